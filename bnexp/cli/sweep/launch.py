"""Runs the jobs of a sweep through Hydra's launcher, until none is left."""

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from bnexp.cli.sweep.grid import Grid, Job
from bnexp.cli.sweep.jobs import take_all
from bnexp.cli.sweep.lockstep import race, tell_alone, together
from bnexp.cli.sweep.worker import LAST, run_job
from bnexp.config.compose import composed_with_hydra
from bnexp.config.explain import explained
from bnexp.errors import UserError
from bnexp.store.run_folder import DONE, STATUS, holder, is_taken, read_status
from bnexp.train.interrupt import Interrupted, deferred_signals


def run_all(grid: Grid, folder: Path, jobs: Sequence[Job], configs: dict[str, DictConfig]) -> bool:
    """Run every job that is not done: folds first, the others by the launcher. Returns whether any failed."""
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
    """Hand jobs to the launcher until all are done, here or in other processes; returns the names that failed."""
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
    failed: set[Job] = set()  # since this start, here or elsewhere; earlier failures are tried again
    while True:
        statuses = {job: read_status(job.folder).get("status") for job in jobs}
        failed |= {job for job in jobs if statuses[job] == "failed" and written_at(job.folder) != before[job]}
        left = [job for job in jobs if statuses[job] not in DONE and job not in failed]
        if not left:
            return [job.name for job in failed if statuses[job] not in DONE]
        free = [job for job in left if not is_taken(job.folder)]
        if free:
            try:
                # Parallel workers get the same Ctrl-C and need time to write their checkpoints.
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
                    raise RuntimeError(f"{job.folder}: its job is {ended}, its status is not")  # or this would not end
            waits = False
        else:
            if not waits and not quiet:
                tell_wait(left)
            waits = True
            time.sleep(0.5)  # other processes hold them; if one dies, its jobs are done here


def tell_wait(jobs: Sequence[Job]) -> None:
    """Say on stderr which jobs other processes hold."""
    shown = ", ".join(f"{job.name} ({holder(job.folder)})" for job in jobs[:4]) + ", ..." * (len(jobs) > 4)
    print(f"bnexp: waiting for jobs that other processes hold: {shown}", file=sys.stderr)


def hydra_config(grid: Grid, folder: Path) -> DictConfig:
    """The config of Hydra's launcher."""
    with explained(grid.hydra):
        fixed = [f"hydra.sweep.dir='{folder}'", "hydra.sweep.subdir=."]
        cfg = composed_with_hydra([*fixed, *grid.hydra], RunMode.MULTIRUN)
    if cfg.hydra.job.chdir:
        raise UserError("hydra.job.chdir=true: jobs that change the folder would write elsewhere; leave it out")
    return cfg


def written_at(folder: Path) -> int:
    """When the status of the run was last written, in ns, 0 if never; it tells a new failure from an old one."""
    path = folder / STATUS
    return path.stat().st_mtime_ns if path.exists() else 0
