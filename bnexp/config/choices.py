"""The groups of ``conf/`` and what each offers; imports neither Hydra nor torch."""

from pathlib import Path

GROUPS = ("model", "norm", "data", "optimizer", "schedule", "engine")


def conf_dir() -> Path:
    """The folder of the configuration: inside the package when installed from a wheel, beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def choices(group: str) -> list[str]:
    """What a group offers: the yaml files in its folder."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def nearest(word: str, known) -> str:
    """`` (did you mean X?)`` if something known looks like ``word``."""
    from difflib import get_close_matches

    found = get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""
