"""The rows of measurements, the goals that they are held against, and the tables that show both."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.table import Table

from bnexp.bench.results import results_table
from bnexp.store.files import finite

EPOCH = 60_000  # images; times are scaled to an epoch of so many
FLOOR, FLOOR_AGAIN, TUTORIAL, DATA = "bare floor", "bare floor again", "tutorial's loop", "data path alone"
TUTORIAL_APART = "tutorial's, as it comes"
OURS, SILENT, SCRATCH, FUSED = "ours", "ours, nothing written", "ours, scratch", "ours, fused"
EAGER, FOLDED = "eager", "folded"
UNITS = {"s": (1, " s"), "MB": (1, " MB"), "share": (100, "%"), "epochs": (1, " epochs")}
SHORT_UNITS = ((1e-4, 1e6, " us"), (0.1, 1e3, " ms"))  # below so many seconds: the factor, and the unit


@dataclass(frozen=True)
class LoopCase:
    """A model at a batch size, its overrides, and the number of steps in a turn.

    ``target`` is the path of the model's class. ``threads`` is the number of CPU threads of every loop.
    """

    model: str
    batch_size: int
    overrides: tuple[str, ...]
    num_steps: int
    target: str
    threads: int

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch_size}"

    @property
    def scale(self) -> float:
        """Number of turns in an epoch."""
        return EPOCH / (self.num_steps * self.batch_size)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a :class:`Row` of this case."""
        return {"model": self.model, "batch_size": self.batch_size}


@dataclass(frozen=True)
class Row:
    """The values of one measurement, one per round; with ``over`` the ratios of two measurements.

    ``unit`` is s, s processor, MB, share (of the epoch), epochs (infinite means never), x (a ratio of times by the
    clock) or x processor (of processor times).
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
        """The line of the CSV file, for ``device`` cpu or cuda; infinite values are None."""
        keys = ("part", "model", "batch_size", "engine", "what", "over", "unit")
        line = {key: getattr(self, key) for key in keys} | {"n": len(self.values)}
        line |= {"median": finite(self.median), "low": finite(min(self.values)), "high": finite(max(self.values))}
        goal = goal_of(self, device)
        return line | {"goal": str(goal or ""), "verdict": goal.verdict(self) if goal else ""}


def ratio_row(mine: Row, other: Row) -> Row:
    """``mine`` over ``other``, round by round."""
    values = [a / b for a, b in zip(mine.values, other.values, strict=True)]
    unit = "x processor" if mine.unit == "s processor" else "x"
    fields = {"over": other.what, "model": mine.model, "batch_size": mine.batch_size}
    return Row(mine.part, mine.what, unit, values, engine=mine.engine or other.engine, **fields)


def payback_row(mine: Row, eager: Row, extra: float) -> Row:
    """Number of epochs after which faster epochs have made up for ``extra`` seconds of setup, round by round."""
    won = [slow - fast for fast, slow in zip(mine.values, eager.values, strict=True)]
    values = [extra / each if each > 0 else math.inf for each in won]
    fields = {"model": mine.model, "batch_size": mine.batch_size, "engine": mine.engine}
    return Row("engine", f"{mine.what}, pays after", "epochs", values, **fields)


class Goal(NamedTuple):
    """A limit for the median of the rows whose fields, and whose device, are those of ``where``."""

    where: dict[str, Any]
    sense: str  # <= | >=
    limit: float

    def __str__(self) -> str:
        return f"{self.sense} {self.limit:g}"

    def verdict(self, row: Row) -> str:
        """``met`` or ``missed``, with a question mark if not all rounds agree with the median."""
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
        for what in (TUTORIAL, TUTORIAL_APART):
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
    # The bare floor computes a ResNet with the same kernels as ours and keeps the device as busy; fused norms can win.
    for model, what, seconds, faster in (("lenet", OURS, 0.05, 3), ("resnet", FUSED, 0.6, 1.2)):
        yield Goal(graph | {"model": model, "what": what, "unit": "s"}, "<=", seconds)
        yield Goal(graph | {"model": model, "what": FLOOR, "over": what, "unit": "x"}, ">=", faster)
    for what in (TUTORIAL, TUTORIAL_APART):
        yield Goal(graph | {"model": "lenet", "what": what, "over": OURS, "unit": "x"}, ">=", 30)


GOALS = tuple(_goals())


def goal_of(row: Row, device: str) -> Goal | None:
    """The goal of a row measured on ``device``, cpu or cuda; None if it has none."""
    for goal in GOALS:
        if all((device if key == "device" else getattr(row, key)) == value for key, value in goal.where.items()):
            return goal
    return None


# ---- tables ----


def with_range(row: Row) -> str:
    """``median unit (least-most)``; a single value without a range."""
    scale, unit = UNITS.get(row.unit.partition(" ")[0], (1, "x"))
    if unit == " s":
        scale, unit = next(((factor, name) for limit, factor, name in SHORT_UNITS if row.median < limit), (scale, unit))
    unit = unit if row.median < math.inf else ""
    middle, low, high = (three_digits(scale * value) for value in (row.median, min(row.values), max(row.values)))
    return f"{middle}{unit}" + (f" ({low}-{high})" if len(row.values) > 1 else "")


def three_digits(number: float) -> str:
    """``number`` with three digits, or with all before the point; ``never`` for infinity."""
    if number == math.inf:
        return "never"
    return f"{number:.0f}" if number >= 99.5 else f"{number:#.3g}".rstrip(".")


def row_table(rows: Sequence[Row], title: str, device: str) -> Table:
    """A line for each row, with its goal on ``device``, cpu or cuda, where it has one."""
    table = results_table(title, "", "median (range)", "n", "goal", "")
    for row in rows:
        part = row.part if row.part in ("start", "sweep", "memory", "fold") else ""
        case = " ".join(str(word) for word in (part, row.model, row.batch_size, row.engine) if word)
        goal = goal_of(row, device)
        marks = (str(goal), goal.verdict(row)) if goal else ("", "")
        what = f"{row.what} / {row.over}" if row.over else row.what
        what += ", cpu" if row.unit.endswith("processor") else ""
        table.add_row(f"{case}: {what}", with_range(row), str(len(row.values)), *marks)
    return table


def epoch_table(rows: Sequence[Row], title: str) -> Table:
    """The epochs of one case: seconds, the ratio to the bare floor, and the tutorial's ratio to ours."""
    table = results_table(title, "", "an epoch", "x bare floor", "x cpu", "tutorial")
    by_kind = {(row.what, row.engine, row.over, row.unit): row for row in rows}
    for row in rows:
        if row.over or row.unit != "s" or row.part != "epoch":
            continue
        wall, processor = (by_kind.get((row.what, row.engine, FLOOR, unit)) for unit in ("x", "x processor"))
        tutorial = by_kind.get((TUTORIAL, row.engine, row.what, "x"))
        name = row.what if row.engine in ("", EAGER) else f"{row.what}, {row.engine}"
        medians = [f"{three_digits(each.median)}x" if each else "" for each in (processor, tutorial)]
        table.add_row(name, with_range(row), with_range(wall) if wall else "", *medians)
    return table
