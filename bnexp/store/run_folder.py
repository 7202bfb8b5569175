"""A run's folder: claimed once, described by ``status.json``, never overwritten.

It holds config.yaml, status.json, metrics.jsonl, probes.jsonl (if probes yielded histograms or tables),
events.out.tfevents..., checkpoint.pt and the checkpoint before that, checkpoint.previous.pt.
"""

import errno
import fcntl
import itertools
import os
import platform
import pwd
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bnexp.errors import StorageError, UserError, unread
from bnexp.store.files import ELSEWHERE, REMEDIES, not_written, warn_once, write_json, write_new, writing
from bnexp.store.untrusted import check_name, number, printable, read_json

CONFIG, STATUS, METRICS, PROBES, LOCK = "config.yaml", "status.json", "metrics.jsonl", "probes.jsonl", ".lock"
WRITTEN = (CONFIG, STATUS, METRICS, PROBES, "checkpoint*.pt", "best.pt", "events.out.tfevents*")
OWN = (*WRITTEN[:4], "lock", "checkpoint", "best.pt")  # how names of a run's files begin, after dots
STATUS_EVERY = 1.0  # seconds between two writes of status.json that hold only new readings
NO_LOCKS = (  # from flock on some network file systems
    errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY, errno.EPROTONOSUPPORT,
)  # fmt: skip
DONE = ("finished", "diverged")  # a run with any other status can be resumed


