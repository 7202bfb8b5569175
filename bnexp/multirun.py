"""Many runs by one command: ``bnexp train -m`` job by job through Hydra's launcher, ``bnexp compare`` in lockstep."""

import shutil
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from bnexp import build, loop, progress
from bnexp.commands import composed, open_journal, session
from bnexp.compare import COLUMNS, Contestant, lockstep, standings
from bnexp.data.dataset import Dataset
from bnexp.errors import UserError
from bnexp.explain import explained
from bnexp.figure import PANELS, curve
from bnexp.folder import CONFIG, DONE, Status, is_taken, read_status, taken, write_new
from bnexp.readings import Band
from bnexp.report import report, show_sweep
from bnexp.run import Run
from bnexp.sweep import Grid, Job, default_folder, expand, open_folder
from bnexp.variants import Variant
from bnexp.writer import write_bands, write_layout


def train(arguments: Sequence[str]) -> int:
    """``bnexp train -m``: every job of the sweep that is not done yet; 1 if any failed."""
    with session():
        grid = read_grid(arguments)
        folder, jobs, configs = prepare(grid, "sweep")
        quiet = next(iter(configs.values())).quiet
        try:
            failed = launch(grid, folder, jobs)
        finally:
            if not quiet:
                show_sweep(folder)
            print(folder, flush=True)
    return 1 if failed else 0


def read_grid(arguments: Sequence[str]) -> Grid:
    with explained(arguments):
        return expand(arguments, GlobalHydra.instance().config_loader())


def prepare(grid: Grid, kind: str) -> tuple[Path, list[Job], dict[str, DictConfig]]:
    """Compose and check every job, then open the folder: bad input ends here, before any work."""
    configs = {name: composed(point) for name, point in zip(grid.names, grid.points, strict=True)}
    for name, cfg in configs.items():
        try:
            build.check(cfg)
        except UserError as error:
            raise UserError(f"{name}: {error}" if len(configs) > 1 else str(error)) from error
    folder = open_folder(grid, default_folder(kind), configs)
    return folder, grid.jobs(folder), configs


def launch(grid: Grid, folder: Path, jobs: Sequence[Job]) -> list[str]:
    """Hand jobs to the launcher until none is left to do or in anybody's hands; returns the names that failed."""
    fixed = [f"hydra.sweep.dir='{folder}'", "hydra.sweep.subdir=.", *grid.hydra]
    with explained(grid.hydra):
        cfg = GlobalHydra.instance().hydra.compose_config("train", fixed, run_mode=RunMode.MULTIRUN)
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(GlobalHydra.instance().config_loader(), Callbacks(cfg)),
            task_function=run_job,
            config=cfg,
        )
    began = time.time()
    while True:
        statuses = {job: read_status(job.folder) for job in jobs}
        failed = [
            job.name for job, status in statuses.items()
            if status.get("status") == "failed" and status["started"] >= began
        ]  # fmt: skip
        left = [job for job in jobs if statuses[job].get("status") not in DONE and job.name not in failed]
        if not left:
            return failed
        free = [job for job in left if not is_taken(job.folder)]
        if free:
            launcher.launch([job.arguments for job in free], initial_job_idx=0)
        else:
            time.sleep(0.5)  # another process is at work on them; should it die, they are ours


def compare(arguments: Sequence[str]) -> int:
    """``bnexp compare``: the runs of ``train -m`` in lockstep, and what they say together; 1 if any failed."""
    named = [word for word in arguments if word.startswith("baseline=")]
    with session(), ExitStack() as locks:
        grid = read_grid([word for word in arguments if word not in named])
        baseline = find_baseline(grid, named[-1].partition("=")[2] if named else None)
        folder, jobs, configs = prepare(grid, "compare")
        for job in jobs:
            if not locks.enter_context(taken(job.folder)):
                raise UserError(f"{job.folder}: another process is at work on this run; wait for it")
        quiet = next(iter(configs.values())).quiet
        try:
            failed = race(jobs, configs, baseline, quiet)
            comparison = report([folder], baseline=baseline, out=folder, quiet=quiet)
            write_band_runs(folder, comparison.variants)
        finally:
            print(folder, flush=True)
    return 1 if failed else 0


