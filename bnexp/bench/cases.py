"""The inputs that norms are measured on: those of known networks, and those that break kernels."""

from math import prod
from typing import NamedTuple

SITES = {"BN+ReLU": False, "BN+add+ReLU": True}  # name: whether a residual is added
PHASES = ("forward", "backward", "both")
REFERENCE = "elementwise"  # the kernels that move the same bytes


class Case(NamedTuple):
    """An input's shape and the number of norms that see it; ``gaps`` leaves every other column unused."""

    shape: tuple[int, ...]
    count: int = 1
    gaps: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + (" with gaps" if self.gaps else "")


def image_cases(batch: int, *layers: tuple[int, int, int]) -> tuple[Case, ...]:
    """One case per (channels, size, count): a feature map of size x size and the number of layers that have it."""
    return tuple(Case((batch, channels, size, size), count) for channels, size, count in layers)


SETS: dict[str, tuple[Case, ...]] = {
    # Some shapes of the networks below. Two cores time them in half a minute.
    "quick": (
        Case((256, 120)),
        *image_cases(64, (6, 24, 1), (64, 16, 1)),
        *image_cases(32, (96, 14, 1)),
    ),
    "lenet": (*image_cases(256, (6, 24, 1), (16, 8, 1)), Case((256, 120)), Case((256, 84))),
    "mlp": (Case((8192, 1024)),),
    # On images of 32x32 (CIFAR-10) and of 96x96.
    "resnet18": (
        *image_cases(256, (64, 32, 5), (128, 16, 5), (256, 8, 5), (512, 4, 5)),
        *image_cases(256, (64, 48, 1), (64, 24, 4), (128, 12, 5), (256, 6, 5), (512, 3, 5)),
    ),
    # On images of 224x224, with the norms of the downsampling shortcuts.
    "resnet50": image_cases(
        128,
        (64, 112, 1), (64, 56, 6), (256, 56, 4), (128, 28, 7), (512, 28, 5),
        (256, 14, 11), (1024, 14, 7), (512, 7, 5), (2048, 7, 4),
    ),  # fmt: skip
    # A DenseNet on images of 96x96: widths that are not powers of two.
    "densenet": image_cases(256, (96, 24, 1), (160, 12, 1), (224, 6, 1)),
    "adversarial": (
        Case((2, 1)),
        Case((2, 3, 1, 1)),
        Case((2, 2049)),
        Case((7, 1, 13, 17)),
        Case((11, 3, 31, 37)),
        Case((5, 6, 101)),
        Case((3, 5, 7, 11, 13)),
        Case((2, 2049, 3, 3)),
        Case((1, 3, 1021, 1031)),
        Case((0, 6, 8, 8)),
        Case((8, 6, 20, 22), gaps=True),
        Case((2, 64, 4099, 4099)),  # more than 2**31 elements
    ),
}  # fmt: skip
