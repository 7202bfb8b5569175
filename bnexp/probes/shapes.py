"""A table of what goes into the first layers and what comes out, as a check that the network is the one meant."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bnexp.probes.layers import layers, tapped
from bnexp.probes.population import shadow, spread
from bnexp.store.readings import Reading, Table
from bnexp.train.probe import Probe
from bnexp.train.run import Run

HEAD = ("layer", "input", "output")


class Shapes(Probe):
    """The table ``shapes``: name, input and output shape (of one image) of the first ``layers`` layers that an image
    passes; after the run's first step and never again, because shapes stay what they are."""

    def __init__(self, layers: int = 8) -> None:
        self.layers = self.at_least("layers", layers, 1, "rows of the table")

    def is_due(self, step: int, total_steps: int) -> bool:
        return step == 1

    @torch.no_grad()
    def look(self, run: Run, before: object) -> Iterator[Reading]:
        model = shadow(run).eval()
        rows: dict[str, tuple[str, ...]] = {}

        def see(name: str, x: Tensor, output: Tensor) -> None:
            rows.setdefault(name, (name, *("x".join(map(str, each.shape[1:])) for each in (x, output))))

        with tapped(layers(model), see):
            run.forward(run.dataset.prepare(spread(run.dataset.train, 2).images), model)
        yield Table("shapes", HEAD, tuple(rows.values())[: self.layers])
