"""Which runs of a sweep are computed as one, ``replicas`` at a time, and what stands in the way of that."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from bnexp.cli.sweep.grid import Grid, Job
from bnexp.config import build, parts
from bnexp.config.start import fail, open_job
from bnexp.data.dataset import Dataset
from bnexp.engines import fold
from bnexp.errors import UserError
from bnexp.store.run_folder import DONE, read_status
from bnexp.store.settings import LOOKING, NUMBERS, PLACE, select
from bnexp.train import progress
from bnexp.train.drive import COLUMNS, Contestant, lockstep, standings
from bnexp.train.probe import Probe
from bnexp.train.run import Run

STACKS = {
    "bnexp.engines.eager.eager": "bnexp.engines.fold.Stack",
    "bnexp.engines.graph.captured": "bnexp.engines.graph_fold.CapturedStack",
}  # for each engine's function what takes the step of a fold, with the engine's options


def check_sweep(grid: Grid, configs: Mapping[str, DictConfig]) -> None:
    """Raise :class:`UserError` for ``replicas`` of jobs, checked one by one, that cannot be computed as one."""
    asked = sorted({cfg.replicas for cfg in configs.values()})
    if len(asked) > 1:
        raise UserError(f"replicas={','.join(map(str, asked))}: belongs to the sweep as a whole; give one value")
    if asked[0] == 1:
        return
    launchers = [word for word in grid.hydra if word.startswith("hydra/launcher=") and not word.endswith("=basic")]
    if launchers:
        raise UserError(
            f"replicas={asked[0]} and {launchers[0]}: folded runs share one process; leave out one of the two"
        )
    for name, cfg in {common(cfg): (name, cfg) for name, cfg in configs.items()}.values():
        try:
            check(cfg)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


def check(cfg: DictConfig) -> None:
    """Raise :class:`UserError` if runs of this config cannot be folded."""
    given = f"replicas={cfg.replicas}"
    if cfg.engine._target_ not in STACKS:
        raise UserError(
            f"{given}: {cfg.engine._target_} makes the step of one run, folded runs take theirs together; "
            "use engine=eager or engine=graph, or leave out replicas"
        )
    if cfg.precision != "fp32":
        reason = "autocast does not see what torch.vmap makes of a model's operations"
        raise UserError(f"{given} and precision={cfg.precision}: {reason}; use precision=fp32, or leave out replicas")
    if cfg.channels_last:
        raise UserError(f"{given} and channels_last=true: what is stacked has one memory format; leave out either")
    for probe in parts.probes_of(cfg):
        if type(probe).before is not Probe.before:
            name = type(probe).__name__.lower()
            raise UserError(
                f"{given} and probe={name}: it compares a run before and after a step, and folded runs take theirs in "
                f"each other's turns; leave out {name} or replicas"
            )
    source = parts.part(cfg, "data")()
    try:
        fold.check(parts.meta_model(cfg, source), (cfg.batch_size, *source.in_shape), parts.find_device(cfg.device))
    except UserError as error:
        raise UserError(f"{given}: {error}") from error


def together(jobs: Sequence[Job], configs: Mapping[str, DictConfig]) -> list[list[Job]]:
    """The jobs in groups to be computed as one each, ``replicas`` at most, as even in size as can be."""
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
    """Whether it is a number, or a list of numbers."""
    if isinstance(value, list):
        return all(map(is_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def fold_all(runs: Mapping[Job, Run], configs: Mapping[str, DictConfig]) -> list[fold.Fold]:
    """Fold those of the runs, all of one sweep, that have one like them."""
    groups = together(list(runs), configs)
    tell_alone(groups, configs)
    return [
        fold.Fold([runs[job] for job in members], stack_of(configs[members[0].name]))
        for members in groups
        if len(members) > 1
    ]


def stack_of(cfg: DictConfig) -> Callable[[Sequence[Run]], fold.Stack]:
    """How runs of this config are stacked: so that their engine takes the step."""
    kind = get_class(STACKS[cfg.engine._target_])
    return partial(kind, **{key: value for key, value in cfg.engine.items() if not key.startswith("_")})


def tell_alone(groups: Sequence[Sequence[Job]], configs: Mapping[str, DictConfig]) -> None:
    """Say on stderr which jobs have no other to be computed with, where that was asked for."""
    names = [members[0].name for members in groups if len(members) == 1]
    if names and configs[names[0]].replicas > 1 and not configs[names[0]].quiet:
        reason = "no other run is left that differs in nothing but the seed and the optimizer's numbers"
        print(f"bnexp: computed alone, because {reason}: {', '.join(names)}", file=sys.stderr)


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
