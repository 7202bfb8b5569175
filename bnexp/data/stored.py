"""Decoded images in one flat file of the user's cache folder, and images that are read when a batch needs them.

A file holds uint8 images (N, C, H, W) and behind them int64 labels (N,). Every start and every job of a sweep reads
it. Beside it a JSON file keeps numbers that need a pass over the images: moments and fingerprints.
"""

import errno
import fcntl
import json
import math
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnexp.data.pictures import no_bombs
from bnexp.errors import RunFailed, UserError, home_path, remedy_of

AHEAD = 3  # batches that are being read while one is used
BLOCK_BYTES = 2**22  # images that are decoded, read or hashed at a time
MOST_BUFFERS = 1024  # of one preadv (IOV_MAX of Linux)

Decoder = Callable[[int], tuple[Tensor, int]]  # the number of an image -> uint8 (C, H, W), label


class Flat:
    """The images of a flat file; ``shape`` is (N, C, H, W). They are read by preadv, a memory map reads more."""

    def __init__(self, path: Path, shape: Sequence[int]) -> None:
        self.path, self.shape = path, torch.Size(shape)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # the system reads nothing that was not asked for

    def labels(self) -> Tensor:
        """The labels int64 (N,)."""
        labels = torch.empty(self.shape[0], dtype=torch.int64)
        self._fill([memoryview(labels.numpy()).cast("B")], math.prod(self.shape))
        return labels

    def read(self, places: Tensor, out: Tensor) -> Tensor:
        """The images at ``places`` (B,), in this order, in ``out`` uint8 (B, C, H, W). Neighbours are read at once."""
        size, image = len(places), math.prod(self.shape[1:])
        memory = memoryview(out.numpy()).cast("B") if size else memoryview(b"")
        sources, targets = (each.tolist() for each in places.sort())
        start = 0
        for end in range(1, size + 1):
            if end == size or sources[end] != sources[end - 1] + 1 or end - start == MOST_BUFFERS:
                self._fill([memory[i * image : (i + 1) * image] for i in targets[start:end]], sources[start] * image)
                start = end
        return out

    def _fill(self, buffers: list[memoryview], offset: int) -> None:
        while buffers:
            count = os.preadv(self._file, buffers, offset)
            if not count and len(buffers[0]):
                raise RunFailed(f"{self.path}: became shorter while it was read; start again to decode the images anew")
            offset += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                buffers[0] = buffers[0][count:]

    def noted(self, key: str, compute: Callable[[], Any]) -> Any:
        """``compute()``, which JSON can hold, or what it gave under this key before."""
        path, notes = self.path.with_suffix(".json"), {}
        with suppress(OSError, ValueError):
            notes = json.loads(path.read_bytes())
        if key not in notes:
            notes[key] = compute()
            with suppress(OSError):  # then it is computed again the next time
                scratch = path.with_suffix(f".{os.getpid()}")
                scratch.write_text(json.dumps(notes))
                os.replace(scratch, path)
        return notes[key]


class Stored:
    """Images that stay in a file, or in the host's memory, and come to ``device`` when they are used.

    They are those at ``places`` (N,) of ``rows``, a :class:`Flat` or a tensor of the host. Like a tensor it has
    ``shape``, ``dtype`` and ``device``, and is indexed by a slice or by a tensor of indices.
    """

    dtype = torch.uint8

    def __init__(self, rows: Flat | Tensor, places: Tensor | None = None, device: torch.device | str = "cpu") -> None:
        self.rows, self.device = rows, torch.device(device)
        self.places = torch.arange(rows.shape[0]) if places is None else places
        self.shape = torch.Size((len(self.places), *rows.shape[1:]))

    @classmethod
    def of(cls, images: "Tensor | Stored", device: torch.device) -> "Stored":
        """These ``images``, which will come to ``device``."""
        return cls(images.rows, images.places, device) if isinstance(images, Stored) else cls(images, None, device)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, indices: slice | Tensor) -> Tensor:
        return self._read(indices).to(self.device)

    def numel(self) -> int:
        return math.prod(self.shape)

    def take(self, indices: slice | Tensor) -> "Stored":
        """The images at ``indices``, which are not read yet."""
        return Stored(self.rows, self.places[indices], self.device)

    def to(self, device: torch.device | str) -> Tensor:
        """All images on ``device``; no other copy is made in the host's memory."""
        if torch.device(device).type == "cpu":
            return self._read(slice(None))
        whole = torch.empty(self.shape, dtype=torch.uint8, device=device)
        size = block_of(self.shape)
        for block, part in zip(whole.split(size), self.split(size), strict=True):
            block.copy_(part)
        return whole

    def split(self, size: int) -> Iterator[Tensor]:
        """The images in order, ``size`` at a time."""
        return self.read_ahead(slice(start, start + size) for start in range(0, max(1, len(self)), size))

    def read_ahead(self, chunks: Iterable[slice | Tensor]) -> Iterator[Tensor]:
        """Yield the images of every chunk of indices; threads read up to three chunks ahead."""
        waiting: deque = deque()
        for chunk in chunks:
            waiting.append(readers(os.getpid()).submit(self._read, chunk))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result().to(self.device, non_blocking=True)
        while waiting:
            yield waiting.popleft().result().to(self.device, non_blocking=True)

    def _read(self, indices: slice | Tensor) -> Tensor:
        places = self.places[indices.cpu() if isinstance(indices, Tensor) else indices]
        shape, is_pinned = (len(places), *self.shape[1:]), self.device.type == "cuda"
        out = torch.empty(shape, dtype=torch.uint8, pin_memory=is_pinned)
        if isinstance(self.rows, Tensor):
            return torch.index_select(self.rows, 0, places, out=out)
        return self.rows.read(places, out)


