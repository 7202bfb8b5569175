"""What was measured after every epoch, as tutorials print it: one table for each split."""

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bnexp.report import stats
from bnexp.report.records import METRICS, TARGETS, Metric, Problem, RunRecord, read_runs
from bnexp.report.variants import Variant, into_variants
from bnexp.report.verdict import Comparison, SpeedUp, show_p
from bnexp.store.untrusted import printable

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


CAPTION = "mean and 95% interval over seeds; differences paired by seed, p by the paired t-test"
SPEED_CAPTION = "baseline's steps to its best / variant's steps to the same value, geometric mean over seeds"


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the tables, what must be said beside them, and the verdict."""
    width = max(14, *(len(each.label) + 2 for each in comparison.variants))  # of the first column
    is_narrow = console.width < 100
    for title, head, rows, caption in _tables(comparison):
        table = _table(title, caption, gap=0 if is_narrow else 1)
        for name in head:
            justify = "left" if name in ("", "evidence") else "right"
            table.add_column(name, justify=justify, no_wrap=name != "evidence")
        for name, *cells in rows:
            style = {"better": "green", "worse": "red"}.get(cells[-1], "") if any(cells) else "bold"
            row = [name, *cells] if any(cells) else [textwrap.fill(name, width), *cells]
            row = [cell.replace(" [", "\n[") for cell in row] if is_narrow else row
            table.add_row(*map(escape, row), style=style)
        console.print(table)
        console.print()
    for line in _remarks(comparison):
        console.print(line, markup=False, highlight=False)
    for sentence in comparison.sentences:
        console.print(f"\n{sentence}", markup=False, highlight=False, style="bold")


def _table(title: str, caption: str, gap: int = 1) -> Table:
    left = {"title_justify": "left", "caption_justify": "left"}
    return Table(title=escape(title), caption=caption, box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), **left)


def _tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]], str]]:
    """Title, head, rows and caption of both tables; a row with nothing but a first cell opens a metric."""
    base = comparison.baseline.label
    any_lost = any(each.diverged for each in comparison.variants)
    head = ["", "n", *["div."] * any_lost, "mean", "difference", "p", "evidence"]
    rows = []
    for metric in METRICS:
        if not any(means[metric.key].n for means in comparison.means.values()):
            continue
        rows.append([_head(metric), *[""] * (len(head) - 1)])
        for variant in comparison.variants:
            mean = comparison.means[variant.label][metric.key]
            cells = [f"  {variant.label}", str(mean.n), *_lost(variant, any_lost), mean_cell(metric, mean)]
            against = comparison.against.get(variant.label)
            if against is None:
                cells += ["baseline", "", ""]
            else:
                paired = against.paired[metric.key]
                p = "" if paired.p is None else show_p(paired.p)
                cells += [_difference_cell(metric, paired), p, against.evidence(metric) if paired.n else ""]
            rows.append(cells)
    caption = CAPTION + "; div.: runs that diverged" * any_lost
    tables = [(f"Variants against {base}", head, rows, caption)]
    rows = []
    for metric in TARGETS:
        speeds = {label: each.speedups[metric.tag] for label, each in comparison.against.items()}
        if any(speed.n for speed in speeds.values()):
            rows.append([f"{base}'s {metric.title}", "", "", ""])
            rows += [[f"  {label}", *_speed_cells(speed)] for label, speed in speeds.items()]
    if rows:
        head = ["", "reached in", "speed-up", "evidence"]
        tables.append((f"Steps to {base}'s best", head, rows, SPEED_CAPTION))
    return tables


def _head(metric: Metric) -> str:
    return f"{metric.title}, %" if metric.is_accuracy else metric.title


def _lost(variant: Variant, any_lost: bool) -> list[str]:
    """The cell of the column on diverged runs, which is there only if any run did."""
    share = f"{len(variant.diverged)}/{len(variant.runs + variant.diverged)}"
    return [share if variant.diverged else ""] * any_lost


def mean_cell(metric: Metric, mean: stats.Mean) -> str:
    """``97.13 ±0.21``, or as much of it as there is."""
    if mean.mean is None:
        return "not finite" if mean.n else "-"
    half = "" if mean.high is None else f" ±{metric.show(mean.high - mean.mean)}"
    return metric.show(mean.mean) + half


def _difference_cell(metric: Metric, paired: stats.Paired) -> str:
    if paired.difference is None:
        return "not finite" if paired.n else "no pair"
    cell = metric.show(paired.difference, "+")
    if paired.low is not None:
        cell += f" [{metric.show(paired.low, '+')}, {metric.show(paired.high, '+')}]"
    return cell


def _speed_cells(speed: SpeedUp) -> list[str]:
    ratio, evidence = "-" if speed.ratio is None else f"{speed.ratio:.2f}", "not enough evidence"
    if speed.low is not None and speed.high is not None:
        ratio += f" [{speed.low:.2f}, {speed.high:.2f}]"
        evidence = "faster" if speed.low > 1 else "slower" if speed.high < 1 else evidence
    elif speed.reached > 1:
        evidence = "the same in each seed, so no interval"
    if speed.reached < speed.n:
        evidence = f"never reached in {speed.n - speed.reached}" + (f"; {evidence}" if speed.reached else "")
    return [f"{speed.reached} of {speed.n}", ratio, evidence]


def _remarks(comparison: Comparison) -> list[str]:
    left_out = [f"left out, {each.status}: {printable(each.path)} ({each.reason})" for each in comparison.left_out]
    if left_out:
        left_out.insert(0, f"{len(left_out)} run{'s' * (len(left_out) > 1)} left out.")
    return comparison.notes + left_out


def show_sweep(folder: Path) -> None:
    """Print what became of the sweep in ``folder`` so far, and how to go on if something is left to do."""
    records, problems = read_runs([folder])
    Console().print(sweep_table(records, problems))
    if any(each.status == "interrupted" for each in problems):
        print(f"to go on, repeat the command with out={folder}", file=sys.stderr)


def sweep_table(records: Sequence[RunRecord], problems: Sequence[Problem]) -> Group:
    """What became of a sweep: a row per variant, then every run that does not count and where it lies."""
    variants, superseded = into_variants(records)
    any_lost = any(each.diverged for each in variants)
    caption = "mean and 95% interval over seeds" + "; div.: runs that diverged, not in the means" * any_lost
    table = _table("Sweep", caption)
    shown = [metric for metric in METRICS[:6] if any(metric.mean(each.runs).n for each in variants)]
    table.add_column("variant", no_wrap=True)
    for name in ["n", *["div."] * any_lost, *map(_head, shown), "s"]:
        table.add_column(name.replace("accuracy,", "acc."), justify="right")
    for variant in variants:
        cells = [mean_cell(metric, metric.mean(variant.runs)) for metric in shown]
        seconds = stats.mean([run.status.get("seconds", 0.0) for run in variant.runs])
        taken = "-" if seconds.mean is None else f"{seconds.mean:.1f}"
        lost = _lost(variant, any_lost)
        table.add_row(escape(variant.label), str(len(variant.runs)), *lost, *cells, taken)
    lines = [
        Text(printable(f"{each.status}: {' '.join(each.overrides)}: {each.reason} ({each.path / 'status.json'})"))
        for each in [*problems, *superseded]
    ]
    return Group(*([table] if variants else []), *lines)
