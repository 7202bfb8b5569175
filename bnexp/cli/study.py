"""``bnexp study``: trains the variants of a published claim and compares the results with its expectations."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bnexp.cli.compare import conclude
from bnexp.cli.flags import parse_line
from bnexp.cli.sweep.grid import Grid, Job, Point, read_grid
from bnexp.cli.sweep.jobs import all_taken, folder_told, prepare
from bnexp.cli.sweep.launch import hydra_config, refuse_launcher, run_all
from bnexp.cli.sweep.lockstep import race
from bnexp.config.choices import GROUPS, choices
from bnexp.config.compose import session
from bnexp.config.study import FORMS, Study, choose, load
from bnexp.errors import UserError
from bnexp.report.expectations import Expectation, Finding, judge
from bnexp.report.records import RunRecord, read_runs
from bnexp.report.tables import epoch_tables
from bnexp.report.tuning import check_choose_on
from bnexp.report.variants import into_variants, last_part
from bnexp.store.files import write_json
from bnexp.store.settings import NUMBERS, as_typed, decides

DOES_NOT_HOLD, TOO_FEW = 3, 4  # exit codes: an expectation does not hold; fewer seeds than the study's own


def study(arguments: Sequence[str]) -> int:
    """``bnexp study [NAME [overrides]]``: returns 1 if a run failed, 4 if the seeds are too few to judge, 3 if an
    expectation does not hold."""
    if not arguments:
        list_studies()
        return 0
    line = parse_line("study", arguments[1:])
    if odd := [word for word in line.words if "=" not in word]:
        raise UserError(f"{odd[0]}: study takes a name and settings only, such as quick=true; see bnexp study --help")
    chosen, overrides = choose(load(arguments[0]), line.words)
    name, in_lockstep = Path(arguments[0]).stem, chosen.how == "compare"
    expectations = chosen.expectations()
    with session(line.source):
        grid, roles = make_grid(chosen, overrides)
        (refuse_launcher if in_lockstep else hydra_config)(grid.hydra)  # before any work
        folder, jobs = prepare(grid, f"study-{name}")
        with all_taken(jobs if in_lockstep else ()), folder_told(folder):
            quiet, began = jobs[0].cfg.quiet, time.monotonic()
            if not quiet:
                amended = f"\namended: {chosen.amended}" if chosen.amended else ""
                print(f"{chosen.title}\nsource: {chosen.source}{amended}")
                print(f"{len(jobs)} runs; takes {chosen.takes} on two CPU cores\n")
            failed = race(jobs) if in_lockstep else run_all(grid.hydra, folder, jobs)
            first = next(iter(chosen.variants))
            names = {job.folder: roles[job.name] if chosen.best_over else job.variant for job in jobs}
            own = [job for job in jobs if roles[job.name] == first]
            conclude(first, own, names, chosen.best_over, chosen.choose_on)
            findings = judge_runs(expectations, jobs, roles)
            is_short = len({repr(job.cfg.seed) for job in jobs}) < chosen.seeds
            write_json(folder / "study.json", study_content(name, chosen, overrides, findings, is_short))
            if not quiet:
                if chosen.epochs:
                    print_epochs(folder, names)
                Console().print(finding_table(findings, is_short))
                print(f"{len(jobs)} runs, {time.monotonic() - began:.0f} s")
            if is_short:
                print(f"too few seeds to judge: the study has {chosen.seeds}", file=sys.stderr)
    return 1 if failed else TOO_FEW if is_short else 0 if all(each.holds for each in findings) else DOES_NOT_HOLD


def make_grid(study: Study, overrides: Sequence[str]) -> tuple[Grid, dict[str, str]]:
    """All runs of the study, and the role of each run by its name; ``overrides`` cannot change what a variant sets."""
    lists = [f"{key}={','.join(map(as_typed, values))}" for key, values in study.sweep.items()]
    shared = [*study.settings, *lists, f"seed=range({study.first_seed},{study.first_seed + study.seeds})", *overrides]
    points, roles = [], {}
    for role, own in study.variants.items():
        grid = read_grid([*shared, *([own] if isinstance(own, str) else own)])
        for name, variant, words in grid.points:
            name, variant = (role if each == "run" else f"{role}-{each}" for each in (name, variant))
            points.append(Point(name, variant, words))
            roles[name] = role
    able = [key for key in dict.fromkeys([*study.sweep, *grid.swept]) if decides(key) & NUMBERS and key not in GROUPS]
    if study.best_over is not None and study.best_over not in [*able, *map(last_part, able)]:
        choice = f"choose among {', '.join(able)}" if able else "leave it out"
        raise UserError(f"best_over: {study.best_over}: not a setting that the study sweeps; {choice}")
    seeds = {word for point in points for word in point.overrides if word.startswith("seed=")}
    check_choose_on(study.choose_on, study.best_over, len(seeds))
    return replace(grid, points=tuple(points)), roles


def judge_runs(expectations: Sequence[Expectation], jobs: Sequence[Job], roles: Mapping[str, str]) -> list[Finding]:
    """Compare each expectation with the runs that came to an end."""
    records = {record.path.resolve(): record for record in read_runs([jobs[0].folder.parent])[0]}
    runs: dict[str, list[RunRecord]] = {role: [] for role in roles.values()}
    for job in jobs:
        if record := records.get(job.folder.resolve()):
            runs[roles[job.name]].append(record)
    return [judge(expectation, runs) for expectation in expectations]


def study_content(
    name: str, study: Study, overrides: Sequence[str], findings: Sequence[Finding], is_short: bool
) -> dict[str, Any]:
    """The content of study.json; ``holds`` is null if there are too few seeds to judge."""
    return {
        "study": name,
        "title": study.title,
        "source": study.source,
        "seeds": [*study.own_seeds],
        "settled_on": study.settled_on,
        "amended": study.amended,
        "overrides": overrides,
        "holds": None if is_short else all(finding.holds for finding in findings),
        "findings": [finding.to_json() for finding in findings],
    }


def print_epochs(folder: Path, names: Mapping[Path, str]) -> None:
    """Print what was measured after every epoch of the runs in ``folder``."""
    console = Console()
    for table in epoch_tables(into_variants(read_runs([folder], names)[0])[0]):
        console.print(table)
        console.print()


def finding_table(findings: Sequence[Finding], is_short: bool = False) -> Table:
    """A row per expectation: whether it holds, what it says, what was measured and the condition."""
    table = Table(title="Expectations", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("", "expectation", "n", "mean [95% interval]", "a new seed", "condition"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        word, style = ("too few", "") if is_short else ("holds", "green") if finding.holds else ("fails", "red")
        cells = (finding.expectation.says, str(len(finding.numbers)), *measured_cells(finding))
        cells += (finding.expectation.condition,)
        table.add_row(word, *map(escape, cells), style=style)
    return table


def measured_cells(finding: Finding) -> tuple[str, str]:
    """``0.0238 [0.0211, 0.0262]``, and between what the number of a new seed lies with 95%."""
    if finding.problem:
        return finding.problem, ""
    mean = finding.mean
    if mean.mean is None:
        return f"not finite: {', '.join(f'{number:.4g}' for number in finding.numbers)}", ""
    interval = f" [{mean.low:.4g}, {mean.high:.4g}]" if mean.low is not None else ""
    low, high = finding.new_seed
    return f"{mean.mean:.4g}{interval}", f"{low:.4g} to {high:.4g}" if low is not None else ""


def list_studies() -> None:
    """Print every study: how long it takes in each form, its claim and the source of the claim."""
    console = Console()
    for name in choices("study"):
        entry = load(name)
        takes = [entry.takes, *(f"{form}=true {entry.forms[form].takes}" for form in FORMS if form in entry.forms)]
        console.print(f"[bold]{name}[/bold]: {', '.join(map(escape, takes))}", highlight=False)
        console.print(Padding(escape(entry.title), (0, 0, 0, 4)), highlight=False)
        console.print(Padding(f"[dim]{escape(entry.source)}[/dim]", (0, 0, 0, 4)), highlight=False)
    print("\nTimes are for two CPU cores. bnexp study NAME runs a study; bnexp study --help explains.")
