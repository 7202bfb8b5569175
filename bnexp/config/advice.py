"""Warnings before training about settings of norms: each names the setting, a number for the harm, and a remedy."""

import math
from bisect import bisect_left

from torch import nn

from bnexp.norms.base import BatchNormBase

MOST_LEFT = 0.05  # share of the running statistics' initial value that may be left at the end of training
FEWEST_EXAMPLES = 8  # per statistic; a variance of 8 values has a relative standard error of 53%
MOST_MOMENTUM = 0.5  # above it a batch weighs more than all batches before it
USUAL_MOMENTUM = 0.1
LONGEST = 10**9  # steps; longer training is not proposed


def advice(model: nn.Module, *, num_steps: int, batch_size: int) -> list[str]:
    """One sentence per problem of training ``model`` for ``num_steps`` batches of ``batch_size`` images.

    * Running statistics keep more than 5% of their initial value (:meth:`~bnexp.norms.base.Norm.share_left`), so
      evaluation normalizes by something else than training. With the default momentum 29 steps are enough.
    * A statistic is of fewer than 8 examples (``batch_size``, or ``virtual_batch`` if the norm has blocks). The
      variance of n independent normal values has the relative standard error sqrt(2 / (n - 1)), 82% for n = 4. The
      pixels of an image add values but are not independent. Norms made for small batches correct for this; a batch
      of one image is an error elsewhere.
    * A weight of the new batch above 1/2 is probably the weight of the old average: 0.9 in TensorFlow is 0.1 in torch
      and here.

    Layers with the same problem share a sentence. Only batch norms of bnexp are checked.
    """
    names: dict[str, list[str]] = {}
    for name, norm in model.named_modules():
        if isinstance(norm, BatchNormBase):
            problems = _slow_statistics(norm, num_steps), _noisy_statistics(norm, batch_size), _swapped_momentum(norm)
            for sentence in filter(None, problems):
                names.setdefault(sentence, []).append(name or "the model")
    return [f"{sentence} ({_count_layers(where)})" for sentence, where in names.items()]


def _count_layers(names: list[str]) -> str:
    return f"{len(names)} layers, the first is {names[0]}" if len(names) > 1 else f"1 layer, {names[0]}"


def _slow_statistics(norm: BatchNormBase, num_steps: int) -> str:
    """The sentence for running statistics that keep too much of their initial value."""
    share = norm.share_left(num_steps)
    if share <= MOST_LEFT or norm.momentum is None:  # a cumulative average keeps nothing of it
        return ""
    remedies = []
    enough = math.ceil(100 * (1 - MOST_LEFT ** (1 / max(num_steps, 1)))) / 100
    if enough <= MOST_MOMENTUM:
        remedies.append(f"use {norm.momentum_setting(max(enough, USUAL_MOMENTUM))}")
    if longer := _steps_to_forget(norm):
        remedies.append(f"train for {longer:,} steps or more")
    remedies += norm.ways_to_forget()
    return (
        f"{norm.momentum_setting(norm.momentum)}: after the planned {num_steps:,} steps the running statistics still "
        f"hold {share:.0%} of their initial value, so evaluation normalizes by other values than training; "
        f"{_either(remedies)}"
    )


def _steps_to_forget(norm: BatchNormBase) -> int:
    """The number of batches after which at most 5% of the initial value is left, 0 if it is above 10**9."""
    enough = 1  # doubled, because the time that share_left takes may grow with the number of batches
    while norm.share_left(enough) > MOST_LEFT:
        enough *= 2
        if enough > LONGEST:
            return 0
    return bisect_left(range(enough), True, key=lambda n: norm.share_left(n) <= MOST_LEFT)


def _noisy_statistics(norm: BatchNormBase, batch_size: int) -> str:
    """The sentence for statistics of too few examples."""
    block = norm.virtual_batch
    num_examples = block or batch_size
    if batch_size == 1 or num_examples >= FEWEST_EXAMPLES or norm.made_for_small_batches:
        return ""
    if num_examples == 1:
        says = "every statistic is of 1 image, which says nothing about how images vary"
    else:
        error = math.sqrt(2 / (num_examples - 1))
        says = f"every statistic is an average over {num_examples} images, which gives a variance to about {error:.0%}"
    if block is None:
        given = f"batch_size={batch_size}"
        remedies = [f"use {FEWEST_EXAMPLES} or more images", "norm=renorm, which is made for small batches"]
    else:
        given = f"norm.virtual_batch={block}"
        able = next((n for n in range(FEWEST_EXAMPLES, batch_size + 1) if batch_size % n == 0), None)
        larger = f"batch_size={FEWEST_EXAMPLES} and " if able is None else ""
        remedies = [f"use {larger}norm.virtual_batch={able or FEWEST_EXAMPLES}"]
    remedies.append("norm=group, which does not depend on the batch")
    return f"{given}: {says}; {_either(remedies)}"


def _swapped_momentum(norm: BatchNormBase) -> str:
    """The sentence for a momentum that is probably the weight of the old average."""
    momentum = norm.momentum
    if momentum is None or momentum <= MOST_MOMENTUM or not norm.track_running_stats:
        return ""
    meant = 1 - momentum if momentum < 1 else USUAL_MOMENTUM
    return (
        f"{norm.momentum_setting(momentum)}: every batch replaces {momentum:.0%} of the running statistics, so "
        "evaluation depends on the last few batches; momentum is the weight of the new batch here, as in torch, and of "
        f"the old average in TensorFlow, so probably {norm.momentum_setting(meant)} was meant"
    )


def _either(remedies: list[str]) -> str:
    """``a, b or c``."""
    *first, last = remedies
    return f"{', '.join(first)} or {last}" if first else last
