"""MNIST and Fashion-MNIST from their original files, and the download of missing files for every source."""

import gzip
import http.client
import math
import os
import ssl
import sys
import urllib.request
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import md5
from pathlib import Path
from typing import BinaryIO
from urllib.error import URLError

import torch
from torch import Tensor

from bnexp.data.dataset import Dataset, Options, Split, assemble, check_size, find_root
from bnexp.errors import UserError

PAIRS = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
Resource = tuple[str, list[str], str]  # file name, addresses to try, md5
TIMEOUT_S = 10  # per connection and per read: a machine without network is told so in seconds
NETWORK_ERRORS = (URLError, http.client.HTTPException, ssl.SSLError, TimeoutError, ConnectionError)


class _IdxSource:
    """70,000 grey images of 28x28 in four idx files under ``root/<folder>/raw``, gzipped or not."""

    def __init__(self, root=None, size=None, valid=5000, limit=None, augment="none", normalize=True):
        size = check_size(size, default=28)
        self.in_shape = (1, size, size)
        self.options = Options(valid, limit, augment, normalize)
        self.folder = find_root(root) / self.folder_name / "raw"

    def load(self) -> Dataset:
        missing = [name for pair in PAIRS for name in pair if find_idx(self.folder, name) is None]
        if missing:
            looked_for = ", ".join(f"{name}[.gz]" for name in missing)
            for images, labels in PAIRS:  # as when files were copied by hand
                if (images in missing) != (labels in missing):
                    found = labels if images in missing else images
                    what = "labels without images" if found == labels else "images without labels"
                    looked_for += f" ({what}: {found} is there)"
            download(self.name, self.folder, lambda: self._resources(missing), looked_for)
        train, test = (self._read(*pair) for pair in PAIRS)
        return assemble(self, train, test)

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

    def _resources(self, names: list[str]) -> list[Resource]:
        import torchvision.datasets  # slow to import, and only wanted for a download

        source = getattr(torchvision.datasets, self.folder_name)
        checksums = dict(source.resources)
        files = [f"{name}.gz" for name in names]
        return [(file, [mirror + file for mirror in source.mirrors], checksums[file]) for file in files]


class MNIST(_IdxSource):
    """Handwritten digits (LeCun, Bottou, Bengio and Haffner 1998): 55,000 / 5,000 / 10,000 by default."""

    name = "mnist"
    folder_name = "MNIST"
    class_names = tuple("0123456789")


class FashionMNIST(_IdxSource):
    """Pieces of clothing in the format of MNIST (Xiao, Rasul and Vollgraf 2017)."""

    name = "fashion_mnist"
    folder_name = "FashionMNIST"
    class_names = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip


def download(data: str, folder: Path, resources: Callable[[], Iterable[Resource]], looked_for: str):
    """Fetch files into ``folder``, trying the addresses of each in turn, with progress on stderr.

    A file takes its name only when it is complete and its checksum is right: an interrupted download is never
    mistaken for one. Raises :class:`UserError` if no address answers or the folder cannot be written to.
    """
    for name, addresses, checksum in resources():
        part = folder / f"{name}.{os.getpid()}.part"
        failures = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for address in addresses:
                try:
                    if _fetch(address, part) == checksum:
                        os.replace(part, folder / name)
                        break
                    failures.append(f"{address}: what came is incomplete or damaged, its checksum is wrong")
                except NETWORK_ERRORS as error:
                    failures.append(f"{address}: {getattr(error, 'reason', None) or error}")
            else:
                raise UserError(
                    f"data={data}: looked in {folder} for {looked_for}; not there, and downloading failed, "
                    f"is there no network? ({'; '.join(failures)}) Copy the files into that folder, "
                    "name another one with data.root=..., or use data=digits, which needs neither"
                )
        except OSError as error:
            raise UserError(
                f"data={data}: cannot write {folder / name} ({error.strerror or error}); "
                "free some space or name another folder with data.root=..."
            ) from None
        finally:
            with suppress(OSError):
                part.unlink()


def _fetch(address: str, path: Path) -> str:
    """Copy ``address`` to ``path`` and return the md5 of what came."""
    checksum = md5(usedforsecurity=False)
    with urllib.request.urlopen(address, timeout=TIMEOUT_S) as response, open(path, "wb") as file:
        total = int(response.headers.get("Content-Length") or 0)
        done, percent = 0, None
        while chunk := response.read(1 << 18):
            file.write(chunk)
            checksum.update(chunk)
            done += len(chunk)
            # One line that counts up on a terminal, one line at the end elsewhere.
            if (shown := 100 * done // total if total else None) != percent or done == total:
                percent = shown
                _show_progress(address, done, total)
    return checksum.hexdigest()


def _show_progress(address: str, done: int, total: int):
    on_terminal = sys.stderr.isatty()
    if on_terminal or done >= total:
        filled = "#" * (30 * done // total) if total else ""
        line = f"{address.rsplit('/', 1)[-1]} [{filled:<30}] {done / 1e6:.1f} of {total / 1e6:.1f} MB"
        print(line, end="\r" if on_terminal and done < total else "\n", file=sys.stderr, flush=True)


MOST_BYTES = 2**28  # five times MNIST; a small gzipped file can hold as much as fills the memory


def find_idx(folder: Path, name: str) -> Path | None:
    """The file ``name`` in ``folder``, plain or gzipped, whichever exists."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path, num_dims: int) -> Tensor:
    """The uint8 tensor of ``num_dims`` dimensions in a file; a damaged one raises :class:`UserError`.

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
            num_bytes = fill(values, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(path, f"it cannot be unzipped ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if num_bytes != values.numel():
        sizes = "x".join(map(str, shape))
        held = f"holds {num_bytes}" if num_bytes < values.numel() else "holds more"
        raise damaged(path, f"it announces {values.numel()} bytes ({sizes}) and {held}")
    return values


def fill(values: Tensor, file: BinaryIO) -> int:
    """Put the bytes that are left in ``file`` into ``values``; returns how many they are, one too many for more.

    A MiB at a time and straight into their place: to touch new memory takes longer than to unzip.
    """
    place = memoryview(values.numpy()).cast("B") if values.numel() else memoryview(b"")
    done = 0
    while done < len(place) and (count := file.readinto(place[done : done + 2**20])):
        done += count
    return done + len(file.read(1))


def damaged(path: Path, what: str) -> UserError:
    """The error for a file that is there but cannot be what it should be."""
    return UserError(f"{path}: damaged or not the right file: {what}; delete it and run again to download it")
