"""Drives the runs of a sweep in lockstep, and decides which are computed as one (``replicas`` at a time)."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise

import torch
from omegaconf import DictConfig, OmegaConf

from bnexp.cli.sweep.grid import Job
from bnexp.config import build, parts
from bnexp.config.explain import parse_words
from bnexp.config.start import fail, open_job
from bnexp.data.dataset import Dataset
from bnexp.engines.base import traits_of
from bnexp.engines.fold import Fold, check_foldable
from bnexp.errors import UserError
from bnexp.store.run_folder import DONE, read_status
from bnexp.store.settings import LOOKING, NUMBERS, PLACE, select
from bnexp.train import progress
from bnexp.train.drive import Group, lockstep, stop_all
from bnexp.train.loop import Loop

COLUMNS = ("", "runs", "loss/train", "loss/valid", "accuracy/valid", "difference")  # of the live table
LAST: dict[str, Dataset] = {}  # the dataset that this process loaded last, for a check or a job


def race(jobs: Sequence[Job], datasets: dict[str, Dataset] | None = None) -> bool:
    """Open every job that is not done and drive them all in lockstep; returns whether any failed.

    ``datasets`` is that of :func:`build`; by default it begins with what was loaded for the check of the splits.
    """
    if datasets is None:
        datasets = dict(LAST)
        LAST.clear()
    loops: dict[Job, Loop] = {}
    has_failed = False
    try:
        for job in jobs:
            if read_status(job.folder).get("status") in DONE:
                continue
            try:
                run, recorder = open_job(job.cfg, job.overrides, datasets)
            except Exception as error:
                fail(job.folder, job.overrides, error)
                has_failed = True
                continue
            loops[job] = Loop(run, build.plan_of(job.cfg, run.batches.steps_per_epoch), recorder)
        steps = lockstep(groups_of(loops))
    except KeyboardInterrupt as reason:
        raise stop_all(list(loops.values()), reason) from None
    with closing(steps), progress.LiveTable(COLUMNS, quiet=jobs[0].cfg.quiet) as table:
        for step in steps:
            last = max(loop.run.total_steps for loop in loops.values())
            is_milestone = step == last or step % next(iter(loops.values())).plan.eval_every == 0
            table.update(step, last, is_milestone, lambda: standings(loops))
    return has_failed or any(loop.status == "failed" for loop in loops.values())


def standings(loops: Mapping[Job, Loop]) -> list[list[str]]:
    """The rows of the live table, one for each variant in the order of the jobs; the first variant is the baseline.

    A row holds means over the variant's runs of the last readings, and the mean difference in validation accuracy to
    the baseline's runs with the same seeds and settings of the data.
    """
    variants = list(dict.fromkeys(job.variant for job in loops))
    data = {job.variant: job.cfg.get("data") for job in loops}
    accuracy = {(job.variant, job.cfg.seed): loop.latest.get("accuracy/valid") for job, loop in loops.items()}
    rows = []
    for variant in variants:
        latest = [loop.latest for job, loop in loops.items() if job.variant == variant]
        cells = [variant, str(len(latest))]
        for tag in COLUMNS[2:5]:
            values = [each[tag] for each in latest if tag in each]
            mean = sum(values) / len(values) if values else None
            cells.append("" if mean is None else f"{mean:.2%}" if tag.startswith("accuracy") else f"{mean:.4f}")
        pairs = [(accuracy[key], accuracy.get((variants[0], key[1]))) for key in accuracy if key[0] == variant]
        gaps = [here - base for here, base in pairs if here is not None and base is not None]
        is_compared = gaps and variant != variants[0] and data[variant] == data[variants[0]]
        cells.append(f"{100 * sum(gaps) / len(gaps):+.2f} points" if is_compared else "")
        rows.append(cells)
    return rows


def check_sweep(hydra: Sequence[str], configs: Mapping[str, DictConfig]) -> None:
    """Raise :class:`UserError` if ``replicas`` is above 1 and the jobs cannot be folded."""
    values = sorted({cfg.replicas for cfg in configs.values()})
    if len(values) > 1:
        raise UserError(f"replicas={','.join(map(str, values))}: belongs to the sweep as a whole; give one value")
    if values[0] == 1:
        return
    for each in parse_words(hydra):
        if each.key_or_group == "hydra/launcher" and each.value() != "basic":
            given = f"replicas={values[0]} and {each.input_line}"
            raise UserError(f"{given}: folded runs share one process; leave out one of the two")
    for name, cfg in {common(cfg): (name, cfg) for name, cfg in configs.items()}.values():
        try:
            check_replicas(cfg)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


def check_replicas(cfg: DictConfig) -> None:
    """Raise :class:`UserError` if runs of this config cannot be folded."""
    given = f"replicas={cfg.replicas}"
    if traits_of(parts.part(cfg, "engine").func).make_stack is None:
        raise UserError(
            f"{given}: {cfg.engine._target_} computes the step of one run, and folded runs take a common one; "
            "use engine=eager or engine=graph, or leave out replicas"
        )
    if cfg.precision not in ("fp32", "tf32"):
        reason = "torch.vmap hides the operations of a model from autocast"
        raise UserError(f"{given} and precision={cfg.precision}: {reason}; use precision=fp32, or leave out replicas")
    if cfg.channels_last:
        reason = "folded runs use torch's default memory format"
        raise UserError(f"{given} and channels_last=true: {reason}; leave out one of the two")
    source = parts.part(cfg, "data")()
    try:
        model, batch = parts.meta_model(cfg, source), (cfg.batch_size, *source.in_shape)
        check_foldable(model, batch, parts.find_device(cfg.device))
    except UserError as error:
        raise UserError(f"{given}: {error}") from error


def check_splits(configs: Mapping[str, DictConfig]) -> None:
    """Raise :class:`UserError` if a job cannot use the splits of its data; any other error is left to the job.

    Jobs that share all but seeds and numbers are checked once, and each data is loaded once. The data of the first job
    come last and stay in LAST.
    """
    LAST.clear()
    by_data: dict[str, dict[str, tuple[str, DictConfig]]] = {}
    for name, cfg in configs.items():
        by_data.setdefault(build.data_key(cfg, torch.device("cpu")), {}).setdefault(common(cfg), (name, cfg))
    for key, name, cfg in [(data, *each) for data in reversed(by_data) for each in by_data[data].values()]:
        try:
            source = parts.part(cfg, "data")()
            if key not in LAST:
                LAST.clear()
                LAST[key] = build.load_dataset(cfg, source)
            build.make_batches(cfg, source, LAST[key])
        except UserError as error:
            raise UserError(f"{name}: {error}" if len(configs) > 1 else str(error)) from error
        except Exception:
            continue


def together(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs in groups that are computed as one: at most ``replicas`` jobs each, all of nearly the same size."""
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        alike.setdefault(common(job.cfg), []).append(job)
    groups = []
    for members in alike.values():
        num_groups = -(-len(members) // members[0].cfg.replicas)
        ends = [-(-len(members) * i // num_groups) for i in range(num_groups + 1)]
        groups += [members[start:end] for start, end in pairwise(ends)]
    return groups


def common(cfg: DictConfig) -> str:
    """The settings, as JSON, that runs computed as one share: all but the seed and the optimizer's numbers."""
    shared = select(OmegaConf.to_container(cfg, resolve=True), NUMBERS | LOOKING | PLACE)
    shared = {k: None if k.startswith("optimizer.") and is_number(value) else value for k, value in shared.items()}
    return json.dumps(shared, sort_keys=True, default=str)


def is_number(value: object) -> bool:
    """Whether ``value`` is a number, or a list of numbers."""
    if isinstance(value, list):
        return all(map(is_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def groups_of(loops: Mapping[Job, Loop]) -> list[Group]:
    """The groups that lockstep drives: runs that are computed as one, or a single run."""
    groups_of_jobs = together(list(loops))
    tell_alone(groups_of_jobs)
    groups = []
    for jobs in groups_of_jobs:
        step_runs = None
        if len(jobs) > 1:
            engine = parts.part(jobs[0].cfg, "engine")
            step_runs = Fold(partial(traits_of(engine.func).make_stack, **engine.keywords)).step
        groups.append(Group([loops[job] for job in jobs], step_runs))
    return groups


def tell_alone(groups: Sequence[Sequence[Job]]) -> None:
    """Print on stderr which jobs are computed alone although ``replicas`` is above 1."""
    alone = [group[0] for group in groups if len(group) == 1]
    if alone and alone[0].cfg.replicas > 1 and not alone[0].cfg.quiet:
        names = ", ".join(job.name for job in alone)
        reason = "no other run is left that differs in nothing but the seed and the optimizer's numbers"
        print(f"bnexp: computed alone, because {reason}: {names}", file=sys.stderr)
