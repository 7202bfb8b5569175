"""Checkpoints: written whole or not at all, and read without executing code.

    checkpoint.pt  checkpoint.previous.pt (the one before)  best.pt, checkpoint-STEP.pt (if asked for)

Each file ends with the SHA-256 of everything before it, as the comment of the zip file that torch writes. The
checksums inside the zip do not cover its table of contents, where one flipped bit can point to other contents.
"""

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from bnexp.errors import StorageError, UserError, unread
from bnexp.store.files import replacing, sync, writing
from bnexp.store.untrusted import is_step

NAME, PREVIOUS, BEST, DAMAGED = "checkpoint.pt", "checkpoint.previous.pt", "best.pt", "checkpoint.damaged.pt"
MARK, NUM_DIGITS = b"sha256 ", 64


def save(state: dict, folder: Path, *also: Path) -> Path:
    """Write ``state`` to ``folder/checkpoint.pt``; the old file becomes ``checkpoint.previous.pt``.

    checkpoint.pt is a whole file at every moment, the old or the new one. ``also`` are further names of the new file.
    """
    return write(state, folder / NAME, *also, previous=folder / PREVIOUS)


def write(state: dict, path: Path, *also: Path, previous: Path | None = None) -> Path:
    """Write ``state`` to ``path`` in one move and flush it to the disk; ``previous`` becomes a name of the old file."""
    with replacing(path) as file:
        save_into(file, state)
        seal(file)
        for name in also:
            also_call(Path(file.name), name)
        if previous is not None and path.exists():
            also_call(path, previous)
    with writing(path):
        sync_folder(path.parent)
    return path


def save_into(file: BinaryIO, state: dict) -> None:
    """``torch.save``, but a full disk is the OSError that it is and not a RuntimeError."""
    try:
        torch.save(state, file)
    except RuntimeError as error:  # raised while torch cleans up after the real error
        cause = error.__context__
        raise cause if isinstance(cause, OSError | KeyboardInterrupt) else error from None


def seal(file: BinaryIO) -> None:
    """Append the checksum of the whole file, and flush it to the disk."""
    file.seek(-2, os.SEEK_END)  # a zip file ends with its comment, which is empty so far, after its length (2 bytes)
    file.write((len(MARK) + NUM_DIGITS).to_bytes(2, "little") + MARK)
    num_bytes = file.tell()
    digest = checksum(file, num_bytes)
    file.seek(num_bytes)
    file.write(digest)
    file.flush()
    sync(file.fileno(), Path(file.name).parent)


def checksum(file: BinaryIO, num_bytes: int) -> bytes:
    """The SHA-256 of the file's first bytes, in hexadecimal."""
    file.seek(0)
    digest = hashlib.sha256()
    while num_bytes > 0 and (chunk := file.read(min(num_bytes, 2**20))):
        digest.update(chunk)
        num_bytes -= len(chunk)
    return digest.hexdigest().encode()


def also_call(path: Path, name: Path) -> None:
    """Make ``name`` another name of the file at ``path``, in one move; a copy if there are no hard links."""
    scratch = name.with_name(f".{name.name}.new")
    try:
        scratch.unlink(missing_ok=True)
        try:
            os.link(path, scratch)
        except OSError:
            shutil.copyfile(path, scratch)
        os.replace(scratch, name)
    finally:
        scratch.unlink(missing_ok=True)  # replace does nothing if both names were the same file already


def sync_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        sync(handle, folder)
    finally:
        os.close(handle)


def load(folder: Path, device: torch.device, model: nn.Module | None = None, *, mend: bool = False) -> dict | None:
    """The last good checkpoint in a run's folder with its tensors on ``device``; None if the folder has none.

    A checkpoint is good if it is whole and :func:`fits <check_fits>` the ``model``, if one is given. If the last one is
    bad, the one before is taken, with a warning; ``mend`` then renames the bad file and gives its name to the good one.
    :class:`UserError` if both are bad.
    """
    bad: list[tuple[Path, UserError]] = []
    for path in (folder / NAME, folder / PREVIOUS):
        if not os.path.lexists(path):
            continue
        try:
            state = read(path, device)
            if model is not None:
                check_fits(state, model, path)
        except StorageError:
            raise
        except UserError as error:
            bad.append((path, error))
            continue
        for wrong, error in bad:
            problem = str(error).rpartition("; ")[0]  # without the remedy
            print(f"bnexp: warning: {problem}; taking the one before, {path}, instead", file=sys.stderr)
            if mend:
                os.replace(wrong, folder / DAMAGED)
                os.replace(path, wrong)
        return state
    if bad:
        raise UserError("; and ".join(str(error) for _, error in bad)) from bad[0][1]
    return None


def read(path: Path, device: torch.device) -> object:
    """The content of the checkpoint at ``path``; :class:`UserError` if it is damaged or holds code."""
    try:
        check_whole(path)
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many types for broken files
        for cause in (error, error.__cause__, error.__context__):
            if isinstance(cause, OSError) and cause.errno != errno.ENOENT:
                raise unread(cause, path, StorageError) from error
        code = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
        reason = f"it names {code[1]}, which is code; none was run" if code else " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a checkpoint that can be read ({reason}); delete it to start anew") from error


def check_whole(path: Path) -> None:
    """Raise ValueError for a damaged file; torch itself verifies no checksum."""
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block
        raise ValueError("not a file")
    try:
        with zipfile.ZipFile(path) as file:
            num_bytes = sum(each.file_size for each in file.infolist())
    except zipfile.BadZipFile as error:  # also for an error of reading, then its context
        raise ValueError("damaged, cut short, or no checkpoint at all") from error.__context__
    if num_bytes > path.stat().st_size:
        raise ValueError("it would unpack to more than its size, which torch does not write")
    with open(path, "rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - NUM_DIGITS - len(MARK))
        file.seek(start)
        mark, digest = file.read(len(MARK)), file.read()
        if mark == MARK:
            if checksum(file, start + len(MARK)) != digest:
                raise ValueError("damaged: its contents do not match the checksum at its end")
            return
        file.seek(-2, os.SEEK_END)
        if file.read() != bytes(2):  # a zip file without a comment ends with the length 0
            raise ValueError("damaged or cut short where its checksum should be")
    with zipfile.ZipFile(path) as file:  # a file without our checksum, such as torch writes
        if damaged := file.testzip():
            raise ValueError(f"damaged in {damaged}")


def check_fits(state: object, model: nn.Module, path: Path) -> None:
    """Raise :class:`UserError` unless ``state`` holds exactly the weights of ``model``, and a step.

    ``model`` may be on the meta device: only names and shapes are compared.
    """
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: not the checkpoint of a run, but a {type(state).__name__}; put back the run's own")
    weights, wanted = state.get("model"), model.state_dict()
    if not isinstance(weights, Mapping) or not is_step(state.get("num_steps")):
        raise UserError(f"{path}: not the checkpoint of a run, it has no model or no num_steps; put back the run's own")
    for key in [*wanted, *weights]:
        one, other = (_shape(each, key) for each in (weights, wanted))
        if one != other:
            raise UserError(
                f"{path}: not of this model, {key} is {one} in it and {other} in the model of config.yaml; "
                "put back the run's own checkpoint, config and data"
            )


def _shape(weights: Mapping, key: str) -> str:
    """``3x4``, ``one number``, ``a list`` or ``missing``, for an error text."""
    if key not in weights:
        return "missing"
    tensor = weights[key]
    is_tensor = isinstance(tensor, Tensor)
    return "x".join(map(str, tensor.shape)) or "one number" if is_tensor else f"a {type(tensor).__name__}"
