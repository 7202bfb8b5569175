"""How far the gradient can be trusted: the loss and the gradient at some distance along it."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnexp.data.dataset import Split
from bnexp.probes.population import norm_of, shadow, some_images
from bnexp.store.readings import Reading, Scalar
from bnexp.train.probe import Probe, same_chance
from bnexp.train.run import Run


class Landscape(Probe):
    """Santurkar, Tsipras, Ilyas & Madry, "How Does Batch Normalization Help Optimization?", 2018 (arXiv:1805.11604),
    figure 4, on one fixed batch of ``images`` training images, in training mode.

    With the loss L (nats) and its gradient g at the weights w, and for every k of ``steps`` the loss L_k and the
    gradient g_k at w_k = w - k lr g, where lr is the learning rate that the step used::

        landscape/loss            = L
        landscape/loss_range      = max_k L_k - min_k L_k                 figure 4a
        landscape/gradient        = |g|
        landscape/gradient_change = max_k |g_k - g|                       figure 4b
        landscape/smoothness      = max_k |g_k - g| / |w_k - w|           figure 4c, the effective beta-smoothness
        landscape/gradient_change_relative = max_k |g_k - g| / |g|

    **Comparing networks.** Do it at equal ``landscape/loss``: a network that sits on a plateau has a smooth view. The
    first four depend on the scale of the weights, which a normalized network is free to choose: if c w computes what
    w does, its gradient is 1 / c and its smoothness 1 / c^2 of that of w (van Laarhoven 2017, arXiv:1706.05350;
    Dinh et al. 2017, arXiv:1703.04933). The relative change has no unit, neither of the weights nor of the loss.
    Since |w_k - w| = k lr |g| it is the largest k lr beta_k, the smoothness beta_k met at k in units of the steps
    that the optimizer takes: plain gradient descent is stable along g while lr beta < 2 (Cohen et al. 2021,
    arXiv:2103.00065). Each variant at its own best learning rate, this is the number to compare.

    Under Adam and its kin lr is not the length of a step per unit of gradient; then ``steps`` are distances to look at
    and nothing more. Running statistics, and what dropout draws, are the same at every k.
    """

    def __init__(self, every: int = 1000, images: int = 64, steps: Sequence[float] = (0.5, 1.0, 2.0, 4.0)) -> None:
        super().__init__(every)
        self.images = self.at_least("images", images, 2, "images that make a batch")
        if len(steps) < 2 or not all(0 < step < float("inf") for step in steps):
            raise self.refusal("steps", list(steps), "multiples of the learning rate; give two or more, all above 0")
        self.steps = tuple(steps)

    def look(self, run: Run, before: object) -> Iterator[Reading]:
        model, batch = shadow(run), some_images(run, self.images, of="train")
        loss, gradient = loss_and_gradient(run, model, batch)
        rates = learning_rates(run)
        start = [p.detach().clone() for p in model.parameters()]
        losses, changes, distances = [], [], []
        for step in self.steps:
            with torch.no_grad():
                for p, w, g, rate in zip(model.parameters(), start, gradient, rates, strict=True):
                    p.copy_(w - step * rate * g)
                distances.append(norm_of(p - w for p, w in zip(model.parameters(), start, strict=True)))
            there, changed = loss_and_gradient(run, model, batch)
            losses.append(there)
            changes.append(norm_of(a - b for a, b in zip(changed, gradient, strict=True)))
        losses, changes, distances = map(torch.stack, (losses, changes, distances))
        length = norm_of(gradient)
        readings = {
            "loss": loss,
            "loss_range": losses.max() - losses.min(),
            "gradient": length,
            "gradient_change": changes.max(),
            "gradient_change_relative": changes.max() / length,
            "smoothness": (changes / distances).max(),
        }
        for name, value in zip(readings, torch.stack(list(readings.values())).tolist(), strict=True):
            yield Scalar(f"landscape/{name}", value)


def loss_and_gradient(run: Run, model: nn.Module, batch: Split) -> tuple[Tensor, list[Tensor]]:
    """The mean loss of the batch and its gradient by every parameter, zeros where there is none.

    Leaves the model's buffers as they are. fp16 needs its loss scaled, or small gradients would vanish.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    scale = run.scaler.get_scale()
    trained = [p for p in model.parameters() if p.requires_grad]
    with same_chance(run):
        loss = F.cross_entropy(run.forward(run.dataset.prepare(batch.images), model), batch.labels)
    found = torch.autograd.grad(loss * scale, trained, allow_unused=True)
    gradients = iter(torch.zeros_like(p) if g is None else g / scale for p, g in zip(trained, found, strict=True))
    with torch.no_grad():
        for buffer, kept in buffers:
            buffer.copy_(kept)
    return loss.detach(), [next(gradients) if p.requires_grad else torch.zeros_like(p) for p in model.parameters()]


def learning_rates(run: Run) -> list[float]:
    """That of every parameter, 0 for those that are not trained."""
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    return [float(rates.get(id(p), 0.0)) for p in run.model.parameters()]
