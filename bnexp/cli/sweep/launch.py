"""Runs the jobs of a sweep through Hydra's launcher until none is left."""

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from bnexp.cli.sweep.grid import Job
from bnexp.cli.sweep.jobs import all_taken
from bnexp.cli.sweep.lockstep import LAST, race, tell_alone, together
from bnexp.cli.sweep.worker import cached_datasets, run_job
from bnexp.config.compose import composed_with_hydra
from bnexp.config.explain import explained
from bnexp.errors import UserError
from bnexp.store.run_folder import DONE, STATUS, holder, is_taken, read_status
from bnexp.train.interrupt import Interrupted, blocked_in_children, deferred_signals


def run_all(hydra: Sequence[str], folder: Path, jobs: Sequence[Job]) -> bool:
    """Run every job that is not done: folded ones here, the others by Hydra's launcher; returns whether any failed."""
    failed = False
    if jobs[0].cfg.replicas > 1:
        groups = together([job for job in jobs if read_status(job.folder).get("status") not in DONE])
        tell_alone(groups)
        for group in groups:
            if len(group) > 1:
                with all_taken(group):
                    failed |= race(group, cached_datasets(group[0].cfg))
        jobs = [group[0] for group in groups if len(group) == 1]
    try:
        return launch(hydra, folder, jobs) or failed
    finally:
        LAST.clear()


def launch(hydra: Sequence[str], folder: Path, jobs: Sequence[Job]) -> bool:
    """Hand jobs to the launcher until all are done, here or in other processes; returns whether any failed."""
    cfg = hydra_config(hydra, folder)
    with explained(hydra):
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(GlobalHydra.instance().config_loader(), Callbacks(cfg)),
            task_function=run_job,
            config=cfg,
        )
    is_alone = cfg.hydra.launcher._target_.endswith("BasicLauncher")
    if not is_alone:
        LAST.clear()
    before = {job: written_at(job.folder) for job in jobs}
    is_waiting = False
    failed: set[Job] = set()  # since this start, here or elsewhere; earlier failures are tried again
    while True:
        statuses = {job: read_status(job.folder).get("status") for job in jobs}
        failed |= {job for job in jobs if statuses[job] == "failed" and written_at(job.folder) != before[job]}
        left = [job for job in jobs if statuses[job] not in DONE and job not in failed]
        if not left:
            return any(statuses[job] not in DONE for job in failed)
        free = [job for job in left if not is_taken(job.folder)]
        if free:
            with nullcontext([]) if is_alone else passed_on_signals() as asked:
                results = launcher.launch([job.arguments for job in free], initial_job_idx=0)
            for job, result in zip(free, results, strict=True):
                if (ended := result.return_value) == "failed":
                    failed.add(job)
                elif ended == "interrupted" or asked:
                    raise Interrupted
                elif ended in DONE and read_status(job.folder).get("status") not in DONE:
                    raise RuntimeError(f"{job.folder}: its job is {ended}, its status is not")  # or this would not end
            is_waiting = False
        else:
            if not is_waiting and not jobs[0].cfg.quiet:
                tell_wait(left)
            is_waiting = True
            time.sleep(0.5)  # if a process that holds jobs dies, they are run here


@contextmanager
def passed_on_signals() -> Iterator[list[float]]:
    """:func:`deferred_signals`, which worker processes get too, with time to write their checkpoints."""

    def stop_workers() -> None:
        for worker in multiprocessing.active_children():
            worker.terminate()  # who has received the signal already passes over this one

    with deferred_signals(longer=2.0, tell=stop_workers) as asked, blocked_in_children():
        try:
            yield asked
        except Exception:
            if asked:  # a worker that died of it is no error
                raise Interrupted from None
            raise


def tell_wait(jobs: Sequence[Job]) -> None:
    """Print on stderr which jobs other processes hold."""
    shown = ", ".join(f"{job.name} ({holder(job.folder)})" for job in jobs[:4]) + ", ..." * (len(jobs) > 4)
    print(f"bnexp: waiting for jobs that other processes hold: {shown}", file=sys.stderr)


def hydra_config(words: Sequence[str], folder: Path = Path()) -> DictConfig:
    """The config that Hydra makes of its own ``words``; :class:`UserError` for a launcher that does not exist."""
    with explained(words):
        fixed = [f"hydra.sweep.dir='{folder}'", "hydra.sweep.subdir=."]
        return composed_with_hydra([*fixed, *words, "hydra.job.chdir=false"], RunMode.MULTIRUN)  # null means true


def refuse_launcher(hydra: Sequence[str]) -> None:
    """Raise :class:`UserError` for a launcher: runs in lockstep have none."""
    for word in hydra:
        if word.lstrip("+~").replace("/", ".").startswith("hydra.launcher"):
            raise UserError(f"{word}: these runs take turns in one process, without a launcher; leave it out")


def written_at(folder: Path) -> int:
    """The time in ns when the run's status was last written, 0 if never; it tells a new failure from an old one."""
    path = folder / STATUS
    return path.stat().st_mtime_ns if path.exists() else 0
