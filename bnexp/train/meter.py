"""Losses and numbers of right classifications of a run's steps, kept on the device until they are read."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

COUNT_AT = 32  # steps whose logits are kept before their hits are counted


@dataclass(frozen=True)
class Measured:
    """Consecutive steps: their losses (nats), batch sizes, images classified right, and the number of bad steps."""

    losses: list[float]
    hits: int
    sizes: list[int]
    num_bad: int

    @property
    def loss(self) -> float:
        """The mean over images."""
        return sum(loss * size for loss, size in zip(self.losses, self.sizes, strict=True)) / sum(self.sizes)

    @property
    def accuracy(self) -> float:
        return self.hits / sum(self.sizes)


class Meter:
    """The steps since the last reading. A step is bad if its loss is finite and its gradient is not."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.uncounted: list[tuple[Tensor, Tensor]] = []  # logits and labels
        self.losses: list[Tensor] = []
        self.hits: list[Tensor] = []
        self.found: list[Tensor] = []
        self.sizes: list[int] = []

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, found: Tensor) -> None:
        """Add a step's loss (), logits (B, classes) and labels (B,); ``found`` is 1 if its gradient was not finite."""
        self.losses.append(loss)
        self.uncounted.append((logits, labels))
        self.found.append(found)
        self.sizes.append(len(labels))
        if len(self.uncounted) == COUNT_AT:
            self.settle()

    def settle(self) -> None:
        """Count the hits of several steps at once, because two operations a step would slow small models down."""
        if self.uncounted:
            logits, labels = map(torch.cat, zip(*self.uncounted, strict=True))
            self.hits.append((logits.argmax(1) == labels).sum())
            self.uncounted = []

    def read(self) -> Measured:
        """Return the steps since the last reading and clear them. The host waits for the device."""
        self.settle()
        losses = torch.stack(self.losses).tolist()
        found = torch.stack(self.found).tolist()
        num_bad = sum(bad > 0 and math.isfinite(loss) for bad, loss in zip(found, losses, strict=True))
        measured = Measured(losses, int(torch.stack(self.hits).sum()), self.sizes, num_bad)
        self.clear()
        return measured

    def is_finite(self) -> bool:
        """Whether all losses since the last reading are finite. The host waits for the device."""
        self.settle()
        return not self.losses or bool(torch.stack(self.losses).isfinite().all())

    def state_dict(self) -> dict:
        self.settle()
        hits = [torch.stack(self.hits).sum()] if self.hits else []
        tensors = {"losses": self.losses, "hits": hits, "found": self.found}
        return {name: [each.clone() for each in kept] for name, kept in tensors.items()} | {"sizes": list(self.sizes)}

    def load_state_dict(self, state: dict) -> None:
        self.clear()
        self.losses, self.hits = list(state["losses"]), list(state["hits"])
        self.found = list(state.get("found", [torch.zeros_like(loss) for loss in self.losses]))  # older ones have none
        self.sizes = list(state["sizes"])
