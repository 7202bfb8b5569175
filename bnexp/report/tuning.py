"""Tuning: picks the best value of a setting for each variant, and what the tried values promise with fewer tries.

Validation ranks the values. The seeds that rank them and the seeds that are judged may be different ones.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from bnexp.errors import UserError
from bnexp.report import stats
from bnexp.report.evidence import or_chance
from bnexp.report.records import BY_KEY, Metric, Problem, RunRecord
from bnexp.report.variants import Variant, can_be_ranked, identity, into_variants, seed_order, tried_settings
from bnexp.store.settings import as_typed, numbers

LOSS, ACCURACY = BY_KEY["loss/valid/best"], BY_KEY["accuracy/valid/best"]
Runs = list[RunRecord]


@dataclass(frozen=True)
class Tried:
    """The runs of a variant at all ``num_values`` values of the setting, and its `tuning_curve`."""

    variant: Variant
    num_values: int
    curve: list[stats.Mean]


@dataclass(frozen=True)
class Tuning:
    """The judged runs, at the best value of their variant, and how it was chosen.

    ``chose`` and ``judged`` are seeds. ``is_unequal`` says that variants were tried with different numbers of values,
    so that the choice favours some. ``tried`` is by `identity`; it is empty unless some variant has two values.
    """

    records: Runs
    superseded: list[Problem]
    notes: list[str]
    chose: list
    judged: list
    is_unequal: bool = False
    tried: dict[str, Tried] = field(default_factory=dict)


def check_choose_on(choose_on: int | None, best_over: str | None, num_seeds: int) -> None:
    """Raise `UserError` unless ``choose_on`` seeds can choose a value and others are left to judge it."""
    if choose_on is None or (best_over is not None and 0 < choose_on < num_seeds):
        return
    why = f"one or more seeds have to choose and one or more to judge, and the runs have {num_seeds}"
    why += "; give a smaller number, or run more seeds" if choose_on > 0 else "; give 1 or more"
    why = why if best_over else "nothing is to be chosen; name the setting too, as in --best-over optimizer.lr"
    raise UserError(f"choose_on={choose_on}: {why}")


def pick_best(records: Sequence[RunRecord], key: str, primary: Metric, choose_on: int | None = None) -> Tuning:
    """Keep the runs at each variant's best value of ``key``; the first ``choose_on`` seeds choose, the others judge.

    Without ``choose_on`` all seeds do both. The best value has the smallest share of diverged runs and, among equal
    shares, the highest mean over seeds of the best validation accuracy (without accuracies: the lowest mean of the
    best validation loss). `UserError` for a key at whose values these numbers mean different things, and for a variant
    that has no run to choose or to judge by.
    """
    if not can_be_ranked(key):
        what = "readings to be the best of" if key == "eval_every" else "training or validation images"
        raise UserError(
            f"best over {key}: its values have other {what}, so that none is better; leave out --best-over, "
            "or choose a setting of the training such as optimizer.lr"
        )
    seeds = list(dict.fromkeys(run.seed for run in sorted(records, key=seed_order)))
    chose, judged = seeds[:choose_on], seeds[choose_on or 0 :]
    variants, superseded = into_variants(records)
    buckets: dict[str, list[Variant]] = defaultdict(list)
    for variant in variants:
        buckets[identity(variant.first, ignore=key)].append(variant)
    metric = ACCURACY if ACCURACY.values(records) else LOSS
    picks = [_choose(bucket, chose, judged, metric) for bucket in buckets.values()]
    kept = [run for *_, runs in picks for run in runs]
    counts = [len(tried) for _, tried, _ in picks]
    if max(counts) == 1:
        others = ", ".join(each for each in tried_settings(records) if each != key) or "no other setting"
        notes = [f"best over {key}: each variant has one value of it; what varies is {others}."]
        return Tuning(kept, superseded, notes, chose, judged)
    shown = into_variants(kept, ignore=key)[0]
    notes = [_best_note(one.label, *pick[:2], key, metric.title) for one, pick in zip(shown, picks, strict=True)]
    if choose_on is not None:
        notes.append(f"best over {key}: chosen on {_name_seeds(chose)}, judged on {_name_seeds(judged)}.")
    elif len(seeds) > 1:
        words = "the seeds that chose a value also judge it, which flatters it; with --choose-on N the first N choose "
        notes.append(f"best over {key}: {words}and the others judge.")
    if len(set(counts)) > 1:
        against = " against ".join(map(str, counts))
        notes.append(f"best over {key}: {against} values were tried, so nothing is called better or worse.")
    tried = {
        name: Tried(_all_of(bucket, one), len(bucket), tuning_curve(bucket, metric, primary))
        for one, (name, bucket) in zip(shown, buckets.items(), strict=True)
    }
    return Tuning(kept, superseded, notes, chose, judged, len(set(counts)) > 1, tried)


def _choose(bucket: Sequence[Variant], chose: list, judged: list, metric: Metric) -> tuple[Runs, list[Runs], Runs]:
    """The best value's runs of the seeds that choose, those of each value, and the best value's runs that judge."""
    tried = [(each.label, *([run for run in each.all_runs if run.seed in seeds] for seeds in (chose, judged)))
             for each in bucket]  # fmt: skip
    tried = [each for each in tried if each[1]]
    label, best, runs = min(tried, key=lambda each: _rank(each[1], metric), default=(bucket[0].label, [], []))
    if not runs:
        lacks = f"{_name_seeds(judged)} to judge" if best else f"{_name_seeds(chose)} to choose"
        raise UserError(f"choose_on={len(chose)}: {label} has no run of {lacks} by; run one, or choose on others")
    return best, [each[1] for each in tried], runs


def _all_of(bucket: Sequence[Variant], variant: Variant) -> Variant:
    """The variant with the runs at all its values."""
    runs, diverged = ([run for each in bucket for run in getattr(each, kind)] for kind in ("runs", "diverged"))
    return replace(variant, runs=runs, diverged=diverged)


def _rank(runs: Runs, metric: Metric) -> tuple[float, float]:
    """A key that sorts runs at different values, the best first."""
    finished = [run for run in runs if not run.diverged]
    value = metric.mean(finished).mean
    return 1 - len(finished) / len(runs), math.inf if value is None else -value if metric.is_accuracy else value


def _name_seeds(seeds: Sequence) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def expected_best(values: Sequence[float]) -> list[float]:
    """The expected best of k values that are drawn with replacement from the K ``values``, for k = 1 to K.

    ``values`` v are sorted from the worst to the best: sum over i of v_i [(i/K)^k - ((i-1)/K)^k] (Dodge et al. 2019,
    arXiv:1909.03004, section 3). At k = K it still lies below the best value, which K draws may miss.
    """
    n = len(values)
    return [sum(v * ((i / n) ** k - ((i - 1) / n) ** k) for i, v in enumerate(values, 1)) for k in range(1, n + 1)]


def tuning_curve(bucket: Sequence[Variant], metric: Metric, primary: Metric) -> list[stats.Mean]:
    """What tuning with k = 1 to K values is expected to give: `expected_best` in ``primary``, means over seeds.

    The K variants of the ``bucket`` differ in the tuned setting. Every seed that all of them have tunes for itself: its
    values are sorted by ``metric``, on validation, and v is the ``primary`` metric. The paper draws validation itself;
    the test metric at the value that validation chooses is not flattered by the choice. A diverged run is the worst
    and counts as chance; a loss then has no curve.
    """
    by_seed, curves = defaultdict(list), []
    for run in chain.from_iterable(variant.all_runs for variant in bucket):
        by_seed[repr(run.seed)].append(run)
    for runs in by_seed.values():
        ranked = sorted(runs, key=lambda run: _rank([run], metric), reverse=True)
        values = [or_chance(run, primary) for run in ranked]
        curves += [expected_best(values)] if len(runs) == len(bucket) and None not in values else []
    return [stats.mean(at_k, is_share=primary.is_accuracy) for at_k in zip(*curves, strict=True)]


def _best_note(label: str, best: Runs, tried: list[Runs], key: str, title: str) -> str:
    """A note on the value that was picked for one variant, and on what makes the choice doubtful."""
    value, *values = (numbers(runs[0].config).get(key) for runs in (best, *tried))
    is_numeric = all(isinstance(each, int | float) and not isinstance(each, bool) for each in values)
    among = ", ".join(map(as_typed, sorted(values) if is_numeric else values))
    note = f"{label} is shown at {key}={as_typed(value)}, the best of {among} by mean {title}"
    if len(values) > 1 and is_numeric and value in (min(values), max(values)):
        end, beyond = ("smallest", "smaller") if value == min(values) else ("largest", "larger")
        note += f"; it is the {end} value tried, so a {beyond} one may be better"
    if len(set(map(len, tried))) > 1:
        note += "; the values were tried with different numbers of seeds"
    return note + "."
