"""What was measured, a row for each kind, and how fast it has to be."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

EPOCH = 60_000  # images that times are scaled to
FLOOR, AGAIN, TUTORIAL, DATA = "bare floor", "bare floor again", "tutorial's loop", "data path alone"
AS_IT_COMES = "tutorial's, as it comes"
OURS, SILENT, SCRATCH = "ours", "ours, nothing written", "ours, scratch"
EAGER, FOLDED = "eager", "folded"
# What lightning-hydra-template took, to its first step and for the sweep, on a machine where import torch took 1.9 s.
TEMPLATE_START_S, TEMPLATE_SWEEP_S, TEMPLATE_IMPORT_S = 5.1, 47.6, 1.9


@dataclass(frozen=True)
class Row:
    """One kind of measurement, ``values`` in the order of the rounds; with ``over`` the ratio of two, round by round.

    ``unit`` is s, MB, share (of the epoch), epochs (infinitely many: never), x (a ratio of times by the clock) or x
    processor (of processor time).
    """

    part: str
    what: str
    unit: str
    values: Sequence[float]
    over: str = ""
    model: str = ""
    batch_size: int | None = None
    engine: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def as_dict(self, device: str) -> dict[str, Any]:
        """The line of the CSV file; ``device`` is cpu or cuda. What is never reached is None."""
        keys = ("part", "model", "batch_size", "engine", "what", "over", "unit")
        found = {key: getattr(self, key) for key in keys} | {"n": len(self.values)}
        found |= {"median": finite(self.median), "low": finite(min(self.values)), "high": finite(max(self.values))}
        found |= {"goal": "", "verdict": ""}
        if goal := goal_of(self, device):
            found |= {"goal": str(goal), "verdict": goal.verdict(self)}
        return found


def ratio(mine: Row, other: Row) -> Row:
    """``mine`` over ``other``, each round's by the same round's."""
    values = [a / b for a, b in zip(mine.values, other.values, strict=True)]
    unit = "x processor" if mine.unit == "s processor" else "x"
    fields = {"over": other.what, "model": mine.model, "batch_size": mine.batch_size}
    return Row(mine.part, mine.what, unit, values, engine=mine.engine or other.engine, **fields)


def payback(mine: Row, eager: Row, extra: float) -> Row:
    """After how many epochs ``extra`` seconds of getting ready are won back from the eager epochs, round by round."""
    won = [slow - fast for fast, slow in zip(mine.values, eager.values, strict=True)]
    values = [extra / each if each > 0 else math.inf for each in won]
    fields = {"model": mine.model, "batch_size": mine.batch_size, "engine": mine.engine}
    return Row("engine", f"{mine.what}, pays after", "epochs", values, **fields)


def finite(value: float) -> float | None:
    """``value`` as JSON can say it."""
    return value if math.isfinite(value) else None


class Goal(NamedTuple):
    """What the median of a row should be; ``where`` has the row's fields and the device."""

    where: dict[str, Any]
    sense: str  # <= | >=
    limit: float

    def __str__(self) -> str:
        return f"{self.sense} {self.limit:g}"

    def verdict(self, row: Row) -> str:
        """``met`` or ``missed``, with a question mark if single rounds say otherwise."""
        sign = 1 if self.sense == "<=" else -1
        met = [sign * value <= sign * self.limit for value in (row.median, *row.values)]
        return ("met" if met[0] else "missed") + ("?" if len(set(met)) > 1 else "")


def _goals() -> Iterable[Goal]:
    lenet = {"device": "cpu", "part": "epoch", "model": "lenet"}
    eager = lenet | {"engine": EAGER}
    for batch_size, limit in ((256, 1.05), (32, 1.08), (16, 1.10)):
        for unit in ("x", "x processor"):
            yield Goal(eager | {"batch_size": batch_size, "unit": unit, "what": OURS, "over": FLOOR}, "<=", limit)
    for batch_size, limit in ((256, 2.5), (16, 2.8)):
        for what in (TUTORIAL, AS_IT_COMES):
            yield Goal(eager | {"batch_size": batch_size, "unit": "x", "what": what, "over": OURS}, ">=", limit)
    for engine, limit in ((EAGER, 1.3), ("compile", 1.1)):
        here = lenet | {"batch_size": 256, "engine": engine, "unit": "x"}
        yield Goal(here | {"what": SCRATCH, "over": OURS}, "<=", limit)
    yield Goal({"device": "cpu", "part": "watching", "model": "lenet", "unit": "share"}, "<=", 0.02)
    yield Goal({"part": "start", "what": OURS, "over": "template"}, "<=", 0.6)
    yield Goal({"part": "start", "what": OURS, "over": "bare script"}, "<=", 1.2)
    yield Goal({"part": "sweep", "what": "template", "over": "in turn"}, ">=", 5)
    yield Goal({"part": "sweep", "what": "in turn", "over": "two jobs"}, ">=", 1.6)
    yield Goal({"part": "fold", "over": FOLDED}, ">=", 5)
    graph = {"device": "cuda", "part": "epoch", "batch_size": 256, "engine": "graph"}
    for model, seconds, faster in (("lenet", 0.05, 3), ("resnet", 0.6, 1.5)):
        yield Goal(graph | {"model": model, "what": OURS, "unit": "s"}, "<=", seconds)
        yield Goal(graph | {"model": model, "what": FLOOR, "over": OURS, "unit": "x"}, ">=", faster)
    for what in (TUTORIAL, AS_IT_COMES):
        yield Goal(graph | {"model": "lenet", "what": what, "over": OURS, "unit": "x"}, ">=", 30)


GOALS = tuple(_goals())


def goal_of(row: Row, device: str) -> Goal | None:
    """The goal for this kind of measurement on a device (cpu or cuda), if there is one."""
    for goal in GOALS:
        if all((device if key == "device" else getattr(row, key)) == value for key, value in goal.where.items()):
            return goal
    return None
