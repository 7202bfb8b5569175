"""The folder of a sweep: made or opened again, its jobs checked, its runs locked."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from bnexp.cli.sweep.grid import Grid, Job
from bnexp.cli.sweep.lockstep import check_splits, check_sweep
from bnexp.config import check
from bnexp.config.compose import composed
from bnexp.config.schema import Train
from bnexp.errors import UserError, unread
from bnexp.store.files import finite, write_new
from bnexp.store.run_folder import DONE, check_free, in_other_hands, new_folder, read_status, taken
from bnexp.store.settings import LOOKING, NUMBERS, SEED, decides, differences, first_few
from bnexp.store.untrusted import read_json

SWEEP, BANDS = "sweep.json", "bands"
FIXED = NUMBERS | SEED | LOOKING  # settings that decide these must be the same at every start of a sweep


def prepare(grid: Grid, kind: str) -> tuple[Path, list[Job]]:
    """Compose and check the config of every job, then open the sweep's folder; returns the folder and the jobs.

    By default the folder is a new one, ``outputs/DATE/KIND-TIME``. Raises :class:`UserError` before any work is done.
    """
    configs = {}
    for name, _, overrides in grid.points:
        try:
            configs[name] = composed(overrides)
            check.check(configs[name], free=False, many=True)
        except UserError as error:
            raise UserError(f"{name}: {error}" if len(grid.points) > 1 else str(error)) from error
    check_sweep(grid.hydra, configs)
    if grid.out is not None:
        check_free(grid.out, SWEEP)
    begun = Path(grid.out) if grid.out and (Path(grid.out) / SWEEP).exists() else None
    check_splits({k: v for k, v in configs.items() if not begun or read_status(begun / k).get("status") not in DONE})
    text = json.dumps(finite({"jobs": {name: _comparable(cfg) for name, cfg in configs.items()}}), indent=1)
    if grid.out is None:
        folder = new_folder(Path("outputs") / time.strftime("%Y-%m-%d"), f"{kind}-{time.strftime('%H%M%S')}")
        write_new(folder / SWEEP, text)
    else:
        folder = Path(grid.out)
        open_folder(folder, text, configs)
    jobs = [Job(*point, folder / point.name, configs[point.name]) for point in grid.points]
    for job in jobs:
        job.cfg.out = str(job.folder)
    return folder, jobs


@contextmanager
def all_taken(jobs: Sequence[Job]) -> Iterator[None]:
    """Hold the lock of every run; :class:`UserError` if another process holds one."""
    with ExitStack() as locks:
        for job in jobs:
            if not locks.enter_context(taken(job.folder)):
                raise in_other_hands(job.folder)
        yield


@contextmanager
def folder_told(folder: Path) -> Iterator[None]:
    """Print the folder last, however the work inside ends, and on stderr how to go on if it is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"to go on, repeat the command with out={folder}", file=sys.stderr)
        raise
    finally:
        print(folder, flush=True)


def open_folder(folder: Path, text: str, names: Iterable[str]) -> None:
    """Make ``folder`` the sweep that ``text`` (sweep.json) lists, with jobs of these names, or open it again.

    Raises :class:`UserError` for a folder that holds another sweep.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not write_new(folder / SWEEP, text):
        _check_same_sweep(folder, _read_jobs(folder), json.loads(text)["jobs"])
    for path in (folder / name for name in (*names, BANDS)):
        if path.is_symlink():
            raise UserError(f"{path}: a link, and nothing is written through links; remove it, or put a folder there")


def _read_jobs(folder: Path) -> dict[str, dict]:
    """The settings of every job of the sweep in ``folder``, by name."""
    try:
        jobs = read_json(folder / SWEEP).get("jobs")
    except OSError as error:
        raise unread(error, folder / SWEEP) from error
    except ValueError as error:
        raise UserError(f"out={folder}: holds no sweep that can go on ({error}); choose another") from error
    if not isinstance(jobs, dict) or not all(isinstance(each, dict) for each in jobs.values()):
        raise UserError(f"out={folder}: holds no sweep that can go on ({SWEEP} lists no jobs); choose another")
    return jobs


def _comparable(cfg: DictConfig) -> dict:
    """The settings of a job that ``sweep.json`` lists: all but those that may change between two starts."""
    config = OmegaConf.to_container(cfg, resolve=True)
    return {key: value for key, value in config.items() if decides(key) & FIXED}


def _check_same_sweep(folder: Path, there: Mapping[str, dict], here: Mapping[str, dict]) -> None:
    """Raise :class:`UserError` if the jobs ``there``, in the folder, are not those of the command line, ``here``."""
    found = [f"{name} only there" for name in there if name not in here]
    found += [f"{name} only here" for name in here if name not in there]
    defaults = OmegaConf.to_container(OmegaConf.structured(Train))  # of settings that are newer than that sweep
    for name in here.keys() & there.keys():
        old = {key: defaults[key] for key in here[name] if key in defaults} | there[name]
        found += differences(old, here[name])
    if found:
        raise UserError(
            f"out={folder}: holds another sweep ({first_few(found)}); repeat its command or choose another folder"
        )
