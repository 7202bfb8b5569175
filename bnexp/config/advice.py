"""What somebody should be told before training rather than find out after: settings of norms that cannot work well.

Nothing here is an error. Each sentence names the setting and a number that says how bad it is, and what to do.
"""

import inspect
import math
from bisect import bisect_left

from torch import nn

from bnexp.norms.base import BatchNormBase
from bnexp.norms.renorm import BatchRenorm

MOST_LEFT = 0.05  # of the running statistics' initial value at the end of training
FEWEST_EXAMPLES = 8  # per statistic; they know a variance to about 53%
MOST_MOMENTUM = 0.5  # from there on a batch weighs more than all before it
USUAL_MOMENTUM = 0.1
LONGEST = 10**9  # steps; who needs more is not advised to train longer


def advice(model: nn.Module, *, num_steps: int, batch_size: int) -> list[str]:
    """One sentence for every problem that training ``model`` for ``num_steps`` batches of ``batch_size`` would have.

    * Running statistics that keep more than 5% of their initial value, which is no statistic of any data, so that
      evaluation normalizes by something else than training: :meth:`BatchNormBase.share_left`.
    * Statistics of fewer than 8 examples (``batch_size``, or ``virtual_batch`` where the norm has blocks). The
      variance of n independent normal values has the relative standard error sqrt(2 / (n - 1)), 82% for n = 4. The
      pixels of an image add values but are not independent of each other. Batch renormalization is left out, as it
      corrects for that; a batch of one image is no advice but an error, elsewhere.
    * A weight of the new batch above 1/2, as if it were the weight of the old average: 0.9 in TensorFlow is 0.1 in
      torch and here.

    The same sentence for several layers is said once, with their number and the first one's name, in the order of
    ``model.named_modules()``. Nothing to say is an empty list, as for the defaults from 29 steps on. Norms are
    those of bnexp that use statistics of the batch; others, group normalization among them, need no advice.
    """
    names: dict[str, list[str]] = {}
    for name, norm in model.named_modules():
        if isinstance(norm, BatchNormBase):
            for sentence in (_memory(norm, num_steps), _noise(norm, batch_size), _convention(norm)):
                if sentence:
                    names.setdefault(sentence, []).append(name or "the model")
    return [f"{sentence} ({_layers(where)})" for sentence, where in names.items()]


def _layers(names: list[str]) -> str:
    return f"{len(names)} layers, the first is {names[0]}" if len(names) > 1 else f"1 layer, {names[0]}"


def _weight(norm: BatchNormBase, momentum: float) -> str:
    """``norm.momentum=0.1`` as one would set it, in both conventions where the norm takes either."""
    options = inspect.signature(type(norm)).parameters
    key = "renorm_momentum" if "renorm_momentum" in options else "momentum"
    decay = f" (norm.decay={1 - momentum:.6g})" if "decay" in options else ""
    return f"norm.{key}={momentum:.6g}{decay}"


def _memory(norm: BatchNormBase, num_steps: int) -> str:
    """Running statistics that the planned steps cannot move."""
    share = norm.share_left(num_steps)
    if share <= MOST_LEFT or norm.momentum is None:  # which forgets with the first batch
        return ""
    remedies = []
    enough = math.ceil(100 * (1 - MOST_LEFT ** (1 / max(num_steps, 1)))) / 100
    if enough <= MOST_MOMENTUM:
        remedies.append(f"use {_weight(norm, max(enough, USUAL_MOMENTUM))}")
    if longer := _steps_to_forget(norm):
        remedies.append(f"train for {longer:,} steps or more")
    if getattr(norm, "zero_debias", False):  # which corrects what starts at zero, and the mean always does
        remedies.append("set norm.running_var_init=0")
    elif not getattr(norm, "decay_warmup", False):
        remedies.append("let norm.momentum=null average all batches")
    return (
        f"{_weight(norm, norm.momentum)}: after the planned {num_steps:,} steps the running statistics still hold "
        f"{share:.0%} of their initial value, so evaluation will not see what training saw; {_either(remedies)}"
    )


def _steps_to_forget(norm: BatchNormBase) -> int:
    """After how many batches little enough of the initial value is left, 0 if that takes forever."""
    enough = 1  # by doubling, because a norm may take as long to tell as there are batches
    while norm.share_left(enough) > MOST_LEFT:
        enough *= 2
        if enough > LONGEST:
            return 0
    return bisect_left(range(enough), True, key=lambda n: norm.share_left(n) <= MOST_LEFT)


def _noise(norm: BatchNormBase, batch_size: int) -> str:
    """Statistics of so few examples that they are mostly chance."""
    block = getattr(norm, "virtual_batch", None)
    num_examples = block or batch_size
    if batch_size == 1 or num_examples >= FEWEST_EXAMPLES or isinstance(norm, BatchRenorm):
        return ""
    if num_examples == 1:
        says = "every statistic is of 1 image, which knows nothing of how images vary"
    else:
        error = math.sqrt(2 / (num_examples - 1))
        says = f"every statistic is an average over {num_examples} images, which knows a variance to about {error:.0%}"
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


def _convention(norm: BatchNormBase) -> str:
    """The weight of the new batch where that of the old average was probably meant."""
    momentum = norm.momentum
    if momentum is None or momentum <= MOST_MOMENTUM or not norm.track_running_stats:
        return ""
    meant = 1 - momentum if momentum < 1 else USUAL_MOMENTUM
    return (
        f"{_weight(norm, momentum)}: every batch replaces {momentum:.0%} of the running statistics, so evaluation "
        f"hangs on the last few batches; momentum is the weight of the new batch here, as in torch, and TensorFlow's "
        f"is the weight of the old average, so probably {_weight(norm, meant)} was meant"
    )


def _either(remedies: list[str]) -> str:
    """``a, b or c``."""
    *first, last = remedies
    return f"{', '.join(first)} or {last}" if first else last
