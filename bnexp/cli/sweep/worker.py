"""Runs one job of a sweep, in the process that Hydra's launcher calls."""

import gc
import json
import math
import os
import signal
import sys
import threading
import time
from functools import cache
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bnexp import startup
from bnexp.cli.sweep import jobs
from bnexp.cli.sweep.lockstep import LAST
from bnexp.config import build, parts
from bnexp.config.start import fail, open_job
from bnexp.data.dataset import Dataset
from bnexp.errors import StorageError
from bnexp.store.run_folder import DONE, read_status, taken
from bnexp.train import progress
from bnexp.train.drive import drive
from bnexp.train.interrupt import PATIENCE, Interrupted, handle, raised_signals
from bnexp.train.loop import Loop

PARENT = os.getppid()
interrupted_at = -math.inf  # time of the last interrupt in this process, if it is one of several


def run_job(cfg: DictConfig) -> str:
    """Run one job and return its status, or ``taken`` if another process holds it.

    With jobs in parallel, KeyboardInterrupt becomes the status ``interrupted`` of this job and of those that would come
    next. If it were raised, the launcher would end the other jobs before they have written a checkpoint.
    """
    is_alone = HydraConfig.get().launcher._target_.endswith("BasicLauncher")
    try:
        if is_alone:
            return run_held(cfg, is_alone)
        begin_worker()
        with raised_signals():
            return run_held(cfg, is_alone) if time.monotonic() - interrupted_at > 10 else "interrupted"
    except KeyboardInterrupt:
        if is_alone:
            raise
        end_jobs()
        return "interrupted"
    except StorageError as error:
        print(f"bnexp: error: {error}", file=sys.stderr)
        return "failed"


def end_jobs(*_: object) -> None:
    """Have the next jobs of this worker process end as ``interrupted``, or end it if its parent process has died."""
    global interrupted_at
    interrupted_at = time.monotonic()
    if os.getppid() != PARENT:
        os._exit(1)  # nobody waits for the jobs


@cache
def begin_worker() -> None:
    """Unblock signals, with :func:`end_jobs` as their handler, and send SIGTERM when the parent process has died."""
    handle(end_jobs)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, startup.SIGNALS)

    def watch() -> None:
        while True:
            if os.getppid() != PARENT:
                os.kill(os.getpid(), signal.SIGTERM)  # a run writes its checkpoint first
                time.sleep(2 * PATIENCE)
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()


def run_held(cfg: DictConfig, is_alone: bool) -> str:
    """:func:`run_job`, but raise KeyboardInterrupt and :class:`StorageError`."""
    hydra_cfg = HydraConfig.get()
    overrides = [word for word in hydra_cfg.overrides.task if not word.startswith("out=")]
    folder = Path(cfg.out)
    with taken(folder) as mine:
        if not mine:
            return "taken"
        status = read_status(folder).get("status")
        if status in DONE:
            return status
        if not is_alone:
            startup.keep_memory()
            startup.prepare_output()
            gc.freeze()  # imported objects stay anyway; a worker that does not check them for garbage is faster
            share_machine(cfg, hydra_cfg)
        try:
            run, recorder = open_job(cfg, overrides, cached_datasets(cfg))
        except Exception as error:
            return fail(folder, overrides, error)
        shown = progress.make_progress(folder.name, quiet=cfg.quiet, in_sweep=True)
        try:
            return drive(Loop(run, build.plan_of(cfg, run.batches.steps_per_epoch), recorder), shown)
        except StorageError:
            raise
        except OSError as error:  # progress cannot be shown; the next job could not show its own either
            raise Interrupted from error
        except Exception:
            return "failed"  # status.json has the reason


def cached_datasets(cfg: DictConfig) -> dict[str, Dataset]:
    """The dataset of the last job if this job has the same one, else an empty dictionary. Other datasets are freed."""
    device = parts.find_device(cfg.device)
    if device.type == "cuda":
        gc.collect()  # frees the last job's model and graphs, which refer to each other; torch's allocator does not
    keys = {build.data_key(cfg, each) for each in (device, torch.device("cpu"))}
    for other in LAST.keys() - keys:
        del LAST[other]
    return LAST


def share_machine(cfg: DictConfig, hydra_cfg: DictConfig) -> None:
    """Set the GPU of one of several parallel jobs, each gets the next one, and its share of the usable cores."""
    if cfg.device in ("auto", "cuda") and torch.cuda.is_available():
        cfg.device = f"cuda:{hydra_cfg.job.num % torch.cuda.device_count()}"
    if cfg.threads == "auto":
        cfg.threads = str(thread_share(cfg, hydra_cfg.launcher))


def thread_share(cfg: DictConfig, launcher: DictConfig) -> int:
    """The number of threads of one of several parallel jobs: at most its share of the usable cores.

    A negative ``n_jobs`` of joblib counts from the number of cores. Other launchers do not say how many jobs run at a
    time; their jobs get 1 thread.
    """
    if "n_jobs" not in launcher:
        return 1
    num_cores, n_jobs = len(os.sched_getaffinity(0)), launcher.n_jobs or 1
    num_jobs = len(json.loads((Path(cfg.out).parent / jobs.SWEEP).read_bytes())["jobs"])
    at_most = num_cores // min(num_jobs, n_jobs if n_jobs > 0 else max(1, num_cores + 1 + n_jobs))
    if at_most < 2:
        return 1
    source = parts.part(cfg, "data")()
    model = parts.make_model(cfg, source)
    return build.count_threads(cfg, model, source.in_shape, parts.find_device(cfg.device), at_most)
