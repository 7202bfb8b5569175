"""What a study expects of its finished runs, and whether they meet it.

An expectation reads one number from each run of a role (a named variant). It may subtract the number of another role
or divide by it: the number of the same seed if both roles saw the same batches, else the mean over the other's seeds.
"""

import math
import operator
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, median, stdev
from typing import Any

from bnexp.errors import UserError
from bnexp.report import stats
from bnexp.report.records import BY_KEY, RunRecord
from bnexp.report.variants import batch_settings, varying
from bnexp.store.settings import as_typed, numbers

Values = Sequence[float]
# How a curve becomes a number; drift is the mean distance from the first reading, spread the standard deviation.
TAKES: dict[str, Callable[[Values], float]] = {
    "last": lambda values: values[-1],
    "first": lambda values: values[0],
    "mean": fmean,
    "median": median,
    "min": min,
    "max": max,
    "drift": lambda values: fmean(abs(value - values[0]) for value in values[1:]),
    "spread": stdev,
}
SEEDS = {
    "interval": ", the 95% interval", "equivalent": ", equivalent", "each": " in each seed", "mean": " in the mean",
}  # fmt: skip


@dataclass(frozen=True)
class Expectation:
    """``says`` is the claim in words; the other fields say which number is read and between which limits it must be.

    * ``tag``: the curve; ``take``: how it becomes a number (:data:`TAKES`). These restrict its readings: ``after`` a
      step; the last one up to and including the step ``at``; those at which other tags lie within limits,
      ``where: {loss/train: [0.3, 0.8]}``.
    * ``best``: a setting, instead of a tag. The number is its value with the best validation accuracy in that seed;
      diverged runs are never best.
    * ``of``: the role; ``minus``: the role whose number is subtracted; ``over``: the role by whose number is divided.
      ``other_tag`` is the curve that is read of that role, by default ``tag``; the role can then be ``of`` itself.
    * ``only``: settings that the runs must have, ``{optimizer.lr: 0.1}``. All such runs of a seed count.
    * ``above``, ``below``: the limits; a number on a limit is outside.
    * ``seeds``: what must be within the limits: the 95% ``interval`` of the mean; for ``equivalent`` its 90% interval,
      which is the test of both limits at 5% (Schuirmann 1987); ``each`` number; or the ``mean``.
    """

    says: str
    of: str
    tag: str | None = None
    best: str | None = None
    take: str = "last"
    at: int | None = None
    after: int | None = None
    where: Mapping[str, Sequence[float]] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    minus: str | None = None
    over: str | None = None
    other_tag: str | None = None
    above: float | None = None
    below: float | None = None
    seeds: str = "interval"

    def check(self, roles: Sequence[str]) -> None:
        """Raise :class:`UserError` for fields that contradict each other or name something unknown."""
        unknown = [role for role in (self.of, self.minus, self.over) if role not in (None, *roles)]
        for is_wrong, complaint in (
            (unknown, f"{', '.join(unknown)} is no variant here; there are {', '.join(roles)}"),
            ((self.tag is None) == (self.best is None), "give either a tag or best: which number to read"),
            (self.take not in TAKES, f"take={self.take} is not known; choose one of {', '.join(TAKES)}"),
            (self.seeds not in SEEDS, f"seeds={self.seeds} is not known; choose one of {', '.join(SEEDS)}"),
            (self.minus is not None and self.over is not None, "minus and over exclude each other; give one"),
            (self.other_tag and not (self.minus or self.over), "other_tag without minus or over is never read"),
            (self.above is None and self.below is None, "without above or below it cannot fail; give one"),
            (self.seeds == "equivalent" and None in (self.above, self.below), "equivalent needs above and below"),
        ):
            if is_wrong:
                raise UserError(f"expect {self.says!r}: {complaint}")

    @property
    def condition(self) -> str:
        """The limits in words."""
        limits = [f"> {self.above:g}"] if self.above is not None else []
        limits += [f"< {self.below:g}"] if self.below is not None else []
        return f"{' and '.join(limits)}{SEEDS[self.seeds]}"

    def holds_for(self, value: float) -> bool:
        return (self.above is None or value > self.above) and (self.below is None or value < self.below)


@dataclass(frozen=True)
class Finding:
    """Whether an expectation holds, and its numbers, one per seed (and setting).

    ``new_seed`` is the 95% prediction interval of the number of one more seed, None without a spread. ``problem`` is
    the reason if the numbers cannot be read; the expectation does not hold then.
    """

    expectation: Expectation
    numbers: tuple[float, ...]
    mean: stats.Mean
    holds: bool
    new_seed: tuple[float | None, float | None] = (None, None)
    problem: str = ""

    def to_json(self) -> dict:
        """The finding as in study.json; fields of the expectation that were not given are left out."""
        stated = {key: value for key, value in asdict(self.expectation).items() if value not in (None, {}, ())}
        return asdict(self) | {"expectation": stated}


class Missing(Exception):
    """The reason why a number cannot be read."""


def judge(expectation: Expectation, runs: Mapping[str, Sequence[RunRecord]]) -> Finding:
    """Return whether the expectation holds for ``runs``, the runs of each role."""
    try:
        numbers, found = _numbers(expectation, runs)
    except Missing as error:
        return Finding(expectation, (), stats.mean([]), False, problem=str(error))
    mean = stats.Mean(found.n, found.difference, found.low, found.high)
    judged: Sequence[float | None] = {
        "interval": [mean.low, mean.high], "equivalent": found.interval(0.90), "each": numbers, "mean": [mean.mean],
    }[expectation.seeds]  # fmt: skip
    if expectation.seeds in ("interval", "equivalent") and len(numbers) > 1 and min(numbers) == max(numbers):
        judged = numbers[:1]  # without spread the interval is the number
    holds = all(value is not None and expectation.holds_for(value) for value in judged)
    return Finding(expectation, tuple(numbers), mean, holds, stats.prediction_interval(numbers))


