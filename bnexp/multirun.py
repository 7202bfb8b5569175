"""Many runs by one command: ``bnexp train -m`` job by job through Hydra's launcher, ``bnexp compare`` in lockstep."""

import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from bnexp import build, progress
from bnexp.compare import COLUMNS, Contestant, lockstep, standings
from bnexp.compose import composed, session
from bnexp.data.dataset import Dataset
from bnexp.errors import UserError
from bnexp.explain import explained
from bnexp.figure import PANELS, curve
from bnexp.folder import DONE, STATUS, holder, in_other_hands, is_taken, read_status, taken
from bnexp.foreign import as_file_name
from bnexp.job import LAST, fail, open_job, run_job
from bnexp.readings import Band
from bnexp.records import read_runs
from bnexp.replicas import check_sweep, fold_all, tell_alone, together
from bnexp.report import report, show_sweep
from bnexp.run import Run
from bnexp.signals import Interrupted, deferred_signals
from bnexp.sweep import Grid, Job, default_folder, expand, open_folder
from bnexp.variants import HOUSEKEEPING, Variant, find_key, into_variants, named
from bnexp.writer import write_bands, write_layout


def train(arguments: Sequence[str]) -> int:
    """``bnexp train -m``: every job of the sweep that is not done yet; 1 if any failed."""
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


def read_grid(arguments: Sequence[str]) -> Grid:
    with explained(arguments):
        return expand(arguments, GlobalHydra.instance().config_loader())


def prepare(grid: Grid, kind: str) -> tuple[Path, list[Job], dict[str, DictConfig]]:
    """Compose and check every job, then open the folder: bad input ends here, before any work."""
    configs = {}
    for name, point in zip(grid.names, grid.points, strict=True):
        try:
            configs[name] = composed(point)
            build.check(configs[name], many=True)
        except UserError as error:
            raise UserError(f"{name}: {error}" if len(grid.names) > 1 else str(error)) from error
    check_sweep(grid, configs)
    folder = open_folder(grid, default_folder(kind), configs)
    return folder, grid.jobs(folder), configs


def run_all(grid: Grid, folder: Path, jobs: Sequence[Job], configs: dict[str, DictConfig]) -> bool:
    """Do every job that is not done, fold after fold and the rest by the launcher; returns whether any failed."""
    failed = False
    if next(iter(configs.values())).replicas > 1:
        groups = together([job for job in jobs if read_status(job.folder).get("status") not in DONE], configs)
        tell_alone(groups, configs)
        for members in groups:
            if len(members) > 1:
                with ExitStack() as locks:
                    take_all(members, locks)
                    failed |= race(members, configs, members[0].variant, configs[members[0].name].quiet)
        jobs = [members[0] for members in groups if len(members) == 1]
    return bool(launch(grid, folder, jobs, quiet=next(iter(configs.values())).quiet)) or failed


def launch(grid: Grid, folder: Path, jobs: Sequence[Job], *, quiet: bool) -> list[str]:
    """Hand jobs to the launcher until none is left to do or in anybody's hands; returns the names that failed."""
    cfg = hydra_config(grid, folder)
    with explained(grid.hydra):
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(GlobalHydra.instance().config_loader(), Callbacks(cfg)),
            task_function=run_job,
            config=cfg,
        )
    is_alone = cfg.hydra.launcher._target_.endswith("BasicLauncher")
    before = {job: written_at(job.folder) for job in jobs}
    waits = False
    failed: set[Job] = set()  # since we began, here or elsewhere; what failed earlier is tried again
    while True:
        statuses = {job: read_status(job.folder).get("status") for job in jobs}
        failed |= {job for job in jobs if statuses[job] == "failed" and written_at(job.folder) != before[job]}
        left = [job for job in jobs if statuses[job] not in DONE and job not in failed]
        if not left:
            return [job.name for job in failed if statuses[job] not in DONE]
        free = [job for job in left if not is_taken(job.folder)]
        if free:
            try:
                # Those who work side by side are asked too, by the same Ctrl-C, and write their checkpoints meanwhile.
                with nullcontext([]) if is_alone else deferred_signals(longer=2.0) as asked:
                    results = launcher.launch([job.arguments for job in free], initial_job_idx=0)
            finally:
                LAST.clear()
            for job, result in zip(free, results, strict=True):
                if (ended := result.return_value) == "failed":
                    failed.add(job)
                elif ended == "interrupted" or asked:
                    raise Interrupted
                elif ended in DONE and read_status(job.folder).get("status") not in DONE:
                    raise RuntimeError(f"{job.folder}: its job is {ended}, but not there")  # or we would go on for ever
            waits = False
        else:
            if not waits and not quiet:
                tell_wait(left)
            waits = True
            time.sleep(0.5)  # another process is at work on them; should it die, they are ours


def tell_wait(jobs: Sequence[Job]) -> None:
    """Say on stderr whom we wait for."""
    shown = ", ".join(f"{job.name} ({holder(job.folder)})" for job in jobs[:4]) + ", ..." * (len(jobs) > 4)
    print(f"bnexp: waiting for the jobs in other hands, to be done here should theirs die: {shown}", file=sys.stderr)


