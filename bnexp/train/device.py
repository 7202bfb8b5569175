"""The limits of a device: its memory, and operations that it cannot repeat bit for bit."""

import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bnexp.errors import OutOfMemory

NOT_REPEATABLE = "does not have a deterministic implementation"  # in torch's warning, after the operation's name
SAID: set[str] = set()  # the operations that this process has named


@contextmanager
def memory_explained(device: torch.device, what: str, batch_size: int) -> Iterator[None]:
    """Raise an error about memory as :func:`explain_memory` words it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = explain_memory(error, device, what, batch_size)
        if told is error:
            raise
        raise told from error


def explain_memory(error: Exception, device: torch.device, what: str, batch_size: int) -> Exception:
    """:class:`OutOfMemory` for a failed allocation by ``what``: how much was in use, what helps. Else ``error``."""
    is_on_host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if not is_on_host and not isinstance(error, torch.OutOfMemoryError | MemoryError):
        return error
    text = f"{device} has no memory left for {what} with batch_size={batch_size}, at most {peak(device):.1f} GiB"
    text += " were in use; try a smaller batch_size, a smaller data.size or a smaller model"
    told = OutOfMemory(text + (", or precision=bf16" if device.type == "cuda" else ""))
    told.__cause__ = error
    return told


def peak(device: torch.device) -> float:
    """GiB that torch had in use on the GPU at most, or that the process had in memory at most on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def prefer_repeatable(is_preferred: bool) -> None:
    """Set whether torch prefers operations that give the same bits every time to faster ones."""
    if is_preferred:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(is_preferred, warn_only=True)


def naming_exceptions(function: Callable[[], None]) -> None:
    """Call ``function``; say on stderr, once each, which of its operations cannot be repeated bit for bit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    for warning in caught:
        operation, found, _ = str(warning.message).partition(NOT_REPEATABLE)
        if not found:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif operation not in SAID:
            SAID.add(operation)
            print(
                f"bnexp: warning: deterministic=true: torch cannot repeat {operation.strip()} bit for bit; the rest is",
                file=sys.stderr,
            )