@cache
def readers(process: int) -> ThreadPoolExecutor:
    """The threads of this process that read images; a forked process has none of its parent's."""
    return ThreadPoolExecutor(AHEAD, thread_name_prefix="read")


def block_of(shape: Sequence[int]) -> int:
    """The number of images (N, C, H, W) of BLOCK_BYTES."""
    return max(1, BLOCK_BYTES // max(1, math.prod(shape[1:])))


def free_memory(device: torch.device) -> int:
    """Free bytes of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return sys.maxsize


def decoded(shape: Sequence[int], decode: Decoder, show: Callable[[int, int], None]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels, a block at a time; threads decode them. ``show(done, total)`` is called in between."""
    with no_bombs(), ThreadPoolExecutor() as pool:  # decoding releases Python's lock
        step = min(256, block_of(shape))
        for start in range(0, shape[0], step):
            pairs = list(pool.map(decode, range(start, min(start + step, shape[0]))))
            yield torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])
            show(start + len(pairs), shape[0])


def decode_once(
    settings: Sequence, files: Sequence, shape: Sequence[int], decode: Decoder, show: Callable, is_needed: bool
) -> tuple[Stored | Tensor, Tensor]:
    """The images (N, C, H, W) and labels (N,) of a source, from its flat file, which is made if it is not there.

    ``settings`` say what is decoded and how; ``files`` are the names, sizes and times of what it is decoded from. A
    file that was made of other ``files`` is replaced. If the cache folder cannot be written to, images are decoded into
    the memory, or :class:`UserError` is raised if the file ``is_needed``.
    """
    root = home_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME=")
    folder = root / "bnexp" / "decoded"
    name, state = (sha256(repr(each).encode()).hexdigest()[:20] for each in ((shape[1:], settings), files))
    path = folder / f"{name}-{state}.u8"
    try:
        if not is_complete(path, shape):
            folder.mkdir(parents=True, exist_ok=True)
            make_flat(path, folder / f".{name}", shape, decode, show)
        flat = Flat(path, shape)
        return Stored(flat), flat.labels()
    except OSError as error:
        why = f"{folder}: decoded images cannot be kept there ({error.strerror or error})"
        remedy = "try again" if error.errno == errno.ENOENT else remedy_of(error)
        if is_needed:
            raise UserError(
                f"data.resident=false: {why}; {remedy}, or name another cache folder by XDG_CACHE_HOME"
            ) from error
        print(f"bnexp: warning: {why}; every start decodes them again", file=sys.stderr)
    images, labels, end = torch.empty(shape, dtype=torch.uint8), [], 0
    for block, block_labels in decoded(shape, decode, show):
        images[end : (end := end + len(block))] = block
        labels.append(block_labels)
    return images, torch.cat(labels)


def is_complete(path: Path, shape: Sequence[int]) -> bool:
    """Whether the flat file is there with all images and labels."""
    return path.is_file() and path.stat().st_size == math.prod(shape) + 8 * shape[0]


def make_flat(path: Path, stem: Path, shape: Sequence[int], decode: Decoder, show: Callable) -> None:
    """Decode all images into the file ``path`` in one move, unless another process just does so; delete older ones."""
    with open(f"{stem}.lock", "a") as lock:
        is_alone = False
        with suppress(OSError):  # from file systems without locks
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for a process that decodes the same images
            is_alone = True
        if is_complete(path, shape):
            return
        if is_alone:
            for left in stem.parent.glob(f"{stem.name}.new-*"):  # by a process that was killed
                left.unlink(missing_ok=True)
        scratch = Path(f"{stem}.new-{os.getpid()}")
        try:
            with open(scratch, "xb") as file:
                labels = []
                for images, block_labels in decoded(shape, decode, show):
                    file.write(images.numpy())
                    labels.append(block_labels)
                file.write(torch.cat(labels).numpy())
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        for old in stem.parent.glob(f"{stem.name[1:]}-*"):
            if old.stem != path.stem:
                old.unlink(missing_ok=True)
