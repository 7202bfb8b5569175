"""``bnexp compare``: trains variants in lockstep and reports on them together."""

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bnexp.cli.flags import parse_line
from bnexp.cli.sweep.grid import Grid, Job, read_grid
from bnexp.cli.sweep.jobs import BANDS, all_taken, folder_told, prepare
from bnexp.cli.sweep.launch import refuse_launcher
from bnexp.cli.sweep.lockstep import race
from bnexp.config.compose import session
from bnexp.config.explain import parse_words
from bnexp.errors import UserError
from bnexp.report.figures.curves import PANELS, mean_curve
from bnexp.report.question import Question
from bnexp.report.records import read_runs
from bnexp.report.report import make_report
from bnexp.report.tables import show_sweep
from bnexp.report.variants import Variant, find_key, into_variants
from bnexp.store.readings import Band
from bnexp.store.settings import NUMBERS, decides
from bnexp.store.untrusted import as_file_name
from bnexp.store.writer import write_bands, write_layout


def compare(arguments: Sequence[str]) -> int:
    """``bnexp compare``: the runs of ``train -m`` in lockstep, and a report; returns 1 if a run failed."""
    named = [word for word in arguments if word.startswith("baseline=")]
    line = parse_line("compare", [word for word in arguments if word not in named])
    with session(line.source):
        grid = read_grid(line.words)
        refuse_launcher(grid.hydra)
        baseline = find_baseline(grid, named[-1].partition("=")[2] if named else None)
        folder, jobs = prepare(grid, "compare")
        jobs.sort(key=lambda job: job.variant != baseline)
        with all_taken(jobs), folder_told(folder):
            failed = race(jobs)
            conclude(baseline, [job for job in jobs if job.variant == baseline])
    return 1 if failed else 0


def find_baseline(grid: Grid, given: str | None) -> str:
    """The variant that the others are compared with: the one that ``baseline=`` gives, by default the first."""
    varied = [key for key in grid.swept if decides(key) & NUMBERS]
    if not varied:
        raise UserError("compare: nothing varies but the seed; give a setting several values: norm=none,library")
    words = [] if given is None else re.split(r",(?=[^,=]+=)", given)
    parsed = parse_words([word for word in words if "=" in word])
    wanted = {f"{each.get_key_element()}={each.get_value_element_as_str()}" for each in parsed}  # 1e-2 is 0.01
    for _, variant, overrides in grid.points:
        own = {word for word in overrides if word.partition("=")[0] in varied}
        if given in (None, variant) or (wanted and wanted <= own):
            return variant
    known = ", ".join(dict.fromkeys(point.variant for point in grid.points))
    raise UserError(f"baseline={given}: not among the variants {known}; give one, as in baseline=norm=none")


def conclude(
    baseline: str, runs: Sequence[Job], names: Mapping[Path, str] | None = None, best_over: str | None = None,
    choose_on: int | None = None,
) -> None:  # fmt: skip
    """Report on all runs of the sweep that ``runs``, those of the baseline, belong to; write the results in its folder.

    ``names`` names variants by the folders of their runs; without it the settings that differ are the names.
    """
    folder, quiet = runs[0].folder.parent, runs[0].cfg.quiet
    label = find_label([job.folder for job in runs], best_over, names or {})
    if label is None:
        if not quiet:
            show_sweep(folder)
        print(f"no comparison: no run of the baseline, {baseline}, has finished", file=sys.stderr)
        return
    cfg = runs[0].cfg
    question = Question(label, best_over, cfg.primary, cfg.margin, cfg.target, choose_on)
    comparison = make_report([folder], question=question, out=folder, quiet=quiet, names=names)
    write_band_runs(folder, comparison.variants)


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
    bands = folder / BANDS
    shutil.rmtree(bands, ignore_errors=True)  # from an earlier start of this comparison
    for variant in variants:
        rows = [
            (int(step), Band(tag, mean, low, high)) for tag in tags
            for step, mean, low, high in mean_curve(variant, tag).T.tolist()
        ]  # fmt: skip
        write_bands(bands, as_file_name(variant.label), rows)
    write_layout(bands, tags)
