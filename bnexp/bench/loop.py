"""What does the comfort cost? Our training loop beside loops written by hand, and our start beside a bare script's."""

from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bnexp.bench import results
from bnexp.bench.epochs import Case, Make, looks, measure
from bnexp.bench.folding import fold_rows
from bnexp.bench.goals import EAGER, EPOCH, OURS, SCRATCH, SILENT, Row, finite, goal_of
from bnexp.bench.loop_settings import SOURCES, Settings
from bnexp.bench.processes import Tutorial
from bnexp.bench.startup import memory_rows, start_rows, sweep_rows
from bnexp.bench.tables import epoch_table, plain_table
from bnexp.errors import UserError

MOST_PROCESSES = 3  # rounds of whole processes and of looks, which take seconds each
WIDE = ("data.size=96", "precision=bf16", "channels_last=true")  # how a ResNet is trained where there is a GPU


def run(make: Make, settings: Settings, device: torch.device, probes: Sequence[str]) -> Path:
    """Measure what was asked for; ``make(overrides)`` builds a run and its plan. Returns the results' folder.

    Its path is the last line printed. What was measured before an interruption is written too.
    """
    console = Console()
    about = results.introduce(console, settings, device)
    cases = cases_of(make, settings, device)
    folder = results.claim_out(settings.out)
    session = Session(make, settings, device, console)
    is_complete = False
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if "epochs" in settings.parts:
                session.epochs(cases)
                session.looks(session.largest(cases), probes)
            if "start" in settings.parts:
                session.starts(session.largest(cases))
            if "sweep" in settings.parts:
                session.sweeps()
        session.end()
        is_complete = True
    finally:
        about |= {"complete": is_complete, "skipped": session.skipped}
        write(folder, about, session.rows, device.type)
        print(folder, flush=True)
    return folder


def cases_of(make: Make, settings: Settings, device: torch.device) -> list[Case]:
    """Every model at every batch size; :class:`UserError` if there are no data, or too few."""
    cases = []
    for model in settings.models:
        for batch_size in settings.batch_sizes:
            given = [f"model={model}", f"data={settings.data}", f"batch_size={batch_size}", f"device={device}"]
            wide = WIDE if device.type == "cuda" and model == "resnet" else ()
            try:
                run, _ = make([*given, *wide])
            except UserError as error:
                if not str(error).startswith("data="):
                    raise
                raise UserError(f"{error}; data.root=... is BNEXP_DATA=... for bench loop") from error
            num_images = len(run.dataset.train)
            if (settings.images or 0) > num_images:
                found = f"{settings.data} has {num_images:,} training images"
                raise UserError(f"images={settings.images}: {found}; give as many or fewer")
            num_steps = min(settings.num_steps(model, batch_size, device.type), num_images // batch_size)
            kind = type(run.model)
            target = f"{kind.__module__}.{kind.__name__}"
            cases.append(Case(model, batch_size, (*given, *wide), num_steps, target, run.threads))
    return cases


class Session:
    """What was found so far, each part of it shown as soon as it is known."""

    def __init__(self, make: Make, settings: Settings, device: torch.device, console: Console) -> None:
        self.make = make
        self.settings = settings
        self.device = device
        self.console = console
        self.rows: list[Row] = []
        self.skipped: dict[str, str] = {}
        self.num_rounds = min(settings.num_rounds, MOST_PROCESSES)

    def largest(self, cases: Sequence[Case]) -> list[Case]:
        """One case of each model."""
        return [case for case in cases if case.batch_size == max(self.settings.batch_sizes)]

    def show(self, rows: Sequence[Row], title: str) -> None:
        if rows:
            self.console.print(plain_table(rows, title, self.device.type), "")

    def epochs(self, cases: Sequence[Case]) -> None:
        """Seconds per epoch, and many small runs as one where they can be captured."""
        source, rounds = SOURCES[self.settings.data], self.settings.num_rounds
        apart = closing(Tutorial(str(self.device), source)) if self.settings.set == "full" else nullcontext()
        with apart as tutorial:
            for case in cases:
                rows, skipped = measure(self.make, case, self.wanted(case), rounds, self.device, tutorial)
                self.rows += rows
                self.skipped |= {f"{case}, {engine}: {what}": why for (what, engine), why in skipped.items()}
                title = f"{case}: an epoch of {EPOCH:,} images, from {case.num_steps} steps"
                title += f", {rounds} times; {case.threads} thread{'s' * (case.threads > 1)}"
                self.console.print(epoch_table(rows, title), "")
        if self.device.type == "cuda" and "graph" in self.settings.engines:
            small = [case for case in self.largest(cases) if case.model == "lenet"]
            found = [row for case in small for row in fold_rows(self.make, case, self.num_rounds, self.device)]
            self.rows += found
            self.show(found, "32 runs, an epoch each")

    def wanted(self, case: Case) -> list[tuple[str, str]]:
        """What of ours is measured in a case: (what, engine)."""
        is_largest = case.batch_size == max(self.settings.batch_sizes)
        found = []
        for engine in self.settings.engines:
            if engine == EAGER or is_largest or self.settings.set == "full":
                found += [(OURS, engine)] + [(SILENT, engine)] * (engine == EAGER)
                found += [(SCRATCH, engine)] * (is_largest and case.model == "lenet")
        return found

    def looks(self, cases: Sequence[Case], probes: Sequence[str]) -> None:
        """What probes take for a look."""
        for case in cases:
            self.rows += looks(self.make, case, probes, self.num_rounds)
        rows = [row for row in self.rows if row.part in ("engine", "watching")]
        self.show(rows, "Getting ready, writing and looking")

    def starts(self, cases: Sequence[Case]) -> None:
        """The start with the first model, and the peak memory of all."""
        found = []
        for case in cases:
            plain = [word for word in case.overrides if word not in WIDE]
            asked = {"name": case.model, "batch_size": case.batch_size, "num_steps": case.num_steps}
            asked |= {"threads": case.threads, "device": str(self.device), "source": SOURCES[self.settings.data]}
            asked |= {"model": case.target, "overrides": [*plain, "quiet=true"]}
            found += memory_rows(asked, 1) if found else start_rows(asked, self.num_rounds)
        self.rows += found
        self.show(found, "From the start of a process to its first step; peak memory")

    def sweeps(self) -> None:
        """A sweep in turn and with two jobs at a time."""
        found, reason = sweep_rows(self.settings.data, str(self.device), self.num_rounds)
        self.skipped |= {"sweep: two jobs": reason} if reason else {}
        self.rows += found
        self.show(found, "A sweep of four learning rates: MLP, an epoch each")

    def end(self) -> None:
        """What it all comes to."""
        rows = [row for row in self.rows if goal_of(row, self.device.type)]
        self.show(rows, "Goals (?: single rounds say otherwise)")
        for name, reason in self.skipped.items():
            self.console.print(f"not measured: {name}: {reason}", highlight=False, markup=False)


def write(path: Path, about: Mapping[str, Any], rows: Sequence[Row], device: str) -> None:
    """``bench.json`` with every round and ``bench.csv`` with a line per kind of measurement."""
    lines = [row.as_dict(device) for row in rows]
    content = [line | {"rounds": list(map(finite, row.values))} for line, row in zip(lines, rows, strict=True)]
    results.write(path, {**about, "rows": content}, [line | results.where(about) for line in lines])