def check_free(out: str | Path, mark: str = "") -> None:
    """Raise :class:`UserError` for a folder that cannot be written, or that holds files of a run or :func:`others`.

    A folder with a file called ``mark`` may hold others.
    """
    if out == "":
        raise UserError("out=: names no folder; give one, or leave it out for a new one under outputs/")
    path = Path(out)
    try:
        check_own(path)
        found = [each.name for pattern in WRITTEN for each in path.glob(pattern)]
        foreign = others(path)
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:  # such as a name that is too long
        raise not_made(error, path) from error
    if found:
        if is_taken(path):
            raise in_other_hands(path)
        what = "a run" if {CONFIG, STATUS} & {*found} else found[0]
        raise UserError(f"out={path}: already holds {what}, which is never overwritten; choose another folder")
    if foreign and not (mark and (path / mark).exists()):  # looked for last: another process may be making it
        raise UserError(f"out={path}: holds {min(foreign)} already; choose a new folder, or an empty one")
    if not existing.is_dir():
        raise UserError(f"out={path}: {existing} is a file; choose a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"out={path}: {existing} cannot be written to; choose another folder")


def others(folder: Path) -> list[str]:
    """The names of what lies in ``folder`` and is not of a run: folders and results, and in a user's home any file.

    Other loose files, such as logs, may lie in the folder of a run or sweep.
    """
    if not folder.is_dir():
        return []
    homes = {os.path.realpath(os.path.expanduser("~")), *(user.pw_dir for user in pwd.getpwall())}
    if not homes.isdisjoint((os.path.abspath(folder), os.path.realpath(folder))):
        return os.listdir(folder)
    shown = [each for each in folder.iterdir() if not each.name.startswith(".")]
    return [each.name for each in shown if each.is_dir() or each.stem in ("comparison", "study")]


def check_own(folder: Path) -> None:
    """Raise :class:`UserError` for a folder with links or pipes where a run writes its files.

    The folder may come from a stranger. Writing through a link would change other files, and a pipe would block.
    """
    check_name(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # the process that holds the run can rename its files at any time
            if path.name.lstrip(".").startswith(OWN) and not stat.S_ISREG(path.lstat().st_mode):
                raise UserError(f"{path}: a link, a pipe or a folder where a run writes a file; move it elsewhere")


def claim(path: Path, config: str) -> Path:
    """Make ``path`` this run's folder by writing its ``config.yaml``; of two processes that try, one succeeds."""
    check_free(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_first = write_new(path / CONFIG, config)
    except OSError as error:
        raise not_made(error, path) from error
    if not is_first:
        raise UserError(f"out={path}: another run has just taken this folder; choose another")
    return path


def claim_new(parent: Path, name: str, config: str) -> Path:
    """:func:`claim` a :func:`new_folder`."""
    return claim(new_folder(parent, name), config)


def new_folder(parent: Path, name: str) -> Path:
    """Make the folder ``parent/name``, or ``parent/name-2``, ... if that exists, and return its path; atomic."""
    path = parent / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(2):
            with suppress(FileExistsError):
                path.mkdir()
                return path
            path = parent / f"{name}-{number}"
    except OSError as error:
        raise not_made(error, path) from error


def not_made(error: OSError, path: Path) -> UserError:
    """The error for a run's folder that the system does not let us make or write to."""
    remedy = f"{REMEDIES[error.errno]}, or " if error.errno in REMEDIES else ""
    return UserError(f"out={path}: cannot be made ({error.strerror}); {remedy}choose another folder with out=DIR")


@contextmanager
def taken(folder: Path) -> Iterator[bool]:
    """Take a run's lock inside the block; yields False if another living process holds it.

    The operating system releases the lock when the process ends, however it ends. An OSError about a file of the
    folder that the block raises becomes a :class:`StorageError`.
    """
    check_own(folder)
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOCK, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise StorageError(not_locked(error, folder)) from error
                lack = f"has no locks ({error.strerror}); training without: do not start two processes on a run there"
                warn_once(folder.absolute().parent, lack)
            yield True
    except OSError as error:
        if error.filename is None or folder not in (Path(error.filename), *Path(error.filename).parents):
            raise
        raise StorageError(not_written(error, folder)) from error


def not_locked(error: OSError, folder: Path) -> str:
    """The error text for a run whose lock the system refuses: which, why, and what to do."""
    is_refused = error.errno in (errno.EACCES, errno.EPERM)  # the file itself may well be writable
    remedy = ELSEWHERE if is_refused else REMEDIES.get(error.errno, ELSEWHERE)
    return f"{folder / LOCK} cannot be locked: {error.strerror}; {remedy}"


def in_other_hands(folder: Path) -> UserError:
    """The error for a run that another process holds."""
    return UserError(f"{folder}: {holder(folder)} is at work on this run; wait for it, or stop it first")


def holder(folder: Path) -> str:
    """The process that holds the run, named by host and pid if its status is readable and current."""
    status = read_status(folder)
    if status.get("status") != "running" or not is_alive(status.get("host"), status.get("pid")):
        return "another process"
    heard = max(0, time.time() - status.get("heartbeat", 0))
    return f"process {status['pid']} on {printable(status['host'])} (last heard of {heard:.0f} s ago)"


def is_alive(host: object, pid: object) -> bool:
    """Whether the process exists; a process on another host counts as existing."""
    if not isinstance(pid, int) or host is None:
        return False
    try:
        if host == socket.gethostname():
            os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # a process of another user
        return True
    return True


def is_taken(folder: Path) -> bool:
    """Whether a living process of this machine holds the run's lock. Writes nothing: the folder may be read-only.

    If the file system has no locks, the run's status decides.
    """
    try:  # O_NONBLOCK: the file could be a pipe
        with open(folder / LOCK, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(not_locked(error, folder)) from error
        status = read_status(folder)
        is_elsewhere = status.get("host") != socket.gethostname() or status.get("pid") == os.getpid()
        return status.get("status") == "running" and not is_elsewhere and is_alive(status["host"], status.get("pid"))
    return False


def load_status(folder: Path) -> dict:
    """The content of ``status.json``; ValueError if its fields have other types, FileNotFoundError if it is missing."""
    status = {"status": None, "step": 0, "metrics": {}, "overrides": []} | read_json(folder / STATUS)
    for name, kind in {"status": str, "step": int, "metrics": dict, "overrides": list}.items():
        if not isinstance(status[name], kind):
            raise ValueError(f"{STATUS}: its {name} is {printable(status[name], 30)}, which no run has written")
    for name in {"seconds", "started", "heartbeat"} & status.keys():
        status[name] = number(status[name], f"{STATUS}: {name}")
    return status | {"overrides": list(map(printable, status["overrides"]))}


def read_status(folder: Path) -> dict:
    """The content of ``status.json``, {} if there is none yet."""
    try:
        return load_status(folder)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise unread(error, folder / STATUS) from error
    except ValueError as error:
        raise UserError(f"{folder}: {error}; delete {STATUS}, then the run goes on from its checkpoint") from error


class Status:
    """``status.json``: how far a run is and how it ended; its metrics hold the last value of every tag.

    A killed process leaves ``running`` behind. ``host`` and ``pid`` name the process, ``heartbeat`` is the time of its
    last write.
    """

    def __init__(self, folder: Path, device: str, overrides: list[str], *, goes_on: bool = False) -> None:
        self.path = folder / STATUS
        first = {"step": 0, "epoch": 0.0, "seconds": 0.0, "metrics": {}, "started": time.time()}
        earlier = read_status(folder) if goes_on else {}
        self.content = {"status": "running"} | {key: earlier.get(key, value) for key, value in first.items()}
        self.content |= {"device": device, "versions": versions(), "git_commit": git_commit(), "overrides": overrides}
        self.content |= {"host": socket.gethostname(), "pid": os.getpid()}
        self.written = 0.0
        self.update()

    def update(self, metrics: dict[str, float] | None = None, **fields: Any) -> None:
        """Write ``fields`` at once; with ``metrics`` (a reading) only if the last write was a second ago.

        There can be many readings a second, and metrics.jsonl holds all of them.
        """
        self.content["metrics"] |= metrics or {}
        self.content |= {"heartbeat": time.time(), **fields}
        if metrics is None or time.monotonic() - self.written >= STATUS_EVERY:
            write_json(self.path, self.content)
            self.written = time.monotonic()


def bnexp_version() -> str:
    """The version that is installed; in a clone that is not installed, the one in its ``pyproject.toml``."""
    try:
        return version("bnexp")
    except PackageNotFoundError:
        import tomllib

        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"] if project.exists() else "?"


@cache
def versions() -> dict[str, str]:
    """The versions of Python, bnexp and the packages that decide its numbers."""
    found = {"python": platform.python_version(), "bnexp": bnexp_version()}
    for package in ("torch", "torchvision", "hydra-core", "numpy", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def git_commit() -> str | None:
    """The git commit of this package, with ``-dirty`` if files of the clone differ; None outside a clone."""
    here = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, check=True)
        return os.fsdecode(done.stdout).strip()  # as paths are decoded, which never fails

    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").rsplit("\n", 1)
        if Path(top) != here.parent:
            return None  # the package lies in another project's repository
        return commit + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
