"""How fast is every implementation of batch normalization? Asked only of those that are batch normalization.

For every shape of a set and for BN+ReLU and BN+add+ReLU: outputs, gradients and buffers against float64 first,
then times, all contestants in turns in one process, of forward, backward and both, each beside elementwise kernels
that move the same bytes. Buffers worth four times the last-level cache rotate, so nobody finds its input in a cache.
"""

import csv
import io
import json
import math
import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexp.errors import UserError
from bnexp.folder import check_free, finite, git_commit, versions, write_new
from bnexp.shapes import PHASES, REFERENCE, SETS, SITES

if TYPE_CHECKING:  # torch takes seconds to import, a misspelt setting is found before
    import torch
    from rich.table import Table
CHOICES = {"set": tuple(SETS), "dtype": ("float32", "bfloat16", "float16"), "layout": ("nchw", "nhwc")}
FILES = ("bench.json", "bench.csv")
USAGE = """usage: bnexp bench [norms] [setting=value] ...

Parity with float64, then speed, of every implementation of batch norm.

  set=quick       {set}
  dtype=float32   {dtype} (parameters and statistics stay float32)
  layout=nchw     {layout} (channels_last)
  device=auto     auto, cpu, cuda or cuda:N
  rounds=3        turns that every contestant gets, each through all rotating buffers
  out=DIR         for bench.csv and bench.json; a new folder under outputs/ by default"""


@dataclass(frozen=True)
class Settings:
    """What ``bnexp bench`` was asked for; ``command`` is the line that asks again."""

    set: str = "quick"
    dtype: str = "float32"
    layout: str = "nchw"
    device: str = "auto"
    rounds: int = 3
    out: str | None = None
    command: str = "bnexp bench"


def parse(arguments: Sequence[str]) -> Settings:
    """``[norms] [setting=value] ...`` as typed; what cannot be is a :class:`UserError` that says what can."""
    words = list(arguments)
    if {"-h", "--help"} & set(words):
        print(USAGE.format(**{key: " | ".join(values) for key, values in CHOICES.items()}))
        raise SystemExit(0)
    if words and "=" not in words[0] and words.pop(0) != "norms":
        raise UserError(f"bench {arguments[0]}: nothing that is timed; choose norms, and settings as setting=value")
    known = [field.name for field in fields(Settings) if field.name != "command"]
    given: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value or key not in known:
            raise UserError(f"{word}: no setting of bench{_nearest(key, known)}; settings are {', '.join(known)}")
        if key in given:
            raise UserError(f"{word}: {key} is given twice; give it once")
        if value not in CHOICES.get(key, (value,)):
            raise UserError(f"{word}: not known{_nearest(value, CHOICES[key])}; choose {', '.join(CHOICES[key])}")
        if key == "rounds" and not (value.isdecimal() and int(value) > 0):
            raise UserError(f"{word}: has to be a whole number, 1 or more")
        given[key] = int(value) if key == "rounds" else value
    if "out" in given:
        check_out(Path(given["out"]))
    return Settings(**given, command=shlex.join(["bnexp", "bench", *arguments]))


def _nearest(word: str, known: Iterable[str]) -> str:
    found = get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def check_out(path: Path) -> None:
    """Refuse, before any work, a folder that holds results or cannot be written."""
    check_free(path)
    if any((path / name).exists() for name in FILES):
        raise UserError(f"out={path}: already holds a benchmark, which is never overwritten; choose another folder")


def claim_out(out: str | None) -> Path:
    """The folder asked for, or a new one ``outputs/<date>/bench-HHMMSS`` that no other process has."""
    if out:
        check_out(Path(out))
    path = first = Path(out) if out else Path("outputs") / time.strftime("%Y-%m-%d/bench-%H%M%S")
    suffix = 1
    while True:
        try:
            path.mkdir(parents=True, exist_ok=out is not None)
            return path
        except FileExistsError as error:
            if out:
                raise UserError(f"out={out}: is a file; choose a folder") from error
            suffix += 1
            path = first.with_name(f"{first.name}-{suffix}")
        except OSError as error:
            raise UserError(f"out={path}: cannot be made ({error.strerror}); choose another folder") from error


def run(implementations: Mapping[str, Callable], settings: Settings, device: "torch.device") -> Path:
    """Compare all implementations, ``name -> factory(num_features, activation=...)``; returns the results' folder.

    Its path is the last line printed. What was measured before an interruption is written too.
    """
    import torch
    from rich.console import Console

    from bnexp import timing

    console = Console()
    folder = claim_out(settings.out)
    about = asdict(settings) | {"device": device_name(device), "versions": versions(), "git_commit": git_commit()}
    about["load"] = os.getloadavg()[0]  # of the machine, before: others' work widens what follows
    told = f"{about['device']}, torch {about['versions']['torch']}, load average {about['load']:.1f}\n"
    console.print(told, highlight=False, markup=False)
    entries = timing.contestants(implementations, device)
    rows: list[dict] = []
    is_complete = False
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for case in SETS[settings.set]:
                for site in SITES:
                    found = timing.compare(
                        entries, case, site, settings.dtype, settings.layout, settings.rounds, device
                    )
                    rows += found
                    console.print(case_table(found, f"{site}, {case} {settings.dtype} {settings.layout}"), "")
        console.print(summary_table(summary(rows)), "")
        is_complete = True
    finally:
        write(folder, about | {"complete": is_complete}, rows)
        print(folder, flush=True)
    return folder


