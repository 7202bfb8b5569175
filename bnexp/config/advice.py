"""Warnings before training about settings of norms, and initial weights, that cannot work well.

They are no errors. A sentence names the setting, the size of the problem as a number, and what to do.
"""

import math
from bisect import bisect_left

import torch
from torch import nn

from bnexp.models.initialize import Weights, initialize
from bnexp.norms.base import BatchNormBase, contract_of
from bnexp.probes.population import shadow, some_of
from bnexp.train.run import Run

MOST_LEFT = 0.05  # weight of the initial value in the running statistics at the end of training
FEWEST_EXAMPLES = 8  # per statistic: the relative standard error of a variance is then 53%
MOST_MOMENTUM = 0.5  # above it, a batch weighs more than all batches before it together
USUAL_MOMENTUM = 0.1
LONGEST = 10**9  # steps; longer training is never proposed
# Nats. Of MLPs of 2 to 10 layers and LeNet (relu, tanh, sigmoid; torch's and Xavier's weights), the best of SGD at 0.05
# and 0.5 reached over 80% of MNIST in 300 steps from 0.0044 on, and 9% to 44% at 0.0019 and below.
LEAST_SIGNAL = 0.003


def advice(model: nn.Module, *, num_steps: int, batch_size: int) -> list[str]:
    """One sentence per problem of training ``model`` for ``num_steps`` batches of ``batch_size`` images.

    * Running statistics keep more than 5% of their initial value (:meth:`~bnexp.norms.base.Norm.share_left`), which
      does not come from data, so that evaluation and training normalize by different numbers. With the default
      momentum less is left after 29 steps.
    * A statistic is over fewer than 8 examples (``batch_size``, or ``virtual_batch`` if the norm has blocks). The
      variance of n independent normal values has the relative standard error sqrt(2 / (n - 1)), 82% for n = 4. The
      pixels of an image add values, but dependent ones. Norms made for small batches correct for the error; a batch
      of one image is an error of its own.
    * A momentum above 1/2 was probably meant as the weight of the old average: 0.9 in TensorFlow is 0.1 in torch and
      here.

    A sentence that applies to several layers is given once, with their number and the name of the first. The order is
    that of ``model.named_modules()``. Only batch norms of bnexp are examined.
    """
    names: dict[str, list[str]] = {}
    for name, norm in model.named_modules():
        if isinstance(norm, BatchNormBase):
            problems = _slow_statistics(norm, num_steps), _noisy_statistics(norm, batch_size), _swapped_momentum(norm)
            for sentence in filter(None, problems):
                names.setdefault(sentence, []).append(name or "the model")
    return [f"{sentence} ({_count_layers(where)})" for sentence, where in names.items()]


def signal_advice(run: Run, seed: int) -> list[str]:
    """A sentence if no norm is in the model and its first logits hardly depend on the image; it costs a forward pass.

    :func:`signal_of` is compared with 1 nat, because softmax tells images apart by differences of logits alone. A share
    of the logits' size would miss weights that shrink everything alike. Parts of the user's own are left out.
    """
    if run.num_steps or run.own_parts or any(contract_of(module).normalizes for module in run.model.modules()):
        return []
    model = shadow(run).eval()
    if not (signal := signal_of(run, model)) < LEAST_SIGNAL:
        return []
    remedy = "use a norm, or model.activation=relu"
    if weights := getattr(model, "initial_weights", None):
        model.initial_weights = better = Weights("auto", weights.activation)
        initialize(model, torch.Generator(run.device).manual_seed(seed))
        if signal_of(run, model) > LEAST_SIGNAL:
            remedy = f"model.init={better.rule}" + (" model.weight_init_std=null" if weights.std else "")
    found = f"without a norm the logits of two images differ by {signal:.1g} before the first step"
    return [f"{found}, so training begins slowly or not at all; {remedy}"]


@torch.no_grad()
def signal_of(run: Run, model: nn.Module) -> float:
    """The root mean square over classes and pairs of 8 training images of how much their logits differ, in nats."""
    images = some_of(run.dataset.train, 8).images
    return float((2 * run.forward(run.dataset.prepare(images), model).double().var(0).mean()).sqrt())


def _count_layers(names: list[str]) -> str:
    return f"{len(names)} layers, the first is {names[0]}" if len(names) > 1 else f"1 layer, {names[0]}"


def _slow_statistics(norm: BatchNormBase, num_steps: int) -> str:
    """The sentence about running statistics that the planned steps move too little, or an empty one."""
    share = norm.share_left(num_steps)
    if share <= MOST_LEFT or norm.momentum is None:  # the first batch replaces the initial value
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
        f"hold {share:.0%} of their initial value, so evaluation will not normalize as training did; "
        f"{_either(remedies)}"
    )


def _steps_to_forget(norm: BatchNormBase) -> int:
    """The fewest batches after which at most 5% of the initial value are left, 0 if LONGEST are not enough."""
    enough = 1  # doubled, because the time of share_left may be proportional to the number of batches
    while norm.share_left(enough) > MOST_LEFT:
        enough *= 2
        if enough > LONGEST:
            return 0
    return bisect_left(range(enough), True, key=lambda n: norm.share_left(n) <= MOST_LEFT)


def _noisy_statistics(norm: BatchNormBase, batch_size: int) -> str:
    """The sentence about statistics over too few examples, or an empty one."""
    block = norm.virtual_batch
    num_examples = block or batch_size
    if batch_size == 1 or num_examples >= FEWEST_EXAMPLES or norm.made_for_small_batches:
        return ""
    if num_examples == 1:
        problem = "every statistic is over 1 image, which does not show how images vary"
    else:
        error = math.sqrt(2 / (num_examples - 1))
        problem = f"every statistic is over {num_examples} images, so a variance has an error of about {error:.0%}"
    if block is None:
        given = f"batch_size={batch_size}"
        remedies = [f"use {FEWEST_EXAMPLES} or more images", "norm=renorm, which is made for small batches"]
    else:
        given = f"norm.virtual_batch={block}"
        able = next((n for n in range(FEWEST_EXAMPLES, batch_size + 1) if batch_size % n == 0), None)
        larger = f"batch_size={FEWEST_EXAMPLES} and " if able is None else ""
        remedies = [f"use {larger}norm.virtual_batch={able or FEWEST_EXAMPLES}"]
    remedies.append("norm=group, which does not depend on the batch")
    return f"{given}: {problem}; {_either(remedies)}"


def _swapped_momentum(norm: BatchNormBase) -> str:
    """The sentence about a momentum that was probably meant as the weight of the old average, or an empty one."""
    momentum = norm.momentum
    if momentum is None or momentum <= MOST_MOMENTUM or not norm.track_running_stats:
        return ""
    meant = 1 - momentum if momentum < 1 else USUAL_MOMENTUM
    return (
        f"{norm.momentum_setting(momentum)}: every batch replaces {momentum:.0%} of the running statistics, so "
        "evaluation depends on the last few batches only; momentum is the weight of the new batch here, as in torch; "
        f"in TensorFlow it is the weight of the old average, so probably {norm.momentum_setting(meant)} was meant"
    )


def _either(remedies: list[str]) -> str:
    """``a, b or c``."""
    *first, last = remedies
    return f"{', '.join(first)} or {last}" if first else last
