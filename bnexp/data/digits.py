"""Scans of handwritten digits, which are part of scikit-learn and need no download."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from bnexp.data.dataset import Dataset, Options, Split, assemble, check_size, set_aside

NUM_TEST = 360  # a fifth of the 1,797 images
FILE = "datasets/data/digits.csv.gz"  # in scikit-learn's folder


class Digits:
    """1,797 digits of 8x8 pixels and 17 grey levels (Alpaydin and Kaynak 1998), resized to ``size`` squared.

    360 of them, always the same, are the test split; ``valid`` images are taken from the other 1,437.
    """

    name = "digits"
    class_names = tuple("0123456789")

    def __init__(self, size=28, valid=0.1, limit=None, augment="none", normalize=True, corrupt="none", strength=None):
        size = check_size(size, default=28)
        self.in_shape = (1, size, size)
        self.options = Options(valid, limit, augment, normalize, corrupt=corrupt, strength=strength)

    def load(self) -> Dataset:
        pixels, labels = read_digits()
        images = torch.from_numpy(pixels).view(-1, 1, 8, 8) * (255 / 16)
        size = self.in_shape[1:]
        if size != (8, 8):
            images = interpolate(images, size=size, mode="bilinear", antialias=size < (8, 8))
        everything = Split(images.round().to(torch.uint8), torch.from_numpy(labels).to(torch.int64))
        test, train = set_aside(everything, "test", NUM_TEST)
        return assemble(self, train, test)


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Grey levels 0 to 16 in float64 (1797, 64), row by row, and the digits (1797,).

    Reads the file of ``load_digits`` itself, because importing scikit-learn would be the longest part of a start.
    """
    package = find_spec("sklearn")
    path = Path(package.submodule_search_locations[0]) / FILE if package else None
    if path is None or not path.is_file():  # the import raises if it is not installed
        from sklearn.datasets import load_digits

        return load_digits(return_X_y=True)
    table = np.loadtxt(path, delimiter=",")
    return np.ascontiguousarray(table[:, :-1]), table[:, -1]
