"""From a checked config to a run that can start: its recorder, its checkpoint, advice on stderr."""

import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from bnexp.config import build
from bnexp.config.advice import advice, signal_advice
from bnexp.config.compose import group_name, hparams
from bnexp.config.stored import remember_place
from bnexp.data.dataset import Dataset
from bnexp.errors import UserError, first_line
from bnexp.store import checkpoint
from bnexp.store.files import not_written, write_new
from bnexp.store.run_folder import CONFIG, METRICS, Status
from bnexp.store.untrusted import read_lines
from bnexp.store.writer import Writer
from bnexp.train.device import computed_with
from bnexp.train.recorder import Recorder, merit
from bnexp.train.run import Run

PRINTED: set[str] = set()  # lines of advice: the runs of a sweep share most of them


def advise(cfg: DictConfig, run: Run) -> None:
    """Print on stderr what the data hold and which settings cannot work well, each line once in a process."""
    if cfg.quiet:
        return
    lines = [run.dataset.about] if run.dataset.about else []
    found = advice(run.model, num_steps=run.total_steps, batch_size=cfg.batch_size) + signal_advice(run, cfg.seed)
    if conversion := getattr(run.model, "conversion", None):
        lines += conversion.lines()
    lines += [f"warning: {each}" for each in found]
    for line in lines:
        if line not in PRINTED:
            PRINTED.add(line)
            print(f"bnexp: {line}", file=sys.stderr)


def open_recorder(cfg: DictConfig, run: Run, overrides: Sequence[str], folder: Path) -> Recorder:
    """The recorder of the run; if ``folder`` holds a checkpoint, it is loaded into ``run``."""
    state = checkpoint.load(folder, run.device, run.model, mend=True)
    if state is not None:
        with fitting(folder / checkpoint.NAME):
            run.load_state_dict(state)
    remember_place(folder, cfg)  # which the checkpoint has accepted
    computed = computed_with(run.device, run.precision)
    status = Status(folder, str(run.device), list(overrides), goes_on=state is not None)
    status.update(**computed)
    writer = Writer(folder, step=run.num_steps)
    writer.describe(
        OmegaConf.to_yaml(cfg, resolve=True), hparams(cfg) | computed, f"{group_name(cfg)}-{run.device.type}"
    )
    best = -math.inf
    if cfg.keep == "best":
        with suppress(ValueError):  # readings that no run wrote set no best
            best = max((merit(line, len(run.dataset.valid) > 0) for line in read_lines(folder / METRICS)), default=best)
    return Recorder(writer, status, folder, cfg.keep, best)


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Turn any error raised while the checkpoint at ``path`` is loaded into :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = f"{path}: not the checkpoint of this run ({type(error).__name__}: {error})"
        raise UserError(f"{what}; put back the run's own") from error


def open_job(
    cfg: DictConfig, overrides: Sequence[str], datasets: dict[str, Dataset] | None = None
) -> tuple[Run, Recorder]:
    """The run of a job, at its last checkpoint if there is one, and its recorder. The caller holds the job's lock."""
    write_new(Path(cfg.out) / CONFIG, OmegaConf.to_yaml(cfg, resolve=True))
    run = build.build(cfg, datasets)
    advise(cfg, run)
    return run, open_recorder(cfg, run, overrides, Path(cfg.out))


def fail(folder: Path, overrides: Sequence[str], error: Exception) -> str:
    """Write the status of a job that did not start because of ``error``; returns that status, ``failed``."""
    try:
        status = Status(folder, "none", list(overrides))
        status.update(status="failed", error=first_line(error), traceback=traceback.format_exc())
    except OSError as second:
        error.add_note(f"and the status could not be written: {second}")
    if isinstance(error, OSError):
        print(f"bnexp: error: {not_written(error, folder)}", file=sys.stderr)
    return "failed"
