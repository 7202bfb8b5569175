"""Tables for a terminal: a comparison, a sweep so far, and the epochs as tutorials print them."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bnexp.report import stats
from bnexp.report.differences import Against, SpeedUp
from bnexp.report.records import METRICS, TARGETS, Metric, Problem, RunRecord, read_runs
from bnexp.report.variants import Variant, into_variants
from bnexp.report.verdict import Comparison, show_p
from bnexp.store.untrusted import printable

TableContent = tuple[str, list[str], list[list[str]], str]  # title, head, rows, caption

SEEDS_CAPTION = "mean and 95% interval over the n finished seeds"
PAIRED_CAPTION = "differences paired by seed, p by the paired t-test"
DIVERGED_CAPTION = "; {}: runs whose loss became infinite or NaN, not in the means"
UNPAIRED = "*"  # marks a difference
SPEED_CAPTION = (
    "speed-up: the baseline's steps to its best / the variant's steps to the same value, geometric mean over the seeds "
    "that reach it"
)
# Curves of a split; the first that a run has: evaluated on the whole set, or averaged over the steps of the epoch.
EPOCH_SPLITS = {"training": ("train_eval", "train"), "validation": ("valid",), "test": ("test",)}


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the tables, the remarks and the verdict."""
    width = max(16, *(len(variant.label) + 2 for variant in comparison.variants))  # of the first column
    is_narrow = console.width < 100
    for title, head, rows, caption in comparison_tables(comparison):
        table = new_table(title, *head, caption=caption, gap=0 if is_narrow else 1)
        for column in table.columns[:-1]:  # the evidence, in words, may be broken
            column.no_wrap, column.overflow = True, "ellipsis"
        table.columns[-1].justify = "left"
        for name, *cells in rows:
            style = {"better": "green", "worse": "red"}.get(cells[-1], "") if any(cells) else "bold"
            row = [name, *cells] if any(cells) else [textwrap.fill(name, width), *cells]
            row = [cell.replace(" [", "\n[") for cell in row] if is_narrow else row
            table.add_row(*map(escape, row), style=style)
        console.print(table)
        console.print()
    for line in remarks(comparison):
        console.print(line, markup=False, highlight=False)
    for sentence in comparison.sentences:
        console.print(f"\n{sentence}", markup=False, highlight=False, style="bold")


def comparison_tables(comparison: Comparison) -> list[TableContent]:
    """The tables that have rows; a row with nothing but a first cell is the heading of a metric."""
    return [table for table in (_difference_table(comparison), _speed_table(comparison)) if table[2]]


def _difference_table(comparison: Comparison) -> TableContent:
    any_diverged = any(variant.diverged for variant in comparison.variants)
    head = ["", "n", *["diverged"] * any_diverged, "mean", "difference", "p", "evidence"]
    rows = []
    for metric in METRICS:
        means = {variant.label: comparison.means[variant.label][metric.key] for variant in comparison.variants}
        if not any(mean.n for mean in means.values()):
            continue
        rows.append([metric.heading, *[""] * (len(head) - 1)])
        for variant, mean in zip(comparison.variants, means.values(), strict=True):
            cells = [f"  {variant.label}", str(mean.n), *_diverged_cell(variant, any_diverged), mean_cell(metric, mean)]
            rows.append(cells + _difference_cells(metric, comparison.against.get(variant.label)))
    is_unpaired = any(against.design == "unpaired" for against in comparison.against.values())
    caption = f"{SEEDS_CAPTION}; {PAIRED_CAPTION}" + f"; {UNPAIRED} unpaired, p by Welch's t-test" * is_unpaired
    caption += DIVERGED_CAPTION.format("diverged") * any_diverged
    return f"Variants against {comparison.baseline.label}", head, rows, caption


def _speed_table(comparison: Comparison) -> TableContent:
    base, rows = comparison.baseline.label, []
    for metric in TARGETS:
        speeds = {f"  {label}": against.speedups[metric.tag] for label, against in comparison.against.items()}
        cells = [[name, *_speed_cells(speed)] for name, speed in speeds.items() if speed.is_informative]
        rows += [[f"{base}'s {metric.title}", "", "", ""], *cells] if cells else []
    return f"Steps to {base}'s best", ["", "reached in", "speed-up", "evidence"], rows, SPEED_CAPTION


def remarks(comparison: Comparison) -> list[str]:
    """The notes of the comparison, then the runs that were left out, with the reasons."""
    left_out = [f"left out, {each.status}: {printable(each.path)} ({each.reason})" for each in comparison.left_out]
    count = [f"{len(left_out)} run{'s' * (len(left_out) > 1)} left out."] if left_out else []
    return comparison.notes + count + left_out


def mean_cell(metric: Metric, mean: stats.Mean) -> str:
    """``97.13 ±0.21``, without the interval if there is none."""
    if mean.mean is None:
        return "not finite" if mean.n else "-"
    half = "" if mean.high is None else f" ±{metric.show(mean.high - mean.mean)}"
    return metric.show(mean.mean) + half


def _difference_cells(metric: Metric, against: Against | None) -> list[str]:
    """The cells of difference, p and evidence."""
    if against is None:
        return ["baseline", "", ""]
    found = against.differences[metric.key]
    if not found.n:
        return [{"paired": "no pair", "unpaired": "-"}.get(against.design, against.design), "", ""]
    cell = "not finite" if found.difference is None else metric.show(found.difference, "+")
    cell += UNPAIRED * (against.design == "unpaired")
    if found.low is not None:
        cell += f" [{metric.show(found.low, '+')}, {metric.show(found.high, '+')}]"
    return [cell, "" if found.p is None else show_p(found.p), against.evidence(metric)]


