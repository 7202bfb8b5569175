"""Running statistics against those of the training images, unscaled channels of norms, and dead units."""

import copy
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnexp.data.dataset import Split
from bnexp.norms.base import contract_of
from bnexp.probes.dead import evaluate_units
from bnexp.probes.layers import tracking_norms
from bnexp.probes.population import recompute_statistics, shadow, some_of, training_batches, whole_batch
from bnexp.store.readings import Reading, Scalar, Table
from bnexp.train.probe import Probe
from bnexp.train.run import Run, shuffled

SMALL_SCALE = 1e-3  # a channel with a smaller |gamma| is unscaled
SMALL_VARIANCE = 1e-8  # a channel with a smaller variance, a thousandth of the usual eps, has a constant input
GAPS = ("mean_gap", "variance_gap", "gamma_min", "unscaled")  # see Statistics
RANGES = ("running_mean", "running_var", "population_mean", "population_var", "gamma", "beta")  # over channels
NORM_HEAD = ("layer", "channels", *RANGES, *GAPS, "dead_units")
TENSORS = {"running_mean": "running_mean", "running_var": "running_var", "weight": "gamma", "bias": "beta"}


class Statistics(Probe):
    """Compares the running statistics of every norm with those recomputed from about ``images`` training images:

        statistics/<layer>/mean_gap     = sqrt(mean_c((running_mean - mean)^2 / (var + eps)))     in standard deviations
        statistics/<layer>/variance_gap = mean_c |ln((running_var + eps) / (var + eps))|
        statistics/<layer>/gamma_min    = min_c |gamma|
        statistics/<layer>/unscaled     = number of channels c with |gamma| < 1e-3 or var < 1e-8
        statistics/<layer>/dead_units   = number of units with a constant output (:func:`evaluate_units`)

    mean and var are the recomputed statistics of channel c (:func:`~bnexp.probes.population.recompute_statistics`, Wu &
    Johnson 2021, arXiv:2105.07576), eps is the norm's, and gamma is 1 with ``norm.affine=false``.

    ``accuracy/valid_running`` and ``accuracy/valid_recomputed`` are accuracies in evaluation mode over the same
    validation images, at most ``images``, with running and with recomputed statistics. A model whose norms keep no
    running statistics has readings of dead units only, over the same images, or training images if there are none.
    """

    def __init__(self, every: int = 2000, images: int = 1024) -> None:
        super().__init__(every)
        self.images = self.at_least("images", images, 2, "training images for the statistics")

    @torch.no_grad()
    def look(self, run: Run, before: object) -> Iterator[Reading]:
        running, valid = shadow(run).eval(), some_of(run.dataset.valid, self.images)
        split = valid if len(valid) else some_of(run.dataset.train, self.images)
        (_, accuracy), dead = evaluate_units(run, split, running)
        for name, (count, _) in dead.items():
            yield Scalar(f"statistics/{name}/dead_units", float(count))
        if not tracking_norms(run.model):
            return
        recomputed = recomputed_model(run, self.images)
        for norm in norm_table(running, recomputed, dead).records():
            if norm["mean_gap"] is not None:
                for name in GAPS:
                    yield Scalar(f"statistics/{norm['layer']}/{name}", float(norm[name]))
        if len(valid):
            yield Scalar("accuracy/valid_running", accuracy)
            yield Scalar("accuracy/valid_recomputed", run.evaluate(valid, recomputed)[1])


def recomputed_model(run: Run, num_images: int) -> nn.Module:
    """A copy of the run's model in evaluation mode, with statistics recomputed from about ``num_images`` images."""
    model = shadow(run).eval()
    recompute_statistics(model, training_batches(run, num_images), run.forward)
    return model


def compare_statistics(norm: nn.Module, recomputed: nn.Module) -> dict[str, Tensor]:
    """The numbers of :class:`Statistics` for a norm and the same norm ``recomputed``, in float64, on the device."""
    mean, var = recomputed.running_mean.double(), recomputed.running_var.double()
    gap, ratio = norm.running_mean - mean, (norm.running_var + norm.eps) / (var + norm.eps)
    gamma = torch.ones_like(var) if norm.weight is None else norm.weight.double().abs()
    return {
        "mean_gap": (gap.square() / (var + norm.eps)).mean().sqrt(),
        "variance_gap": ratio.log().abs().mean(),
        "gamma_min": gamma.min(),
        "unscaled": ((gamma < SMALL_SCALE) | (var < SMALL_VARIANCE)).sum().double(),
    }


