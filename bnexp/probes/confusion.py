"""Which classes a model takes for which."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bnexp.data.dataset import Split
from bnexp.probes.population import evaluation_batches, evenly_spaced, shadow
from bnexp.store.readings import Reading, Scalar, Table
from bnexp.train.probe import Probe
from bnexp.train.run import Run

SPLIT_CHOICES = ("train", "valid", "test")


class Confusion(Probe):
    """The confusion matrix of at most ``images`` images of ``split``, in evaluation mode, as the table
    ``confusion/<split>``: a row per true class, a column per predicted class, numbers of images.

    ``recall/<split>_lowest`` is the smallest recall in [0, 1], the share of a class's images that are recognized, over
    all classes with images: 0 as long as one class is never recognized, however high the accuracy. The images are
    always the same; training images where ``split`` has none.
    """

    def __init__(self, every: int = 2000, split: str = "valid", images: int = 2000) -> None:
        super().__init__(every)
        if split not in SPLIT_CHOICES:
            raise self.refusal("split", split, f"no part of the data; choose one of {', '.join(SPLIT_CHOICES)}")
        self.split = split
        self.images = self.at_least("images", images, 1, "images that are classified")

    def look(self, run: Run, before: object) -> Iterator[Reading]:
        name = self.split if len(getattr(run.dataset, self.split)) else "train"
        split = evenly_spaced(getattr(run.dataset, name), self.images)
        counts = count_confusions(run, split, shadow(run).eval())
        rows = zip(run.dataset.class_names, counts.tolist(), strict=True)
        yield Table(f"confusion/{name}", ("true", *run.dataset.class_names), tuple((each, *row) for each, row in rows))
        recall = counts.diagonal() / counts.sum(1)  # NaN for a class without images
        yield Scalar(f"recall/{name}_lowest", float(recall.nan_to_num(1.0).min()))


@torch.no_grad()
def count_confusions(run: Run, split: Split, model: nn.Module) -> Tensor:
    """How many images of which class (rows) ``model`` takes for which (columns), (classes, classes), on the CPU."""
    num_classes = len(run.dataset.class_names)
    counts = torch.zeros(num_classes**2, dtype=torch.int64, device=run.device)
    for picked in evaluation_batches(run, split, model):
        predicted = run.forward(run.dataset.prepare(split.images[picked]), model).argmax(1)
        counts += torch.bincount(split.labels[picked] * num_classes + predicted, minlength=num_classes**2)
    return counts.view(num_classes, num_classes).cpu()
