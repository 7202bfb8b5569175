"""For tests: what this process writes, starts or connects to, by Python's audit events; and a limit to its time."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# How many paths of an event's arguments are changed, and where the folder is that a relative one is of.
CHANGES = {"os.mkdir": (1, 2), "os.rename": (2, 2), "os.remove": (1, 1), "os.rmdir": (1, 1), "os.truncate": (1, 9),
           "os.chmod": (1, 2), "os.link": (2, 2), "os.symlink": (2, 9)}  # fmt: skip
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo")
LIBRARIES = re.compile(r"/__pycache__(/|$)|^/dev/(null$|shm/)|/torchinductor_|/matplotlib(/|$)")  # their caches
# What of a text a terminal would obey: everything below the space but tabs and line ends, and the same above 127.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_roots: tuple[str, ...] | None = None
_strays: list[str] = []


class Hung(BaseException):
    """Nothing was to be heard of a command for too long."""


@contextmanager
def watching(*roots: Path) -> Iterator[list[str]]:
    """Yields a list that fills with whatever is done outside of ``roots``, links followed: writing, starting programs
    other than git, connecting."""
    global _roots
    _strays.clear()
    _roots = tuple(os.path.realpath(root) for root in roots)
    try:
        yield _strays
    finally:
        _roots = None


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise :class:`Hung` in what takes longer."""

    def ring(number: int, frame: object) -> None:
        raise Hung(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _see(event: str, args: tuple) -> None:
    if _roots is None:
        return
    if event in STARTS:
        if event != "subprocess.Popen" or list(args[1])[:1] != ["git"]:
            _strays.append(f"{event} {args[:2]}")
    elif event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITES):
        if event == "open" and args[2] & os.O_EXCL:
            event = "make"
        num_paths, at = CHANGES.get(event, (1, 9))
        for i, path in enumerate(args[:num_paths]):
            is_new_name = i == 1 or event not in ("os.link", "os.symlink")
            if is_new_name and not isinstance(path, int):
                _look(event, os.fsdecode(path), args[at + i] if len(args) > at + i else -1)


def _look(event: str, path: str, folder: int) -> None:
    base = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
    # Whoever moves or removes a link leaves alone what it names; whoever opens one does not.
    path = os.path.join(base, path)
    place = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    if event in ("open", "os.truncate"):
        place = os.path.realpath(path)
    is_there = event == "os.mkdir" and os.path.isdir(place)  # nothing will be made
    if not is_there and not LIBRARIES.search(place) and not any(f"{place}/".startswith(f"{root}/") for root in _roots):
        _strays.append(f"{event} {place}")


sys.addaudithook(_see)
