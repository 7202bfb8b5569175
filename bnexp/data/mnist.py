"""MNIST and Fashion-MNIST from their original idx files."""

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from bnexp.data.dataset import Dataset, Options, Split, assemble, check_size, find_root
from bnexp.data.download import damaged, download
from bnexp.errors import unread

PAIRS = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
MOST_BYTES = 2**28  # five times MNIST; a small gzipped file can expand to fill the memory


class _IdxSource:
    """Reads 70,000 grey images of 28x28 from four idx files in ``root/<published>/raw``, gzipped or not.

    ``published`` is the data set's name in torchvision, which downloads missing files.
    """

    def __init__(
        self, root: str | None = None, size=None, valid=5000, limit=None, augment="none", normalize=True,
        corrupt="none", strength=None,
    ):  # fmt: skip
        size = check_size(size, default=28)
        self.in_shape = (1, size, size)
        self.options = Options(valid, limit, augment, normalize, corrupt=corrupt, strength=strength)
        self.root = find_root(root)
        self.folder = self.root / self.published / "raw"

    def load(self) -> Dataset:
        missing = [name for pair in PAIRS for name in pair if find_idx(self.folder, name) is None]
        if missing:
            download(self, missing, looked_for(missing))
        train, test = (self._read(*pair) for pair in PAIRS)
        return assemble(self, train, test)

    def fetch(self, root: Path) -> None:
        """Have torchvision download and check the files, plain and gzipped, into ``root/<published>/raw``."""
        from torchvision import datasets  # takes a second to import

        getattr(datasets, self.published)(root, download=True)

    def _read(self, images_name: str, labels_name: str) -> Split:
        images_path, labels_path = find_idx(self.folder, images_name), find_idx(self.folder, labels_name)
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if not len(images) or images.shape[1:] != (28, 28):
            shape = "x".join(map(str, images.shape))
            raise damaged(images_path, f"its values are {shape}, not images of 28x28")
        if len(labels) != len(images):
            what = f"it holds {len(labels)} labels for the {len(images)} images of {images_path.name}"
            raise damaged(labels_path, what)
        if labels.max() >= len(self.class_names):
            raise damaged(labels_path, f"it holds the label {int(labels.max())} where 0 to 9 are possible")
        return Split(images.unsqueeze(1), labels.to(torch.int64))


class MNIST(_IdxSource):
    """Handwritten digits (LeCun, Bottou, Bengio and Haffner 1998): 55,000 / 5,000 / 10,000 by default."""

    name = "mnist"
    published = "MNIST"
    class_names = tuple("0123456789")


class FashionMNIST(_IdxSource):
    """Pieces of clothing in the format of MNIST (Xiao, Rasul and Vollgraf 2017)."""

    name = "fashion_mnist"
    published = "FashionMNIST"
    class_names = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip


def looked_for(missing: list[str]) -> str:
    """The missing files for an error, and the files that exist without their other half."""
    text = ", ".join(f"{name}[.gz]" for name in missing)
    for images, labels in PAIRS:
        if images in missing and labels not in missing:
            text += f" (labels without images: {labels} is there)"
        if labels in missing and images not in missing:
            text += f" (images without labels: {images} is there)"
    return text


def find_idx(folder: Path, name: str) -> Path | None:
    """The path of the file ``name`` in ``folder``, plain or else gzipped; None if neither exists."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path, num_dims: int) -> Tensor:
    """The uint8 tensor of ``num_dims`` dimensions in an idx file; :class:`UserError` if the file is damaged.

    Layout: bytes 0, 0, 8 (unsigned byte), number of dimensions; each size as a big-endian int32; the values.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = file.read(4 + 4 * num_dims)
            if len(header) < 4 + 4 * num_dims or header[:4] != bytes((0, 0, 8, num_dims)):
                raise damaged(path, f"it does not begin as an idx file of {num_dims} dimensions does")
            shape = [int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4)]
            if math.prod(shape) > MOST_BYTES:
                raise damaged(path, f"it announces {math.prod(shape):,} bytes, more than {MOST_BYTES:,}")
            values = torch.empty(shape, dtype=torch.uint8)
            num_bytes = read_into(values, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(path, f"it cannot be unzipped ({error})") from None
    except OSError as error:
        raise unread(error, path) from None
    if num_bytes != values.numel():
        sizes = "x".join(map(str, shape))
        held = f"holds {num_bytes}" if num_bytes < values.numel() else "holds more"
        raise damaged(path, f"it announces {values.numel()} bytes ({sizes}) and {held}")
    return values


def read_into(values: Tensor, file: BinaryIO) -> int:
    """Read the rest of ``file`` into ``values``; returns the number of bytes, one above ``numel()`` for any excess.

    Reads a MiB at a time and without a second copy, because touching new memory takes longer than unzipping.
    """
    place = memoryview(values.numpy()).cast("B") if values.numel() else memoryview(b"")
    done = 0
    while done < len(place) and (count := file.readinto(place[done : done + 2**20])):
        done += count
    return done + len(file.read(1))
