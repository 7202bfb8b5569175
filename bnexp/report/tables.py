"""Tables for a terminal: a comparison, a sweep so far, and the epochs as tutorials print them."""

import re
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
from bnexp.report.differences import Against
from bnexp.report.figures.style import describe_runs
from bnexp.report.records import METRICS, Metric, Problem, RunRecord, read_runs
from bnexp.report.sentences import show_p
from bnexp.report.steps import SpeedUp
from bnexp.report.variants import Variant, into_variants, last_part
from bnexp.report.verdict import Comparison
from bnexp.store.untrusted import printable

TableContent = tuple[str, list[str], list[list[str]], str]  # title, head, rows, caption

SEEDS_CAPTION = "mean and 95% interval over the n finished seeds"
PAIRED_CAPTION = "differences paired by seed, p by the paired t-test"
DIVERGED_CAPTION = "; {}: runs whose loss became infinite or NaN, not in the means"
PRIMARY_CAPTION = (
    "sd: standard deviation over seeds; difference: from {}, with intervals that hold for all variants together "
    "(Bonferroni); p: by the paired t-test, corrected for the number of variants (Holm); better in: seeds in which the "
    "variant is better, a tie counts half, and the 95% interval of its chance in a new seed (Wilson); r: correlation "
    "over seeds with {}; evidence: better or worse where p < 0.05, equivalent where the difference lies within "
    "margin={:g}, else undecided"
)
FLIPS_CAPTION = "; flips: another p, by flipping the signs of whole seeds, which assumes no normal distribution"
BREAKS = ("(?!)", r" (?=\[)", r" (?=[\[±])|(?<=,) ")  # spaces at which cells are broken, the first that fits
UNPAIRED = "*"  # marks a difference
TARGET_CAPTION = "target: what {} ends at in the other seeds (median of the last fifth of readings), mean over seeds; "
SPEED_CAPTION = (
    "speed-up: steps of {} to the target / steps of the variant, geometric mean over seeds, above 1 if the variant is "
    "sooner; >= or <=: a bound, where a target is reached at the first reading or not at all; p: by the sign test, "
    "where there is no interval"
)
TUNING_CAPTION = "k: how many values are tried, drawn at random from those that were run (Dodge et al. 2019)"
SWEPT = [metric for metric in METRICS if metric.at is None and metric.key != "loss/train/final"]  # columns of a sweep
# Curves of a split; the first that a run has: evaluated on the whole set, or averaged over the steps of the epoch.
EPOCH_SPLITS = {"training": ("train_eval", "train"), "validation": ("valid",), "test": ("test",)}


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the tables, the remarks and the verdict."""
    width = max(16, *(len(variant.label) + 2 for variant in comparison.variants))  # of the first column
    for content in comparison_tables(comparison):
        for breaks in BREAKS:
            table = _printed_table(content, width, breaks)
            if table.__rich_measure__(console, console.options.update(max_width=10_000)).maximum <= console.width:
                break
        console.print(table)
        console.print()
    for line in remarks(comparison):
        console.print(line, markup=False, highlight=False)
    for sentence in comparison.sentences:
        console.print(f"\n{sentence}", markup=False, highlight=False, style="bold")


def _printed_table(content: TableContent, width: int, breaks: str) -> Table:
    """The table for a terminal; ``breaks`` is the pattern of the spaces at which a cell is broken into lines."""
    title, head, rows, caption = content
    table = new_table(title, *head, caption=caption, gap=int(breaks == BREAKS[0]))
    for column in table.columns[1:]:
        column.no_wrap, column.overflow = True, "ellipsis"
    if head[-1] == "evidence":  # in words, which may be broken
        table.columns[-1].no_wrap, table.columns[-1].justify, table.columns[-1].min_width = False, "left", 10
    for name, *cells in rows:
        style = {"better": "green", "worse": "red", "faster": "green", "slower": "red"}.get(cells[-1], "")
        style = style if any(cells) else "bold"
        name = name if any(cells) else textwrap.fill(name, width)
        table.add_row(*map(escape, (name, *(re.sub(breaks, "\n", cell) for cell in cells))), style=style)
    return table


def comparison_tables(comparison: Comparison) -> list[TableContent]:
    """The tables that have rows; a row with nothing but a first cell is the heading of a metric."""
    tables = [_primary_table(comparison), _other_table(comparison), _speed_table(comparison), _tuning_table(comparison)]
    return [table for table in tables if table[2]]


def _primary_table(comparison: Comparison) -> TableContent:
    metric, rows = comparison.question.metric, []
    any_diverged = any(variant.diverged for variant in comparison.variants)
    any_flips = any(each.p_flips is not None for each in comparison.evidence.values())
    head = ["", "n", *["diverged"] * any_diverged, "mean", "sd", "difference", "p", *["flips"] * any_flips,
            "better in", "r", "evidence"]  # fmt: skip
    for variant in comparison.variants:
        label, mean = variant.label, comparison.means[variant.label][metric.key]
        cells = [label, str(mean.n), *_diverged_cell(variant, any_diverged), mean_cell(metric, mean)]
        cells += ["-" if mean.sd is None else metric.show(mean.sd), *_evidence_cells(comparison, label, any_flips)]
        rows.append(cells if mean.n or comparison.against else [])
    base = comparison.baseline.label
    caption = (
        f"{SEEDS_CAPTION}; {PRIMARY_CAPTION.format(base, base, comparison.question.margin)}" + FLIPS_CAPTION * any_flips
    )
    caption += _unpaired_caption(comparison) + _computed_caption(comparison)
    caption += DIVERGED_CAPTION.format("diverged") * any_diverged
    return f"{metric.heading}, against {base}", head, [row for row in rows if row], caption


def _evidence_cells(comparison: Comparison, label: str, any_flips: bool) -> list[str]:
    """The cells from the difference to the evidence."""
    against, metric = comparison.against.get(label), comparison.question.metric
    if against is None:
        return ["baseline", "", *[""] * any_flips, "", "", ""]
    found, seen = against.differences[metric.key], comparison.evidence[label]
    cells = [_difference_cell(metric, against, (seen.low, seen.high)), "" if seen.p is None else show_p(seen.p)]
    cells += ["" if seen.p_flips is None else show_p(seen.p_flips)] * any_flips
    wins = "" if seen.wins is None else f"{seen.wins:g} of {found.n} [{seen.wins_low:.0%}, {seen.wins_high:.0%}]"
    return [*cells, wins, "-" if seen.correlation is None else f"{seen.correlation:.2f}", seen.word]


def _other_table(comparison: Comparison) -> TableContent:
    """The metrics that are not judged."""
    head, rows = ["", "n", "mean", "difference", "p"], []
    for metric in METRICS:
        means = {variant.label: comparison.means[variant.label][metric.key] for variant in comparison.variants}
        if metric is comparison.question.metric or not any(mean.n for mean in means.values()):
            continue
        rows.append([metric.heading, *[""] * (len(head) - 1)])
        for label, mean in means.items():
            against = comparison.against.get(label)
            found = against and against.differences[metric.key]
            cell = "baseline" if against is None else _difference_cell(metric, against, (found.low, found.high))
            p = show_p(found.p) if found and found.p is not None else ""
            rows.append([f"  {label}", str(mean.n), mean_cell(metric, mean), cell, p])
    caption = f"{SEEDS_CAPTION}; {PAIRED_CAPTION}, not corrected for their number"
    caption += f"{_unpaired_caption(comparison)}; a best value has no p, because the noisier variant tends to have it"
    return "Metrics that are not judged", head, rows, caption


def _unpaired_caption(comparison: Comparison) -> str:
    is_unpaired = any(against.design == "unpaired" for against in comparison.against.values())
    return f"; {UNPAIRED} unpaired, p by Welch's t-test" * is_unpaired


def _computed_caption(comparison: Comparison) -> str:
    ways = {run.computed: None for variant in comparison.variants for run in variant.all_runs if run.computed}
    return f"; computed on {'; and on '.join(ways)}" * bool(ways)


def _speed_table(comparison: Comparison) -> TableContent:
    rows = [
        [label, f"{speed.target:.2%}", f"{speed.reached} of {speed.n}", f"{speed.base_reached} of {speed.n}",
         *_speed_cells(speed)] for label, speed in comparison.speedups.items() if speed.n
    ]  # fmt: skip
    base = comparison.baseline.label
    head = ["", "target", "reached in", f"by {base} in", "speed-up", "p", "evidence"]
    caption = TARGET_CAPTION.format(base) * (comparison.question.target is None) + SPEED_CAPTION.format(base)
    return f"Steps to a validation accuracy, against {base}", head, rows, caption


def _tuning_table(comparison: Comparison) -> TableContent:
    metric, key = comparison.question.metric, last_part(comparison.question.best_over or "")
    curves = {variant.label: tried.curve for variant in comparison.variants if (tried := comparison.tried(variant))}
    num_values = max(map(len, curves.values()), default=0)
    rows = [
        [label, *(mean_cell(metric, mean) for mean in curve), *["-"] * (num_values - len(curve))]
        for label, curve in curves.items() if num_values
    ]  # fmt: skip
    return (
        f"{metric.heading}, expected best of k values of {key}",
        ["", *map(str, range(1, num_values + 1))],
        rows,
        TUNING_CAPTION,
    )


def remarks(comparison: Comparison) -> list[str]:
    """The settings that all runs share, the notes, then the runs that were left out, with the reasons."""
    left_out = [f"left out, {each.status}: {printable(each.path)} ({each.reason})" for each in comparison.left_out]
    count = [f"{len(left_out)} run{'s' * (len(left_out) > 1)} left out."] if left_out else []
    runs = [f"All runs: {words}." for words in [describe_runs(comparison.variants)] if words]
    return runs + comparison.notes + count + left_out


def mean_cell(metric: Metric, mean: stats.Mean) -> str:
    """``97.13 ±0.21``, or ``99.10 [97.90, 100.00]`` if an end is cut off, without the interval if there is none."""
    if mean.mean is None:
        return "not finite" if mean.n else "-"
    if mean.low is None or mean.high is None:
        return metric.show(mean.mean)
    if metric.is_accuracy and (mean.low == 0 or mean.high == 1):  # cut off
        return f"{metric.show(mean.mean)} [{metric.show(mean.low)}, {metric.show(mean.high)}]"
    return f"{metric.show(mean.mean)} ±{metric.show(mean.high - mean.mean)}"


def _difference_cell(metric: Metric, against: Against, interval: tuple[float | None, float | None]) -> str:
    """``+0.84 [+0.46, +1.22]``, with a mark if it is unpaired."""
    found, (low, high) = against.differences[metric.key], interval
    if not found.n:
        return {"paired": "no pair", "unpaired": "-"}.get(against.design, against.design)
    cell = "not finite" if found.difference is None else metric.show(found.difference, "+")
    cell += UNPAIRED * (against.design == "unpaired")
    return cell if low is None or high is None else f"{cell} [{metric.show(low, '+')}, {metric.show(high, '+')}]"


def _speed_cells(speed: SpeedUp) -> list[str]:
    """The cells of speed-up, p and evidence."""
    ratio = "-" if speed.ratio is None else f"{speed.bound} {speed.ratio:.2f}".strip()
    if speed.low is not None and speed.high is not None:
        ratio += f" [{speed.low:.2f}, {speed.high:.2f}]"
    return [ratio, "" if speed.p is None else show_p(speed.p), speed.evidence]


def _diverged_cell(variant: Variant, any_diverged: bool) -> list[str]:
    """The cell in the column of diverged runs; no cell if there is no such column."""
    share = f"{len(variant.diverged)}/{len(variant.all_runs)}"
    return [share if variant.diverged else ""] * any_diverged


def new_table(title: str, *columns: str, caption: str | None = None, gap: int = 1) -> Table:
    """An empty table, the first column aligned to the left and the others to the right."""
    table = Table(
        title=escape(title), caption=caption and escape(caption), title_justify="left", caption_justify="left",
        show_edge=False, box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), min_width=len(title),
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
    shown = [metric for metric in SWEPT if any(metric.values(variant.runs) for variant in variants)]
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
