"""Are the running statistics those of the training images, and is every channel of a norm still alive?"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bnexp.probes.layers import tracking_norms
from bnexp.probes.population import recompute_statistics, shadow, spread, training_batches
from bnexp.store.readings import Reading, Scalar
from bnexp.train.probe import Probe
from bnexp.train.run import Run

SMALL_SCALE = 1e-3  # a channel with a smaller |gamma| says next to nothing
SMALL_VARIANCE = 1e-8  # an input with less is a constant: a thousandth of the usual eps


class Statistics(Probe):
    """Per norm with running statistics, against those of about ``images`` training images, recomputed
    (:func:`~bnexp.probes.population.recompute_statistics`, Wu & Johnson 2021, arXiv:2105.07576):

        statistics/<layer>/mean_gap     = sqrt(mean_c((running_mean - mean)^2 / (var + eps)))     in standard deviations
        statistics/<layer>/variance_gap = mean_c |ln((running_var + eps) / (var + eps))|
        statistics/<layer>/gamma_min    = min_c |gamma|
        statistics/<layer>/dead         = number of channels c with |gamma| < 1e-3 or var < 1e-8

    mean and var are the recomputed ones of every channel c, eps the norm's own, because the norm divides by
    sqrt(var + eps). Without gamma (``norm.affine=false``) it counts as 1.

    ``accuracy/valid_running`` and ``accuracy/valid_recomputed`` are accuracies in evaluation mode over the same
    validation images, at most ``images``, with the one and the other. A model whose norms keep no running statistics
    yields nothing.
    """

    def __init__(self, every: int = 2000, images: int = 1024) -> None:
        super().__init__(every)
        self.images = self.at_least("images", images, 2, "images that stand for the population")

    @torch.no_grad()
    def look(self, run: Run, before: object) -> Iterator[Reading]:
        if not tracking_norms(run.model):
            return
        running = shadow(run)
        recomputed = copy.deepcopy(running)
        recompute_statistics(recomputed, training_batches(run, self.images), run.forward)
        others = tracking_norms(recomputed)
        names, numbers = [], []
        for name, norm in tracking_norms(running).items():
            found = compare(norm, others[name])
            names += [f"statistics/{name}/{what}" for what in found]
            numbers += found.values()
        for tag, value in zip(names, torch.stack(numbers).tolist(), strict=True):
            yield Scalar(tag, value)
        valid = spread(run.dataset.valid, self.images)
        if len(valid):
            for kind, model in (("running", running), ("recomputed", recomputed)):
                yield Scalar(f"accuracy/valid_{kind}", run.evaluate(valid, model.eval())[1])


def compare(norm: nn.Module, recomputed: nn.Module) -> dict[str, Tensor]:
    """What the running statistics of ``norm`` say beside the recomputed ones; numbers in float64, on the device."""
    mean, var = recomputed.running_mean.double(), recomputed.running_var.double()
    gap, ratio = norm.running_mean - mean, (norm.running_var + norm.eps) / (var + norm.eps)
    gamma = torch.ones_like(var) if norm.weight is None else norm.weight.double().abs()
    return {
        "mean_gap": (gap.square() / (var + norm.eps)).mean().sqrt(),
        "variance_gap": ratio.log().abs().mean(),
        "gamma_min": gamma.min(),
        "dead": ((gamma < SMALL_SCALE) | (var < SMALL_VARIANCE)).sum().double(),
    }
