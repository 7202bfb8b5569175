"""The report on finished runs, as tables, JSON, CSV, Markdown and figures; all forms show the same numbers."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

from rich.console import Console

from bnexp.errors import UserError
from bnexp.report.evidence import Evidence
from bnexp.report.figures.style import describe_runs
from bnexp.report.question import Question
from bnexp.report.records import read_runs
from bnexp.report.tables import comparison_tables, print_comparison, remarks
from bnexp.report.verdict import Comparison, compare_records, looked_at
from bnexp.store.files import write_files
from bnexp.store.untrusted import printable, read, read_json

REPORT_FORMATS = ("json", "csv", "markdown")
SPEED_COLUMNS = ("target", "reached", "base_reached", "sooner", "later", "bound")
FAILURE_COLUMNS = ("low", "high", "p")
CSV_COLUMNS = (
    "variant", "baseline", "metric", "n", "mean", "low", "high", "sd", "num_diverged", "num_failed",
    *(f"failures_{each}" for each in FAILURE_COLUMNS), "num_pairs",
    "difference", "difference_low", "difference_high", "p", "design", "evidence",
    *(f"evidence_{each.name}" for each in fields(Evidence) if each.name != "word"), *SPEED_COLUMNS,
)  # fmt: skip


def make_report(
    paths: Iterable[str | os.PathLike],
    *,
    question: Question = Question(),  # noqa: B008 (frozen)
    out: str | os.PathLike | None = None,
    format: str | None = None,
    quiet: bool = False,
    console: Console | None = None,
    names: Mapping[Path, str] | None = None,
) -> Comparison:
    """Compare the finished runs at or below ``paths``, print the result and, with ``out``, write the files there.

    ``format`` prints json, csv or markdown instead of tables. ``names`` are names of variants by run folder.
    Bad input is a `UserError`.
    """
    if format is not None and format not in REPORT_FORMATS:
        raise UserError(f"format={format}: not known; choose one of {', '.join(REPORT_FORMATS)}")
    console = console or Console(quiet=quiet)
    comparison = compare_records(*read_runs(paths, names), question)
    if out is not None:
        comparison = write_comparison(out, comparison)
    if format is None:
        print_comparison(console, comparison)
        if out is not None:
            figure = printable(Path(out) / "comparison.png")
            console.print(f"figure: {figure}", markup=False, highlight=False, soft_wrap=True)
    else:
        text = {"json": comparison_json, "csv": comparison_csv, "markdown": comparison_markdown}[format](comparison)
        console.print(text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True, emoji=False)
    return comparison


def comparison_content(comparison: Comparison) -> dict:
    """The content of comparison.json. Undefined numbers are null, accuracies are fractions, losses are in nats.

    The differences of a variant from the baseline are under ``paired`` or under ``unpaired``; the other is null. Its
    ``tuning`` is the expected primary metric after k = 1, 2, ... values of ``best_over``, see `tuning_curve`.
    """
    variants = []
    for variant in comparison.variants:
        against, tried = comparison.against.get(variant.label), comparison.tried(variant)
        designs: dict[str, dict | None] = {"paired": None, "unpaired": None}
        if against is not None and against.design in designs:
            designs[against.design] = {key: asdict(found) for key, found in against.differences.items()}
        variants.append({
            "label": variant.label,
            "overrides": variant.overrides,
            "n": len(variant.runs),
            "num_diverged": len(variant.diverged),
            "seeds": [run.seed for run in variant.runs],
            "runs": [str(run.path) for run in variant.all_runs],
            "metrics": {key: asdict(mean) for key, mean in comparison.means[variant.label].items()},
            "failures": asdict(comparison.failures[variant.label]),
            **designs,
            "evidence": against and asdict(comparison.evidence[variant.label]),
            "speedup": against and asdict(comparison.speedups[variant.label]),
            "differs": against and against.differs,
            "tuning": [asdict(mean) for mean in tried.curve] if tried else [],
        })  # fmt: skip
    return {
        "baseline": comparison.baseline.label,
        **{key: getattr(comparison.question, key) for key in ("primary", "margin", "target", "best_over", "choose_on")},
        "looks": comparison.looks,
        "verdict": comparison.sentences,
        "all_runs": describe_runs(comparison.variants),
        "computed_on": sorted({run.computed for variant in comparison.variants for run in variant.all_runs}),
        "variants": variants,
        "chosen": comparison.chosen,
        "chosen_on": comparison.tuning and comparison.tuning.chose,
        "judged_on": comparison.tuning and comparison.tuning.judged,
        "notes": comparison.notes,
        "left_out": [asdict(each) | {"path": str(each.path)} for each in comparison.left_out],
    }


def comparison_json(comparison: Comparison) -> str:
    """The text of comparison.json, strict JSON without NaN."""
    return json.dumps(comparison_content(comparison), indent=2, allow_nan=False, default=str) + "\n"


def comparison_csv(comparison: Comparison) -> str:
    """One line per variant and metric, one with the metric ``speedup``, whose ratio is in the column mean, and one with
    ``tuning/K`` for the expected best of K values.

    ``evidence`` and ``evidence_...`` are filled in the line of the primary metric.
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for variant in comparison_content(comparison)["variants"]:
        shared = {"variant": variant["label"], "baseline": comparison.baseline.label}
        shared |= {"num_diverged": variant["num_diverged"], "num_failed": variant["failures"]["k"]}
        shared |= {f"failures_{key}": variant["failures"][key] for key in FAILURE_COLUMNS}
        design = "paired" if variant["paired"] else "unpaired" if variant["unpaired"] else None
        for key, mean in variant["metrics"].items():
            row = shared | {"metric": key} | mean
            if design is not None:
                found = variant[design][key]
                row |= {"difference": found["difference"], "p": found["p"], "design": design}
                row |= {"difference_low": found["low"], "difference_high": found["high"]}
                row["num_pairs"] = found["n"] if design == "paired" else None
            if variant["evidence"] and key == comparison.question.primary:
                row |= {f"evidence_{name}".removesuffix("_word"): each for name, each in variant["evidence"].items()}
            writer.writerow(row)
        if (speed := variant["speedup"]) and speed["n"]:
            row = shared | {"metric": "speedup", "mean": speed["ratio"]}
            writer.writerow(row | {key: speed[key] for key in ("n", "low", "high", "p", "evidence", *SPEED_COLUMNS)})
        for num_values, mean in enumerate(variant["tuning"], start=1):
            writer.writerow(shared | {"metric": f"tuning/{num_values}"} | mean)
    return file.getvalue()


