"""Dead units: channels or units behind an activation that put out one value, whatever the image."""

import torch
from torch import Tensor, nn

from bnexp.data.dataset import Split
from bnexp.norms.base import Norm, contract_of
from bnexp.probes.layers import tapped
from bnexp.train.run import Run

SPANS = {"sigmoid": 1.0, "tanh": 2.0}  # of the outputs, where they are bounded
SAME = 1e-3  # a smaller share of the span is no difference: the unit is saturated


def evaluate_units(run: Run, split: Split, model: nn.Module) -> tuple[tuple[float, float], dict[str, tuple[int, int]]]:
    """:meth:`Run.evaluate` for ``model``, and by layer the number of dead units and of all units.

    The layers are the norms and what stands in their place. A unit is dead if the largest and the smallest of its
    outputs over the images and pixels of ``split``, after the activation, are the same: with relu it never fires. With
    sigmoid and tanh they may differ by a thousandth of the activation's span.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, Norm) or contract_of(m).normalizes}
    ends: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, _: Tensor, output: Tensor) -> None:
        if isinstance(output, Tensor) and output.dim() > 1:
            low, high = output.detach().transpose(0, 1).flatten(1).aminmax(dim=1)
            before = ends.get(name, (low, high))
            ends[name] = torch.minimum(before[0], low), torch.maximum(before[1], high)

    with tapped(norms, see):
        score = run.evaluate(split, model)
    found = {}
    for name, (low, high) in ends.items():
        least = SAME * SPANS.get(contract_of(norms[name]).activation, 0.0)
        found[name] = int((high - low <= least).sum()), len(low)
    return score, found
