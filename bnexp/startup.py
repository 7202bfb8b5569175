"""How a process of ours waits for its threads and keeps its memory: said before torch is imported, the user first.

Neither changes a bit of what is computed.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {
    # Two OpenMP threads that spin while they wait slow each other down as soon as anything else runs.
    "OMP_WAIT_POLICY": "PASSIVE",
    # torch then asks for pages of 2 MiB for its larger tensors, where the system has them to give.
    "THP_MEM_ALLOC_ENABLE": "1",
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT = -1, -3, 2**30  # glibc's names (malloc.h), and bytes


def settle() -> None:
    """Set what the user has not set, for this process and those that it starts."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    keep_memory()


def keep_memory() -> None:
    """Have the allocator keep what is freed, as torch does on a GPU, for every step asks for the same again.

    Given back to the system, memory comes as new pages, and a page's first touch takes microseconds: in a LeNet with
    the textbook batch norm, whose tensors are many, a third of the step. Elsewhere than with glibc, do nothing.
    """
    import ctypes  # which --help would feel

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    if not mallopt(M_MMAP_THRESHOLD, KEPT):
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older versions of glibc accept
    mallopt(M_TRIM_THRESHOLD, KEPT)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Around what imports torch: its million objects all stay, and looking for garbage among them, then and at the
    end of the process, takes a quarter of the time that the import takes."""
    is_first = "torch" not in sys.modules and gc.isenabled()
    if is_first:
        gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
            gc.enable()