def comparison_markdown(
    comparison: Comparison, figure: str | None = None, probed: Mapping[str, str] | None = None
) -> str:
    """Verdict, ``figure`` if there is one, tables, other figures as {title: file}, and remarks."""
    lines = [f"# Comparison of {', '.join(_cell(each.label) for each in comparison.variants)}", ""]
    lines += [f"{_cell(sentence)}\n" for sentence in comparison.sentences]
    if figure is not None:
        lines += [f"![loss and accuracy against steps, mean and 95% interval over seeds]({figure})", ""]
    for title, head, rows, caption in comparison_tables(comparison):
        lines += [
            f"## {_cell(title)}",
            "",
            _row(head),
            _row([":--", *["--:"] * (len(head) - 2), ":--" if head[-1] == "evidence" else "--:"]),
        ]
        lines += [_row([f"**{row[0]}**", *row[1:]] if not any(row[1:]) else row) for row in rows]
        lines += ["", f"{caption[0].upper()}{caption[1:]}.", ""]
    for title, name in (probed or {}).items():
        lines += [f"## {title}", "", f"![{title}]({name})", ""]
    return "\n".join([*lines, *(f"* {_cell(remark)}" for remark in remarks(comparison))]).rstrip() + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_cell(cell.strip()) for cell in cells)} |"


def _cell(text: str) -> str:
    """``text`` escaped for Markdown. Names from a run's folder must not become links, pictures or HTML."""
    return re.sub(r"[\\`|]|<(?=[\w/!])|](?=\()", r"\\\g<0>", text).replace("\n", " ")


def write_comparison(folder: str | os.PathLike, comparison: Comparison) -> Comparison:
    """Write comparison.png, .svg, .json, .md and figures of tuning and probes into ``folder``, each file atomically.

    Returns the comparison with a note on every figure of a probe that was left out. Figures that an earlier
    comparison.md in the folder shows and this one does not are deleted, because they belong to other runs.
    """
    from bnexp.report.figures.curves import draw_curves
    from bnexp.report.figures.probes import TITLES, draw_probes
    from bnexp.report.figures.style import render_figure
    from bnexp.report.figures.tuning import TUNING, draw_tuning

    folder = Path(folder)
    comparison = looked_at(comparison, earlier_looks(folder, comparison))
    probed, notes = draw_probes(comparison.variants)
    if tried := [each for each in map(comparison.tried, comparison.variants) if each]:
        probed = {"tuning": draw_tuning(tried, comparison.question)} | probed
    known = {"tuning": TUNING} | TITLES
    comparison = replace(comparison, notes=comparison.notes + notes)
    drawn = {"comparison": draw_curves(comparison.variants), **probed}
    files = {f"{name}.{kind}": render_figure(each, kind) for name, each in drawn.items() for kind in ("png", "svg")}
    titles = {known[name]: f"{name}.png" for name in probed}
    files["comparison.json"] = comparison_json(comparison).encode()
    files["comparison.md"] = comparison_markdown(comparison, "comparison.png", titles).encode()
    try:
        try:
            before = read(folder / "comparison.md", 2**24)
        except (FileNotFoundError, ValueError):  # no such file, or one that bnexp did not write
            before = b""
        write_files(folder, files)
        for name in known:
            if name not in probed and f"]({name}.png)".encode() in before:
                (folder / f"{name}.png").unlink(missing_ok=True)
                (folder / f"{name}.svg").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"out={folder}: cannot be written to ({error.strerror}); choose another") from error
    return comparison


def earlier_looks(folder: Path, comparison: Comparison) -> list[int]:
    """The numbers of seeds at the earlier looks that comparison.json in ``folder`` holds, if it asks the same."""
    try:
        before = read_json(folder / "comparison.json")
        is_same = [before[key] for key in ("baseline", "primary")] == [
            comparison.baseline.label,
            comparison.question.primary,
        ]
        looks = [int(each) for each in before["looks"]]
    except (OSError, ValueError, TypeError, KeyError):  # none, or one of an older version
        return []
    return looks if is_same else []
