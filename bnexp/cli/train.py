"""The commands that train or look at a model: Hydra composes, ``build`` builds, ``loop`` drives."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bnexp.cli.sweep.grid import flat, read_grid
from bnexp.cli.sweep.jobs import prepare
from bnexp.cli.sweep.launch import hydra_config, run_all, written_at
from bnexp.config import build, check
from bnexp.config.compose import change, run_hydra, run_name, session, stored_config
from bnexp.config.start import advise, open_recorder
from bnexp.errors import RunFailed, UserError
from bnexp.report.tables import show_sweep
from bnexp.startup import quick_imports
from bnexp.store.run_folder import CONFIG, DONE, in_other_hands, read_status, taken
from bnexp.store.settings import FREE_TO_RESUME

if TYPE_CHECKING:
    from bnexp.train.recorder import Recorder
    from bnexp.train.run import Run


def train(arguments: list[str]) -> int:
    """``bnexp train``: one run, from the command line to its folder, whose path is the last line printed."""
    flags = {word for word in arguments if word.startswith("-")}
    if flags and flags <= {"-m", "--multirun"} and not any(word.startswith("hydra/sweeper=") for word in arguments):
        return train_many([word for word in arguments if word not in flags])
    if any(word.startswith("--experimental-rerun") for word in arguments):
        raise UserError("--experimental-rerun: reads a file that can hold code; bnexp rerun RUN does without")
    caught: list[BaseException] = []

    def task(cfg: DictConfig) -> None:
        try:
            train_one(cfg, list(HydraConfig.get().overrides.task))
        except Exception as error:  # Hydra would print it as its own
            caught.append(error)

    run_hydra(arguments, task)
    if caught:
        raise caught[0]
    return 0


def train_one(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Check, build, claim a folder, train; prints the folder's path last, even when interrupted."""
    with quick_imports():
        from bnexp.cli import train
        from bnexp.config import build, check
        from bnexp.store.run_folder import claim, claim_new, in_other_hands, taken

    if cfg.resume and train.is_begun(cfg):
        train.go_on_as(cfg)
        return
    check.check(cfg)
    run = build.build(cfg)
    text = OmegaConf.to_yaml(cfg, resolve=True)
    day = Path("outputs") / time.strftime("%Y-%m-%d")
    folder = claim_new(day, run_name(cfg), text) if cfg.out is None else claim(Path(cfg.out), text)
    with taken(folder) as mine:
        if not mine:  # whoever goes on with runs may have been quicker
            raise in_other_hands(folder)
        advise(cfg, run)
        finish(cfg, run, open_recorder(cfg, run, overrides, folder))


def finish(cfg: DictConfig, run: "Run", recorder: "Recorder") -> None:
    """Drive the run to its end; the last line on stdout is its folder."""
    from bnexp.config import build
    from bnexp.store.run_folder import STATUS
    from bnexp.train import progress
    from bnexp.train.drive import drive
    from bnexp.train.loop import Loop

    shown = progress.make_progress(run_name(cfg), quiet=cfg.quiet)
    try:
        drive(Loop(run, build.plan_of(cfg, run.batches.steps_per_epoch), recorder), shown)
    except UserError:
        raise
    except Exception as error:
        what, kept = f"{type(error).__name__}: {error}", recorder.folder / STATUS
        raise RunFailed(f"the run failed at step {run.num_steps}: {what}; the traceback is in {kept}") from error
    finally:
        print(recorder.folder, flush=True)


def rerun(arguments: list[str]) -> int:
    """``bnexp rerun RUN [overrides]``: the config of a run folder again, in a folder of its own."""
    if not arguments or ("=" in arguments[0] and not Path(arguments[0]).is_dir()):
        raise UserError("rerun: which run? Give its folder first: bnexp rerun outputs/DATE/RUN seed=1")
    cfg, overrides = stored_config(Path(arguments[0])), arguments[1:]
    change(cfg, overrides, "rerun")
    train_one(cfg, overrides)
    return 0


def train_many(arguments: Sequence[str]) -> int:
    """``bnexp train_many -m``: every job of the sweep that is not done yet; 1 if any failed."""
    with session():
        grid = read_grid(arguments)
        hydra_config(grid, Path())  # a launcher that does not exist is heard of before any work
        folder, jobs, configs = prepare(grid, "sweep")
        quiet = next(iter(configs.values())).quiet
        try:
            failed = run_all(grid, folder, jobs, configs)
        finally:
            if not quiet and any(written_at(job.folder) for job in jobs):
                show_sweep(folder)
            print(folder, flush=True)
    return 1 if failed else 0


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
        check.check(cfg, free=False)
        run = build.build(cfg)
        finish(cfg, run, open_recorder(cfg, run, status.get("overrides", []), folder))
    return None


def check_same(folder: Path, cfg: DictConfig) -> None:
    """Raise :class:`UserError` that names what differs, unless the run in ``folder`` has the config ``cfg``."""
    there, here = (flat(OmegaConf.to_container(each, resolve=True)) for each in (stored_config(folder), cfg))
    keys = [key for key in dict.fromkeys([*here, *there]) if key.partition(".")[0] not in FREE_TO_RESUME]
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
