"""Writes files whole or not at all, and tells of those that cannot be written by their names."""

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REMEDIES = {
    errno.EDQUOT: "free some space or ask for a larger quota",
    errno.EROFS: "make it writable again",
    errno.EACCES: "make it writable again",
    errno.EPERM: "make it writable again",
    errno.EIO: "see to its disk",
}  # else free some space


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
    remedy = REMEDIES.get(error.errno, "free some space")
    return (
        f"{file} could not be written: {why}; what was written before stays readable in {folder}; {remedy}, "
        f"then go on with bnexp resume {folder}"
    )


def write_new(path: Path, text: str) -> bool:
    """Make a file with its whole content in one move, unless it exists; returns whether it was made."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            scratch.write_text(text)
            try:
                os.link(scratch, path)
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links
                write_exclusively(path, text)
            return True
        except FileExistsError:
            return False
        finally:
            scratch.unlink(missing_ok=True)


def write_exclusively(path: Path, text: str) -> None:
    """Make a file unless it exists, which is a FileExistsError; leaves none behind with half its content."""
    with open(path, "x") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:
            path.unlink()
            raise


def finite(value: Any) -> Any:
    """``value`` with every float that JSON cannot hold replaced by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: dict) -> None:
    """Replace ``path`` in one move, so that a reader sees the old or the new and never half of one."""
    scratch = path.with_name(f".{path.name}.new")  # whoever writes holds the run's lock
    with writing(path), removed_if_broken_off(scratch):
        scratch.unlink(missing_ok=True)  # what lies there may be a link
        with open(scratch, "x") as file:
            file.write(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
        os.replace(scratch, path)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write every file into ``folder``, made if need be, each in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        scratch = folder / f".{name}.{os.getpid()}"
        with removed_if_broken_off(scratch):
            scratch.unlink(missing_ok=True)
            with open(scratch, "xb") as file:
                file.write(content)
            os.replace(scratch, folder / name)


@contextmanager
def removed_if_broken_off(scratch: Path) -> Iterator[None]:
    """Leave no half of a file behind. Once it has its name nothing is done any more that could fail."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the one that is on its way says more
            scratch.unlink(missing_ok=True)
        raise
