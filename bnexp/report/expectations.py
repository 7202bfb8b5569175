"""Conditions on what finished runs measured, so that a study can say for itself whether it came out as expected.

An expectation reads one number from every run of a role (a named variant), pairs it by seed with another role's,
and holds if the numbers lie where they should: in each seed, in the mean, or with the whole 95% interval.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean, median, stdev
from typing import Any

from bnexp.errors import UserError
from bnexp.report import stats
from bnexp.report.records import TARGETS, RunRecord
from bnexp.report.variants import plain
from bnexp.store.settings import numbers

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
SEEDS = {"each": " in each seed", "mean": " in the mean", "interval": ", the 95% interval"}


@dataclass(frozen=True)
class Expectation:
    """``says`` in words; the rest says which number is read and where it has to lie.

    * ``tag``: the curve, ``take``: how it becomes a number (:data:`TAKES`), only its reading ``at`` a step (the
      last one up to it), ``after`` a step, or the readings where other tags lie within limits:
      ``where: {loss/train: [0.3, 0.8]}``.
    * ``best``: instead of a tag a setting, the number is its value at which the role does best in that seed
      (validation accuracy); runs that diverged are never best.
    * ``of``: the role; ``minus`` or ``over``: the role whose number of the same seed is subtracted or divides.
    * ``only``: settings that the runs must have, ``{optimizer.lr: 0.1}``. Of several runs per seed each counts.
    * ``above``, ``below``: the limits, of which a number on the limit is outside.
    * ``seeds``: ``each`` number within them, the ``mean``, or the whole 95% ``interval`` of the mean.
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
    above: float | None = None
    below: float | None = None
    seeds: str = "each"

    def check(self, roles: Sequence[str]) -> None:
        """Raise :class:`UserError` for what cannot be meant."""
        for role in (self.of, self.minus, self.over):
            if role is not None and role not in roles:
                raise UserError(f"expect {self.says!r}: {role} is no variant here; there are {', '.join(roles)}")
        if (self.tag is None) == (self.best is None):
            raise UserError(f"expect {self.says!r}: give either a tag or best, the number to be read")
        if self.take not in TAKES:
            raise UserError(f"expect {self.says!r}: take={self.take} is not known; choose one of {', '.join(TAKES)}")
        if self.seeds not in SEEDS:
            raise UserError(f"expect {self.says!r}: seeds={self.seeds} is not known; choose one of {', '.join(SEEDS)}")
        if self.minus is not None and self.over is not None:
            raise UserError(f"expect {self.says!r}: minus and over exclude each other")
        if self.above is None and self.below is None:
            raise UserError(f"expect {self.says!r}: without above or below it could not fail; give one")

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
    """What became of an expectation: the numbers, one per seed (and setting), and whether it holds.

    ``problem`` says why there is no number where there is none; then it does not hold.
    """

    expectation: Expectation
    numbers: tuple[float, ...]
    mean: stats.Mean
    holds: bool
    problem: str = ""

    def to_json(self) -> dict:
        stated = {f.name: getattr(self.expectation, f.name) for f in fields(Expectation)}
        stated = {key: value for key, value in stated.items() if value not in (None, {}, ())}
        return {
            "expectation": stated, "numbers": list(self.numbers), "mean": asdict(self.mean), "holds": self.holds,
            "problem": self.problem,
        }  # fmt: skip


class Missing(Exception):
    """A number that cannot be read, and why."""


def judge(expectation: Expectation, runs: Mapping[str, Sequence[RunRecord]]) -> Finding:
    """Compare the expectation with the runs of every role."""
    try:
        numbers = tuple(_numbers(expectation, runs))
    except Missing as error:
        return Finding(expectation, (), stats.mean([]), False, str(error))
    mean = stats.mean(numbers)
    if expectation.seeds == "each":
        holds = all(map(expectation.holds_for, numbers))
    elif expectation.seeds == "mean":
        holds = mean.mean is not None and expectation.holds_for(mean.mean)
    else:
        holds = mean.low is not None and expectation.holds_for(mean.low) and expectation.holds_for(mean.high)
    return Finding(expectation, numbers, mean, holds)


