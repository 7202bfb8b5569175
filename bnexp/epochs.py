"""What was measured after every epoch, as tutorials print it: one table for each split."""

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from bnexp.records import RunRecord
from bnexp.variants import Variant

# The first tag that a run has: evaluated on the whole set, or averaged over the epoch's steps as they were taken.
SPLITS = {"training": ("train_eval", "train"), "validation": ("valid",), "test": ("test",)}


def epoch_tables(variants: Sequence[Variant]) -> list[Table]:
    """A table of loss and accuracy for every split, means over seeds; the training table also has seconds."""
    return [table for title, tags in SPLITS.items() if (table := _table(title, tags, variants)) is not None]


def _table(title: str, tags: Sequence[str], variants: Sequence[Variant]) -> Table | None:
    has = {each for variant in variants for run in variant.runs for each in run.curves}
    tag = next((each for each in tags if f"loss/{each}" in has), None)
    if tag is None:
        return None
    seconds = title == "training"
    title += " set, mean over seeds"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ["epoch", *(f"{each.label}: loss / accuracy{' / s' * seconds}" for each in variants)]:
        table.add_column(escape(name), justify="right")
    columns = [epoch_rows(variant.runs, tag) for variant in variants]
    for epoch in sorted({epoch for column in columns for epoch in column}):
        cells = []
        for column in columns:
            loss, accuracy, taken = column.get(epoch, (None, None, None))
            cell = "-" if loss is None else f"{loss:.4f}  {accuracy:.2%}"
            cells.append(cell + (f"  {taken:.1f}" if seconds and taken is not None else ""))
        table.add_row(f"{epoch:g}", *cells)
    return table


def epoch_rows(runs: Sequence[RunRecord], split: str) -> dict[float, tuple[float, float, float]]:
    """{epoch: (loss, accuracy, seconds that it took)}, means over ``runs``, at the evaluations that all have.

    A curve with readings between the evaluations, the loss of training, is averaged from one to the next.
    """
    rows: list[dict[float, tuple[float, float, float]]] = []
    for run in runs:
        curves = run.curves
        ends = next((curves[f"loss/{each}"][0] for each in ("valid", "test", split) if f"loss/{each}" in curves), [])
        epoch, seconds = (dict(zip(*curves.get(key, ((), ())), strict=True)) for key in ("epoch", "seconds"))
        row, before = {}, 0
        for end in ends:
            loss, accuracy = (_between(curves.get(f"{kind}/{split}"), before, end) for kind in ("loss", "accuracy"))
            if loss is not None and accuracy is not None and end in epoch.keys() & seconds.keys():
                row[round(epoch[end], 3)] = (loss, accuracy, seconds[end] - seconds.get(before, 0.0))
            before = end
        rows.append(row)
    common = set.intersection(*map(set, rows)) if rows else set()
    columns = {at: zip(*(row[at] for row in rows), strict=True) for at in common}
    return {at: tuple(sum(column) / len(rows) for column in each) for at, each in columns.items()}


def _between(curve: tuple[Sequence[int], Sequence[float]] | None, after: int, upto: int) -> float | None:
    values = [value for step, value in zip(*(curve or ((), ())), strict=True) if after < step <= upto]
    return sum(values) / len(values) if values else None
