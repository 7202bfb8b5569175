"""``bnexp study``: a published claim as one yaml, run like a comparison and held against what it should show."""

import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bnexp.cli import choices, conf_dir, nearest
from bnexp.compose import session
from bnexp.epochs import epoch_tables
from bnexp.errors import UserError
from bnexp.expectations import Expectation, Finding, judge
from bnexp.explain import explained
from bnexp.files import write_json
from bnexp.foreign import read_yaml
from bnexp.multirun import conclude, hydra_config, prepare, race, read_grid, run_all, take_all
from bnexp.records import RunRecord, read_runs
from bnexp.sweep import Grid, Job
from bnexp.targets import fits
from bnexp.variants import into_variants, named

UNEXPECTED = 3  # the exit code of a study whose runs are fine and whose expectations are not
FORMS = ("quick", "full")
HOW = ("compare", "sweep")
THE_USERS = ("out", "allow", "resume")  # settings that a study has no say in


@dataclass
class Form:
    """Another way to run a study: what is given here is added to the study's settings or replaces its other parts."""

    takes: str | None = None
    settings: list[str] = field(default_factory=list)
    sweep: dict[str, list[Any]] | None = None
    variants: dict[str, Any] | None = None
    expect: list[dict[str, Any]] | None = None
    how: str | None = None


@dataclass
class Study:
    """A claim, where it comes from, the runs that test it, and what they should show."""

    title: str
    source: str
    takes: str  # how long, on two CPU cores
    variants: dict[str, Any]  # role: an override or a list of them; the first is the baseline
    expect: list[dict[str, Any]]  # see Expectation
    settings: list[str] = field(default_factory=list)  # overrides that all runs share
    sweep: dict[str, list[Any]] = field(default_factory=dict)  # lists of values, crossed with the variants
    seeds: int = 3
    how: str = "compare"  # in lockstep, or sweep: one run after the other
    best_over: str | None = None  # the report takes every variant at its best value of this setting
    epochs: bool = False  # print what was measured after every epoch
    forms: dict[str, Form] = field(default_factory=dict)

    def expectations(self) -> list[Expectation]:
        """Raises :class:`UserError` for what cannot be meant."""
        found, hints = [], get_type_hints(Expectation)
        for each in self.expect:
            for key, value in each.items():
                pairs = value.values() if key == "where" and isinstance(value, dict) else ()
                if not fits(value, hints.get(key, Any)) or not all(len(pair) == 2 for pair in pairs):
                    raise UserError(f"expect {each}: {key} cannot be {value}; see bnexp/expectations.py")
            try:
                found.append(Expectation(**each))
            except TypeError as error:
                raise UserError(f"expect {each}: {error}; see bnexp/expectations.py") from error
            found[-1].check(list(self.variants))
        return found


def study(arguments: Sequence[str]) -> int:
    """``bnexp study [NAME [overrides]]``: 3 if an expectation does not hold, 1 if a run failed."""
    if not arguments:
        list_studies()
        return 0
    if odd := [word for word in arguments[1:] if word.startswith("-") or "=" not in word]:
        raise UserError(f"{odd[0]}: study takes a name and settings only, such as quick=true; see bnexp study --help")
    chosen, overrides = choose(load(arguments[0]), arguments[1:])
    name = Path(arguments[0]).stem
    expectations = chosen.expectations()
    with session(), ExitStack() as locks:
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


def load(name: str) -> Study:
    """The study of this name in ``conf/study``, or in a yaml file of the user's own."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else conf_dir() / "study" / f"{name}.yaml"
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        known = choices("study")
        near = nearest(name, known)
        raise UserError(f"study {name}: there is no such study{near}; choose one of {', '.join(known)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"study {name}: cannot be read ({error}); correct the file") from error
    with explained([name]):
        study = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Study), content))
        check_words(study)
        for form in study.forms.values():
            check_words(form)
    return study


def check_words(study: Study | Form) -> None:
    """Raise :class:`UserError` for what a study may not say, because it can be a stranger's.

    Where files are written, whom to trust and what Hydra starts is for the person at the keyboard to say.
    """
    words = [*study.settings, *(f"{key}=0" for key in study.sweep or {})]
    for role, own in (study.variants or {}).items():
        if not re.fullmatch(r"\w[\w.+-]{,59}", role):
            raise UserError(f"variants.{role}: cannot name a folder; use letters, digits, and then _ . + - too")
        words += own if isinstance(own, list) else [own]
    if odd := [word for word in words if not isinstance(word, str)]:
        raise UserError(f"{odd[0]}: no setting; write it as text, name=value")
    for override in OverridesParser.create().parse_overrides(words):
        key = override.key_or_group
        if key in THE_USERS or key.startswith("hydra"):
            raise UserError(f"{override.input_line}: no study may say that; give it on the command line if you want it")


def choose(study: Study, arguments: Sequence[str]) -> tuple[Study, list[str]]:
    """The study in the form and with the variants that the command line asks for, and the overrides that are left.

    Of a form that the study does not have it is said nothing: as it is, it is as full or as quick as it gets.
    """
    overrides, form, changes = [], None, {}
    for word in arguments:
        key, _, value = word.partition("=")
        if key in FORMS:
            if value not in ("true", "false"):
                raise UserError(f"{word}: true or false is expected")
            form = key if value == "true" else form
        elif key.startswith("variants."):
            changes[key.removeprefix("variants.")] = value.split()
        else:
            overrides.append(word)
    if form in study.forms:
        other = study.forms[form]
        parts = {key: getattr(other, key) for key in ("takes", "sweep", "variants", "expect", "how")}
        given = {key: value for key, value in parts.items() if value is not None}
        study = replace(study, **given, settings=[*study.settings, *other.settings])
    if unknown := [role for role in changes if role not in study.variants]:
        known = ", ".join(study.variants)
        raise UserError(f"variants.{unknown[0]}: this study has no such variant; its variants are {known}")
    if study.how not in HOW:
        raise UserError(f"how: {study.how}: not known; choose one of {', '.join(HOW)}")
    return replace(study, variants=study.variants | changes), overrides


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
        for table in epoch_tables(into_variants(named(read_runs([folder])[0], names))[0]):
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
