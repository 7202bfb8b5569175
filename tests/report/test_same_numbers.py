"""JSON, CSV and Markdown carry the same numbers, for every number of the tables."""

import csv
import io
import json
import re

import pytest
from test_report import compared, curves, write_run

from bnexp.report.records import METRICS
from bnexp.report.report import comparison_csv, comparison_json, comparison_markdown
from bnexp.report.sentences import show_p

CELLS = {  # heads of the tables: columns of the CSV, of which "all" and "half" are made here
    "n": "n", "diverged": "num_diverged all", "mean": "mean half", "sd": "sd", "r": "evidence_correlation",
    "better in": "evidence_wins num_pairs evidence_wins_low evidence_wins_high", "flips": "evidence_p_flips",
    "target": "target", "reached in": "reached n", "by none in": "base_reached n", "speed-up": "mean low high",
}  # fmt: skip
JUDGED = {"difference": "difference evidence_low evidence_high", "p": "evidence_p"}
OTHERS = {"difference": "difference difference_low difference_high", "p": "p"}


@pytest.fixture
def comparison(tmp_path):
    """Seven seeds of three variants, one better and faster; the baseline diverges once. It fills every column."""
    for seed in range(7):
        valid = [0.9, 0.5, 0.3, 0.2 + seed / 100]
        fast = [0.8, 0.15 + (seed > 2) / 10, 0.12 + seed / 300, 0.1]
        for norm, gain, course in (("none", 0, valid), ("library", 0.01, fast), ("scratch", 0.001, valid)):
            readings = curves(0.9 + seed**2 / 1000 + gain + (seed == 2) * gain / 3, 0.3 + gain + seed / 90, course)
            status = "diverged" if norm == "none" and seed == 6 else "finished"
            write_run(tmp_path / f"{norm}-{seed}", norm, seed, started=1, readings=readings, status=status)
    return compared(tmp_path)


def lines_of(comparison):
    """{(variant, metric): {column: number}} of the CSV."""
    lines = {}
    for row in csv.DictReader(io.StringIO(comparison_csv(comparison))):
        words = {"variant", "baseline", "metric", "design", "evidence", "bound"}
        lines[row["variant"], row["metric"]] = {
            column: float(cell) for column, cell in row.items() if cell and column not in words
        }
    return lines


def test_json_and_csv(comparison):
    lines, num_compared = lines_of(comparison), 0
    content = json.loads(comparison_json(comparison))
    for variant in content["variants"]:
        for key in (*variant["metrics"], "speedup"):
            if key == "speedup":
                told = dict(variant["speedup"] or {})
                told["mean"] = told.pop("ratio", None)
            else:
                found = variant["paired"] and variant["paired"][key] or {}
                told = variant["metrics"][key] | {"difference": found.get("difference"), "p": found.get("p")}
                told |= {f"difference_{end}": found.get(end) for end in ("low", "high")} | {"num_pairs": found.get("n")}
                judged = (variant["evidence"] or {}) if key == content["primary"] else {}
                told |= {f"evidence_{name}": each for name, each in judged.items() if name != "word"}
            line = dict(lines.get((variant["label"], key), {}))
            if line:
                counts = line.pop("num_diverged"), line.pop("num_failed")
                assert counts == (variant["num_diverged"], variant["failures"]["k"])
                rates = [line.pop(f"failures_{each}", None) for each in ("low", "high", "p")]
                assert rates == [variant["failures"][each] for each in ("low", "high", "p")]
            told = {column: each for column, each in told.items() if isinstance(each, int | float)}
            assert line == told, (variant["label"], key)
            num_compared += len(told)
    assert num_compared > 100 and "speedup" in {key for _, key in lines}


def test_markdown_and_csv(comparison):
    lines, keys, seen = lines_of(comparison), {metric.heading: metric.key for metric in METRICS}, set()
    key, head = "", []
    for line in comparison_markdown(comparison).splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if line.startswith("## "):
            key = "speedup" if "Steps" in line else comparison.question.primary
        elif name.startswith("**"):
            key = keys[name.strip("*")]
        elif not name:
            head = cells
        elif cells and (name, key) in lines:
            numbers = dict(lines[name, key])
            numbers["all"] = numbers["n"] + numbers["num_diverged"]
            if "high" in numbers:
                numbers["half"] = numbers["high"] - numbers["mean"]
            columns = CELLS | (JUDGED if key == comparison.question.primary else OTHERS)
            for column, cell in zip(head, cells, strict=True):
                check_cell(
                    key, column, cell, [numbers[each] for each in columns.get(column, "").split() if each in numbers]
                )
                seen |= {column} if re.search(r"\d", cell) else set()
    assert seen == {*CELLS, "difference", "p"}, "every column held a number"


def check_cell(key, column, cell, values):
    """The numbers in a cell are the values, as precisely as they are shown."""
    if column in ("p", "flips"):
        assert cell == "".join(map(show_p, values))
        return
    tokens = re.findall(r"[-+]?\d+(?:\.\d+)?(?=(%?))", cell)
    shown = re.findall(r"[-+]?\d+(?:\.\d+)?", cell)
    assert len(shown) == len(values) or not shown, (key, column, cell, values)
    for text, percent, value in zip(shown, tokens, values if shown else (), strict=True):
        is_percent = percent or (key.startswith("accuracy") and column in ("mean", "sd", "difference"))
        precision = 10.0 ** -len(text.partition(".")[2])
        expected = (100 if is_percent else 1) * value
        assert abs(float(text) - expected) <= 0.5001 * precision, (key, column, cell, values)
