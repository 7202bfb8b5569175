"""The groups of ``conf/`` and what each offers; imports neither Hydra nor torch."""

from functools import cache
from pathlib import Path
from typing import Any

GROUPS = ("model", "norm", "data", "optimizer", "schedule", "engine")  # a config has one entry of each
SHELVES = (*GROUPS, "probe")  # and any number of probes


def conf_dir() -> Path:
    """The folder of the configuration: inside the package when installed from a wheel, beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def choices(group: str, folder: Path | None = None) -> list[str]:
    """The entries of a group: the yaml files in its folder of ``conf/`` and in that of the user's ``folder``."""
    return sorted(_files(group, folder))


def entries(group: str, folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The options of every entry of a group, as they stand in its yaml file; files that cannot be read are left out."""
    found = {name: _read(path) for name, path in _files(group, folder).items()}
    return {name: options for name, options in found.items() if options is not None}


def defaults() -> dict[str, str]:
    """The entry that ``conf/train.yaml`` takes of each group."""
    lines = [line for line in _read(conf_dir() / "train.yaml")["defaults"] if isinstance(line, dict)]
    return {group: name for line in lines for group, name in line.items() if group in GROUPS}


def _files(group: str, folder: Path | None) -> dict[str, Path]:
    return {path.stem: path for place in (folder, conf_dir()) if place for path in (place / group).glob("*.yaml")}


@cache
def _read(path: Path) -> dict[str, Any] | None:
    from bnexp.store.untrusted import read_yaml

    try:
        return read_yaml(path)
    except (OSError, ValueError):
        return None
