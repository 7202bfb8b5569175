"""Checkpoints: written whole or not at all, and read without executing anything."""

import os
from pathlib import Path

import torch

from bnexp.errors import UserError

NAME = "checkpoint.pt"


def save(state: dict, folder: Path) -> Path:
    """Write ``state`` to ``folder/checkpoint.pt``; whoever dies halfway leaves the previous one untouched."""
    path = folder / NAME
    scratch = folder / f".{NAME}.new"  # one name, so that those who are killed here leave one file and not many
    try:
        with open(scratch, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # while it tidies up after the one that matters
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def load(folder: Path, device: torch.device) -> dict | None:
    """The last checkpoint of a run's folder with its tensors on ``device``, None if there is none."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises a different type for each way in which a file can be broken
        raise UserError(f"{path}: not a checkpoint that can be read ({error}); delete it to start anew") from error
