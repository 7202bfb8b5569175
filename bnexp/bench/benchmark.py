"""How fast is each implementation of batch norm? Only implementations that agree with float64 are timed.

Every case of a set is measured for BN+ReLU and for BN+add+ReLU. Outputs, gradients and buffers are compared with
float64 first. Then forward, backward and both are timed, all implementations in turns in one process, beside
elementwise kernels that move the same bytes. Buffers of four times the last-level cache rotate, so that no input
is read from a cache. On a GPU the calls on all buffers are replayed as one CUDA graph, because a single call is often
shorter than its launch; the calls one by one, by the clock of the host, have rows of their own (``eager calls``).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnexp.bench.cases import PHASES, REFERENCE, SETS, SITES
from bnexp.bench.results import describe_measurement, make_results_folder, provenance, results_table, write_results
from bnexp.bench.settings import BenchSettings
from bnexp.bench.timing import chosen, implementations_on, measure_case
from bnexp.store.files import finite


def run_benchmark(
    norms: Mapping[str, Callable], settings: BenchSettings, device: torch.device, command: str = "bnexp bench"
) -> Path:
    """Measure all ``norms``, ``name -> factory(num_features, activation=...)``; returns the results' folder.

    ``command`` is the command line, for the record. The last line printed is the folder. What was measured before an
    interruption is written too.
    """
    console = Console()
    implementations = chosen(implementations_on(norms, device), settings.contestants)
    folder = make_results_folder(settings.out)
    about = describe_measurement(console, settings, device, command)
    rows: list[dict] = []
    is_complete = False
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for case in SETS[settings.set]:
                for site in SITES:
                    new = measure_case(implementations, case, site, settings, device)
                    rows += new
                    console.print(case_table(new, f"{site}, {case} {settings.dtype} {settings.layout}"), "")
        console.print(means_table(geometric_means(rows)), "")
        is_complete = True
    finally:
        write_benchmark(folder, about | {"complete": is_complete}, rows)
        print(folder, flush=True)
    return folder


def write_benchmark(path: Path, about: Mapping[str, Any], rows: Sequence[Mapping]) -> None:
    """Write ``bench.json`` with the means and all rows, and ``bench.csv`` with a line per row."""
    content = {**about, "summary": geometric_means(rows), "rows": [finite(row) for row in rows]}
    same = provenance(about) | {key: about[key] for key in ("dtype", "layout")}
    write_results(path, content, [{key: row[key] for key in row if key != "parity"} | same for row in rows])


def geometric_means(rows: Sequence[Mapping]) -> list[dict]:
    """One entry per site and implementation: geometric means of its time ratios over all norms of the network.

    ``<phase>_over_<other>`` is the mean ratio to the elementwise kernels or to the library, ``..._range`` the smallest
    and the largest ratio of any shape. The means cover ``norms`` of the ``of`` norms in the set.
    """
    timed = {(row["site"], row["shape"], row["implementation"]): row for row in rows if row["status"] == "timed"}
    entries = []
    for site, name in dict.fromkeys((site, name) for site, _, name in timed if name != REFERENCE):
        own = [row for key, row in timed.items() if (key[0], key[2]) == (site, name)]
        entry = {"site": site, "implementation": name, "norms": sum(row["count"] for row in own)}
        entry["of"] = sum({row["shape"]: row["count"] for row in rows if row["site"] == site}.values())
        for other in (REFERENCE, "library"):
            pairs = [(row, timed.get((site, row["shape"], other))) for row in own]
            for key in PHASES:
                ratios = [a[f"{key}_us"] / b[f"{key}_us"] for a, b in pairs if b for _ in range(a["count"])]
                entry[f"{key}_over_{other}"] = geometric_mean(ratios) if ratios else None
                entry[f"{key}_over_{other}_range"] = [min(ratios), max(ratios)] if ratios else None
        entries.append(entry)
    return entries


# ---- tables, no wider than 80 columns ----


def _digits(number: float, digits: int = 3) -> str:
    if number >= 9999.5:
        return _digits(number / 1e3, digits) + "k"
    return f"{number:.0f}" if number >= 99.5 else f"{number:.{digits}g}"


def _factor(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 9.995 else f"{ratio:.0f}x"


def case_table(rows: Sequence[Mapping], title: str) -> Table:
    """A table of one case: the times of every implementation, or why it has none."""
    timed = [row for row in rows if row["status"] == "timed"]
    is_slow = all(row[f"{phase}_us"] >= 1e3 for row in timed for phase in PHASES)
    unit, scale = ("ms", 1e-3) if is_slow else ("us", 1)
    heading = f"{title}: {unit}, 20%-80%, x {REFERENCE}, n={timed[0]['n']}" if timed else title
    table = results_table(heading, "", " ".join(phase.rjust(21) for phase in PHASES) if timed else "")
    table.columns[1].min_width = 65 if timed else 0  # a long name is wrapped, the times are not
    for row in rows:
        text = row["status"]
        if row in timed:
            cells = []
            for phase in PHASES:
                low, high = (_digits(scale * row[f"{phase}_{key}_us"], 2) for key in ("p20", "p80"))
                median, ratio = _digits(scale * row[f"{phase}_us"]), _factor(row[f"{phase}_ratio"])
                cells.append(f"{median} {low}-{high} {ratio}".rjust(21))
            text = " ".join(cells)
        table.add_row(escape(f"{row['implementation']} {row['tier']}".strip()), escape(text))
    return table


def means_table(entries: Sequence[Mapping]) -> Table:
    """A table of geometric means of the ratios to the elementwise kernels and, of both passes, to the library."""
    table = results_table(
        f"Geometric means: x {REFERENCE}; x library (range over shapes)",
        "", "norms", *PHASES, "both x library",
    )  # fmt: skip
    for site in dict.fromkeys(entry["site"] for entry in entries):
        table.add_row(site)
        for entry in entries:
            if entry["site"] == site:
                means = [_factor(entry[f"{phase}_over_{REFERENCE}"]) for phase in PHASES]
                ratio, limits = entry["both_over_library"], entry["both_over_library_range"]
                against = f"{_factor(ratio)} ({limits[0]:.2f}-{limits[1]:.2f})" if limits else ""
                table.add_row(f"  {entry['implementation']}", f"{entry['norms']} of {entry['of']}", *means, against)
    return table
