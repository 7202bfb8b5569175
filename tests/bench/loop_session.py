"""The measurements of ``loop.py`` in order; each is shown as soon as it is known."""

from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from loop_epochs import MakeRun, fold_rows, look_rows, measure_epochs
from loop_processes import TutorialProcess, memory_rows, start_rows, sweep_rows
from loop_rows import EAGER, EPOCH, FUSED, OURS, SCRATCH, SILENT, LoopCase, Row, epoch_table, goal_of, row_table
from loop_settings import SOURCES, LoopSettings
from rich.console import Console

from bnexp.bench.results import describe_measurement, make_results_folder, provenance, write_results
from bnexp.config import build, check
from bnexp.config.compose import composed
from bnexp.data.dataset import Dataset
from bnexp.errors import UserError
from bnexp.store.files import finite
from bnexp.train.loop import Plan
from bnexp.train.run import Run

MAX_PROCESS_ROUNDS = 3  # processes and probes take seconds a round
GPU_RESNET = ("data.size=96", "precision=bf16", "channels_last=true")  # the usual settings of a ResNet on a GPU


def run_maker() -> MakeRun:
    """A function ``overrides -> (run, plan)``; its runs share their datasets."""
    datasets: dict[str, Dataset] = {}

    def make_run(overrides: Sequence[str]) -> tuple[Run, Plan]:
        cfg = composed(overrides)
        check.check(cfg)
        run = build.build(cfg, datasets)
        return run, build.plan_of(cfg, run.batches.steps_per_epoch)

    return make_run


def measure_loop(
    make_run: MakeRun, settings: LoopSettings, device: torch.device, probes: Sequence[str], command: str
) -> Path:
    """Measure the parts that ``settings`` name; returns the results' folder, whose path is the last line printed.

    ``command`` is the command line, for the record. An interruption keeps what was measured before it.
    """
    console = Console()
    about = describe_measurement(console, settings, device, command)
    cases = make_cases(make_run, settings, device)
    folder = make_results_folder(settings.out)
    session = Session(make_run, settings, device, console)
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
        write_rows(folder, about, session.rows, device.type)
        print(folder, flush=True)
    return folder


