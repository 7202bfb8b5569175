"""``bnexp compare``: trains variants in lockstep and reports on them together."""

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from bnexp.cli.flags import parse_line
from bnexp.cli.sweep.grid import Grid, read_grid
from bnexp.cli.sweep.jobs import prepare, take_all
from bnexp.cli.sweep.lockstep import race
from bnexp.config.compose import session
from bnexp.config.explain import parse_words
from bnexp.errors import UserError
from bnexp.report.figures.curves import PANELS, mean_curve
from bnexp.report.records import read_runs
from bnexp.report.report import make_report
from bnexp.report.tables import show_sweep
from bnexp.report.variants import Variant, find_key, into_variants
from bnexp.store.readings import Band
from bnexp.store.settings import NUMBERS, decides
from bnexp.store.untrusted import as_file_name
from bnexp.store.writer import write_bands, write_layout


def compare(arguments: Sequence[str]) -> int:
    """``bnexp compare``: the runs of ``train -m`` in lockstep, and a report; 1 if any failed."""
    named = [word for word in arguments if word.startswith("baseline=")]
    line = parse_line("compare", [word for word in arguments if word not in named], many=True)
    with session(line.source), ExitStack() as locks:
        grid = read_grid(line.words)
        baseline = find_baseline(grid, named[-1].partition("=")[2] if named else None)
        folder, jobs, configs = prepare(grid, "compare")
        take_all(jobs, locks)
        quiet = next(iter(configs.values())).quiet
        try:
            failed = race(jobs, configs, baseline, quiet)
            conclude(folder, baseline, [job.folder for job in jobs if job.variant == baseline], quiet)
        except KeyboardInterrupt:
            print(f"to go on, repeat the command with out={folder}", file=sys.stderr)
            raise
        finally:
            print(folder, flush=True)
    return 1 if failed else 0


def find_baseline(grid: Grid, wanted: str | None) -> str:
    """The variant that the others are compared with: the one that ``wanted`` names, by default the first."""
    varied = [key for key in grid.swept if decides(key) & NUMBERS]
    if not varied:
        raise UserError("compare: nothing varies but the seed; give a setting several values, norm=none,library say")
    words = [] if wanted is None else re.split(r",(?=[^,=]+=)", wanted)
    parsed = parse_words([word for word in words if "=" in word])
    asked = {f"{each.get_key_element()}={each.get_value_element_as_str()}" for each in parsed}  # 1e-2 is 0.01
    for variant, point in zip(grid.variants, grid.points, strict=True):
        own = {word for word in point if word.partition("=")[0] in varied}
        if wanted in (None, variant) or (asked and asked <= own):
            return variant
    known = ", ".join(dict.fromkeys(grid.variants))
    raise UserError(f"baseline={wanted}: not among the variants, which are {known}; write baseline=norm=none, say")


def conclude(
    folder: Path,
    baseline: str,
    runs: Sequence[Path],
    quiet: bool,
    best_over: str | None = None,
    names: Mapping[Path, str] | None = None,
) -> None:
    """Report on the runs in ``folder``; ``runs`` are the baseline's. Writes figures, tables and bands there."""
    names = names or {}
    label = find_label(runs, best_over, names)
    if label is not None:
        comparison = make_report(
            [folder], baseline=label, best_over=best_over, out=folder, quiet=quiet, names=names
        )  # fmt: skip
        write_band_runs(folder, comparison.variants)
        return
    if not quiet:
        show_sweep(folder)
    print(f"no comparison: no run of the baseline, {baseline}, has finished", file=sys.stderr)


def find_label(folders: Sequence[Path], best_over: str | None, names: Mapping[Path, str]) -> str | None:
    """The report's label of the variant whose runs lie in ``folders``; None if none of them has finished."""
    records, _ = read_runs([folders[0].parent], names)
    for variant in into_variants(records, ignore=best_over and find_key(records, best_over))[0]:
        if any(run.path in folders for run in variant.all_runs):
            return variant.label
    return None


def write_band_runs(folder: Path, variants: Sequence[Variant]) -> None:
    """Write a TensorBoard run of means and intervals for each variant under ``bands/``, and their layout."""
    tags = [tag for tag in PANELS if any(tag in run.curves for variant in variants for run in variant.runs)]
    bands = folder / "bands"
    shutil.rmtree(bands, ignore_errors=True)  # from an earlier start of this comparison
    for variant in variants:
        rows = [
            (int(step), Band(tag, mean, low, high)) for tag in tags
            for step, mean, low, high in mean_curve(variant, tag).T.tolist()
        ]  # fmt: skip
        write_bands(bands, as_file_name(variant.label), rows)
    write_layout(bands, tags)