def _speed_cells(speed: SpeedUp) -> list[str]:
    ratio, evidence = "-" if speed.ratio is None else f"{speed.ratio:.2f}", "not enough evidence"
    if speed.low is not None and speed.high is not None:
        ratio += f" [{speed.low:.2f}, {speed.high:.2f}]"
        evidence = "faster" if speed.low > 1 else "slower" if speed.high < 1 else evidence
    elif speed.reached > 1:
        evidence = "the same in each seed, so no interval"
    if speed.reached < speed.n:
        evidence = f"not reached in {speed.n - speed.reached}" + (f"; {evidence}" if speed.reached else "")
    return [f"{speed.reached} of {speed.n}", ratio, evidence]


def _diverged_cell(variant: Variant, any_diverged: bool) -> list[str]:
    """The cell in the column of diverged runs; no cell if there is no such column."""
    share = f"{len(variant.diverged)}/{len(variant.all_runs)}"
    return [share if variant.diverged else ""] * any_diverged


def new_table(title: str, *columns: str, caption: str | None = None, gap: int = 1) -> Table:
    """An empty table, the first column aligned to the left and the others to the right."""
    table = Table(
        title=escape(title), caption=caption, title_justify="left", caption_justify="left", show_edge=False,
        box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), min_width=len(title),
    )  # fmt: skip
    for i, name in enumerate(columns):
        table.add_column(escape(name), justify="right" if i else "left", overflow="fold")
    return table


def show_sweep(folder: Path) -> None:
    """Print the results of the sweep in ``folder`` so far."""
    Console().print(sweep_table(*read_runs([folder])))


def sweep_table(records: Sequence[RunRecord], problems: Sequence[Problem]) -> Group:
    """A table with a row per variant; below it a line per unusual evaluation and per run that is left out."""
    variants, superseded = into_variants(records)
    any_diverged = any(variant.diverged for variant in variants)
    shown = [metric for metric in METRICS[:6] if any(metric.values(variant.runs) for variant in variants)]
    heads = [each.heading.replace("accuracy,", "acc.").replace("validation", "valid.") for each in shown]
    caption = SEEDS_CAPTION + DIVERGED_CAPTION.format("div.") * any_diverged
    table = new_table("Sweep", "variant", "n", *["div."] * any_diverged, *heads, "s", caption=caption)
    for variant in variants:
        cells = [str(len(variant.runs)), *_diverged_cell(variant, any_diverged)]
        cells += [mean_cell(metric, metric.mean(variant.runs)) for metric in shown]
        seconds = f"{fmean(run.status.get('seconds', 0.0) for run in variant.runs):.1f}" if variant.runs else "-"
        table.add_row(escape(variant.label), *cells, seconds)
    lines = [line for variant in variants for line in variant.evaluations]
    for each in [*problems, *superseded]:
        place = each.path / "status.json"
        lines.append(printable(f"{each.status}: {' '.join(each.overrides)}: {each.reason} ({place})"))
    return Group(*([table] if variants else []), *map(Text, lines))


def epoch_tables(variants: Sequence[Variant]) -> list[Table]:
    """A table of loss and accuracy for each split, means over seeds; the training table also has seconds."""
    tags = {tag for variant in variants for run in variant.runs for tag in run.curves}
    found = {name: [split for split in splits if f"loss/{split}" in tags] for name, splits in EPOCH_SPLITS.items()}
    return [_epoch_table(name, splits[0], variants) for name, splits in found.items() if splits]


def _epoch_table(name: str, split: str, variants: Sequence[Variant]) -> Table:
    has_seconds = name == "training"
    heads = [f"{each.label}: loss / accuracy{' / s' * has_seconds}" for each in variants]
    table = new_table(f"{name} set, mean over seeds", "epoch", *heads)
    columns = [epoch_rows(variant.runs, split) for variant in variants]
    for epoch in sorted(set().union(*columns)):
        cells = []
        for column in columns:
            loss, accuracy, seconds = column.get(epoch, (None, None, None))
            cell = "-" if loss is None else f"{loss:.4f}  {accuracy:.2%}"
            cells.append(cell + (f"  {seconds:.1f}" if has_seconds and seconds is not None else ""))
        table.add_row(f"{epoch:g}", *cells)
    return table


def epoch_rows(runs: Sequence[RunRecord], split: str) -> dict[float, tuple[float, ...]]:
    """{epoch: (loss, accuracy, seconds since the last row)}, means over ``runs``, at the evaluations that all have.

    The training loss, which is read more often, is averaged over the readings since the last evaluation.
    """
    rows: list[dict[float, tuple[float, float, float]]] = []
    for run in runs:
        evaluated = next((f"loss/{each}" for each in ("valid", "test", split) if f"loss/{each}" in run.curves), "")
        tags = ("epoch", "seconds", f"loss/{split}", f"accuracy/{split}")
        epochs, seconds, losses, accuracies = map(run.curve, tags)
        row, before = {}, 0
        for step in run.curve(evaluated):
            loss, accuracy = (_mean_between(curve, before, step) for curve in (losses, accuracies))
            if loss is not None and accuracy is not None and step in epochs.keys() & seconds.keys():
                row[round(epochs[step], 3)] = (loss, accuracy, seconds[step] - seconds.get(before, 0.0))
            before = step
        rows.append(row)
    common = set.intersection(*map(set, rows)) if rows else set()
    return {at: tuple(map(fmean, zip(*(row[at] for row in rows), strict=True))) for at in common}


def _mean_between(curve: Mapping[int, float], after: int, upto: int) -> float | None:
    values = [value for step, value in curve.items() if after < step <= upto]
    return fmean(values) if values else None
