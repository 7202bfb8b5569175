"""Shows a comparison of runs: tables and a verdict to read, JSON, CSV, Markdown and a figure to keep.

`report` is the door: folders in, verdict out. What it prints is made of the same numbers as comparison.json.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from bnexp.errors import UserError
from bnexp.report.records import METRICS, read_runs
from bnexp.report.tables import _remarks, _tables, print_comparison
from bnexp.report.variants import named
from bnexp.report.verdict import Comparison, compare
from bnexp.store.files import write_files
from bnexp.store.untrusted import printable, read

FORMATS = ("json", "csv", "markdown")


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
    from bnexp.report.figures import curves, probes

    folder = Path(folder)
    probed = probes.draw(comparison.variants)
    drawn = {"comparison": curves.draw(comparison.variants), **probed}
    files = {f"{name}.{kind}": curves.render(each, kind) for name, each in drawn.items() for kind in ("png", "svg")}
    titles = {probes.TITLES[name]: f"{name}.png" for name in probed}
    files["comparison.json"] = dump_json(comparison).encode()
    files["comparison.md"] = to_markdown(comparison, "comparison.png", titles).encode()
    try:
        try:
            before = read(folder / "comparison.md", 2**24)
        except (FileNotFoundError, ValueError):  # none, or none of ours
            before = b""
        write_files(folder, files)
        for name in probes.TITLES:
            if name not in probed and f"]({name}.png)".encode() in before:
                (folder / f"{name}.png").unlink(missing_ok=True)
                (folder / f"{name}.svg").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"out={folder}: cannot be written to ({error.strerror}); choose another") from error
    return folder / "comparison.png"
