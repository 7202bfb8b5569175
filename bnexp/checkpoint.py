"""Checkpoints: written whole or not at all, and read without executing anything."""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

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
        check_whole(path)
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises a different type for each way in which a file can be broken
        code = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
        reason = f"it names {code[1]}, which is code; none was run" if code else " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a checkpoint that can be read ({reason}); delete it to start anew") from error


def check_whole(path: Path) -> None:
    """Raise ValueError for a file that is not as it was written: torch itself does not look at its sums."""
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ValueError("damaged, cut short, or no checkpoint at all")
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():
            raise ValueError(f"damaged in {damaged}")


def check_fits(state: object, model: nn.Module, folder: Path) -> None:
    """Raise :class:`UserError` unless ``state`` holds every weight of ``model`` and nothing else, and their step.

    ``model`` may be on the meta device: only names and shapes are compared.
    """
    path = folder / NAME
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: not the checkpoint of a run, but a {type(state).__name__}; put back the run's own")
    weights, wanted = state.get("model"), model.state_dict()
    if not isinstance(weights, Mapping) or type(state.get("num_steps")) is not int:
        raise UserError(f"{path}: not the checkpoint of a run, it has no model or no num_steps; put back the run's own")
    for key in [*wanted, *weights]:
        one, other = (_shape(each, key) for each in (weights, wanted))
        if one != other:
            raise UserError(
                f"{path}: not of this model, {key} is {one} in it and {other} in the model of config.yaml; "
                "put back the run's own checkpoint, config and data"
            )


def _shape(weights: Mapping, key: str) -> str:
    if key not in weights:
        return "missing"
    tensor = weights[key]
    is_tensor = isinstance(tensor, Tensor)
    return "x".join(map(str, tensor.shape)) or "one number" if is_tensor else f"a {type(tensor).__name__}"
