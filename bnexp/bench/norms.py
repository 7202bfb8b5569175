"""How fast is every implementation of batch normalization? Asked only of those that are batch normalization.

For every shape of a set and for BN+ReLU and BN+add+ReLU: outputs, gradients and buffers against float64 first,
then times, all contestants in turns in one process, of forward, backward and both, each beside elementwise kernels
that move the same bytes. Buffers worth four times the last-level cache rotate, so nobody finds its input in a cache.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexp.bench import results
from bnexp.bench.arguments import Form
from bnexp.bench.cases import PHASES, REFERENCE, SETS, SITES
from bnexp.store.files import finite

if TYPE_CHECKING:  # torch takes seconds to import, a misspelt setting is found before
    import torch
    from rich.table import Table
CHOICES = {"set": tuple(SETS), "dtype": ("float32", "bfloat16", "float16"), "layout": ("nchw", "nhwc")}
USAGE = """usage: bnexp bench [norms] [setting=value] ... (and: bnexp bench loop --help)

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
    """``[norms] [setting=value] ...`` as typed."""
    return Form("bench", Settings, USAGE, CHOICES).parse(arguments)


def run(implementations: Mapping[str, Callable], settings: Settings, device: "torch.device") -> Path:
    """Compare all implementations, ``name -> factory(num_features, activation=...)``; returns the results' folder.

    Its path is the last line printed. What was measured before an interruption is written too.
    """
    import torch
    from rich.console import Console

    from bnexp.bench import timing

    console = Console()
    folder = results.claim_out(settings.out)
    about = results.introduce(console, settings, device)
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
    table = results.table_of(heading, "", " ".join(phase.rjust(21) for phase in PHASES) if timed else "")
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
    table = results.table_of(
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
    """``bench.json`` with everything and ``bench.csv`` with a line per row."""
    content = {**about, "summary": summary(rows), "rows": [finite(row) for row in rows]}
    told = results.where(about) | {key: about[key] for key in ("dtype", "layout")}
    results.write(path, content, [{key: value for key, value in row.items() if key != "parity"} | told for row in rows])