def device_name(device: "torch.device") -> str:
    """The device as a person knows it; of a CPU the model and the threads that torch uses."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    model = models[0].partition(":")[2].strip() if models else "CPU"
    return f"{model}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def summary(rows: Sequence[Mapping]) -> list[dict]:
    """Geometric means over the norms of the set, per site and implementation.

    Of the times over the elementwise kernels' and over the library's, with the least and most of any shape; ``norms``
    says how many norms ``of`` the set they cover.
    """
    timed = {(row["site"], row["shape"], row["implementation"]): row for row in rows if row["status"] == "timed"}
    found = []
    for site, name in dict.fromkeys((site, name) for site, _, name in timed if name != REFERENCE):
        mine = [row for key, row in timed.items() if (key[0], key[2]) == (site, name)]
        entry = {"site": site, "implementation": name, "norms": sum(row["count"] for row in mine)}
        entry["of"] = sum({row["shape"]: row["count"] for row in rows if row["site"] == site}.values())
        for other in (REFERENCE, "library"):
            pairs = [(row, timed.get((site, row["shape"], other))) for row in mine]
            for key in PHASES:
                ratios = [(a[f"{key}_us"] / b[f"{key}_us"], a["count"]) for a, b in pairs if b]
                weight = sum(count for _, count in ratios)
                mean = math.exp(sum(count * math.log(ratio) for ratio, count in ratios) / weight) if ratios else None
                entry[f"{key}_over_{other}"] = mean
                entry[f"{key}_over_{other}_range"] = [min(ratios)[0], max(ratios)[0]] if ratios else None
        found.append(entry)
    return found


# ---- what a person and a program read ----


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    looks = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False, "pad_edge": False}
    table = Table(title=title, title_justify="left", **looks)
    for column in columns:
        table.add_column(column)
    return table


def _show(number: float, digits: int = 3) -> str:
    return f"{number:.0f}" if number >= 99.5 else f"{number:.{digits}g}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 9.995 else f"{ratio:.0f}x"


def case_table(rows: Sequence[Mapping], title: str) -> "Table":
    """The times of one shape, or why there are none: one row per implementation, no wider than 80 columns."""
    from rich.markup import escape

    timed = [row for row in rows if row["status"] == "timed"]
    unit, scale = ("ms", 1e-3) if any(row[f"{phase}_p80_us"] >= 1e5 for row in timed for phase in PHASES) else ("us", 1)
    heading = f"{title}: {unit}, 20%-80%, x {REFERENCE}, n={timed[0]['n']}" if timed else title
    table = _table(heading, "", " ".join(phase.rjust(21) for phase in PHASES) if timed else "")
    table.columns[1].min_width = 65 if timed else 0  # a name folds before the times do
    for row in rows:
        text = row["status"]
        if row in timed:
            cells = []
            for phase in PHASES:
                low, high = (_show(scale * row[f"{phase}_{key}_us"], 2) for key in ("p20", "p80"))
                median, ratio = _show(scale * row[f"{phase}_us"]), _times(row[f"{phase}_ratio"])
                cells.append(f"{median} {low}-{high} {ratio}".rjust(21))
            text = " ".join(cells)
        table.add_row(escape(f"{row['implementation']} {row['tier']}".strip()), escape(text))
    return table


def summary_table(entries: Sequence[Mapping]) -> "Table":
    """The geometric means, and of both passes over the library's time the range over shapes."""
    table = _table(
        f"Geometric means: x {REFERENCE}; x library (range over shapes)",
        "", "norms", *PHASES, "both x library",
    )  # fmt: skip
    for site in dict.fromkeys(entry["site"] for entry in entries):
        table.add_row(site)
        for entry in entries:
            if entry["site"] == site:
                means = [_times(entry[f"{phase}_over_{REFERENCE}"]) for phase in PHASES]
                ratio, span = entry["both_over_library"], entry["both_over_library_range"]
                against = f"{_times(ratio)} ({span[0]:.2f}-{span[1]:.2f})" if span else ""
                table.add_row(f"  {entry['implementation']}", f"{entry['norms']} of {entry['of']}", *means, against)
    return table


def write(path: Path, about: Mapping[str, Any], rows: Sequence[Mapping]) -> None:
    """``bench.json`` with everything and ``bench.csv`` with a line per row; neither is ever overwritten."""
    content = {**about, "summary": summary(rows), "rows": [finite(row) for row in rows]}
    told = {"device": about["device"], "versions": " ".join(f"{k} {v}" for k, v in about["versions"].items())}
    told |= {key: about[key] for key in ("dtype", "layout", "command")}
    flat = [{key: value for key, value in row.items() if key != "parity"} | told for row in rows]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    texts = (json.dumps(content, indent=1, allow_nan=False) + "\n", text.getvalue())
    for name, words in zip(FILES, texts, strict=True):
        if not write_new(path / name, words):
            raise UserError(f"out={path}: another benchmark has just taken this folder; choose another")
