"""CIFAR-10 from its original pickles, read without calling the functions that a pickle may name."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import torch

from bnexp.data.dataset import Dataset, Options, Split, assemble, check_size, find_root
from bnexp.data.download import damaged, download
from bnexp.errors import unread

TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILES = ("test_batch",)


class CIFAR10:
    """60,000 colour photographs of 32x32 (Krizhevsky 2009): 45,000 / 5,000 / 10,000 by default."""

    name = "cifar10"
    class_names = (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip

    def __init__(
        self, root: str | None = None, size=None, valid=5000, limit=None, augment="none", normalize=True,
        corrupt="none", strength=None,
    ):  # fmt: skip
        size = check_size(size, default=32)
        self.in_shape = (3, size, size)
        self.options = Options(valid, limit, augment, normalize, corrupt=corrupt, strength=strength)
        self.root = find_root(root)
        self.folder = self.root / "cifar-10-batches-py"
        self.archive = self.root / "cifar-10-python.tar.gz"

    def load(self) -> Dataset:
        missing = [name for name in TRAIN_FILES + TEST_FILES if not (self.folder / name).is_file()]
        if missing:
            there = ", which is there with a wrong checksum" if self.archive.is_file() else ""
            download(self, missing, f"{', '.join(missing)}, or {self.archive}{there}")
        return assemble(self, self._read(TRAIN_FILES), self._read(TEST_FILES))

    def fetch(self, root: Path) -> None:
        """Unpack the archive into ``root``: the user's if its checksum is right, else a downloaded one."""
        from torchvision.datasets import CIFAR10 as published  # takes a second to import
        from torchvision.datasets.utils import check_integrity, download_url

        archive = self.archive
        if not check_integrity(archive, published.tgz_md5):
            archive = root / self.archive.name
            download_url(published.url, root, archive.name, published.tgz_md5)
        shutil.unpack_archive(archive, root, filter="data")

    def _read(self, names: tuple[str, ...]) -> Split:
        parts = [read_batch(self.folder / name, len(self.class_names)) for name in names]
        return Split(torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))


def read_batch(path: Path, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) of one file; raises :class:`~bnexp.errors.UserError` naming it.

    The file holds a dict: ``data`` uint8 (N, 3072), red then green then blue, row by row; a list ``labels``.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="latin1").load()  # written by Python 2
        content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        pixels, labels = content["data"], torch.tensor(content["labels"], dtype=torch.int64)
    except OSError as error:
        raise unread(error, path) from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise damaged(path, f"it is no pickle with data and labels ({error})") from None
    if not isinstance(pixels, np.ndarray) or (pixels.dtype, pixels.shape[1:]) != (np.uint8, (3072,)):
        raise damaged(path, "its data are not bytes of 3x32x32 images")
    if labels.shape != (len(pixels),) or not len(pixels):
        raise damaged(path, f"it holds {labels.numel()} labels for {len(pixels)} images")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise damaged(path, f"it holds labels outside 0 to {num_classes - 1}")
    return torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), labels


class _Unpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers; raises UnpicklingError for anything else that a pickle names.

    A pickle can call any function that it names. torchvision compares checksums and then allows everything; this
    needs neither checksums nor torchvision, and it reads files that were pickled again.
    """

    def find_class(self, module: str, name: str) -> type:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # its name depends on the version of numpy
        raise pickle.UnpicklingError(f"it names {module}.{name}")