def _numbers(expectation: Expectation, runs: Mapping[str, Sequence[RunRecord]]) -> list[float]:
    own = _by_seed(expectation, runs[expectation.of])
    other = expectation.minus or expectation.over
    if other is None:
        return list(own.values())
    partners = _by_seed(expectation, runs[other])
    if own.keys() != partners.keys():
        raise Missing(f"{expectation.of} and {other} do not have the same seeds and settings")
    pairs = [(own[key], partners[key]) for key in own]
    if expectation.minus:
        return [mine - base for mine, base in pairs]
    return [mine / base if base else math.copysign(math.inf, mine) for mine, base in pairs]


def _by_seed(expectation: Expectation, runs: Sequence[RunRecord]) -> dict[tuple, float]:
    """The number of every seed, of every seed and setting where a role was run with several."""
    chosen = [run for run in runs if _has(run, expectation.only)]
    if not chosen:
        only = f" with {dict(expectation.only)}" if expectation.only else ""
        raise Missing(f"no run of {expectation.of}{only} came to its end")
    if expectation.best is not None:
        return _best(expectation.best, chosen)
    varied = _varied(chosen)
    values = [tuple(repr(numbers(run.config).get(key)) for key in varied) for run in chosen]
    return {(run.seed, *own): _read(expectation, run) for run, own in zip(chosen, values, strict=True)}


def _has(run: RunRecord, only: Mapping[str, Any]) -> bool:
    flat = numbers(run.config)
    return all(flat.get(key) == value for key, value in only.items())


def _varied(runs: Sequence[RunRecord]) -> list[str]:
    """The settings in which the runs differ, but for the seed."""
    flats = [numbers(run.config) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    return [key for key in keys if len({repr(flat.get(key)) for flat in flats}) > 1]


def _best(key: str, runs: Sequence[RunRecord]) -> dict[tuple, float]:
    """For every seed the value of ``key`` with the highest best validation accuracy."""
    accuracy = TARGETS[1]
    best: dict[tuple, tuple[float, float]] = {}
    for run in runs:
        score, value = accuracy.of(run), numbers(run.config).get(key)
        if not isinstance(value, int | float):
            raise Missing(f"{key}={plain(value)} is not a number")
        if score is not None and not run.diverged and math.isfinite(score):
            best[run.seed,] = max(best.get((run.seed,), (-math.inf, 0.0)), (score, float(value)))
    if missing := {run.seed for run in runs} - {seed for seed, in best}:
        raise Missing(f"every run of seed {min(missing)} diverged")
    return {seed: value for seed, (_, value) in best.items()}


def _read(expectation: Expectation, run: RunRecord) -> float:
    tag = expectation.tag
    if run.diverged and expectation.take == "last":
        raise Missing(f"{run.path.name} diverged, so that it has no last {tag}")
    points = list(zip(*run.curves.get(tag, ((), ())), strict=True))
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if expectation.after is not None:
        points = [point for point in points if point[0] > expectation.after]
    for other, (low, high) in expectation.where.items():
        near = _latest(run.curves.get(other, ((), ())))
        points = [point for point in points if low <= near(point[0]) <= high]
    if expectation.at is not None:
        points = [point for point in points if point[0] <= expectation.at][-1:]
    if len(points) < (2 if expectation.take in ("drift", "spread") else 1):
        where = f" where {dict(expectation.where)}" if expectation.where else ""
        raise Missing(f"{run.path.name} has too few readings of {tag}{where}")
    return TAKES[expectation.take]([value for _, value in points])


def _latest(curve: tuple[Sequence[int], Sequence[float]]) -> Callable[[int], float]:
    """The value of a curve at its last reading up to a step; NaN before its first."""
    steps, values = curve

    def near(step: int) -> float:
        position = bisect_right(steps, step)
        return values[position - 1] if position else math.nan

    return near