def _numbers(expectation: Expectation, runs: Mapping[str, Sequence[RunRecord]]) -> tuple[list[float], stats.Difference]:
    """The numbers that must be within the limits, and their mean, or the difference of means, with its interval."""
    own_runs = _runs_of(expectation, expectation.of, runs)
    own = _by_seed(expectation, own_runs)
    other = expectation.minus or expectation.over
    if other is None:
        return list(own.values()), _mean_of(own.values())
    other_runs = _runs_of(expectation, other, runs)
    partners = _by_seed(replace(expectation, tag=expectation.other_tag or expectation.tag), other_runs)
    combine = operator.sub if expectation.minus else _divide
    is_paired = _batches(own_runs) == _batches(other_runs)
    first = 0 if is_paired else 1  # without pairs, a key without its seed names all seeds of a setting
    bases: dict[tuple, list[float]] = defaultdict(list)
    for key, value in partners.items():
        bases[key[first:]].append(value)
    if {key[first:] for key in own} != bases.keys():
        what = "seeds and settings" if is_paired else "settings"
        raise Missing(f"{expectation.of} and {other} do not have the same {what}")
    numbers = [combine(value, fmean(bases[key[first:]])) for key, value in own.items()]
    if is_paired:
        return numbers, _mean_of(numbers)
    if expectation.minus and len(bases) == 1:
        return numbers, stats.unpaired_difference(list(own.values()), list(partners.values()))
    if expectation.seeds in ("interval", "equivalent"):
        raise Missing(f"{expectation.of} and {other} are not paired: only one difference of means has an interval")
    return numbers, _mean_of(numbers)


def _mean_of(values: Collection[float]) -> stats.Difference:
    return stats.paired_difference(list(values), [0.0] * len(values))


def _divide(value: float, base: float) -> float:
    return value / base if base else math.copysign(math.inf, value)


def _batches(runs: Sequence[RunRecord]) -> set[str]:
    """A text per kind of batches that the runs saw, given their seeds."""
    return {repr(sorted(batch_settings(run).items())) for run in runs}


def _runs_of(expectation: Expectation, role: str, runs: Mapping[str, Sequence[RunRecord]]) -> list[RunRecord]:
    """The role's runs that have the settings of ``only``."""
    flats = [(run, numbers(run.config)) for run in runs[role]]
    chosen = [run for run, flat in flats if all(flat.get(key) == value for key, value in expectation.only.items())]
    if not chosen:
        only = f" with {dict(expectation.only)}" if expectation.only else ""
        raise Missing(f"no run of {role}{only} has finished or diverged")
    return chosen


def _by_seed(expectation: Expectation, runs: Sequence[RunRecord]) -> dict[tuple, float]:
    """{(seed, *values of the settings that vary among the runs): number}; with ``best`` {(seed,): number}."""
    if expectation.best is not None:
        return _best_by_seed(expectation.best, runs)
    columns = varying([numbers(run.config) for run in runs]).values()
    keys = zip((run.seed for run in runs), *(map(repr, column) for column in columns), strict=True)
    return {key: _read_number(expectation, run) for key, run in zip(keys, runs, strict=True)}


def _best_by_seed(key: str, runs: Sequence[RunRecord]) -> dict[tuple, float]:
    """{(seed,): the value of ``key`` of the run with the highest best validation accuracy}."""
    accuracy = BY_KEY["accuracy/valid/best"]
    best: dict[tuple, tuple[float, float]] = {}
    for run in runs:
        score, value = accuracy.of(run), numbers(run.config).get(key)
        if not isinstance(value, int | float):
            raise Missing(f"{key}={as_typed(value)} is not a number")
        if score is not None and not run.diverged and math.isfinite(score):
            best[run.seed,] = max(best.get((run.seed,), (-math.inf, 0.0)), (score, float(value)))
    if missing := {run.seed for run in runs} - {seed for (seed,) in best}:
        raise Missing(f"every run of seed {min(missing)} diverged")
    return {seed: value for seed, (_, value) in best.items()}


def _read_number(expectation: Expectation, run: RunRecord) -> float:
    tag = expectation.tag
    if run.diverged and expectation.take == "last":
        raise Missing(f"{run.path.name} diverged, so it has no last {tag}")
    points = [(step, value) for step, value in run.curve(tag).items() if math.isfinite(value)]
    if expectation.after is not None:
        points = [point for point in points if point[0] > expectation.after]
    for other, (low, high) in expectation.where.items():
        curve = run.curves.get(other, ((), ()))
        points = [point for point in points if low <= _value_at(curve, point[0]) <= high]
    if expectation.at is not None:
        points = [point for point in points if point[0] <= expectation.at][-1:]
    if len(points) < (2 if expectation.take in ("drift", "spread") else 1):
        where = f" where {dict(expectation.where)}" if expectation.where else ""
        raise Missing(f"{run.path.name} has too few readings of {tag}{where}")
    return TAKES[expectation.take]([value for _, value in points])


def _value_at(curve: tuple[Sequence[int], Sequence[float]], step: int) -> float:
    """The value of a curve at its last reading up to ``step``; NaN before its first."""
    steps, values = curve
    position = bisect_right(steps, step)
    return values[position - 1] if position else math.nan
