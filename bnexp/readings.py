"""What a look at a run yields: a tag and a value of one kind. Writers know how to keep each kind."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scalar:
    """One number under a TensorBoard tag such as ``loss/valid``; losses in nats, accuracies in [0, 1]."""

    tag: str
    value: float


@dataclass(frozen=True)
class Band:
    """A mean over seeds and the interval around it; ``lower`` and ``upper`` are the mean where there is none."""

    tag: str
    mean: float
    lower: float
    upper: float
