"""Faults for tests: a process dies, or is told that there is no room, at any place where it touches a file.

As a program it has everything imported and forks a child for each command that it is given, so that many deaths
cost little.
"""

import builtins
import errno
import io
import json
import logging
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

CALLS = {
    "fsync": "fsync", "link": "link", "replace": "rename", "rename": "rename", "unlink": "remove", "remove": "remove",
    "truncate": "truncate", "ftruncate": "truncate", "mkdir": "mkdir",
}  # fmt: skip
NEED_ROOM = ("open", "write", "link", "mkdir")
SILENT = 60  # seconds after which a child is thought to go round and round


class Place(NamedTuple):
    """The ``count``-th time that ``operation`` (or "any") is done to a file with ``name`` in its path, and what then.

    ``how``: ``killed`` before it is done, ``killed halfway``, ``asked`` to stop by a SIGINT, ``asked twice``, or the
    name of an errno, which a write fails with halfway. ``ENOSPC from then on`` fails whatever needs room, ``EROFS from
    then on`` everything.
    """

    operation: str
    name: str
    count: int
    how: str = "killed"


class Seen(io.FileIO):
    """A file whose every write is seen."""

    see: Callable[[str, str, Callable[[], object]], None]

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        self.see("write", str(self.name), lambda: super(Seen, self).write(data[: len(data) // 2]))
        return super().write(data)


@contextmanager
def seeing(see: Callable[[str, str, Callable[[], object]], None]) -> Iterator[None]:
    """Call ``see(operation, path, half)`` before whatever this process does to a file; ``half()`` does half of it, of
    a write, and else nothing."""
    plain = builtins.open

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        if isinstance(file, int) or set(mode) <= set("rbt"):
            return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
        see("open", str(file), lambda: None)
        raw = Seen(file, mode.replace("b", "").replace("t", ""), opener=opener)
        raw.see = see
        if buffering == 0:
            return raw
        whole = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return whole if "b" in mode else io.TextIOWrapper(whole, encoding, errors, newline)

    def seen(call, operation):
        def do(file, *arguments, **options):
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else str(file)
            see(operation, path, lambda: None)
            return call(file, *arguments, **options)

        return do

    before = {name: getattr(os, name) for name in CALLS}
    builtins.open = io.open = opened
    for name, operation in CALLS.items():
        setattr(os, name, seen(before[name], operation))
    try:
        yield
    finally:
        builtins.open = io.open = plain
        for name, call in before.items():
            setattr(os, name, call)


@contextmanager
def faulty(place: Place) -> Iterator[list[tuple[str, str]]]:
    """Let it happen at ``place``; yields each (operation, path) up to there, of files with the name."""
    met, num_seen, has_happened = [], 0, False

    def see(operation, path, half):
        nonlocal num_seen, has_happened
        if has_happened:
            if place.how.endswith("from then on") and (operation in NEED_ROOM or "EROFS" in place.how):
                raise failure(place.how, path)
        elif place.name in path:
            met.append((operation, path))
            num_seen += place.operation in (operation, "any")
            has_happened = num_seen == place.count and place.operation in (operation, "any")
            if has_happened:
                act(place.how, operation, path, half)

    with seeing(see):
        yield met


def act(how: str, operation: str, path: str, half: Callable[[], object]) -> None:
    if how.startswith("killed"):
        if how == "killed halfway":
            half()
        os.kill(os.getpid(), signal.SIGKILL)
    elif how.startswith("asked"):
        for _ in range(1 + (how == "asked twice")):
            os.kill(os.getpid(), signal.SIGINT)
    else:
        half()
        raise failure(how, path if operation != "write" else None)


def failure(how: str, path: str | None) -> OSError:
    """As the operating system says it: what goes wrong in write(2) names no file."""
    code = getattr(errno, how.split()[0])
    return OSError(code, os.strerror(code), path) if path else OSError(code, os.strerror(code))


def trace(call: Callable[[], object], name: str) -> list[tuple[str, str]]:
    """Every (operation, path) of ``call()`` on a file with ``name`` in its path."""
    found = []
    with seeing(lambda operation, path, half: found.append((operation, path)) if name in path else None):
        call()
    return found


# ---------------------------------------------------------------- what is left behind


def misdrawn(folder: Path, events=None) -> dict[str, tuple]:
    """The tags that TensorBoard draws otherwise than metrics.jsonl has them: what it draws, what is written.

    A step that is drawn twice, or after a later one, is among them, because each is written once and in order.
    ``events`` is TensorBoard's reader, if it has read them already.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every restart
    if events is None:
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
        events.Reload()
    drawn = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()[SCALARS]}
    written: dict[str, list[tuple[int, float]]] = {}
    steps = []
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        steps.append(line["step"])
        for tag, value in line.items():
            if "/" in tag:
                written.setdefault(tag, []).append((line["step"], struct.unpack("f", struct.pack("f", value))[0]))
    assert steps == sorted(set(steps)), f"metrics.jsonl of {folder} has a step twice or out of order: {steps}"
    tags = drawn.keys() | written.keys()
    return {tag: (drawn.get(tag), written.get(tag)) for tag in tags if drawn.get(tag) != written.get(tag)}


# ---------------------------------------------------------------- a warm process


class Warm:
    """A process that has imported everything; what it is told to do is done by a child of its own each time."""

    def __init__(self, first: Sequence[str], cwd: Path) -> None:
        """``first``: a command that is over at once and imports what is imported late."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], cwd=cwd, **pipes)
        self._say(list(first))

    def __call__(self, arguments: Sequence[str], seconds: float | None = None, place: Place | None = None) -> int:
        """The exit code of ``bnexp ARGUMENTS``, -9 if it was killed, after ``seconds`` or at ``place``."""
        return self._ask(one=[list(arguments), seconds, place])

    def crowd(self, arguments: Sequence[str], size: int, num_kills: int, log: Path) -> tuple[list[int], int]:
        """``size`` processes at once, ``num_kills`` of them killed at random moments and each replaced by another;
        returns the exit codes of those that were not, and how many were. A line in ``log`` for each job done."""
        return tuple(self._ask(crowd=[list(arguments), size, num_kills, str(log)]))

    def _ask(self, **question):
        self._say(question)
        return json.loads(self.process.stdout.readline())

    def _say(self, what) -> None:
        print(json.dumps(what), file=self.process.stdin, flush=True)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def fork(arguments: list[str], place: Place | None = None, log: str | None = None) -> int:
    """The process number of a child that runs ``bnexp ARGUMENTS``."""
    from bnexp.cli.main import main

    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if log is not None:
        note_ends(log)
    if place is None:
        os._exit(main(arguments))
    with faulty(Place(*place)):
        os._exit(main(arguments))


def note_ends(log: str) -> None:
    """Have this process write a line, in one piece, for each job whose end it has written down."""
    from bnexp.store import run_folder

    write_json = run_folder.write_json

    def noting(path, content):
        write_json(path, content)
        if content.get("status") in run_folder.DONE:
            with open(log, "ab", buffering=0) as file:
                file.write(f"{path.parent.name} {os.getpid()}\n".encode())

    run_folder.write_json = noting


def one(arguments: list[str], seconds: float | None, place: Place | None) -> int | str:
    child = fork(arguments, place)
    deadline = time.monotonic() + (SILENT if seconds is None else seconds)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return "silent" if seconds is None else os.waitstatus_to_exitcode(status)


def crowd(arguments: list[str], size: int, num_kills: int, log: str) -> tuple[list[int], int]:
    alive, codes, killed = {fork(arguments, log=log) for _ in range(size)}, [], 0
    deadline = time.monotonic() + SILENT * size
    while alive:
        time.sleep(random.uniform(0, 0.3))
        for child in list(alive):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                alive.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
        if alive and (killed < num_kills or time.monotonic() > deadline):
            victim = random.choice(sorted(alive))
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
            alive.remove(victim)
            if time.monotonic() < deadline:
                alive.add(fork(arguments, log=log))
            killed += 1
    return codes, killed


def serve() -> None:
    """Answer one line of JSON with another, until there are no more."""
    import torch

    torch.set_num_threads(1)
    from bnexp.cli.main import main
    from bnexp.store import run_folder

    run_folder.STATUS_EVERY = 0.0  # written at every reading, so that there are many moments to be killed at

    sys.stdout, out = open(os.devnull, "w"), sys.stdout  # noqa: SIM115 (until the end)
    assert main(json.loads(sys.stdin.readline())) == 0
    for line in sys.stdin:
        ((name, values),) = json.loads(line).items()
        print(json.dumps({"one": one, "crowd": crowd}[name](*values)), file=out, flush=True)


if __name__ == "__main__":
    serve()
