"""What there is to find in a trained model: its norms' statistics, what it gets right and what it confuses."""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnexp.data.dataset import Split
from bnexp.errors import UserError
from bnexp.inspect import featuremaps
from bnexp.probes.layers import Layer, list_layers
from bnexp.probes.population import recompute_statistics, tracking_norms, training_batches
from bnexp.probes.statistics import compare
from bnexp.train.run import EVALUATION_BATCH, Run

MOST_IMAGES = 10_000  # training images that statistics are recomputed from; more of them change little

Range = tuple[float, float]  # the smallest and the largest value over channels


@dataclass(frozen=True)
class NormStatistics:
    """A norm's statistics and parameters, as ranges over its channels; None for what it does not have.

    ``mean_gap``, ``variance_gap`` and ``dead`` are those of :class:`bnexp.probes.statistics.Statistics`.
    """

    layer: str
    channels: int
    running_mean: Range | None = None
    running_var: Range | None = None
    population_mean: Range | None = None
    population_var: Range | None = None
    mean_gap: float | None = None
    variance_gap: float | None = None
    gamma: Range | None = None
    beta: Range | None = None
    dead: int | None = None


@dataclass(frozen=True)
class Score:
    """Mean loss in nats and accuracy in [0, 1] over all images."""

    loss: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What was found. ``scores`` are named by the statistics that the norms used: running, recomputed, batch; where
    there are no running ones, ``why_one_score`` says why. ``confusion`` (true class, predicted class) counts images."""

    split: str
    num_images: int
    num_training_images: int
    batch_size: int
    classes: tuple[str, ...]
    norms: list[NormStatistics]
    scores: dict[str, Score]
    why_one_score: str
    confusion: Tensor
    portraits: list[featuremaps.Portrait]

    @property
    def recall(self) -> list[float]:
        """The share of every class's images that are recognized, NaN for a class without images."""
        return (self.confusion.diagonal() / self.confusion.sum(1)).tolist()

    @property
    def confusions(self) -> list[tuple[int, int, int]]:
        """(true class, predicted class, images), the most frequent first."""
        found = [(*pair, int(self.confusion[tuple(pair)])) for pair in self.confusion.nonzero().tolist()]
        return sorted((each for each in found if each[0] != each[1]), key=lambda each: -each[2])


@torch.no_grad()
def diagnose(run: Run, images: Sequence[int] | None = None, layers: Sequence[str] | None = None) -> Diagnosis:
    """Look at ``run``, which stays as it is, and at some images and layers of it; by default at those that tell most.

    The images are the test images, validation or training images where there are no others.
    :class:`UserError` for images that are not there.
    """
    splits = {"test": run.dataset.test, "validation": run.dataset.valid, "training": run.dataset.train}
    name, split = next((name, split) for name, split in splits.items() if len(split))
    if beyond := [index for index in images or () if index >= len(split)]:
        raise UserError(
            f"--images {beyond[0]}: there are {len(split):,} {name} images, counted from 0; "
            f"the last is {len(split) - 1}"
        )
    found = list_layers(run.model, run.dataset.in_shape)
    model = copy.deepcopy(run.model).eval()
    recomputed, num_training_images = copy.deepcopy(model), 0
    batch_size = min(run.batches.batch_size, len(run.dataset.train))
    scores = {"running": Score(*run.evaluate(split, model))}
    if tracking_norms(model):

        def counted() -> Iterator[Tensor]:
            nonlocal num_training_images
            for batch in training_batches(run, MOST_IMAGES):
                num_training_images += len(batch)
                yield batch

        recompute_statistics(recomputed, counted(), run.forward)
        scores["recomputed"] = Score(*run.evaluate(split, recomputed))
        scores["batch"] = score(batch_logits(run, split, model, batch_size), split.labels)
    return Diagnosis(
        split=name,
        num_images=len(split),
        num_training_images=num_training_images,
        batch_size=batch_size,
        classes=run.dataset.class_names,
        norms=list(norm_statistics(model, recomputed)),
        scores=scores,
        why_one_score="" if len(scores) > 1 else why_one_score(found),
        confusion=confusion(run, split, model),
        portraits=featuremaps.portraits(
            run, model, split, range(min(3, len(split))) if images is None else images,
            layers or featuremaps.choose(found),
        ),
    )  # fmt: skip


