"""Writes files whole or not at all, with errors that name the file, the reason and a remedy."""

import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from bnexp.errors import REMEDIES

ELSEWHERE = "choose another folder with out=DIR on another file system"
NO_SYNC = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)  # from fsync on some file systems


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Set the file name of an OSError that the block raises to ``path``.

    The error of a failed write names no file, and that of a failed move another one.
    """
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        del error.filename2
        raise


def not_written(error: OSError, folder: Path) -> str:
    """The error text for a file of the run in ``folder`` that could not be written: which, why, and what to do."""
    file, why = error.filename or folder, error.strerror or str(error)
    resume = f"go on with bnexp resume {folder}"
    known = REMEDIES.get(error.errno)
    remedy = f"{known}, then {resume}" if known else f"{resume}; if that fails too, {ELSEWHERE}"
    return f"{file} could not be written: {why}; what was written before stays readable in {folder}; {remedy}"


def sync(handle: int, folder: Path) -> None:
    """Flush ``folder`` or a file in it to the disk; a file system that cannot do this causes a warning."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
        text = (
            f"cannot flush to the disk ({error.strerror}); training without, so a power failure may damage files there"
        )
        warn_once(folder.absolute().parent, text)


@cache
def warn_once(folder: Path, text: str) -> None:
    """Warn on stderr that the file system of ``folder`` lacks something; each text once for each folder."""
    print(f"bnexp: warning: {folder}: its file system {text}", file=sys.stderr)


@contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """A new file, open for writing and reading, that takes the name ``path`` in one move when the block ends.

    A reader sees the whole old file or the whole new one. If the block raises, the old file stays and the scratch file
    is removed. Two processes must not write the same scratch file: either the caller holds the run's lock, or
    ``scratch`` holds the process id.
    """
    scratch = scratch or path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            with suppress(FileNotFoundError):
                scratch.unlink()  # it could be a link
            with open(scratch, "x+b") as file:
                yield file
            os.replace(scratch, path)
        except BaseException:
            with suppress(OSError):  # the first error matters
                scratch.unlink(missing_ok=True)
            raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace ``path`` by ``content`` as strict JSON; numbers that are not finite become null."""
    text = json.dumps(finite(content), indent=1, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write every file into ``folder`` in one move each; makes the folder if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with replacing(folder / name, folder / f".{name}.{os.getpid()}") as file:
            file.write(content)


def write_new(path: Path, text: str) -> bool:
    """Make a file with its whole content in one move; returns False if it exists already."""
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
    """:func:`write_new` without hard links: makes the file, then writes it, and removes it if that fails."""
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
    """``value`` with None in the place of infinite and NaN floats, inside dictionaries and lists too."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
