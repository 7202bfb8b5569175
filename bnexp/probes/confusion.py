"""The confusion matrix: the classes that a model predicts for the images of every class."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bnexp.data.dataset import Split
from bnexp.probes.population import shadow, some_of
from bnexp.store.readings import Reading, Scalar, Table
from bnexp.train.probe import Probe
from bnexp.train.run import Run

SPLIT_CHOICES = ("train", "valid", "test")


class Confusion(Probe):
    """The table ``confusion/<split>``: how many images of a true class (row) are predicted to be of a class (column).

    ``recall/<split>_lowest`` is the smallest recall over all classes with images, where the recall is the share of a
    class's images that are classified right, in [0, 1]. The model is in evaluation mode. The images are at most
    ``images`` of ``split``, or training images if it has none, and the same every time.
    """

    def __init__(self, every: int = 2000, split: str = "valid", images: int = 2000) -> None:
        super().__init__(every)
        if split not in SPLIT_CHOICES:
            raise self.refusal("split", split, f"no part of the data; choose one of {', '.join(SPLIT_CHOICES)}")
        self.split = split
        self.images = self.at_least("images", images, 2, "images that are classified")

    def look(self, run: Run, before: object) -> Iterator[Reading]:
        name = self.split if len(getattr(run.dataset, self.split)) else "train"
        split = some_of(getattr(run.dataset, name), self.images)
        counts = count_confusions(run, split, shadow(run).eval())
        rows = zip(run.dataset.class_names, counts.tolist(), strict=True)
        yield Table(f"confusion/{name}", ("true", *run.dataset.class_names), tuple((each, *row) for each, row in rows))
        recall = counts.diagonal() / counts.sum(1)  # NaN for a class without images
        yield Scalar(f"recall/{name}_lowest", float(recall.nan_to_num(1.0).min()))


@torch.no_grad()
def count_confusions(run: Run, split: Split, model: nn.Module) -> Tensor:
    """Numbers of images by true class (rows) and class predicted by ``model``, (classes, classes), on the CPU."""
    num_classes = len(run.dataset.class_names)
    counts = torch.zeros(num_classes**2, dtype=torch.int64, device=run.device)
    for places in run.chunks(split, model):
        predicted = run.forward(run.dataset.prepare(split.images_at(places)), model).argmax(1)
        counts += torch.bincount(split.labels[places] * num_classes + predicted, minlength=num_classes**2)
    return counts.view(num_classes, num_classes).cpu()
