"""The folder of a sweep: opened or found again, its jobs checked, its runs locked."""

import itertools
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from bnexp.cli.sweep.grid import Grid, Job
from bnexp.cli.sweep.lockstep import check_sweep
from bnexp.config import check
from bnexp.config.compose import composed
from bnexp.config.schema import Train
from bnexp.errors import UserError
from bnexp.store.files import finite, write_new
from bnexp.store.run_folder import check_free, in_other_hands, taken
from bnexp.store.settings import LOOKING, NUMBERS, SEED, decides, differences, first_few
from bnexp.store.untrusted import read_json


def prepare(grid: Grid, kind: str) -> tuple[Path, list[Job], dict[str, DictConfig]]:
    """Compose and check every job, then open the folder: bad input ends here, before any work."""
    configs = {}
    for name, point in zip(grid.names, grid.points, strict=True):
        try:
            configs[name] = composed(point)
            check.check(configs[name], many=True)
        except UserError as error:
            raise UserError(f"{name}: {error}" if len(grid.names) > 1 else str(error)) from error
    check_sweep(grid, configs)
    folder = open_folder(grid, default_folder(kind), configs)
    return folder, grid.jobs(folder), configs


def take_all(jobs: Sequence[Job], locks: ExitStack) -> None:
    """Hold every run's lock until ``locks`` is closed; :class:`UserError` if another process holds one."""
    for job in jobs:
        if not locks.enter_context(taken(job.folder)):
            raise in_other_hands(job.folder)


NAME, BANDS = "sweep.json", "bands"
FIXED = NUMBERS | SEED | LOOKING  # settings that decide these must be the same at every start of a sweep


def open_folder(grid: Grid, default: Path, configs: dict[str, DictConfig]) -> Path:
    """The sweep's folder, new or found again; :class:`UserError` for one that holds another sweep.

    ``configs`` holds the composed config of every job by name.
    """
    content = {"jobs": {name: _comparable(cfg) for name, cfg in configs.items()}}
    text = json.dumps(finite(content), indent=1)
    if grid.out is None:
        for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))):
            folder = default.with_name(default.name + suffix)
            check_free(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            write_new(folder / NAME, text)
            return folder
    check_free(grid.out)
    folder = Path(grid.out)
    _check_alone(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not write_new(folder / NAME, text):
        _check_same_sweep(folder, _read_jobs(folder), json.loads(text)["jobs"])
    for path in (*(folder / name for name in configs), folder / BANDS):
        if path.is_symlink():
            raise UserError(f"{path}: a link to another place, where nothing is written; remove it, or move it here")
    return folder


def _check_alone(folder: Path) -> None:
    """Raise :class:`UserError` for a folder with runs or results of something else; other loose files may be there."""
    if not folder.is_dir():
        return
    entries = [each for each in folder.iterdir() if not each.name.startswith(".")]
    in_the_way = [each.name for each in entries if each.is_dir() or each.stem in ("comparison", "study")]
    if in_the_way and not (folder / NAME).exists():  # checked last: another process may be making it
        raise UserError(f"out={folder}: holds {min(in_the_way)} and no sweep; choose a new folder, or an empty one")


def _read_jobs(folder: Path) -> dict[str, dict]:
    """The config of every job of the sweep that ``folder`` holds, by name."""
    try:
        jobs = read_json(folder / NAME).get("jobs")
    except (OSError, ValueError) as error:
        raise UserError(f"out={folder}: holds no sweep that can go on ({error}); choose another") from error
    if not isinstance(jobs, dict) or not all(isinstance(each, dict) for each in jobs.values()):
        raise UserError(f"out={folder}: holds no sweep that can go on ({NAME} lists no jobs); choose another")
    return jobs


def _comparable(cfg: DictConfig) -> dict:
    """What a job is, as ``sweep.json`` lists it: all settings but those that may change between two starts."""
    config = OmegaConf.to_container(cfg, resolve=True)
    return {key: value for key, value in config.items() if decides(key) & FIXED}


def _check_same_sweep(folder: Path, there: dict, here: dict) -> None:
    """Raise :class:`UserError` if the sweep in the folder is another one."""
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


def default_folder(kind: str) -> Path:
    return Path("outputs") / time.strftime("%Y-%m-%d") / f"{kind}-{time.strftime('%H%M%S')}"
