"""Runs taken up again where they stopped: ``bnexp resume RUN``, and ``bnexp train ... out=RUN resume=true``.

The second is one command for the first start and for every later one, for machines that start what they stopped.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from bnexp import build
from bnexp.commands import finish, open_journal
from bnexp.compose import stored_config
from bnexp.errors import UserError
from bnexp.folder import CONFIG, DONE, in_other_hands, read_status, taken
from bnexp.sweep import flat

FREE_TO_CHANGE = ("out", "quiet", "allow", "resume")  # between two starts of one run; none of them changes its files


def resume(arguments: list[str]) -> int:
    """``bnexp resume RUN``: go on with an interrupted run, in its folder, from its last checkpoint."""
    if not arguments:
        raise UserError("resume: which run? Give the folder of an interrupted one: bnexp resume outputs/DATE/RUN")
    if len(arguments) > 1:
        raise UserError(
            f"{' '.join(arguments[1:])}: resume takes the folder of one run and nothing else, for the run keeps its "
            "settings; bnexp rerun trains with others, in a folder of its own"
        )
    folder = Path(arguments[0])
    if ended := go_on(stored_config(folder), folder):
        raise UserError(f"{folder}: this run is {ended}, nothing is left to do; bnexp rerun repeats it")
    return 0


def is_begun(cfg: DictConfig) -> bool:
    """Whether ``out`` holds a run already."""
    if not cfg.out:
        raise UserError("resume=true: which run? Name its folder too, out=DIR; it is begun there if there is none yet")
    return (Path(cfg.out) / CONFIG).is_file()


def go_on_as(cfg: DictConfig) -> None:
    """Go on with the run in ``out``, whose config must be ``cfg``; of one that has ended only that is said."""
    folder = Path(cfg.out)
    check_same(folder, cfg)
    if ended := go_on(cfg, folder):
        if not cfg.quiet:
            print(f"bnexp: {folder}: this run is {ended}, nothing is left to do", file=sys.stderr)
        print(folder, flush=True)


def go_on(cfg: DictConfig, folder: Path) -> str | None:
    """Train from the last checkpoint in ``folder``, or from the first step if there is none, to the end.

    A run that has come to its end is not touched; returns how it ended.
    """
    with taken(folder) as mine:
        if not mine:
            raise in_other_hands(folder)
        status = read_status(folder)
        if status.get("status") in DONE:
            return status["status"]
        build.check(cfg, free=False)
        run = build.build(cfg)
        finish(cfg, run, open_journal(cfg, run, status.get("overrides", []), folder))
    return None


def check_same(folder: Path, cfg: DictConfig) -> None:
    """Raise :class:`UserError` that names what differs, unless the run in ``folder`` has the config ``cfg``."""
    there, here = (flat(OmegaConf.to_container(each, resolve=True)) for each in (stored_config(folder), cfg))
    keys = [key for key in dict.fromkeys([*here, *there]) if key.partition(".")[0] not in FREE_TO_CHANGE]
    shown = [
        f"{key} is {there.get(key, 'missing')} there and {here.get(key, 'missing')} here"
        for key in keys if there.get(key, "missing") != here.get(key, "missing")
    ]  # fmt: skip
    if shown:
        more = f"; and {len(shown) - 6} more" if len(shown) > 6 else ""
        raise UserError(
            f"out={folder}: holds a run with other settings ({'; '.join(shown[:6])}{more}); "
            "give those of the run, or another folder"
        )
