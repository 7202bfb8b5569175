"""The idx format of the MNIST family: a magic number, the sizes, then one byte per value; often gzipped."""

import gzip
import io
import math
import zlib
from pathlib import Path

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
        content = path.read_bytes()
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(MOST_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(path, f"it cannot be unzipped ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if len(content) > MOST_BYTES:
        raise damaged(path, f"it holds more than {MOST_BYTES:,} bytes")
    start = 4 + 4 * num_dims
    if len(content) < start or content[:4] != bytes((0, 0, 8, num_dims)):
        raise damaged(path, f"it does not begin as an idx file of {num_dims} dimensions does")
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        sizes = "x".join(map(str, shape))
        num_bytes = len(content) - start
        raise damaged(path, f"it announces {math.prod(shape)} bytes ({sizes}) and holds {num_bytes}")
    # A bytearray, because torch wants memory that may be written to.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].view(shape)


def damaged(path: Path, what: str) -> UserError:
    """The error for a file that is there but cannot be what it should be."""
    return UserError(f"{path}: damaged or not the right file: {what}; delete it and run again to download it")
