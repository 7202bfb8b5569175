"""Readings: a tag and a value of one kind. Probes and the loop yield them, writers write them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scalar:
    """One number under a TensorBoard tag such as ``loss/valid``; losses in nats, accuracies in [0, 1]."""

    tag: str
    value: float


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` values lay between ``edges[i]`` and ``edges[i + 1]``; edges ascend, one more than counts."""

    tag: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Image:
    """A picture: ``pixels`` is a uint8 tensor, (H, W) grey or (H, W, 3) colour, on the CPU."""

    tag: str
    pixels: Any


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; a cell is a text, a number, a tuple of numbers, or None if there is no value."""

    tag: str
    head: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def records(self) -> list[dict[str, Any]]:
        """The rows as {column: cell}."""
        return [dict(zip(self.head, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class Band:
    """A mean over seeds and its interval; ``lower`` and ``upper`` are the mean if there is no interval."""

    tag: str
    mean: float
    lower: float
    upper: float


Reading = Scalar | Histogram | Image | Table  # of one run; a Band is of several runs
