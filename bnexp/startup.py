"""Settings of OpenMP, the allocator and the output. Must be made before torch is imported; the user's values win.

They change the speed and never the results.
"""

import gc
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {
    # OpenMP threads that spin while they wait slow each other down if another process runs.
    "OMP_WAIT_POLICY": "PASSIVE",
    # torch then requests pages of 2 MiB for larger tensors.
    "THP_MEM_ALLOC_ENABLE": "1",
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT = -1, -3, 2**30  # glibc's names (malloc.h), and bytes


def settle() -> None:
    """Make the settings that the user has not made, for this process and its children."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    keep_memory()


def replace_unprintable() -> None:
    """Print characters that the terminal's encoding lacks as ``?``, so that no run fails because of them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def keep_memory() -> None:
    """Make glibc's allocator keep freed memory, because every step needs the same amount again.

    Memory that was given back to the system returns as new pages, and the first access to a page takes microseconds:
    a third of the step of a LeNet with ``norm=scratch``. Does nothing with another C library.
    """
    import ctypes  # here, because it would slow --help

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    if not mallopt(M_MMAP_THRESHOLD, KEPT):
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older versions of glibc accept
    mallopt(M_TRIM_THRESHOLD, KEPT)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch inside the block without garbage collection.

    torch makes a million objects that all stay. Searching them for garbage takes a quarter of the import time.
    """
    is_first = "torch" not in sys.modules and gc.isenabled()
    if is_first:
        gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
            gc.enable()