def score(logits: Tensor, labels: Tensor) -> Score:
    loss = F.cross_entropy(logits.double(), labels)
    return Score(float(loss), float((logits.argmax(1) == labels).double().mean()))


def confusion(run: Run, split: Split, model: nn.Module) -> Tensor:
    """How many images of which class (rows) ``model`` takes for which (columns), int64 on the CPU."""
    num_classes = len(run.dataset.class_names)
    chunks = run.chunks(split, model)
    predicted = [run.forward(run.dataset.prepare(split.images[places]), model).argmax(1) for places in chunks]
    labels = torch.cat([split.labels[places] for places in chunks])
    counts = torch.bincount(labels * num_classes + torch.cat(predicted), minlength=num_classes**2)
    return counts.view(num_classes, num_classes).cpu()


def batch_logits(run: Run, split: Split, model: nn.Module, batch_size: int) -> Tensor:
    """Logits (N, classes) of ``split`` where every batch is normalized by its own statistics, as in training.

    The norms of ``model`` are in training mode and nothing else is: dropout, say, stays off. Every batch finds the
    buffers as the run left them, whatever the one before did to them, and so does whoever comes after.
    """
    model = copy.deepcopy(model).eval()
    for norm in tracking_norms(model).values():
        norm.train()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    logits = []
    batches = batches_of(len(split), batch_size).to(run.device)
    for picked in batches:
        logits.append(run.forward(run.dataset.prepare(split.images[picked]), model))
        for buffer, kept in buffers:
            buffer.copy_(kept)
    order = batches.flatten()[: len(split)]
    return torch.cat(logits)[order.argsort()]


def batches_of(num_images: int, batch_size: int) -> Tensor:
    """Indices (batches, batch_size) of all images, shuffled, because files may be sorted by class; always the same.

    Every image is once among the first ``num_images``. The last batch is filled up from the beginning: a short one
    would have other statistics, and some norms refuse it.
    """
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    num_batches = -(-num_images // batch_size)
    return order[torch.arange(num_batches * batch_size) % num_images].view(num_batches, batch_size)


def why_one_score(layers: Sequence[Layer]) -> str:
    """Why there is no other way to evaluate a model none of whose norms keeps running statistics."""
    norms = [layer.norm for layer in layers if layer.norm]
    if not norms:
        return "There is no norm in this model, so there are no statistics to choose between."
    if any(re.search(r"over .*\bN\b", norm) for norm in norms):
        return (
            f"Its norms keep no running statistics: every {EVALUATION_BATCH} images that are evaluated together are "
            "normalized by their own, and there is nothing to recompute."
        )
    return f"Its norms ({norms[0]}) look at one image at a time: no statistics of a batch are involved."


def norm_statistics(model: nn.Module, recomputed: nn.Module) -> Iterator[NormStatistics]:
    """Every norm of ``model`` that has statistics, gamma or beta, beside the same with recomputed statistics."""
    tracking, others = tracking_norms(model), tracking_norms(recomputed)
    for name, module in model.named_modules():
        gamma, beta = (getattr(module, each, None) for each in ("weight", "bias"))
        own = gamma if gamma is not None else beta
        if name in tracking:
            other = others[name]
            found = {key: float(value) for key, value in compare(module, other).items()}
            yield NormStatistics(
                name, len(module.running_mean),
                spanned(module.running_mean), spanned(module.running_var),
                spanned(other.running_mean), spanned(other.running_var),
                found["mean_gap"], found["variance_gap"], spanned(gamma), spanned(beta), round(found["dead"]),
            )  # fmt: skip
        elif hasattr(module, "reduces_over") and own is not None:
            yield NormStatistics(name, len(own), gamma=spanned(gamma), beta=spanned(beta))


def spanned(values: Tensor | None) -> Range | None:
    """The smallest and the largest value; both NaN if one is."""
    return None if values is None or not values.numel() else tuple(float(end) for end in values.double().aminmax())