def make_cases(make_run: MakeRun, settings: LoopSettings, device: torch.device) -> list[LoopCase]:
    """Every model at every batch size; :class:`UserError` if the data are missing or too few."""
    cases = []
    for model in settings.models:
        for batch_size in settings.batch_sizes:
            overrides = [f"model={model}", f"data={settings.data}", f"batch_size={batch_size}", f"device={device}"]
            overrides += GPU_RESNET if device.type == "cuda" and model == "resnet" else ()
            try:
                run, _ = make_run(overrides)
            except UserError as error:
                if not str(error).startswith("data="):
                    raise
                raise UserError(f"{error}; for this script, data.root=... is BNEXP_DATA=...") from error
            num_images = len(run.dataset.train)
            if (settings.images or 0) > num_images:
                have = f"{settings.data} has {num_images:,} training images"
                raise UserError(f"images={settings.images}: {have}; give as many or fewer")
            num_steps = min(settings.num_steps(model, batch_size, device.type), num_images // batch_size)
            kind = type(run.model)
            target = f"{kind.__module__}.{kind.__name__}"
            cases.append(LoopCase(model, batch_size, tuple(overrides), num_steps, target, run.threads))
    return cases


class Session:
    """The rows measured so far, and the reasons for those that could not be measured."""

    def __init__(self, make_run: MakeRun, settings: LoopSettings, device: torch.device, console: Console) -> None:
        self.make_run = make_run
        self.settings = settings
        self.device = device
        self.console = console
        self.rows: list[Row] = []
        self.skipped: dict[str, str] = {}
        self.num_rounds = min(settings.num_rounds, MAX_PROCESS_ROUNDS)

    def largest(self, cases: Sequence[LoopCase]) -> list[LoopCase]:
        """The cases of the largest batch size, one of each model."""
        return [case for case in cases if case.batch_size == max(self.settings.batch_sizes)]

    def show(self, rows: Sequence[Row], title: str) -> None:
        if rows:
            self.console.print(row_table(rows, title, self.device.type), "")

    def epochs(self, cases: Sequence[LoopCase]) -> None:
        """Measure seconds per epoch and, where runs can be captured, many small runs folded into one."""
        source, rounds = SOURCES[self.settings.data], self.settings.num_rounds
        is_full = self.settings.set == "full"
        with closing(TutorialProcess(str(self.device), source)) if is_full else nullcontext() as tutorial:
            for case in cases:
                rows, skipped = measure_epochs(self.make_run, case, self.wanted(case), rounds, self.device, tutorial)
                self.rows += rows
                self.skipped |= {f"{case}, {engine}: {what}": why for (what, engine), why in skipped.items()}
                title = f"{case}: an epoch of {EPOCH:,} images, from {case.num_steps} steps"
                title += f", {rounds} times; {case.threads} thread{'s' * (case.threads > 1)}"
                self.console.print(epoch_table(rows, title), "")
        if self.device.type == "cuda" and "graph" in self.settings.engines:
            small = [case for case in self.largest(cases) if case.model == "lenet"]
            rows = []
            try:
                rows = [row for case in small for row in fold_rows(self.make_run, case, self.num_rounds, self.device)]
            except RuntimeError as error:
                self.skipped["32 runs, an epoch each"] = str(error)
            self.rows += rows
            self.show(rows, "32 runs, an epoch each")

    def wanted(self, case: LoopCase) -> list[tuple[str, str]]:
        """The measurements of our loop in a case: (what, engine)."""
        is_largest = case.batch_size == max(self.settings.batch_sizes)
        wanted = []
        for engine in self.settings.engines:
            if engine == EAGER or is_largest or self.settings.set == "full":
                wanted += [(OURS, engine)] + [(SILENT, engine)] * (engine == EAGER)
                wanted += [(SCRATCH, engine)] * (is_largest and case.model == "lenet")
                wanted += [(FUSED, engine)] * (is_largest and self.device.type == "cuda")
        return wanted

    def looks(self, cases: Sequence[LoopCase], probes: Sequence[str]) -> None:
        """Measure a look of every probe."""
        for case in cases:
            self.rows += look_rows(self.make_run, case, probes, self.num_rounds)
        rows = [row for row in self.rows if row.part in ("engine", "watching")]
        self.show(rows, "Setup of engines, writing and looking")

    def starts(self, cases: Sequence[LoopCase]) -> None:
        """Measure the start with the first model, and the peak memory of all models."""
        rows = []
        for case in cases:
            overrides = [word for word in case.overrides if word not in GPU_RESNET]
            asked = {"name": case.model, "batch_size": case.batch_size, "num_steps": case.num_steps}
            asked |= {"threads": case.threads, "device": str(self.device), "source": SOURCES[self.settings.data]}
            asked |= {"model": case.target, "overrides": [*overrides, "quiet=true"]}
            rows += memory_rows(asked, 1) if rows else start_rows(asked, self.num_rounds)
        self.rows += rows
        self.show(rows, "From the start of a process to its first step; peak memory")

    def sweeps(self) -> None:
        """Measure a sweep in turn and with two jobs at a time."""
        rows, reason = sweep_rows(self.settings.data, str(self.device), self.num_rounds)
        self.skipped |= {"sweep: two jobs": reason} if reason else {}
        self.rows += rows
        self.show(rows, "A sweep of four learning rates: MLP, an epoch each")

    def end(self) -> None:
        """Show the rows that have goals, and what was not measured."""
        rows = [row for row in self.rows if goal_of(row, self.device.type)]
        self.show(rows, "Goals (?: not all rounds agree)")
        for name, reason in self.skipped.items():
            self.console.print(f"not measured: {name}: {reason}", highlight=False, markup=False)


def write_rows(path: Path, about: Mapping[str, Any], rows: Sequence[Row], device: str) -> None:
    """Write ``bench.json`` with every round and ``bench.csv`` with a line per row."""
    lines = [row.as_dict(device) for row in rows]
    content = [line | {"rounds": list(map(finite, row.values))} for line, row in zip(lines, rows, strict=True)]
    write_results(path, {**about, "rows": content}, [line | provenance(about) for line in lines])
