"""The idx format of the MNIST family: a magic number, the sizes, then one byte per value; often gzipped."""

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from bnexp.errors import UserError

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
