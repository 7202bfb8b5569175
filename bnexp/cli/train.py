"""``bnexp train``, ``resume`` and ``rerun``: start a run, continue it, and repeat it."""

import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from bnexp.cli.flags import parse_line, was_shown
from bnexp.config.compose import composed, run_name, session
from bnexp.config.explain import is_hydras, parse_words
from bnexp.config.stored import moved, rerun_config, stored_config
from bnexp.errors import RunFailed, UserError, home_path
from bnexp.startup import quick_imports
from bnexp.store.run_folder import CONFIG, DONE, STATUS, claim, claim_new, in_other_hands, read_status, taken
from bnexp.store.settings import PLACE, differences, first_few

if TYPE_CHECKING:
    from bnexp.train.run import Run


def train(arguments: list[str]) -> int:
    """``bnexp train``: train one run, or with ``-m`` a sweep, and print its folder last."""
    line = parse_line("train", arguments)
    if was_shown(line):
        return 0
    if line.multirun:
        return train_many(line)
    with session(line.source):
        cfg = composed(line.words, logs=True)
    return train_one(cfg, line.words)


def train_many(line: Namespace) -> int:
    """``bnexp train -m``: run every job of the sweep that is not done; returns 1 if a run failed."""
    with quick_imports():
        from bnexp.cli.sweep.grid import read_grid
        from bnexp.cli.sweep.jobs import folder_told, prepare
        from bnexp.cli.sweep.launch import hydra_config, run_all, written_at
        from bnexp.report.tables import show_sweep

    with session(line.source):
        grid = read_grid(line.words)
        hydra_config(grid.hydra)  # refuses a launcher that does not exist before any work
        folder, jobs = prepare(grid, "sweep")
        with folder_told(folder):
            try:
                failed = run_all(grid.hydra, folder, jobs)
            finally:
                if not jobs[0].cfg.quiet and any(written_at(job.folder) for job in jobs):
                    show_sweep(folder)
    return 1 if failed else 0


def train_one(cfg: DictConfig, words: Sequence[str]) -> int:
    """Check the config, build the run, claim its folder and train; prints the folder last, even when interrupted."""
    with quick_imports():
        from bnexp.config import build, check

    if cfg.resume and not cfg.out:
        raise UserError("resume=true: which run? Name its folder too, out=DIR; a new run starts there if it holds none")
    if cfg.resume and (Path(cfg.out) / CONFIG).is_file():
        return continue_same(cfg)
    check.check(cfg)
    run = build.build(cfg)
    text = OmegaConf.to_yaml(cfg, resolve=True)
    day = Path("outputs") / time.strftime("%Y-%m-%d")
    folder = claim_new(day, run_name(cfg), text) if cfg.out is None else claim(Path(cfg.out), text)
    with taken(folder) as is_mine:
        if not is_mine:  # another process has resumed it at once
            raise in_other_hands(folder)
        words = [each.input_line for each in parse_words(words) if not is_hydras(each.key_or_group)]
        finish(cfg, run, words, folder)
    return 0


def finish(cfg: DictConfig, run: "Run", words: Sequence[str], folder: Path) -> None:
    """Train to the end, from the checkpoint in ``folder`` if there is one; prints the folder last."""
    from bnexp.config import build, start
    from bnexp.train import progress
    from bnexp.train.drive import drive
    from bnexp.train.loop import Loop

    start.advise(cfg, run)
    recorder = start.open_recorder(cfg, run, words, folder)
    shown = progress.make_progress(run_name(cfg), quiet=cfg.quiet)
    try:
        drive(Loop(run, build.plan_of(cfg, run.batches.steps_per_epoch), recorder), shown)
    except UserError:
        raise
    except KeyboardInterrupt:
        if not cfg.quiet:
            print(f"to go on: bnexp resume {shlex.quote(str(folder))}")
        raise
    except Exception as error:
        what = f"the run failed at step {run.num_steps}: {type(error).__name__}: {error}"
        raise RunFailed(f"{what}; the traceback is in {folder / STATUS}") from error
    finally:
        print(folder, flush=True)


def rerun(arguments: list[str]) -> int:
    """``bnexp rerun RUN [overrides]``: train again with the config of a run, in a new folder."""
    if not arguments or ("=" in arguments[0] and not Path(arguments[0]).is_dir()):
        raise UserError("rerun: which run? Give its folder first: bnexp rerun outputs/DATE/RUN seed=1")
    line = parse_line("rerun", arguments[1:])
    with session(line.source):
        cfg, words = rerun_config(home_path(arguments[0]), line.words)
    return train_one(cfg, words)


def resume(arguments: list[str]) -> int:
    """``bnexp resume RUN``: continue an interrupted run, in its folder, from its last checkpoint."""
    words = parse_line("resume", arguments).words  # a run's own config is complete, --config-dir changes nothing
    if not words:
        raise UserError("resume: which run? Give the folder of an interrupted one: bnexp resume outputs/DATE/RUN")
    folder = home_path(words[0])
    cfg = moved(folder, words[1:], "resume")
    if ended := go_on(cfg, folder):
        raise UserError(f"{folder}: this run is {ended}, nothing is left to do; bnexp rerun repeats it")
    return 0


def continue_same(cfg: DictConfig) -> int:
    """Continue the run in ``out``, or leave it as it is if it has ended.

    Raises :class:`UserError` that names the settings in which it differs from ``cfg``.
    """
    folder = Path(cfg.out)
    there, here = (OmegaConf.to_container(each) for each in (stored_config(folder), cfg))
    if found := differences(there, here, but=PLACE):
        raise UserError(
            f"out={folder}: holds a run with other settings ({first_few(found)}); "
            "give those of the run, or another folder"
        )
    if ended := go_on(cfg, folder):
        if not cfg.quiet:
            print(f"bnexp: {folder}: this run is {ended}, nothing is left to do", file=sys.stderr)
        print(folder, flush=True)
    return 0


def go_on(cfg: DictConfig, folder: Path) -> str | None:
    """Train the run in ``folder`` to its end and return None; if it has ended already, return how: its status."""
    with quick_imports():
        from bnexp.config import build, check

    with taken(folder) as is_mine:
        if not is_mine:
            raise in_other_hands(folder)
        status = read_status(folder)
        if status.get("status") in DONE:
            return status["status"]
        check.check(cfg, free=False)
        run = build.build(cfg)
        finish(cfg, run, status.get("overrides", []), folder)
    return None
