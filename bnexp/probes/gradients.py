"""The gradients of a step, layer by layer, and the updates of the weights."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from bnexp.store.readings import Reading, Scalar
from bnexp.train.probe import Probe
from bnexp.train.run import Run


class Gradients(Probe):
    """The gradient g of every layer's weight w in the last step, and the update of w by that step:

        gradient/<layer> = |g|                           in nats per unit of w
        update/<layer>   = |w_after - w_before| / |w_before|

    and ``gradient/all``, |g| over all parameters together; norms are Euclidean. Many networks train well with updates
    of about 1e-3. If w_before is 0, the update is infinite, or NaN if w_after is 0 too.

    ``layers`` are modules with a parameter called weight; by default those whose weight has two or more dimensions,
    which are convolutions and dense layers. With fp16 the loss scale is divided out of g; for a step that the scaler
    skips, because gradients overflowed, gradients are NaN and updates 0.
    """

    def __init__(self, every: int = 200, layers: Sequence[str] | None = None) -> None:
        super().__init__(every)
        self.layers = layers

    def check(self, model: nn.Module) -> None:
        self.check_layers(self.layers or (), weights(model), "layer with a trained weight")

    def chosen(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that the probe looks at, by layer."""
        every = weights(model)
        if self.layers is not None:
            return {name: every[name] for name in self.layers}
        return {name: weight for name, weight in every.items() if weight.dim() > 1}

    def before(self, run: Run) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.chosen(run.model).items()}

    @torch.no_grad()
    def look(self, run: Run, before: dict[str, Tensor]) -> Iterator[Reading]:
        chosen = self.chosen(run.model)
        # Gradients are kept until the next step; the scaler or the optimizer has unscaled them in place.
        gradients = {name: [] if weight.grad is None else [weight.grad] for name, weight in chosen.items()}
        gradients["all"] = [p.grad for p in run.model.parameters() if p.grad is not None]
        norms = torch.stack([get_total_norm(each).to(run.device) for each in gradients.values()])
        if run.scaler.is_enabled():
            norms = torch.where(norms[-1].isfinite(), norms, torch.nan)
        moved = [(weight - before[name]).norm() / before[name].norm() for name, weight in chosen.items()]
        values = torch.cat([norms, torch.stack(moved)] if moved else [norms]).tolist()
        tags = [f"gradient/{name}" for name in gradients] + [f"update/{name}" for name in chosen]
        for tag, value in zip(tags, values, strict=True):
            yield Scalar(tag, value)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters called weight, by the name of their module."""
    found = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    return {name: weight for name, weight in found.items() if isinstance(weight, Tensor) and weight.requires_grad}
