"""A run's folder: claimed once, described by ``status.json``, never overwritten.

    config.yaml  status.json  metrics.jsonl  probes.jsonl (if probes had more to say than numbers)
    events.out.tfevents...  checkpoint.pt and the one before, checkpoint.previous.pt
"""

import fcntl
import json
import math
import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bnexp.errors import UserError

CONFIG, STATUS, METRICS, LOCK = "config.yaml", "status.json", "metrics.jsonl", ".lock"
PROBES = "probes.jsonl"
DONE = ("finished", "diverged")  # results; every other status leaves something to do


def check_free(path: Path) -> None:
    """Refuse, before any work, a folder that holds a run or cannot be written."""
    if any((path / name).exists() for name in (CONFIG, STATUS)):
        raise UserError(f"out={path}: already holds a run, which is never overwritten; choose another folder")
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UserError(f"out={path}: {existing} is a file; choose a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"out={path}: {existing} cannot be written to; choose another folder")


def claim(path: Path, config: str) -> Path:
    """Make ``path`` this run's by writing its ``config.yaml``; of two who try, one succeeds."""
    check_free(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_first = write_new(path / CONFIG, config)
    except OSError as error:
        raise UserError(f"out={path}: cannot be written to ({error.strerror}); choose another folder") from error
    if not is_first:
        raise UserError(f"out={path}: another run has just taken this folder; choose another")
    return path


def write_new(path: Path, text: str) -> bool:
    """Make a file with its whole content in one move, unless it exists; returns whether it was made."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text)
        try:
            os.link(scratch, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with open(path, "x") as file:
                file.write(text)
        return True
    except FileExistsError:
        return False
    finally:
        scratch.unlink(missing_ok=True)


def claim_new(parent: Path, name: str, config: str) -> Path:
    """A new folder ``parent/name``, or ``parent/name-2``, ... if others were first; atomic."""
    suffix = 1
    while True:
        path = parent / (name if suffix == 1 else f"{name}-{suffix}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            suffix += 1
            continue
        except OSError as error:
            raise UserError(f"{path}: cannot be made ({error.strerror}); name another folder with out=DIR") from error
        return claim(path, config)


@contextmanager
def taken(folder: Path) -> Iterator[bool]:
    """Hold a run's lock, if no living process does; yields whether it is ours.

    The operating system lets go of it when the process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def is_taken(folder: Path) -> bool:
    """Whether a living process of this machine is at work on the run. Only looks, so the folder may be read-only."""
    try:
        with open(folder / LOCK, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:  # or a pipe
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def finite(value: Any) -> Any:
    """``value`` with every float that JSON cannot hold replaced by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: dict) -> None:
    """Replace ``path`` in one move, so that a reader sees the old or the new and never half of one."""
    scratch = path.with_name(f".{path.name}.new")  # whoever writes holds the run's lock
    try:
        scratch.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write every file into ``folder``, made if need be, each in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        scratch = folder / f".{name}.{os.getpid()}"
        try:
            scratch.write_bytes(content)
            os.replace(scratch, folder / name)
        finally:
            scratch.unlink(missing_ok=True)


def read_status(folder: Path) -> dict:
    """``status.json``, or {} where there is none yet."""
    try:
        return json.loads((folder / STATUS).read_text())
    except FileNotFoundError:
        return {}


class Status:
    """``status.json``: what became of a run. Metrics hold the last value of every tag.

    A process that is killed leaves ``running`` behind; host and pid say which it was, heartbeat when it last wrote.
    """

    def __init__(self, folder: Path, device: str, overrides: list[str], *, goes_on: bool = False) -> None:
        self.path = folder / STATUS
        earlier = read_status(folder) if goes_on else {}
        self.content = {
            "status": "running",
            "step": 0,
            "epoch": 0.0,
            "seconds": 0.0,
            "metrics": earlier.get("metrics", {}),
            "device": device,
            "versions": versions(),
            "git_commit": git_commit(),
            "overrides": overrides,
            "started": earlier.get("started", time.time()),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self.update()

    def update(self, metrics: dict[str, float] | None = None, **fields: Any) -> None:
        self.content["metrics"] |= metrics or {}
        self.content |= {"heartbeat": time.time(), **fields}
        write_json(self.path, self.content)


@cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("bnexp", "torch", "torchvision", "hydra-core", "numpy", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def git_commit() -> str | None:
    """The commit of the code that runs, with ``-dirty`` if files differ from it; None outside a clone."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here.parent:
            return None  # installed inside somebody else's repository
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
