"""A table of the input and output shapes of the first layers, to check that the network is the intended one."""

from collections.abc import Iterator

from bnexp.probes.layers import list_layers
from bnexp.store.readings import Reading, Table
from bnexp.train.probe import Probe
from bnexp.train.run import Run

HEAD = ("layer", "input", "output")


class Shapes(Probe):
    """The table ``shapes``: name, input shape and output shape (for one image) of the first ``layers`` layers.

    It is written after the run's first step only, because shapes do not change.
    """

    def __init__(self, layers: int = 8) -> None:
        self.layers = self.at_least("layers", layers, 1, "rows of the table")

    def is_due(self, step: int, total_steps: int) -> bool:
        return step == 1

    def look(self, run: Run, before: object) -> Iterator[Reading]:
        layers = list_layers(run.model, run.dataset.in_shape, run.device, run.batches.batch_size)
        rows = [(each.name, show_shape(each.in_shape), show_shape(each.out_shape)) for each in layers if each.out_shape]
        yield Table("shapes", HEAD, tuple(rows[: self.layers]))


def show_shape(shape: tuple[int, ...]) -> str:
    """``6x24x24``."""
    return "x".join(map(str, shape))
