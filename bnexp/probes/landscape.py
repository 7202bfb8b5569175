"""The loss landscape along the gradient: loss and gradient at some distances from the weights."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from bnexp.data.dataset import Split
from bnexp.probes.population import shadow, some_images
from bnexp.store.readings import Reading, Scalar
from bnexp.train.device import forked_rng
from bnexp.train.probe import Probe
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

    **Comparing networks.** Compare at equal ``landscape/loss``, because a network on a plateau has a smooth
    neighbourhood. All numbers but the relative change depend on the scale of the weights, which is arbitrary in a
    normalized network: if c w computes the same as w, its gradient is 1 / c and its smoothness 1 / c^2 of that of w
    (van Laarhoven 2017, arXiv:1706.05350; Dinh et al. 2017, arXiv:1703.04933). The relative change has no unit. Since
    |w_k - w| = k lr |g|, it is the largest k lr beta_k, where beta_k is the smoothness at k; plain gradient descent is
    stable along g while lr beta < 2 (Cohen et al. 2021, arXiv:2103.00065). It is the number to compare, with every
    variant at its own best learning rate.

    With Adam and similar optimizers lr is not the length of a step per unit of gradient; ``steps`` are then only
    distances. Running statistics and the draws of dropout are the same at every k.
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
        rate_of = {id(p): float(group["lr"]) for group in run.optimizer.param_groups for p in group["params"]}
        rates = [rate_of.get(id(p), 0.0) for p in run.model.parameters() if p.requires_grad]
        trained = [p for p in model.parameters() if p.requires_grad]
        start = [p.detach().clone() for p in trained]
        losses, changes, distances = [], [], []
        for step in self.steps:
            with torch.no_grad():
                for p, w, g, rate in zip(trained, start, gradient, rates, strict=True):
                    p.copy_(w - step * rate * g)
                distances.append(get_total_norm([p - w for p, w in zip(trained, start, strict=True)]))
            there, changed = loss_and_gradient(run, model, batch)
            losses.append(there)
            changes.append(get_total_norm([a - b for a, b in zip(changed, gradient, strict=True)]))
        losses, changes, distances = map(torch.stack, (losses, changes, distances))
        length = get_total_norm(gradient)
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


def loss_and_gradient(run: Run, model: nn.Module, batch: Split) -> tuple[Tensor, Sequence[Tensor]]:
    """The mean loss of the batch and its gradient by every trained parameter; the model's buffers do not change.

    With fp16 the loss is scaled, because small gradients would become 0.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    scale = run.scaler.get_scale()
    trained = [p for p in model.parameters() if p.requires_grad]
    with forked_rng(run.device):
        loss = F.cross_entropy(run.forward(run.dataset.prepare(batch.images), model), batch.labels)
    gradient = torch.autograd.grad(loss * scale, trained, materialize_grads=True)  # zeros where there is none
    with torch.no_grad():
        for buffer, kept in buffers:
            buffer.copy_(kept)
    return loss.detach(), [g / scale for g in gradient]
