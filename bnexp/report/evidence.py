"""The verdict on the primary metric: better, worse, equivalent or undecided, corrected for the number of variants.

Failures count: a difference among the seeds in which both sides finished is no verdict if failures reverse it.
"""

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from bnexp.report import inference, stats
from bnexp.report.differences import Against, Pair
from bnexp.report.records import Metric, RunRecord
from bnexp.report.variants import Variant

ENOUGH = 5  # seeds below which a warning is given


@dataclass(frozen=True)
class Failures:
    """A variant fails in ``k`` of ``n`` seeds, which says that its rate lies between ``low`` and ``high`` (95%).

    ``p`` is that of McNemar's exact test against the baseline over the paired seeds; None for the baseline itself.
    """

    k: int
    n: int
    low: float
    high: float
    p: float | None = None


@dataclass(frozen=True)
class Evidence:
    """What the primary metric says of a variant against the baseline; None where it cannot be said.

    ``word`` is the verdict and ``low`` and ``high`` the interval of the difference that holds for all variants at once
    (Bonferroni). ``p`` and ``p_equivalent`` are corrected by Holm, ``p_flips`` by flips of whole seeds. ``detectable``
    is the difference that so many seeds find with a power of 80%. In ``wins`` of n seeds (ties count half) the variant
    is better, so the chance that it is in a new seed lies between ``wins_low`` and ``wins_high`` (95%).
    """

    word: str
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_flips: float | None = None
    p_equivalent: float | None = None
    detectable: float | None = None
    wins: float | None = None
    wins_low: float | None = None
    wins_high: float | None = None
    correlation: float | None = None


def failures_of(variant: Variant, pairs: Sequence[Pair] = ()) -> Failures:
    """The failed runs of a variant, tested against the baseline's in ``pairs``; no test without pairs."""
    both = [(run.has_failed, base.has_failed) for run, base in pairs]
    p = inference.sign_test(both.count((True, False)), both.count((False, True))) if pairs else None
    k, n = sum(run.has_failed for run in variant.all_runs), len(variant.all_runs)
    return Failures(k, n, *inference.clopper_pearson(k, n), p)


def judge_variants(variants: Mapping[str, Variant], base: Variant, against: Mapping[str, Against], metric: Metric,
                   margin: float, is_fair: bool = True) -> dict[str, Evidence]:  # fmt: skip
    """The evidence on each of the ``variants``, by label; unless tuning ``is_fair`` nothing is called better or worse.

    ``margin`` is the largest difference, in points for an accuracy and in nats for a loss, that does not matter.
    """
    margin /= 100 if metric.is_accuracy else 1
    found = {label: against[label].differences[metric.key] for label in variants}
    ps = inference.holm([each.p for each in found.values()])
    inside = inference.holm([inference.equivalence_p(each, margin) for each in found.values()])
    flips = _flips([against[label].values(metric) for label in variants])
    level = inference.ALPHA / max(1, sum(each.p is not None for each in found.values()))
    evidence = {}
    for (label, difference), p, p_inside, p_flips in zip(found.items(), ps, inside, flips, strict=True):
        word = _word(difference, p, p_inside, metric)
        if word in ("better", "worse"):
            if not is_fair:
                word = "undecided"
            elif not _survives(variants[label], base, difference.difference, metric):
                word += " where both finish"
        if against[label].design != "other data":
            word = _all_fail(variants[label], base, difference.n) or word
        power = inference.detectable(difference.error, difference.freedom, level) if difference.error else None
        seen = Evidence(word, *difference.interval(1 - level), p, p_flips, p_inside, power)
        evidence[label] = replace(seen, **_seed_by_seed(against[label].values(metric).values(), metric))
    return evidence


def _all_fail(variant: Variant, base: Variant, num_pairs: int) -> str:
    """The word for sides of which every run failed; empty if there is none, or if a difference says more."""
    own, other = (all(run.has_failed for run in side.all_runs) for side in (variant, base))
    if own and other:
        return "nothing was learned"
    if num_pairs or not (own or other):
        return ""
    return "fails in every seed" if own else "baseline fails in every seed"


def _word(difference: stats.Difference, p: float | None, p_inside: float | None, metric: Metric) -> str:
    if p is None or difference.n < inference.FEWEST_SEEDS:
        return "undecided"
    if p < inference.ALPHA:
        return "better" if (difference.difference > 0) == metric.is_accuracy else "worse"
    return "equivalent" if p_inside is not None and p_inside < inference.ALPHA else "undecided"


def _survives(variant: Variant, base: Variant, difference: float, metric: Metric) -> bool:
    """Whether the difference keeps its sign if every diverged run counts as one that learned nothing."""
    if not variant.diverged and not base.diverged:
        return True
    sides = [[or_chance(run, metric) for run in side.all_runs] for side in (variant, base)]
    own, other = (statistics.fmean(value for value in side if value is not None) for side in sides)
    return (own - other) * difference > 0  # False for inf - inf, of two losses without bound


def or_chance(run: RunRecord, metric: Metric) -> float | None:
    """The value of a run; of a diverged one the largest class's share, or an infinite loss."""
    if not run.diverged:
        return metric.of(run)
    share, _ = run.majority(metric.tag.rpartition("/")[2]) or (0.0, 0)
    return share if metric.is_accuracy else math.inf


def _seed_by_seed(values: Collection[tuple[float, float]], metric: Metric) -> dict[str, float | None]:
    """In how many seeds the variant is better, with Wilson's interval, and the correlation of both sides."""
    n = len(values)
    if n == 0 or not all(map(math.isfinite, itertools.chain(*values))):
        return {}
    gains = [own - other if metric.is_accuracy else other - own for own, other in values]
    wins = sum(gain > 0 for gain in gains) + 0.5 * gains.count(0)
    low, high = inference.wilson(wins, n)
    sides = list(zip(*values, strict=True))
    has_spread = n > 2 and all(min(side) < max(side) for side in sides)
    correlation = statistics.correlation(*sides) if has_spread else None
    return {"wins": wins, "wins_low": low, "wins_high": high, "correlation": correlation}


def _flips(values: Sequence[Mapping[str, tuple[float, float]]]) -> list[float | None]:
    """The p of flips of whole seeds for each variant; None unless all variants were paired in the same seeds."""
    if not values or not values[0] or any(each.keys() != values[0].keys() for each in values):
        return [None] * len(values)
    rows = [[each[seed][0] - each[seed][1] for seed in values[0]] for each in values]
    return inference.flip_signs(rows) or [None] * len(rows)
