"""Settings of OpenMP, the allocator and the output. Must be made before torch is imported; the user's values win.

They change the speed and never the results.
"""

import errno
import gc
import io
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

ENVIRONMENT = {
    # OpenMP threads that spin while they wait slow each other down if another process runs.
    "OMP_WAIT_POLICY": "PASSIVE",
    # torch then requests pages of 2 MiB for larger tensors.
    "THP_MEM_ALLOC_ENABLE": "1",
}
# Ctrl-C, kill, a closed terminal, and the warning of a scheduler that a job's time is nearly over.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT = -1, -3, 2**30  # glibc's names (malloc.h), and bytes


def settle() -> None:
    """Make the settings that the user has not made, for this process and its children."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    keep_memory()


class Terminal:
    """A stream that sends this process SIGHUP when its terminal is found closed, and from then on drops text."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._do(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, act: Callable[..., object], *arguments: str) -> None:
        try:
            act(*arguments)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            signal.raise_signal(signal.SIGHUP)


def prepare_output() -> None:
    """Let no run fail because of the terminal: it prints ``?`` for what its encoding lacks, and may be closed."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with suppress(OSError):  # no file
            if isinstance(stream, io.TextIOWrapper) and stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
                setattr(sys, name, Terminal(stream))


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
    """Import torch inside the block without garbage collection, and with signals held back until the end.

    torch makes a million objects that all stay. Searching them for garbage takes a quarter of the import time. An
    exception that a signal raises inside would abort the process.
    """
    is_first = "torch" not in sys.modules and gc.isenabled()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if is_first:
        gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