def hydra_config(grid: Grid, folder: Path) -> DictConfig:
    """What Hydra's launcher is made of."""
    fixed = [f"hydra.sweep.dir='{folder}'", "hydra.sweep.subdir=.", *grid.hydra]
    with explained(grid.hydra):
        return GlobalHydra.instance().hydra.compose_config("train", fixed, run_mode=RunMode.MULTIRUN)


def written_at(folder: Path) -> int:
    """When the status of the run was last written, 0 if never: tells a new failure from an old one."""
    path = folder / STATUS
    return path.stat().st_mtime_ns if path.exists() else 0


def compare(arguments: Sequence[str]) -> int:
    """``bnexp compare``: the runs of ``train -m`` in lockstep, and what they say together; 1 if any failed."""
    named = [word for word in arguments if word.startswith("baseline=")]
    with session(), ExitStack() as locks:
        grid = read_grid([word for word in arguments if word not in named])
        baseline = find_baseline(grid, named[-1].partition("=")[2] if named else None)
        folder, jobs, configs = prepare(grid, "compare")
        take_all(jobs, locks)
        quiet = next(iter(configs.values())).quiet
        try:
            failed = race(jobs, configs, baseline, quiet)
            conclude(folder, baseline, [job.folder for job in jobs if job.variant == baseline], quiet)
        except KeyboardInterrupt:
            print(f"to go on, repeat the command with out={folder}", file=sys.stderr)
            raise
        finally:
            print(folder, flush=True)
    return 1 if failed else 0


def find_baseline(grid: Grid, wanted: str | None) -> str:
    """The variant that all others are compared with: the first, unless ``wanted`` names one, or its overrides."""
    varied = [key for key in grid.swept if key not in HOUSEKEEPING]
    if not varied:
        raise UserError("compare: nothing varies but the seed; give a setting several values, norm=none,library say")
    words = [] if wanted is None else re.split(r",(?=[^,=]+=)", wanted)
    with explained(words):
        parsed = OverridesParser.create().parse_overrides([word for word in words if "=" in word])
    asked = {f"{each.get_key_element()}={each.get_value_element_as_str()}" for each in parsed}  # 1e-2 is 0.01
    for variant, point in zip(grid.variants, grid.points, strict=True):
        own = {word for word in point if word.partition("=")[0] in varied}
        if wanted in (None, variant) or (asked and asked <= own):
            return variant
    known = ", ".join(dict.fromkeys(grid.variants))
    raise UserError(f"baseline={wanted}: not among the variants, which are {known}; write baseline=norm=none, say")


def take_all(jobs: Sequence[Job], locks: ExitStack) -> None:
    """Hold every run's lock until ``locks`` are let go."""
    for job in jobs:
        if not locks.enter_context(taken(job.folder)):
            raise in_other_hands(job.folder)


def conclude(
    folder: Path,
    baseline: str,
    runs: Sequence[Path],
    quiet: bool,
    best_over: str | None = None,
    names: Mapping[Path, str] | None = None,
) -> None:
    """Report on the runs in ``folder`` against ``runs``, the baseline's; write figures, tables and bands there."""
    names = names or {}
    label = find_label(runs, best_over, names)
    if label is not None:
        comparison = report([folder], baseline=label, best_over=best_over, out=folder, quiet=quiet, names=names)
        write_band_runs(folder, comparison.variants)
        return
    if not quiet:
        show_sweep(folder)
    print(f"no comparison: no run of the baseline, {baseline}, came to its end", file=sys.stderr)


def find_label(folders: Sequence[Path], best_over: str | None, names: Mapping[Path, str]) -> str | None:
    """How the report calls the variant whose runs lie in ``folders``; None if none of them came to its end."""
    records = named(read_runs([folders[0].parent])[0], names)
    for variant in into_variants(records, ignore=best_over and find_key(records, best_over))[0]:
        if any(run.path in folders for run in variant.runs + variant.diverged):
            return variant.label
    return None


def race(jobs: Sequence[Job], configs: dict[str, DictConfig], baseline: str, quiet: bool) -> bool:
    """Take up every job that is not done and drive them in lockstep; returns whether any failed."""
    datasets: dict[str, Dataset] = {}
    contestants, failed = [], False
    runs: dict[Job, Run] = {}
    for job in sorted(jobs, key=lambda job: job.variant != baseline):
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
        runs[job] = run
    folds = fold_all(runs, configs)
    with progress.LiveTable(COLUMNS, quiet=quiet) as table:
        for step in lockstep(contestants):
            for fold in folds:
                fold.leave(each.run for each in contestants if not each.is_running)
            last = max(contestants, key=lambda each: each.run.total_steps).run.total_steps
            is_milestone = step == last or step % contestants[0].plan.eval_every == 0
            table.update(step, last, is_milestone, lambda: standings(contestants))
    return failed or any(each.ended["status"] == "failed" for each in contestants)


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
        write_bands(bands, as_file_name(variant.label), rows)
    write_layout(bands, tags)