@torch.no_grad()
def norm_table(model: nn.Module, recomputed: nn.Module, dead: Mapping[str, tuple[int, int]]) -> Table:
    """The table ``norms``: a row for every layer in ``dead`` and every norm that has statistics, gamma or beta.

    Statistics, gamma and beta are (smallest, largest) over channels, NaN if one is NaN. The gaps and ``unscaled`` are
    those of :class:`Statistics`, ``dead`` of :func:`evaluate_units`. A cell is None if the norm lacks the number.
    """
    others, rows = tracking_norms(recomputed), []
    for name, norm in model.named_modules():
        tensors = {TENSORS[key]: value for key, value in norm.state_dict().items() if key in TENSORS}
        if name not in dead and not (tensors and (name in others or contract_of(norm).normalizes)):
            continue
        count, num_units = dead.get(name, (None, None))
        row = {"layer": name, "channels": num_units or len(next(iter(tensors.values()))), "dead_units": count}
        if name in others:
            tensors |= {"population_mean": others[name].running_mean, "population_var": others[name].running_var}
            row |= {key: float(value) for key, value in compare_statistics(norm, others[name]).items()}
            row["unscaled"] = round(row["unscaled"])
        row |= {key: tuple(float(end) for end in value.double().aminmax()) for key, value in tensors.items()}
        rows.append(tuple(row.get(column) for column in NORM_HEAD))
    return Table("norms", NORM_HEAD, tuple(rows))


@torch.no_grad()
def score_by_statistics(
    run: Run, split: Split, model: nn.Module, recomputed: nn.Module, running: tuple[float, float]
) -> Table:
    """The table ``scores``: mean loss (nats) and accuracy over ``split``, a row for every kind of statistics.

    ``running`` is the result of :meth:`Run.evaluate`. Models with running statistics also have ``recomputed``, and
    ``batch``, in which batches of the run's size are normalized by their own statistics.
    """
    scores = {"running": running}
    if tracking_norms(model):
        scores["recomputed"] = run.evaluate(split, recomputed)
        batches = shuffled_batches(len(split), whole_batch(run)).to(run.device)
        scores["batch"] = score_by_batch(run, split, model, batches)
    return Table("scores", ("statistics", "loss", "accuracy"), tuple((name, *each) for name, each in scores.items()))


def score_by_batch(run: Run, split: Split, model: nn.Module, batches: Tensor) -> tuple[float, float]:
    """Mean loss (nats) and accuracy when the images at ``batches`` (batches, B) are normalized by batch statistics.

    Norms with running statistics are in training mode; everything else, dropout for example, is in evaluation mode.
    The buffers are restored after every batch, because some norms use them in training.
    """
    model = copy.deepcopy(model).eval()
    for norm in tracking_norms(model).values():
        norm.train()
    kept, logits = [(buffer, buffer.clone()) for buffer in model.buffers()], []
    for picked in batches:
        logits.append(run.forward(run.dataset.prepare(split.images_at(picked)), model))
        for buffer, before in kept:
            buffer.copy_(before)
    labels = split.labels[batches.flatten()[: len(split)]]
    found = torch.cat(logits)[: len(split)].double()
    return float(F.cross_entropy(found, labels)), float((found.argmax(1) == labels).double().mean())


def shuffled_batches(num_images: int, batch_size: int) -> Tensor:
    """Indices (batches, batch_size) of all images, shuffled (files may be sorted by class) and always the same.

    Every image is once among the first ``num_images`` indices. The last batch is filled with images of the first,
    because a short batch would have other statistics, and some norms refuse it.
    """
    order = shuffled(num_images, torch.device("cpu"))
    num_batches = -(-num_images // batch_size)
    return order[torch.arange(num_batches * batch_size) % num_images].view(num_batches, batch_size)
