"""What a process sets before torch is imported: OpenMP, the allocator, the output. Values that the user set win.

None of it changes a bit of what is computed.
"""

import gc
import io
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


def replace_unprintable() -> None:
    """Have characters that the terminal's encoding lacks printed as ``?``: no run may fail because of them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def keep_memory() -> None:
    """Have the allocator keep freed memory, as torch does on a GPU, because every step needs the same again.

    Memory that was given back to the system returns as new pages, and the first touch of a page takes microseconds:
    in a LeNet with the textbook batch norm, whose tensors are many, a third of the step. Elsewhere than with glibc
    this does nothing.
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
    """Import torch inside without garbage collection.

    torch makes a million objects that all stay. Collecting among them, then and at the end of the process, takes a
    quarter of the time that the import takes.
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
