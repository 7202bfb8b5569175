"""Shows a comparison of runs: tables and a verdict to read, JSON, CSV, Markdown and a figure to keep.

`report` is the door: folders in, verdict out. What it prints is made of the same numbers as comparison.json.
"""

import csv
import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bnexp import stats
from bnexp.errors import UserError
from bnexp.files import write_files
from bnexp.foreign import printable, read
from bnexp.records import METRICS, TARGETS, Metric, Problem, RunRecord, read_runs
from bnexp.variants import Variant, into_variants, named
from bnexp.verdict import Comparison, SpeedUp, compare, show_p

FORMATS = ("json", "csv", "markdown")
CAPTION = "mean and 95% interval over seeds; differences paired by seed, p by the paired t-test"
SPEED_CAPTION = "baseline's steps to its best / variant's steps to the same value, geometric mean over seeds"


def report(
    paths: Iterable[str | os.PathLike],
    *,
    best_over: str | None = None,
    baseline: str | None = None,
    out: str | os.PathLike | None = None,
    format: str | None = None,
    quiet: bool = False,
    console: Console | None = None,
    names: Mapping[Path, str] | None = None,
) -> Comparison:
    """Compare the finished runs at or below ``paths``, print the result and, with ``out``, write the files.

    ``format`` prints json, csv or markdown alone instead of tables. ``names`` says how the variants of runs are
    called, by their folders, where the settings that differ would not say it well. Bad input is a `UserError`.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"format={format}: not known; choose one of {', '.join(FORMATS)}")
    console = console or Console(quiet=quiet)
    records, problems = read_runs(paths)
    records = named(records, names or {})
    comparison = compare(records, problems, baseline=baseline, best_over=best_over)
    figure = write_comparison(out, comparison) if out is not None else None
    if format is None:
        print_comparison(console, comparison)
        if figure is not None:
            console.print(f"figure: {printable(figure)}", markup=False, highlight=False, soft_wrap=True)
    else:
        text = {"json": dump_json, "csv": to_csv, "markdown": to_markdown}[format](comparison)
        console.print(text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True, emoji=False)
    return comparison


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


def to_json(comparison: Comparison) -> dict:
    """The content of comparison.json; undefined numbers are null, accuracies fractions, losses nats."""
    variants = []
    for variant in comparison.variants:
        against = comparison.against.get(variant.label)
        content = {
            "label": variant.label,
            "overrides": variant.overrides,
            "n": len(variant.runs),
            "num_diverged": len(variant.diverged),
            "seeds": [run.seed for run in variant.runs],
            "runs": [str(run.path) for run in variant.runs + variant.diverged],
            "metrics": {key: asdict(mean) for key, mean in comparison.means[variant.label].items()},
            "paired": None,
            "speedups": None,
            "differs": None,
        }
        if against is not None:
            content["paired"] = {
                metric.key: asdict(against.paired[metric.key]) | {"evidence": against.evidence(metric)}
                for metric in METRICS
            }
            content["speedups"] = {tag: asdict(speed) for tag, speed in against.speedups.items()}
            content["differs"] = {key: list(values) for key, values in against.differs.items()}
        variants.append(content)
    return {
        "baseline": comparison.baseline.label,
        "verdict": comparison.sentences,
        "variants": variants,
        "best_over": comparison.best_over,
        "chosen": comparison.chosen,
        "notes": comparison.notes,
        "left_out": [asdict(each) | {"path": str(each.path)} for each in comparison.left_out],
    }


def dump_json(comparison: Comparison) -> str:
    """comparison.json, strict: no NaN in it."""
    return json.dumps(to_json(comparison), indent=2, allow_nan=False, default=str) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One line per variant and number; a speed-up stands in the column mean, its count of seeds in n."""
    columns = "variant,baseline,metric,n,mean,low,high,num_diverged,reached,num_pairs,difference"
    columns += ",difference_low,difference_high,p,evidence"
    file = io.StringIO()
    writer = csv.DictWriter(file, columns.split(","), lineterminator="\n")
    writer.writeheader()
    for variant in to_json(comparison)["variants"]:
        shared = {"variant": variant["label"], "baseline": comparison.baseline.label}
        shared["num_diverged"] = variant["num_diverged"]
        for key, mean in variant["metrics"].items():
            row = shared | {"metric": key} | mean
            if variant["paired"]:
                paired = variant["paired"][key]
                row |= {"num_pairs": paired["n"], "difference": paired["difference"], "p": paired["p"]}
                row |= {"difference_low": paired["low"], "difference_high": paired["high"]}
                row["evidence"] = paired["evidence"]
            writer.writerow(row)
        for tag, speed in (variant["speedups"] or {}).items():
            row = shared | {"metric": f"speedup/{tag}", "mean": speed["ratio"]}
            writer.writerow(row | {key: speed[key] for key in ("n", "low", "high", "reached")})
    return file.getvalue()


