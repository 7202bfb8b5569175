"""Batches of few classes: the order of an epoch in which at most k classes meet in a batch."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bnexp.errors import UserError


def check_classes(k: int, counts: Sequence[int], batch_size: int) -> None:
    """Raise :class:`UserError` unless batches can have ``k`` classes each; ``counts`` are the images per class."""
    num_classes, largest, num_batches = sum(n > 0 for n in counts), max(counts), sum(counts) // batch_size
    given = f"classes_per_batch={k}"
    if type(k) is not int or k < 1:
        raise UserError(f"{given}: not a number of classes; give 1 to {num_classes}, or null to draw from all images")
    if k > num_classes:
        raise UserError(
            f"{given}: the training images have {num_classes} classes; give {num_classes} or less, "
            "or null to draw from all images"
        )
    enough = 1 - (1 - num_classes) // num_batches if num_batches else num_classes
    if k == 1 < num_classes and largest < batch_size:
        raise UserError(
            f"{given}: no class fills a batch of {batch_size}, the largest has {largest} images; "
            f"use batch_size={largest} or less, or classes_per_batch={enough} or more"
        )
    if 1 < k < num_classes and k < enough:
        able = sum(counts) // -((1 - num_classes) // (k - 1))
        raise UserError(
            f"{given}: an epoch of {num_batches} full batches is too short for {num_classes} classes, "
            f"some batch would need more of them; use batch_size={able} or less, or classes_per_batch={enough} or more"
        )


def order_by_classes(
    order: Tensor, labels: Tensor, counts: Sequence[int], batch_size: int, k: int, generator: torch.Generator
) -> Tensor:
    """``order`` (N,), the images of an epoch, rearranged into batches of few classes; see :func:`deal`.

    Everything lies on the CPU. ``labels`` (N,) are those of all images, ``counts`` the images per class. Full batches
    come in random order and the short one last. The images inside a batch are shuffled.
    """
    num_batches, num_last = divmod(len(order), batch_size)
    sizes = [num_last] * (num_last > 0) + [batch_size] * num_batches  # the short one first: all classes are left
    uniform = torch.rand(len(sizes), len(counts), generator=generator).tolist()
    start_of = [sum(counts[:c]) for c in range(len(counts))]  # of a class in by_class: its next image
    starts, lengths = [], []
    for parts in deal(counts, sizes, k, uniform):
        for c, count in parts.items():
            starts.append(start_of[c])
            lengths.append(count)
            start_of[c] += count
    starts, lengths = (torch.tensor(numbers) for numbers in (starts, lengths))
    shifts = (starts - lengths.cumsum(0) + lengths).repeat_interleave(lengths, output_size=len(order))
    by_class = order[labels[order].argsort(stable=True)]
    dealt = by_class[torch.arange(len(order)) + shifts]
    last, full = dealt[:num_last], dealt[num_last:].view(num_batches, batch_size)
    # Shuffled inside a batch too, because ghost norms split a batch in order.
    full = full[torch.randperm(num_batches, generator=generator)]
    places = torch.rand(full.shape, generator=generator).argsort(stable=True, dim=1)
    last = last[torch.randperm(num_last, generator=generator)]
    return torch.cat([full.gather(1, places).flatten(), last])


def deal(counts: Sequence[int], sizes: Sequence[int], k: int, uniform: Sequence[Sequence[float]]) -> Iterator[dict]:
    """Yield for each batch the number of images that it gets of each class, ``{class: number}``.

    ``counts`` are the images per class, which are all dealt: sum(counts) = sum(sizes). All ``sizes`` are equal, except
    that the first may be smaller. ``uniform`` holds one draw from [0, 1) per batch and class.

    * With k >= 2 **no batch has more than k classes**. With C classes and T batches that needs
      C <= (k - 1) T + 1 (:func:`check_classes`): a batch can use up k - 1 classes and take the rest from one more.
      Parts are even, size / k, except where a class runs out: with classes of one size in about C / (k - 1) batches
      of an epoch. A batch has fewer than k classes where a part would be empty, because a rare class is used up.
    * With k = 1 a batch has one class as long as some class can fill it. Then every class has less than a batch left,
      and these images make **fewer than C mixed batches**, of as few classes as the same rule allows.
    * A class with more than 1 / k of the images is in every batch, by its share; the others divide the rest.
    """
    left = list(counts)
    for i, size in enumerate(sizes):
        classes = sorted((c for c, n in enumerate(left) if n), key=left.__getitem__)  # the rarest first
        # Exponential variables whose rates are the images left: the smallest is a draw in proportion to the rates.
        times = {c: -math.log1p(-uniform[i][c]) / left[c] for c in classes}
        parts = _deal_batch(left, classes, size, len(sizes) - i, k, times)
        for c, count in parts.items():
            left[c] -= count
        yield parts


def _deal_batch(
    left: Sequence[int], classes: list[int], size: int, num_batches: int, k: int, times: dict[int, float]
) -> dict[int, int]:
    """The parts of the next batch, the first of ``num_batches`` that the images ``left`` of ``classes`` fill."""
    if k == 1:
        able = [c for c in classes if left[c] >= size]
        if able:
            return {min(able, key=times.__getitem__): size}
        k = 1 - (1 - len(classes)) // num_batches
    # Later batches can use up k - 1 classes each, and the last one more. The classes beyond that are used up now.
    num_used_up = len(classes) - ((k - 1) * (num_batches - 1) + 1)
    if num_used_up > 0:
        # The rarest k neighbours in size that fill the batch. All but the largest of them fit into it, because the
        # k neighbours before include them and did not fill it.
        windows = (classes[i : i + k] for i in range(max(1, len(classes) - k + 1)))
        chosen = next(window for window in windows if sum(left[c] for c in window) >= size)
        return _fill_up({c: left[c] for c in chosen[:num_used_up]}, left, chosen, size)
    always = _large_classes(left, classes, k)
    others = sorted((c for c in classes if c not in always), key=times.__getitem__)[: k - len(always)]
    chosen = sorted(always + others, key=left.__getitem__)
    if sum(left[c] for c in chosen) < size:
        return _fill_up({}, left, classes[-k:], size)
    total = sum(left[c] for c in classes)
    return _fill_up({c: size * left[c] // total for c in always}, left, chosen, size)


def _large_classes(left: Sequence[int], classes: list[int], k: int) -> list[int]:
    """The classes, largest first, whose share of a batch without the larger ones is an even part or more."""
    large, rest = [], sum(left[c] for c in classes)
    for c in reversed(classes):
        if left[c] * (k - len(large)) < rest:
            break
        large.append(c)
        rest -= left[c]
    return large


def _fill_up(parts: dict[int, int], left: Sequence[int], chosen: list[int], size: int) -> dict[int, int]:
    """``parts`` filled up to ``size`` by even parts of the other ``chosen`` classes, the rarest first."""
    missing = size - sum(parts.values())
    others = [c for c in chosen if c not in parts]
    for i, c in enumerate(others):
        parts[c] = min(left[c], missing // (len(others) - i))
        missing -= parts[c]
    for c in reversed(chosen):
        more = min(missing, left[c] - parts[c])
        parts[c] += more
        missing -= more
    return {c: count for c, count in parts.items() if count}
