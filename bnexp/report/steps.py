"""Steps to a target: how much sooner or later than the baseline a variant reaches a validation accuracy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from bnexp.report import stats
from bnexp.report.differences import Pair
from bnexp.report.inference import ALPHA, FEWEST_SEEDS, sign_test
from bnexp.report.records import RunRecord

TAG = "accuracy/valid"


@dataclass(frozen=True)
class SpeedUp:
    """The baseline's steps to a target over the variant's steps to it; above 1 the variant is faster.

    In ``reached`` of ``n`` seeds the variant reaches the target, in ``base_reached`` the baseline does; ``sooner`` and
    ``later`` count the seeds in which the variant does so before or after the baseline. ``ratio`` is the geometric mean
    over seeds, with a simultaneous 95% interval. Where a run reaches the target at its first reading or not at all,
    only a bound of its ratio is known: then ``bound`` is ``>=`` or ``<=``, there is no interval, and ``p`` is that of
    the sign test. ``target`` is the mean of the targets over seeds; without a target n is 0.
    """

    n: int
    target: float | None = None
    reached: int = 0
    base_reached: int = 0
    sooner: int = 0
    later: int = 0
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    bound: str = ""
    p: float | None = None
    evidence: str = ""  # faster, slower or undecided


def default_targets(base: Sequence[RunRecord]) -> dict[str, float]:
    """{seed: target}: the mean over the other seeds of the median of the baseline's last fifth of readings.

    A seed's own readings do not set its target: the baseline would then have a mark that its own noise had reached.
    """
    levels = {}
    for run in base:
        values = [value for value in run.curve(TAG).values() if math.isfinite(value)]
        if len(values) > 1 and not run.diverged:
            levels[repr(run.seed)] = median(values[-max(1, len(values) // 5) :])
    others = {
        seed: [level for key, level in levels.items() if key != seed] for seed in (repr(run.seed) for run in base)
    }
    return {seed: fmean(each) for seed, each in others.items() if each}


def speed_up(pairs: Sequence[Pair], targets: dict[str, float], num_variants: int = 1) -> SpeedUp:
    """The speed-up over the ``pairs`` whose seed has a target; ``num_variants`` widens the interval (Bonferroni)."""
    pairs = [(run, base) for run, base in pairs if repr(run.seed) in targets and run.curve(TAG) and base.curve(TAG)]
    if not pairs:
        return SpeedUp(0)
    found = [_compare(run, base, targets[repr(run.seed)]) for run, base in pairs]
    ratios = [(ratio, bound) for *_, ratio, bound in found if ratio is not None]
    bounds = {bound for _, bound in ratios if bound}
    sooner = sum(bound == ">=" or (ratio > 1 and not bound) for ratio, bound in ratios)
    later = sum(bound == "<=" or (ratio < 1 and not bound) for ratio, bound in ratios)
    level = ALPHA / num_variants
    mean = stats.geometric_mean([ratio for ratio, _ in ratios] if len(bounds) < 2 else [], 1 - level)
    low, high = (None, None) if bounds else (mean.low, mean.high)
    p = sign_test(sooner, later) if low is None and ratios else None
    is_sure = len(pairs) >= FEWEST_SEEDS and (p is not None and p < level or low is not None and not low <= 1 <= high)
    is_faster = sooner > later if low is None else mean.mean > 1
    return SpeedUp(
        len(pairs), fmean(targets[repr(run.seed)] for run, _ in pairs),
        sum(each[0] for each in found), sum(each[1] for each in found), sooner, later,
        mean.mean, low, high, *(bounds if len(bounds) == 1 else {""}), p,
        ("faster" if is_faster else "slower") if is_sure else "undecided",
    )  # fmt: skip


def _compare(run: RunRecord, base: RunRecord, target: float) -> tuple[bool, bool, float | None, str]:
    """Whether the run and the baseline reach ``target``, the baseline's steps over the run's, and its bound."""
    own, other = _steps_to(run, target), _steps_to(base, target)
    if own is None and other is None:
        return False, False, None, ""
    if own is None:
        return False, True, other / max(list(run.curve(TAG))[-1], 1), "<="
    if other is None:
        return True, False, max(list(base.curve(TAG))[-1], 1) / own, ">="
    is_first, is_base_first = (_is_first_reading(each, target) for each in (run, base))
    return True, True, other / own, "" if is_first == is_base_first else ">=" if is_first else "<="


def _steps_to(run: RunRecord, target: float) -> int | None:
    """The first step at which the validation accuracy is at least ``target``; 1 for a reading before training."""
    return next((max(step, 1) for step, value in run.curve(TAG).items() if value >= target), None)


def _is_first_reading(run: RunRecord, target: float) -> bool:
    return next(iter(run.curve(TAG).values())) >= target