def to_markdown(comparison: Comparison, figure: str | None = None, probed: Mapping[str, str] | None = None) -> str:
    """Verdict, figure if there is one, tables, figures of probes {title: file} and remarks, for a pull request."""
    lines = [f"# {' / '.join(_cell(each.label) for each in comparison.variants)}", ""]
    lines += [f"{_cell(sentence)}\n" for sentence in comparison.sentences]
    if figure is not None:
        lines += [f"![loss and accuracy against steps, mean and 95% interval over seeds]({figure})", ""]
    for title, head, rows, caption in _tables(comparison):
        lines += [f"## {_cell(title)}", "", _row(head), _row([":--", *["--:"] * (len(head) - 2), ":--"])]
        lines += [_row([f"**{row[0]}**", *row[1:]] if not any(row[1:]) else row) for row in rows]
        lines += ["", f"{caption[0].upper()}{caption[1:]}.", ""]
    for title, name in (probed or {}).items():
        lines += [f"## {title}", "", f"![{title}]({name})", ""]
    return "\n".join([*lines, *(f"* {_cell(remark)}" for remark in _remarks(comparison))]).rstrip() + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_cell(cell.strip()) for cell in cells)} |"


def _cell(text: str) -> str:
    """``text`` in Markdown, where names from a run's folder must be no link, no picture and no HTML."""
    return re.sub(r"[\\`|]|<(?=[\w/!])|](?=\()", r"\\\g<0>", text).replace("\n", " ")


def write_comparison(folder: str | os.PathLike, comparison: Comparison) -> Path:
    """Write comparison.png, .svg, .json and .md into ``folder``, each in one move; returns the png's path.

    Beside them what probes saw, as .png and .svg. What an earlier report here showed of other runs' probes is taken
    away, or it would seem to belong to this one; pictures that its comparison.md did not show are somebody else's.
    """
    from bnexp import figure, probe_figure

    folder = Path(folder)
    probed = probe_figure.draw(comparison.variants)
    drawn = {"comparison": figure.draw(comparison.variants), **probed}
    files = {f"{name}.{kind}": figure.render(each, kind) for name, each in drawn.items() for kind in ("png", "svg")}
    titles = {probe_figure.TITLES[name]: f"{name}.png" for name in probed}
    files["comparison.json"] = dump_json(comparison).encode()
    files["comparison.md"] = to_markdown(comparison, "comparison.png", titles).encode()
    try:
        try:
            before = read(folder / "comparison.md", 2**24)
        except (FileNotFoundError, ValueError):  # none, or none of ours
            before = b""
        write_files(folder, files)
        for name in probe_figure.TITLES:
            if name not in probed and f"]({name}.png)".encode() in before:
                (folder / f"{name}.png").unlink(missing_ok=True)
                (folder / f"{name}.svg").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"out={folder}: cannot be written to ({error.strerror}); choose another") from error
    return folder / "comparison.png"
