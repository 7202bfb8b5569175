"""Writes files whole or not at all, and says which file could not be written, why, and what to do."""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

FREE_SPACE = "free some space"
LOST = "see whether the file system is still mounted and its server answers"
REMEDIES = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: "free some space or ask for a larger quota",
    errno.EFBIG: "the file system takes no files of this size; choose another",
    errno.EROFS: "make it writable again",
    errno.EACCES: "make it writable again",
    errno.EPERM: "make it writable again",
    errno.EIO: "see to its disk",
    errno.ENODEV: LOST, errno.ENXIO: LOST, errno.ESTALE: LOST, errno.ETIMEDOUT: LOST, errno.EHOSTDOWN: LOST,
    errno.EHOSTUNREACH: LOST, errno.ENOTCONN: LOST, errno.ECONNRESET: LOST, errno.EREMOTEIO: LOST,
    errno.EMFILE: "close other programs, or raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs, or raise the limit of open files (ulimit -n)",
}  # fmt: skip


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have an OSError raised inside name ``path``: a failed write names nothing, and a failed move another file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        del error.filename2
        raise


def not_written(error: OSError, folder: Path) -> str:
    """Which file of the run in ``folder`` could not be written, why, and what to do."""
    file, why = error.filename or folder, error.strerror or str(error)
    remedy = REMEDIES.get(error.errno, "mend that")
    return (
        f"{file} could not be written: {why}; what was written before stays readable in {folder}; {remedy}, "
        f"then go on with bnexp resume {folder}"
    )


@contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """A new file, open for writing and reading, that takes the name ``path`` in one move when the block ends.

    A reader sees the old file or the new one and never half of one. A block that raises leaves the old file and no
    scratch file. The writer must be the only one of its kind: it holds the lock, or ``scratch`` names its process.
    """
    scratch = scratch or path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            with suppress(FileNotFoundError):
                scratch.unlink()  # what lies there may be a link
            with open(scratch, "x+b") as file:
                yield file
            os.replace(scratch, path)
        except BaseException:
            with suppress(OSError):  # the first error says more
                scratch.unlink(missing_ok=True)
            raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace ``path`` by ``content`` as strict JSON; numbers that are not finite become null."""
    text = json.dumps(finite(content), indent=1, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write every file into ``folder``, made if need be, each in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with replacing(folder / name, folder / f".{name}.{os.getpid()}") as file:
            file.write(content)


def write_new(path: Path, text: str) -> bool:
    """Make a file with its whole content in one move, unless it exists; returns whether it was made."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            scratch.write_bytes(text.encode())
            try:
                os.link(scratch, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                return _write_exclusively(path, text)
            return True
        finally:
            scratch.unlink(missing_ok=True)


def _write_exclusively(path: Path, text: str) -> bool:
    """:func:`write_new` where the name comes before the content; leaves no file with half its content."""
    try:
        file = open(path, "xb")  # noqa: SIM115
    except FileExistsError:
        return False
    with file:
        try:
            file.write(text.encode())
            file.flush()
        except OSError:
            path.unlink()
            raise
    return True


def finite(value: Any) -> Any:
    """``value`` with every float that JSON cannot hold replaced by None, in tables and lists too."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
