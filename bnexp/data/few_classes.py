"""Batches of few classes: how an epoch's images are dealt so that at most k classes meet in a batch."""

import math
from collections.abc import Iterator, Sequence

from bnexp.errors import UserError


def check_classes(k: int, counts: Sequence[int], batch_size: int) -> None:
    """Raise :class:`UserError` unless :func:`deal` can keep to ``k`` classes per batch; ``counts`` per class."""
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
            f"{given}: an epoch of {num_batches} full batches is too short to share out {num_classes} classes, "
            f"some batch would need more of them; use batch_size={able} or less, or classes_per_batch={enough} or more"
        )


def deal(counts: Sequence[int], sizes: Sequence[int], k: int, luck: Sequence[Sequence[float]]) -> Iterator[dict]:
    """How many images of which class each batch gets: dicts of class and number, the numbers add up to ``sizes``.

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
        parts = _deal_one(left, classes, size, len(sizes) - i, k, race)
        for c, count in parts.items():
            left[c] -= count
        yield parts


def _deal_one(
    left: Sequence[int], classes: list[int], size: int, num_batches: int, k: int, race: dict[int, float]
) -> dict[int, int]:
    """The parts of the first of ``num_batches`` batches that the images ``left`` of ``classes`` are to fill."""
    if k == 1:
        able = [c for c in classes if left[c] >= size]
        if able:
            return {min(able, key=race.__getitem__): size}
        k = 1 - (1 - len(classes)) // num_batches
    parts = {}
    # Later batches can finish k - 1 classes each, and one more at the end: what is above that is finished now.
    num_finished = len(classes) - ((k - 1) * (num_batches - 1) + 1)
    if num_finished > 0:
        # Neighbours in size, from the rarest up, until they fill the batch. The rarer ones of them fit in, because
        # they are among the neighbours before, which did not fill it.
        windows = (classes[i : i + k] for i in range(max(1, len(classes) - k + 1)))
        chosen = next(window for window in windows if sum(left[c] for c in window) >= size)
        parts = {c: left[c] for c in chosen[:num_finished]}
    else:
        total = rest = sum(left[c] for c in classes)
        always = []
        for c in reversed(classes):
            if left[c] * (k - len(always)) < rest:
                break
            always.append(c)
            rest -= left[c]
        others = sorted((c for c in classes if c not in always), key=race.__getitem__)[: k - len(always)]
        chosen = sorted(always + others, key=left.__getitem__)
        if sum(left[c] for c in chosen) >= size:
            parts = {c: size * left[c] // total for c in always}
        else:
            chosen = classes[-k:]
    return _fill_up(parts, left, chosen, size)


def _fill_up(parts: dict[int, int], left: Sequence[int], chosen: list[int], size: int) -> dict[int, int]:
    """``parts`` and as much of the other ``chosen`` classes, the rarest first, as makes ``size``, evenly."""
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
