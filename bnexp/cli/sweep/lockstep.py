"""The runs of a sweep in lockstep, and which of them are computed as one (``replicas`` at a time)."""

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from bnexp.cli.sweep.grid import Grid, Job
from bnexp.config import build, parts
from bnexp.config.start import fail, open_job
from bnexp.data.dataset import Dataset
from bnexp.engines.base import traits_of
from bnexp.engines.fold import Fold, check_foldable
from bnexp.errors import UserError
from bnexp.store.run_folder import DONE, read_status
from bnexp.store.settings import LOOKING, NUMBERS, PLACE, select
from bnexp.train import progress
from bnexp.train.drive import Group, lockstep
from bnexp.train.loop import Loop

COLUMNS = ("", "runs", "loss/train", "loss/valid", "accuracy/valid", "difference")  # of the live table


class Entry(NamedTuple):
    """A run in lockstep, of a variant and with a seed."""

    variant: str
    seed: int
    loop: Loop


def race(jobs: Sequence[Job], configs: dict[str, DictConfig], baseline: str, quiet: bool) -> bool:
    """Open every job that is not done and drive them all in lockstep; return whether any failed."""
    datasets: dict[str, Dataset] = {}
    entries: dict[Job, Entry] = {}
    has_failed = False
    for job in sorted(jobs, key=lambda job: job.variant != baseline):
        if read_status(job.folder).get("status") in DONE:
            continue
        cfg = configs[job.name]
        cfg.out = str(job.folder)
        try:
            run, recorder = open_job(cfg, job.overrides, datasets)
        except Exception as error:
            fail(job.folder, job.overrides, error)
            has_failed = True
            continue
        loop = Loop(run, build.plan_of(cfg, run.batches.steps_per_epoch), recorder)
        entries[job] = Entry(job.variant, cfg.seed, loop)
    loops = [entry.loop for entry in entries.values()]
    with progress.LiveTable(COLUMNS, quiet=quiet) as table:
        for step in lockstep(groups_of(entries, configs)):
            last = max(loop.run.total_steps for loop in loops)
            is_milestone = step == last or step % loops[0].plan.eval_every == 0
            table.update(step, last, is_milestone, lambda: standings(list(entries.values())))
    return has_failed or any(loop.status == "failed" for loop in loops)


def standings(entries: Sequence[Entry]) -> list[list[str]]:
    """The rows of the live table, one for each variant, the baseline first.

    A row holds means over the variant's runs of the last readings, and the mean difference in validation accuracy to
    the baseline's runs with the same seeds.
    """
    variants = list(dict.fromkeys(entry.variant for entry in entries))
    accuracy = {(entry.variant, entry.seed): entry.loop.latest.get("accuracy/valid") for entry in entries}
    rows = []
    for variant in variants:
        latest = [entry.loop.latest for entry in entries if entry.variant == variant]
        cells = [variant, str(len(latest))]
        for tag in COLUMNS[2:5]:
            values = [each[tag] for each in latest if tag in each]
            mean = sum(values) / len(values) if values else None
            cells.append("" if mean is None else f"{mean:.2%}" if tag.startswith("accuracy") else f"{mean:.4f}")
        seeds = [entry.seed for entry in entries if entry.variant == variant]
        pairs = [(accuracy[variant, seed], accuracy.get((variants[0], seed))) for seed in seeds]
        gaps = [here - base for here, base in pairs if here is not None and base is not None]
        cells.append(f"{100 * sum(gaps) / len(gaps):+.2f} points" if gaps and variant != variants[0] else "")
        rows.append(cells)
    return rows


def check_sweep(grid: Grid, configs: Mapping[str, DictConfig]) -> None:
    """Raise :class:`UserError` if ``replicas`` is above 1 and the jobs, each checked by itself, cannot be folded."""
    values = sorted({cfg.replicas for cfg in configs.values()})
    if len(values) > 1:
        raise UserError(f"replicas={','.join(map(str, values))}: belongs to the sweep as a whole; give one value")
    if values[0] == 1:
        return
    launchers = [word for word in grid.hydra if word.startswith("hydra/launcher=") and not word.endswith("=basic")]
    if launchers:
        raise UserError(
            f"replicas={values[0]} and {launchers[0]}: folded runs share one process; leave out one of the two"
        )
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
            f"{given}: {cfg.engine._target_} makes the step of one run, folded runs take theirs together; "
            "use engine=eager or engine=graph, or leave out replicas"
        )
    if cfg.precision != "fp32":
        reason = "autocast does not see what torch.vmap makes of a model's operations"
        raise UserError(f"{given} and precision={cfg.precision}: {reason}; use precision=fp32, or leave out replicas")
    if cfg.channels_last:
        raise UserError(f"{given} and channels_last=true: what is stacked has one memory format; leave out either")
    source = parts.part(cfg, "data")()
    try:
        model, batch = parts.meta_model(cfg, source), (cfg.batch_size, *source.in_shape)
        check_foldable(model, batch, parts.find_device(cfg.device))
    except UserError as error:
        raise UserError(f"{given}: {error}") from error


def together(jobs: Sequence[Job], configs: Mapping[str, DictConfig]) -> list[list[Job]]:
    """The jobs in groups to be computed as one, at most ``replicas`` in each, as even in size as can be."""
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        alike.setdefault(common(configs[job.name]), []).append(job)
    groups = []
    for members in alike.values():
        num_groups = -(-len(members) // configs[members[0].name].replicas)
        ends = [-(-len(members) * i // num_groups) for i in range(num_groups + 1)]
        groups += [members[start:end] for start, end in pairwise(ends)]
    return groups


def common(cfg: DictConfig) -> str:
    """The settings that runs computed as one share: all but the seed and the optimizer's numbers."""
    shared = select(OmegaConf.to_container(cfg, resolve=True), NUMBERS | LOOKING | PLACE)
    shared = {k: None if k.startswith("optimizer.") and is_number(value) else value for k, value in shared.items()}
    return json.dumps(shared, sort_keys=True, default=str)


def is_number(value: object) -> bool:
    """Whether ``value`` is a number, or a list of numbers."""
    if isinstance(value, list):
        return all(map(is_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def groups_of(entries: Mapping[Job, Entry], configs: Mapping[str, DictConfig]) -> list[Group]:
    """The groups that lockstep drives: of runs that are computed as one, or of a single run."""
    jobs_of_groups = together(list(entries), configs)
    tell_alone(jobs_of_groups, configs)
    groups = []
    for jobs in jobs_of_groups:
        loops = [entries[job].loop for job in jobs]
        engine = parts.part(configs[jobs[0].name], "engine")
        if len(jobs) == 1:
            groups.append(Group(loops))
        else:
            groups.append(Group(loops, Fold(partial(traits_of(engine.func).make_stack, **engine.keywords)).step))
    return groups


def tell_alone(groups: Sequence[Sequence[Job]], configs: Mapping[str, DictConfig]) -> None:
    """Say on stderr which jobs are computed alone although ``replicas`` is above 1."""
    names = [members[0].name for members in groups if len(members) == 1]
    if names and configs[names[0]].replicas > 1 and not configs[names[0]].quiet:
        reason = "no other run is left that differs in nothing but the seed and the optimizer's numbers"
        print(f"bnexp: computed alone, because {reason}: {', '.join(names)}", file=sys.stderr)
