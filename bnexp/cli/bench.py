"""``bnexp bench``: parity first, then speed, of every implementation of batch norm."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bnexp.config.choices import choices
from bnexp.config.compose import composed

if TYPE_CHECKING:
    from bnexp.train.loop import Plan
    from bnexp.train.run import Run


def bench(arguments: list[str]) -> int:
    """``bnexp bench norms`` and ``bnexp bench loop``."""
    from bnexp.bench.arguments import kind_of

    return {"norms": bench_norms, "loop": bench_loop}[kind_of(arguments)](arguments)


def bench_norms(arguments: list[str]) -> int:
    """Every implementation of batch norm in ``conf/norm``, parity first, then speed."""
    from bnexp.bench import norms as benchmark

    asked = benchmark.parse(arguments)
    from bnexp.config import parts
    from bnexp.norms.base import BatchNormBase

    norms = {name: parts.part(composed([f"norm={name}"]), "norm") for name in choices("norm")}
    ours = {
        name: norm for name, norm in norms.items()
        if isinstance(norm.func, type) and issubclass(norm.func, BatchNormBase) and norm.func.implements_batch_norm
    }  # fmt: skip
    benchmark.run(ours, asked, parts.find_device(asked.device))
    return 0


def bench_loop(arguments: list[str]) -> int:
    """What an epoch of ours takes beside loops written by hand, and what a start and a sweep take."""
    from bnexp.bench import loop_settings

    asked = loop_settings.parse(arguments, {group: choices(group) for group in ("model", "engine")})
    from bnexp.bench import loop as benchmark
    from bnexp.config import build, check, parts
    from bnexp.data.dataset import Dataset

    datasets: dict[str, Dataset] = {}

    def make(overrides: Sequence[str]) -> tuple["Run", "Plan"]:
        cfg = composed(overrides)
        check.check(cfg)
        run = build.build(cfg, datasets)
        return run, build.plan_of(cfg, run.batches.steps_per_epoch)

    benchmark.run(make, asked, parts.find_device(asked.device), choices("probe"))
    return 0
