"""Which runs of a sweep are computed as one, ``replicas`` at a time, and what stands in the way of that."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from bnexp import build, fold
from bnexp.errors import UserError
from bnexp.probes.base import Probe
from bnexp.run import Run
from bnexp.sweep import Grid, Job

STACKS = {
    "bnexp.engines.eager.eager": "bnexp.fold.Stack",
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
    for probe in build.probes_of(cfg):
        if type(probe).before is not Probe.before:
            name = type(probe).__name__.lower()
            raise UserError(
                f"{given} and probe={name}: it compares a run before and after a step, and folded runs take theirs in "
                f"each other's turns; leave out {name} or replicas"
            )
    source = build.part(cfg, "data")()
    try:
        fold.check(build.meta_model(cfg, source), (cfg.batch_size, *source.in_shape), build.find_device(cfg.device))
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
    """What runs that are computed as one share: all but the seed, the folder and the optimizer's numbers."""
    config = OmegaConf.to_container(cfg, resolve=True)
    optimizer = {key: None if is_number(value) else value for key, value in config["optimizer"].items()}
    return json.dumps(config | {"optimizer": optimizer, "seed": None, "out": None}, sort_keys=True, default=str)


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
