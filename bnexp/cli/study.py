"""``bnexp study``: a published claim as one yaml, run like a comparison and held against what it should show."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bnexp.cli.compare import conclude
from bnexp.cli.flags import parse_line
from bnexp.cli.sweep.grid import Grid, Job, read_grid
from bnexp.cli.sweep.jobs import prepare, take_all
from bnexp.cli.sweep.launch import hydra_config, run_all
from bnexp.cli.sweep.lockstep import race
from bnexp.config.choices import choices
from bnexp.config.compose import session
from bnexp.config.study import FORMS, Study, choose, load
from bnexp.errors import UserError
from bnexp.report.expectations import Expectation, Finding, judge
from bnexp.report.records import RunRecord, read_runs
from bnexp.report.tables import epoch_tables
from bnexp.report.variants import into_variants
from bnexp.store.files import write_json

UNEXPECTED = 3  # the exit code of a study whose runs are fine and whose expectations are not


def study(arguments: Sequence[str]) -> int:
    """``bnexp study [NAME [overrides]]``: 3 if an expectation does not hold, 1 if a run failed."""
    if not arguments:
        list_studies()
        return 0
    line = parse_line("study", arguments[1:], many=True)
    if odd := [word for word in line.words if "=" not in word]:
        raise UserError(f"{odd[0]}: study takes a name and settings only, such as quick=true; see bnexp study --help")
    chosen, overrides = choose(load(arguments[0]), line.words)
    name = Path(arguments[0]).stem
    expectations = chosen.expectations()
    with session(line.source), ExitStack() as locks:
        grid, roles = make_grid(chosen, overrides)
        hydra_config(grid, Path())  # a launcher that does not exist is heard of before any work
        folder, jobs, configs = prepare(grid, f"study-{name}")
        quiet = next(iter(configs.values())).quiet
        if not quiet:
            print(f"{chosen.title}\nsource: {chosen.source}\n{len(jobs)} runs; takes {chosen.takes} on two CPU cores\n")
        try:
            began = time.monotonic()
            failed = run_jobs(chosen, grid, folder, jobs, configs, locks)
            first = next(iter(chosen.variants))
            runs = [job.folder for job in jobs if roles[job.name] == first]
            names = {job.folder: roles[job.name] if chosen.best_over else job.variant for job in jobs}
            conclude(folder, first, runs, quiet, chosen.best_over, names)
            findings = find(expectations, jobs, roles)
            write_json(folder / "study.json", summary(name, chosen, overrides, findings))
            if not quiet:
                show(chosen, findings, folder, names)
                print(f"{len(jobs)} runs, {time.monotonic() - began:.0f} s")
        except KeyboardInterrupt:
            print(f"to go on, repeat the command with out={folder}", file=sys.stderr)
            raise
        finally:
            print(folder, flush=True)
    return 1 if failed else 0 if all(each.holds for each in findings) else UNEXPECTED


def run_jobs(
    chosen: Study, grid: Grid, folder: Path, jobs: Sequence[Job], configs: dict[str, Any], locks: ExitStack
) -> bool:
    """In lockstep or one after the other; whether any failed."""
    if chosen.how == "sweep":
        return run_all(grid, folder, jobs, configs)
    take_all(jobs, locks)
    return race(jobs, configs, jobs[0].variant, next(iter(configs.values())).quiet)


def make_grid(study: Study, overrides: Sequence[str]) -> tuple[Grid, dict[str, str]]:
    """All runs of the study, and the role of each by name. What the command line says cannot undo a variant."""
    lists = [f"{key}={','.join(map(str, values))}" for key, values in study.sweep.items()]
    shared = [*study.settings, *lists, f"seed=range({study.seeds})", *overrides]
    roles: dict[str, str] = {}
    points, variants = [], []
    for role, own in study.variants.items():
        grid = read_grid([*shared, *([own] if isinstance(own, str) else own)])
        for point, name, variant in zip(grid.points, grid.names, grid.variants, strict=True):
            roles[role if name == "run" else f"{role}-{name}"] = role
            points.append(point)
            variants.append(role if variant == "run" else f"{role}-{variant}")
    return Grid(grid.swept, tuple(points), tuple(roles), tuple(variants), grid.out, grid.hydra), roles


def find(expectations: Sequence[Expectation], jobs: Sequence[Job], roles: Mapping[str, str]) -> list[Finding]:
    """Hold each expectation against the runs that came to an end."""
    records, _ = read_runs([jobs[0].folder.parent])
    by_folder = {record.path.resolve(): record for record in records}
    runs: dict[str, list[RunRecord]] = {role: [] for role in roles.values()}
    for job in jobs:
        if (record := by_folder.get(job.folder.resolve())) is not None:
            runs[roles[job.name]].append(record)
    return [judge(each, runs) for each in expectations]


def summary(name: str, study: Study, overrides: Sequence[str], findings: Sequence[Finding]) -> dict:
    """The content of study.json."""
    return {
        "study": name,
        "title": study.title,
        "source": study.source,
        "overrides": list(overrides),
        "holds": all(each.holds for each in findings),
        "findings": [each.to_json() for each in findings],
    }


def show(study: Study, findings: Sequence[Finding], folder: Path, names: Mapping[Path, str]) -> None:
    """Print the epochs if the study asks for them, then each expectation with what was found."""
    console = Console()
    if study.epochs:
        for table in epoch_tables(into_variants(read_runs([folder], names)[0])[0]):
            console.print(table)
            console.print()
    table = Table(title="Expectations", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("", "expectation", "found", "asked"):
        table.add_column(column, overflow="fold")
    for each in findings:
        word, style = ("holds", "green") if each.holds else ("fails", "red")
        cells = (each.expectation.says, found(each), each.expectation.condition)
        table.add_row(word, *map(escape, cells), style=style)
    console.print(table)


def found(finding: Finding) -> str:
    """``0.0238 (0.0211 to 0.0262)``: the mean and the range, or the interval if that was asked for."""
    if finding.problem:
        return finding.problem
    if finding.mean.mean is None:
        return f"not finite: {', '.join(f'{number:.4g}' for number in finding.numbers)}"
    low, high = min(finding.numbers), max(finding.numbers)
    if finding.expectation.seeds == "interval":
        low, high = finding.mean.low, finding.mean.high
    return f"{finding.mean.mean:.4g}" + (f" ({low:.4g} to {high:.4g})" if low is not None and low < high else "")


def list_studies() -> None:
    """Every study: how long it takes in each form, what it claims, where that comes from."""
    console = Console()
    for name in choices("study"):
        each = load(name)
        takes = [each.takes, *(f"{form}=true {each.forms[form].takes}" for form in FORMS if form in each.forms)]
        console.print(f"[bold]{name}[/bold]: {', '.join(map(escape, takes))}", highlight=False)
        console.print(Padding(escape(each.title), (0, 0, 0, 4)), highlight=False)
        console.print(Padding(f"[dim]{escape(each.source)}[/dim]", (0, 0, 0, 4)), highlight=False)
    print("\nTimes on two CPU cores. bnexp study NAME runs one; bnexp study --help says more.")
