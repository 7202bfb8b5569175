"""How the measurements of ``bnexp bench loop`` are shown: medians, ranges and ratios, beside the goals."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bnexp.bench.goals import EAGER, FLOOR, TUTORIAL, Row, goal_of
from bnexp.bench.results import table_of

if TYPE_CHECKING:
    from rich.table import Table
UNITS = {"s": (1, " s"), "MB": (1, " MB"), "share": (100, "%"), "epochs": (1, " epochs")}
SMALL = ((1e-4, 1e6, " us"), (0.1, 1e3, " ms"))  # seconds below, how many of what


def spread(row: Row) -> str:
    """``median unit (least-most)``, of one value itself."""
    scale, unit = UNITS.get(row.unit.partition(" ")[0], (1, "x"))
    if unit == " s":
        scale, unit = next(((factor, name) for limit, factor, name in SMALL if row.median < limit), (scale, unit))
    unit = unit if row.median < math.inf else ""
    middle, low, high = (show(scale * value) for value in (row.median, min(row.values), max(row.values)))
    return f"{middle}{unit}" + (f" ({low}-{high})" if len(row.values) > 1 else "")


def show(number: float) -> str:
    """Three digits, and all of those before the point; infinitely many epochs are never over."""
    if number == math.inf:
        return "never"
    return f"{number:.0f}" if number >= 99.5 else f"{number:#.3g}".rstrip(".")


def plain_table(rows: Sequence[Row], title: str, device: str) -> "Table":
    """A line for each row, with its goal where it has one; ``device`` is cpu or cuda."""
    table = table_of(title, "", "median (range)", "n", "goal", "")
    for row in rows:
        part = row.part if row.part in ("start", "sweep", "memory", "fold") else ""
        case = " ".join(str(word) for word in (part, row.model, row.batch_size, row.engine) if word)
        goal = goal_of(row, device)
        marks = (str(goal), goal.verdict(row)) if goal else ("", "")
        what = f"{row.what} / {row.over}" if row.over else row.what
        what += ", cpu" if row.unit.endswith("processor") else ""
        table.add_row(f"{case}: {what}", spread(row), str(len(row.values)), *marks)
    return table


def epoch_table(rows: Sequence[Row], title: str) -> "Table":
    """The epochs of one case: seconds, how many times the bare floor's, and how many times ours the tutorial's are."""
    table = table_of(title, "", "an epoch", "x bare floor", "x cpu", "tutorial")
    found = {(row.what, row.engine, row.over, row.unit): row for row in rows}
    for row in rows:
        if row.over or row.unit != "s" or row.part != "epoch":
            continue
        wall, processor = (found.get((row.what, row.engine, FLOOR, unit)) for unit in ("x", "x processor"))
        theirs = found.get((TUTORIAL, row.engine, row.what, "x"))
        name = row.what if row.engine in ("", EAGER) else f"{row.what}, {row.engine}"
        medians = [f"{show(each.median)}x" if each else "" for each in (processor, theirs)]
        table.add_row(name, spread(row), spread(wall) if wall else "", *medians)
    return table
