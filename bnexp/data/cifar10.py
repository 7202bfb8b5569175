"""CIFAR-10 from its original pickles, read without letting them run anything."""

import gzip
import os
import pickle
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

from bnexp.data.dataset import Dataset, Options, Split, assemble, check_size, find_root
from bnexp.data.mnist import Resource, damaged, download
from bnexp.errors import UserError

TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILES = ("test_batch",)


class CIFAR10:
    """60,000 colour photographs of 32x32 (Krizhevsky 2009): 45,000 / 5,000 / 10,000 by default."""

    name = "cifar10"
    class_names = (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip

    def __init__(self, root=None, size=None, valid=5000, limit=None, augment="none", normalize=True):
        size = check_size(size, default=32)
        self.in_shape = (3, size, size)
        self.options = Options(valid, limit, augment, normalize)
        self.root = find_root(root)
        self.folder = self.root / "cifar-10-batches-py"

    def load(self) -> Dataset:
        missing = [name for name in TRAIN_FILES + TEST_FILES if not (self.folder / name).is_file()]
        if missing:
            archive = self.root / "cifar-10-python.tar.gz"
            if not archive.is_file():
                looked_for = f"{self.folder.name}/ with {', '.join(missing)}, or {archive.name}"
                download(self.name, self.root, self._resources, looked_for)
            self._extract(archive, missing)
        return assemble(self, self._read(TRAIN_FILES), self._read(TEST_FILES))

    def _read(self, names: tuple[str, ...]) -> Split:
        parts = [read_batch(self.folder / name, len(self.class_names)) for name in names]
        return Split(torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))

    def _extract(self, archive: Path, names: list[str]):
        """Unpack the files ``names``; each takes its name when it is complete."""
        try:
            with tempfile.TemporaryDirectory(dir=self.root) as scratch:
                with tarfile.open(archive, "r:gz") as tar:
                    members = [tar.getmember(f"{self.folder.name}/{name}") for name in names]
                    tar.extractall(scratch, members, filter="data")
                self.folder.mkdir(exist_ok=True)
                for name in names:
                    os.replace(Path(scratch) / self.folder.name / name, self.folder / name)
        except (tarfile.TarError, EOFError, KeyError, zlib.error, gzip.BadGzipFile) as error:
            raise damaged(archive, f"it cannot be unpacked ({error})") from None
        except OSError as error:
            raise UserError(
                f"data={self.name}: cannot unpack {archive} into {self.folder} ({error.strerror or error}); "
                "free some space or name another folder with data.root=..."
            ) from None

    @staticmethod
    def _resources() -> list[Resource]:
        from torchvision.datasets import CIFAR10 as source  # slow to import, and only wanted for a download

        return [(source.filename, [source.url], source.tgz_md5)]


def read_batch(path: Path, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) of one file; raises :class:`UserError` naming it.

    The file holds a dict: ``data`` uint8 (N, 3072), red then green then blue, row by row; a list ``labels``.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="latin1").load()  # written by Python 2
        content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        pixels, labels = content["data"], torch.tensor(content["labels"], dtype=torch.int64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
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
    """Makes numpy arrays and the plain containers; whatever else a pickle asks for is refused.

    A pickle can call any function it names, so an unknown file must not choose the functions.
    """

    def find_class(self, module: str, name: str):
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # under whatever name this numpy has it
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
