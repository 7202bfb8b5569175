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
    """The images ``order`` (N,) of an epoch so that every ``batch_size`` in a row are of few classes; see :func:`deal`.

    ``labels`` (N,) are those of all images, ``counts`` the images per class. The short batch comes last, the others
    in random order, and the images inside a batch are shuffled.
    """
    num_batches, num_last = divmod(len(order), batch_size)
    sizes = [num_last] * (num_last > 0) + [batch_size] * num_batches  # the short one first, while all classes are left
    # Dealt on the host: a few milliseconds, and the only time in an epoch that it waits for the device.
    luck = torch.rand(len(sizes), len(counts), generator=generator, device=order.device).tolist()
    start_of = [sum(counts[:c]) for c in range(len(counts))]  # of the next image of each class, class after class
    starts, lengths = [], []
    for parts in deal(counts, sizes, k, luck):
        for c, count in parts.items():
            starts.append(start_of[c])
            lengths.append(count)
            start_of[c] += count
    starts, lengths = (torch.tensor(numbers, device=order.device) for numbers in (starts, lengths))
    shifts = (starts - lengths.cumsum(0) + lengths).repeat_interleave(lengths, output_size=len(order))
    by_class = order[labels[order].argsort(stable=True)]
    dealt = by_class[torch.arange(len(order), device=order.device) + shifts]
    last, full = dealt[:num_last], dealt[num_last:].view(num_batches, batch_size)
    # Shuffled inside a batch too, because ghost norms split a batch in order.
    full = full[torch.randperm(num_batches, generator=generator, device=order.device)]
    places = torch.rand(full.shape, generator=generator, device=order.device).argsort(stable=True, dim=1)
    last = last[torch.randperm(num_last, generator=generator, device=order.device)]
    return torch.cat([full.gather(1, places).flatten(), last])


def deal(counts: Sequence[int], sizes: Sequence[int], k: int, luck: Sequence[Sequence[float]]) -> Iterator[dict]:
    """Yield for each batch how many images of which class it gets, a dict that adds up to its size.

    ``counts`` are the images per class and are all used up: sum(counts) = sum(sizes). ``sizes`` are equal but for
    the first, which may be smaller. ``luck`` is one uniform draw from [0, 1) per batch and class.

    * From k = 2 on **no batch has more than k classes**. With C classes and T batches that takes
      C <= (k - 1) T + 1 (:func:`check_classes`): a batch can use up k - 1 classes and fill up from one more. Parts
      are even, size / k, but where a class runs out: with classes of one size in about C / (k - 1) batches of an
      epoch. Fewer than k classes meet where a part would be nothing: rare classes are soon used up.
    * With k = 1 batches are pure as long as a class can fill one. What is then left, less than a batch of every
      class, makes **fewer than C mixed batches**, of as few classes as the same rule allows.
    * A class with more than 1 / k of the images is in every batch, by its share; the others divide the rest.
    """
    left = list(counts)
    for i, size in enumerate(sizes):
        classes = sorted((c for c, n in enumerate(left) if n), key=left.__getitem__)  # the rarest first
        # Smallest first is a draw in proportion to the images left: exponential variables with these as their rates.
        race = {c: -math.log1p(-luck[i][c]) / left[c] for c in classes}
        parts = _deal_batch(left, classes, size, len(sizes) - i, k, race)
        for c, count in parts.items():
            left[c] -= count
        yield parts


def _deal_batch(
    left: Sequence[int], classes: list[int], size: int, num_batches: int, k: int, race: dict[int, float]
) -> dict[int, int]:
    """The parts of the next batch, of ``num_batches`` that all images ``left`` of ``classes`` are to fill."""
    if k == 1:
        able = [c for c in classes if left[c] >= size]
        if able:
            return {min(able, key=race.__getitem__): size}
        k = 1 - (1 - len(classes)) // num_batches
    # Later batches can finish k - 1 classes each, and one more at the end: what is above that is finished now.
    num_finished = len(classes) - ((k - 1) * (num_batches - 1) + 1)
    if num_finished > 0:
        # Neighbours in size, from the rarest up, until they fill the batch. The rarer ones of them fit in, because
        # they are among the neighbours before, which did not fill it.
        windows = (classes[i : i + k] for i in range(max(1, len(classes) - k + 1)))
        chosen = next(window for window in windows if sum(left[c] for c in window) >= size)
        return _fill_up({c: left[c] for c in chosen[:num_finished]}, left, chosen, size)
    always = _large_classes(left, classes, k)
    others = sorted((c for c in classes if c not in always), key=race.__getitem__)[: k - len(always)]
    chosen = sorted(always + others, key=left.__getitem__)
    if sum(left[c] for c in chosen) < size:
        return _fill_up({}, left, classes[-k:], size)
    total = sum(left[c] for c in classes)
    return _fill_up({c: size * left[c] // total for c in always}, left, chosen, size)


def _large_classes(left: Sequence[int], classes: list[int], k: int) -> list[int]:
    """The classes that fill a k-th of a batch or more by their share, the largest first, each without those before."""
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
