"""A variant against the baseline in numbers: the difference of each metric, and steps to the baseline's best.

Differences are paired by seed if the runs of a seed saw the same batches, else unpaired. Runs on different images are
not compared. Differences leave diverged runs out, because they have no final values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bnexp.report import stats
from bnexp.report.records import METRICS, TARGETS, Metric, RunRecord
from bnexp.report.variants import Variant, batch_settings, group_names, varying

Pair = tuple[RunRecord, RunRecord]  # a variant's run and the baseline's run of the same seed
SOURCE = {"data", "data.root", "data.images"}  # runs that differ in one of these saw different images


@dataclass(frozen=True)
class SpeedUp:
    """The baseline's steps to its best over the variant's steps to the same value; above 1 is faster.

    Per seed: the step of the baseline's best validation value over the first step at which the variant is as good
    (Ioffe & Szegedy 2015, fig. 2). In ``n`` seeds the baseline has a best; in ``reached`` of them the variant is as
    good at some step, which a diverged run never is. ``ratio`` is the geometric mean over the latter.
    """

    n: int
    reached: int
    ratio: float | None
    low: float | None
    high: float | None

    @property
    def is_same_step(self) -> bool:
        """Whether the ratio is 1 in every seed that reached the value."""
        return self.ratio == 1 and self.low is None

    @property
    def is_informative(self) -> bool:
        """Whether there is more to show than a ratio of 1 in every seed."""
        return self.n > self.reached or (self.n > 0 and not self.is_same_step)


@dataclass(frozen=True)
class Against:
    """A variant against the baseline: ``differences`` by metric key, ``speedups`` by tag.

    ``differs`` are the settings that set the two apart, ``unlike`` those because of which a run and its partner saw
    different batches. Both are {setting: (baseline's value, variant's value)}.
    """

    design: str  # paired, unpaired or other data
    differences: dict[str, stats.Difference]
    speedups: dict[str, SpeedUp]
    differs: dict[str, tuple]
    unlike: dict[str, tuple]

    def evidence(self, metric: Metric) -> str:
        """``better``, ``worse`` or, if the interval contains zero, ``not enough evidence``."""
        difference = self.differences[metric.key]
        if not difference.excludes_zero:
            return "not enough evidence"
        return "better" if (difference.difference > 0) == metric.is_accuracy else "worse"


def measure_against(variant: Variant, base: Variant) -> Against:
    """Return the differences and speed-ups of ``variant`` against ``base``."""
    partners = {repr(run.seed): run for run in base.runs}
    pairs = [(run, partners[repr(run.seed)]) for run in variant.all_runs if repr(run.seed) in partners]
    unlike = _unlike(pairs or [(variant.first, base.first)])
    design = "other data" if unlike.keys() & SOURCE else "unpaired" if unlike else "paired"
    pairs = pairs if design == "paired" else []
    if design == "unpaired":
        both = {metric.key: (metric.values(variant.runs), metric.values(base.runs)) for metric in METRICS}
        differences = {key: stats.unpaired_difference(*values) for key, values in both.items()}
    else:
        differences = {metric.key: _paired_difference(metric, pairs) for metric in METRICS}
    speedups = {metric.tag: _speed_up(metric, pairs) for metric in TARGETS}
    return Against(design, differences, speedups, _differing(variant, base), unlike)


def _differing(variant: Variant, base: Variant) -> dict[str, tuple]:
    """The settings that set the two apart, without the options of groups whose name differs."""
    renamed = varying([group_names(base.first), group_names(variant.first)])
    settings = varying([base.parts, variant.parts])
    return {key: pair for key, pair in settings.items() if "." not in key or key.split(".")[0] not in renamed}


def _unlike(pairs: Sequence[Pair]) -> dict[str, tuple]:
    """The settings because of which a run and its partner saw different batches."""
    unlike: dict[str, tuple] = {}
    for run, base in pairs:
        unlike |= varying([batch_settings(base), batch_settings(run)])
        if "data._target_" in unlike:
            return {"data": (group_names(base).get("data"), group_names(run).get("data"))}
    return unlike


def _paired_difference(metric: Metric, pairs: Sequence[Pair]) -> stats.Difference:
    both = [(metric.of(run), metric.of(base)) for run, base in pairs if not run.diverged]
    both = [values for values in both if None not in values]
    return stats.paired_difference([value for value, _ in both], [value for _, value in both])


def _speed_up(metric: Metric, pairs: Sequence[Pair]) -> SpeedUp:
    ratios, n = [], 0
    for run, base in pairs:
        target = metric.of(base)
        if target is None or not math.isfinite(target) or len(base.curve(metric.tag)) < 2:
            continue  # a single reading is the best by construction
        n += 1
        step = None if run.diverged else _first_step(metric, run, target)
        if step is not None:
            ratios.append(max(_first_step(metric, base, target), 1) / max(step, 1))  # step 0: before training
    result = stats.geometric_mean(ratios)
    return SpeedUp(n, len(ratios), result.mean, result.low, result.high)


def _first_step(metric: Metric, run: RunRecord, target: float) -> int | None:
    """The first step at which the run is as good as ``target``."""
    as_good = target.__le__ if metric.is_accuracy else target.__ge__
    return next((step for step, value in run.curve(metric.tag).items() if as_good(value)), None)
