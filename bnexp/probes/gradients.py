"""The gradients of a step, layer by layer, and how the step moved and turned the weights."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from bnexp.store.readings import Reading, Scalar
from bnexp.train.probe import Probe
from bnexp.train.run import Run


class Gradients(Probe):
    """The gradient g of every layer's weight w in the last step, and the update of w by that step:

        gradient/<layer>    = |g|                        in nats per unit of w
        update/<layer>      = |w_after - w_before| / |w_before|
        angle/<layer>       = mean over rows of the angle between w_before and w_after, in radians
        equilibrium/<layer> = angle/<layer> / sqrt(2 lr wd)

    and ``gradient/all``, |g| over all parameters together; norms are Euclidean. Many networks train well with updates
    of about 1e-3. If w_before is 0, the update is infinite, or NaN if w_after is 0 too.

    A row holds the weights of one unit or output channel. A norm after the layer undoes the length of a row, so the
    angle is all that a step changes. Weight decay wd shortens rows and gradients lengthen them; in equilibrium a step
    of SGD at the rate lr turns a row by sqrt(2 lr wd), whatever the gradients are (van Laarhoven 2017,
    arXiv:1706.05350; Wan et al. 2021, arXiv:2006.08419, theorem 1; with momentum m by sqrt(2 lr wd / (1 + m))).
    ``equilibrium`` is left out without weight decay.

    ``gradient/growth``, where all chosen weights have one shape, is the factor by which |g|^2 grows from a layer to
    the one before it, the geometric mean over the k chosen layers: (|g_1|^2 / |g_k|^2)^(1 / (k - 1)).

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
        turned = {name: turn(before[name], weight) for name, weight in chosen.items() if weight.dim() > 1}
        values = torch.stack([*norms, *moved, *turned.values()]).tolist()
        tags = [f"gradient/{name}" for name in gradients] + [f"update/{name}" for name in chosen]
        found = dict(zip(tags + [f"angle/{name}" for name in turned], values, strict=True))
        if len(chosen) > 1 and len({weight.shape for weight in chosen.values()}) == 1:
            first, *_, last = norms[:-1].double().square()
            found["gradient/growth"] = float((first / last) ** (1 / (len(chosen) - 1)))
        for group in run.optimizer.param_groups:
            if (decay := group.get("weight_decay", 0.0)) > 0 and (rate := float(group["lr"])) > 0:
                names = [name for name in turned if any(chosen[name] is p for p in group["params"])]
                scale = math.sqrt(2 * rate * decay)
                found |= {f"equilibrium/{name}": found[f"angle/{name}"] / scale for name in names}
        for tag, value in found.items():
            yield Scalar(tag, value)


def turn(before: Tensor, after: Tensor) -> Tensor:
    """The mean angle (radians) between the rows of two weights (rows, ...); NaN if a row is 0.

    2 atan2(|u - v|, |u + v|) of unit vectors u and v (Kahan 2006), which keeps small angles that the cosine rounds off.
    """
    u, v = (w.double().flatten(1) / w.double().flatten(1).norm(dim=1, keepdim=True) for w in (before, after))
    return 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1)).mean()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters called weight, by the name of their module."""
    found = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    return {name: weight for name, weight in found.items() if isinstance(weight, Tensor) and weight.requires_grad}