def find_baseline(grid: Grid, wanted: str | None) -> str:
    """The overrides of the variant that all others are compared with: the first, unless ``wanted`` names one."""
    varied = [key for key in grid.swept if key != "seed"]
    if not varied:
        raise UserError("compare: nothing varies but the seed; give a setting several values, norm=none,library say")
    for variant, point in zip(grid.variants, grid.points, strict=True):
        words = [word for word in point if word.partition("=")[0] in varied]
        if wanted is None or wanted == variant or set(wanted.split(",")) <= set(words):
            return ",".join(words)
    known = ", ".join(dict.fromkeys(grid.variants))
    raise UserError(f"baseline={wanted}: not among the variants, which are {known}; write baseline=norm=none, say")


def race(jobs: Sequence[Job], configs: dict[str, DictConfig], baseline: str, quiet: bool) -> bool:
    """Take up every job that is not done and drive them in lockstep; returns whether any failed."""
    datasets: dict[str, Dataset] = {}
    contestants, failed = [], False
    for job in sorted(jobs, key=lambda job: not set(baseline.split(",")) <= set(job.overrides)):
        if read_status(job.folder).get("status") in DONE:
            continue
        cfg = configs[job.name]
        cfg.out = str(job.folder)
        try:
            run, journal = open_job(cfg, job.overrides, datasets)
        except Exception as error:
            fail(job.folder, job.overrides, error)
            failed = True
            continue
        plan = build.plan_of(cfg, run.batches.steps_per_epoch)
        contestants.append(Contestant(job.variant, cfg.seed, run, journal, plan))
    with progress.LiveTable(COLUMNS, quiet=quiet) as table:
        for step in lockstep(contestants):
            last = max(contestants, key=lambda each: each.run.total_steps).run.total_steps
            is_milestone = step == last or step % contestants[0].plan.eval_every == 0
            table.update(step, last, is_milestone, lambda: standings(contestants))
    return failed or any(each.ended["status"] == "failed" for each in contestants)


def open_job(
    cfg: DictConfig, overrides: Sequence[str], datasets: dict[str, Dataset] | None = None
) -> tuple[Run, loop.Journal]:
    """The run of a job whose folder is ours, at its last checkpoint if there is one, and its journal."""
    write_new(Path(cfg.out) / CONFIG, OmegaConf.to_yaml(cfg, resolve=True))
    run = build.build(cfg, datasets)
    return run, open_journal(cfg, run, overrides, Path(cfg.out))


def run_job(cfg: DictConfig) -> str:
    """One job, in whichever process the launcher runs it; returns its status and never raises but on Ctrl-C."""
    hydra_cfg = HydraConfig.get()
    overrides = [word for word in hydra_cfg.overrides.task if not word.startswith("out=")]
    is_alone = hydra_cfg.launcher._target_.endswith("BasicLauncher")
    folder = Path(cfg.out)
    with taken(folder) as mine:
        if not mine:
            return "taken"
        status = read_status(folder).get("status")
        if status in DONE:
            return status
        if not is_alone:
            spread(cfg, hydra_cfg.job.num)
        try:
            run, journal = open_job(cfg, overrides)
        except Exception as error:
            return fail(folder, overrides, error)
        shown = progress.make_progress(folder.name, quiet=cfg.quiet, in_sweep=True)
        try:
            return loop.drive(run, build.plan_of(cfg, run.batches.steps_per_epoch), journal, shown)
        except Exception:
            return "failed"  # and the journal says why


def spread(cfg: DictConfig, number: int) -> None:
    """Jobs side by side get one CPU thread each, or the GPUs in turn."""
    if cfg.threads == "auto":
        cfg.threads = "1"
    if cfg.device in ("auto", "cuda") and torch.cuda.is_available():
        cfg.device = f"cuda:{number % torch.cuda.device_count()}"


def fail(folder: Path, overrides: Sequence[str], error: Exception) -> str:
    """Write down a job that did not even start."""
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    status = Status(folder, "none", list(overrides))
    status.update(status="failed", error=reason.splitlines()[0], traceback=traceback.format_exc())
    return "failed"


def write_band_runs(folder: Path, variants: Sequence[Variant]) -> None:
    """A TensorBoard run of means and intervals per variant under ``bands/``, and the layout that draws them."""
    tags = [tag for tag in PANELS if any(tag in run.curves for variant in variants for run in variant.runs)]
    bands = folder / "bands"
    shutil.rmtree(bands, ignore_errors=True)  # from an earlier start of this comparison; made anew from its runs
    for variant in variants:
        rows = [
            (step, Band(tag, mean, low, high)) for tag in tags
            for step, mean, low, high in zip(*curve(variant, tag), strict=True)
        ]  # fmt: skip
        write_bands(bands, variant.label, rows)
    write_layout(bands, tags)
