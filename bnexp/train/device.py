"""What depends on the device: its memory, operations that it cannot repeat bit for bit, torch's own generators."""

import os
import platform
import re
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

import torch

from bnexp.errors import OutOfMemory

MATMUL = {"fp32": "float32", "tf32": "TF32", "bf16": "bfloat16", "fp16": "float16"}  # by the setting precision
NOT_REPEATABLE = "does not have a deterministic implementation"  # in torch's warning, after the operation's name


@contextmanager
def memory_explained(device: torch.device, what: str, batch_size: int) -> Iterator[None]:
    """Inside, an error about memory is raised as :func:`explain_memory` words it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise explain_memory(error, device, what, batch_size)  # noqa: B904 (it has its cause)


def explain_memory(error: Exception, device: torch.device, what: str, batch_size: int) -> Exception:
    """Return ``error``, or the :class:`OutOfMemory` for it if it is a failed allocation by ``what``."""
    is_on_host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    is_in_library = isinstance(error, RuntimeError) and re.search("CU(DNN|BLAS)_STATUS_ALLOC_FAILED", str(error))
    if not is_on_host and not is_in_library and not isinstance(error, torch.OutOfMemoryError | MemoryError):
        return error
    text = f"{device} has no memory left for {what} with batch_size={batch_size}, at most {peak(device):.1f} GiB"
    text += " were in use; try a smaller batch_size, a smaller data.size or a smaller model"
    told = OutOfMemory(text + (", or precision=bf16" if device.type == "cuda" else ""))
    told.__cause__ = error
    return told


def peak(device: torch.device) -> float:
    """The largest memory use so far, in GiB: of torch on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the model of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return match[1] if match else platform.machine() or "CPU"


def computed_with(device: torch.device, precision: str) -> dict[str, str]:
    """The device's type and name, and the precision of matrix products and convolutions, for the run's record."""
    return {"device_type": device.type, "device_name": device_name(device), "matmul_precision": MATMUL[precision]}


def allow_tf32(is_allowed: bool) -> None:
    """Set whether a GPU may round the factors of float32 products to TF32 (10 bits), in convolutions too."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_allowed


def prefer_repeatable(is_preferred: bool) -> None:
    """Set whether torch prefers operations that give the same bits every time over faster ones."""
    if is_preferred:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(is_preferred, warn_only=True)


def naming_exceptions(function: Callable[[], None]) -> None:
    """Call ``function`` and name on stderr the operations that torch warns it cannot repeat bit for bit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    for warning in caught:
        operation, found, _ = str(warning.message).partition(NOT_REPEATABLE)
        if not found:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        else:
            name_not_repeatable(operation.strip())


@cache
def name_not_repeatable(operation: str) -> None:
    """Warn on stderr, once for each operation in a process."""
    told = f"deterministic=true: torch cannot repeat {operation} bit for bit; all other operations are repeated"
    print(f"bnexp: warning: {told}", file=sys.stderr)


def forked_rng(device: torch.device) -> AbstractContextManager:
    """A block after which torch's own generators are as before it: what is drawn inside changes no later draw."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
