"""Seconds per epoch of our loop, per engine, beside the bare floor and the tutorial's loop: all in turns."""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, thread_time
from typing import Any

import torch
from rich.console import Console

from bnexp.bench import goals
from bnexp.bench.goals import DATA, EAGER, FLOOR, OURS, SCRATCH, SILENT, TUTORIAL, Row, payback, ratio
from bnexp.bench.processes import Tutorial
from bnexp.bench.rivals import Loop, bare_loop, prepared, tutorial_loop
from bnexp.bench.turns import Stopwatch, in_turns
from bnexp.store.run_folder import Status
from bnexp.store.writer import NullWriter, Writer
from bnexp.train.drive import drive
from bnexp.train.loop import Loop as TrainingLoop
from bnexp.train.loop import Plan
from bnexp.train.probe import Probe, same_chance
from bnexp.train.progress import LiveProgress, NullProgress
from bnexp.train.recorder import Recorder
from bnexp.train.run import Run

TUTORIALS = ((TUTORIAL, ""), (goals.AS_IT_COMES, ""))
Make = Callable[[Sequence[str]], tuple[Run, Plan]]


@dataclass(frozen=True)
class Case:
    """A model and a batch size, the overrides that say so, and the steps that one turn takes.

    ``target`` is the model's class, ``threads`` what our runs of it use on a CPU, and all others too.
    """

    model: str
    batch_size: int
    overrides: tuple[str, ...]
    num_steps: int
    target: str
    threads: int

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch_size}"

    @property
    def scale(self) -> float:
        """Turns in an epoch."""
        return goals.EPOCH / (self.num_steps * self.batch_size)


def training_only(run: Run, num_steps: int) -> Run:
    """``run`` without images to evaluate, which is work that was asked for, ending after ``num_steps``."""
    none = run.dataset.valid.take(torch.arange(0))
    run.batches.dataset = replace(run.dataset, valid=none, test=none)
    run.total_steps = num_steps
    return run


def our_loop(run: Run, plan: Plan, *, writes: bool = True) -> Loop:
    """The command's own loop to the run's last step, recorded and shown as by default, or not at all."""

    def loop(watch: Stopwatch) -> None:
        run.num_steps = 0
        with TemporaryDirectory() as name, open(os.devnull, "w") as null:
            recorder, progress = Recorder(NullWriter()), NullProgress()
            if writes:
                folder = Path(name)
                recorder = Recorder(Writer(folder), Status(folder, "", []), folder)
                progress = LiveProgress("bench", Console(file=null, force_terminal=True), in_sweep=False)
                watch.count(recorder, "write", "writer")
                watch.count(progress, "update", "progress")
                watch.count(progress.bar.live, "refresh", "bar", thread_time)  # it waits for its turn in a thread
            for thing, method in ((recorder, "save"), (recorder, "end"), (progress, "start"), (progress, "end")):
                watch.count_once(thing, method)
            with watch.running():
                ended = drive(TrainingLoop(run, plan, recorder), progress)
        if ended != "finished":
            raise RuntimeError(f"the run {ended}, its times mean nothing")

    return loop


def data_loop(run: Run, num_steps: int) -> Loop:
    """Gather, scale and normalize, as our loop does, and nothing else."""

    def loop(watch: Stopwatch) -> None:
        torch.set_num_threads(run.threads)
        with watch.running():
            for _ in range(num_steps):
                run.batches.next()

    return loop


def hand_written(make: Make, case: Case, tutorial: Tutorial | None) -> dict[tuple[str, str], Loop]:
    """The floor twice, which is the noise, the tutorial's loop, and our data path.

    The tutorial's loop has as many threads as ours. It also comes as it does to others, if there is a process for it.
    """
    loops: dict[tuple[str, str], Loop] = {}
    run, _ = make(case.overrides)
    layout = torch.channels_last if run.channels_last else torch.contiguous_format
    images = prepared(run.dataset, run.autocast_dtype or torch.float32, layout)
    generator = torch.Generator(run.device).manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randperm(len(images), generator=generator, device=run.device)

    for name in (FLOOR, goals.AGAIN):
        model = make(case.overrides)[0].model
        loops[name, ""] = bare_loop(
            model, images, run.dataset.train.labels, case.batch_size, case.num_steps, draw, case.threads,
            run.autocast_dtype,
        )  # fmt: skip
    model = make(case.overrides)[0].model.to(memory_format=torch.contiguous_format)
    loops[TUTORIAL, ""] = tutorial_loop(model, run.dataset, case.batch_size, case.num_steps, case.threads)
    if tutorial:
        loops[goals.AS_IT_COMES, ""] = partial(tutorial.turn, case, run.dataset.in_shape[1])
    loops[DATA, ""] = data_loop(run, case.num_steps)
    return loops


def ours(make: Make, case: Case, what: str, engine: str) -> Loop:
    """Our loop with one engine, ready for its turns; what it cannot do it says itself."""
    norm = "scratch" if what == SCRATCH else "library"
    run, plan = make([*case.overrides, f"engine={engine}", f"norm={norm}"])
    return our_loop(training_only(run, case.num_steps), plan, writes=what != SILENT)


def measure(
    make: Make,
    case: Case,
    wanted: Sequence[tuple[str, str]],
    rounds: int,
    device: torch.device,
    tutorial: Tutorial | None = None,
) -> tuple[list[Row], dict[tuple[str, str], str]]:
    """Rows of one case, and why some of the ``wanted`` (what, engine) are not among them."""
    torch.compiler.reset()  # or the cases before would count against the limit of recompilations
    loops, skipped, firsts = hand_written(make, case, tutorial), {}, {}
    for what, engine in wanted:
        try:
            loop = ours(make, case, what, engine)
            if engine != EAGER:  # what it cannot compile or capture comes to light when it first tries
                loop(watch := Stopwatch(device))
                firsts[what, engine] = watch.total.clock
        except Exception as error:
            if engine == EAGER:
                raise
            skipped[what, engine] = (str(error).splitlines() or [type(error).__name__])[0]
            continue
        loops[what, engine] = loop

    def turn(loop: Loop) -> Stopwatch:
        watch = Stopwatch(device)
        loop(watch)
        return watch

    results = in_turns({key: partial(turn, loop) for key, loop in loops.items()}, rounds)
    return rows_of(case, results) + readiness(case, firsts, results), skipped


def _named(case: Case) -> dict[str, Any]:
    return {"model": case.model, "batch_size": case.batch_size}


def rows_of(case: Case, results: Mapping[tuple[str, str], Sequence[Stopwatch]]) -> list[Row]:
    """Epochs in seconds, what they are to the floor and to ours, and what writing and showing took of them."""
    rows, clock, processor = [], {}, {}
    for (what, engine), watches in results.items():
        times = [watch.epoch(case.scale) for watch in watches]
        for kept, unit, field in ((clock, "s", "clock"), (processor, "s processor", "processor")):
            values = [getattr(time, field) for time in times]
            kept[what, engine] = Row("epoch", what, unit, values, engine=engine, **_named(case))
    for kept in (clock, processor):
        rows += kept.values()
        rows += [ratio(row, kept[FLOOR, ""]) for key, row in kept.items() if key not in ((FLOOR, ""), (DATA, ""))]
        for (what, engine), row in kept.items():
            if what == OURS:
                others = [(kept[key], row) for key in ((FLOOR, ""), *TUTORIALS) if key in kept]
                others += [(kept[SCRATCH, engine], row)] if (SCRATCH, engine) in kept else []
                rows += [ratio(other, mine) for other, mine in others]
    for (what, engine), watches in results.items():
        if what == OURS:
            rows += _watching(case, engine, watches)
    return rows


def readiness(
    case: Case, firsts: Mapping[tuple[str, str], float], results: Mapping[tuple[str, str], Sequence[Stopwatch]]
) -> list[Row]:
    """What the first turn with an engine took, and after how many epochs that is won back, if ever."""
    rows = []
    for (what, engine), seconds in firsts.items():
        rows.append(Row("engine", f"{what}, first turn", "s", [seconds], engine=engine, **_named(case)))
        if (what, EAGER) in results:
            mine, eager = (
                Row("epoch", what, "s", [watch.epoch(case.scale).clock for watch in results[key]], **_named(case))
                for key in ((what, engine), (what, EAGER))
            )
            extra = seconds - statistics.median(watch.total.clock for watch in results[what, engine])
            rows.append(payback(replace(mine, engine=engine), eager, extra))
    return rows


def _watching(case: Case, engine: str, watches: Sequence[Stopwatch]) -> list[Row]:
    """What was spent in the writer and the progress bar, of an epoch and per reading."""
    fields = {"engine": engine, **_named(case)}
    shares = [
        sum(watch.seconds[name] for name in ("writer", "progress", "bar")) * case.scale / watch.epoch(case.scale).clock
        for watch in watches
    ]
    each = [watch.seconds["writer"] / watch.calls["writer"] for watch in watches]
    return [
        Row("watching", "writer and progress", "share", shares, **fields),
        Row("watching", "writer, a reading", "s", each, **fields),
    ]


def looks(make: Make, case: Case, names: Sequence[str], rounds: int) -> list[Row]:
    """Seconds that each probe takes for one look, in turns, on a run that goes on training."""
    run, plan = make([*case.overrides, f"probe=[{','.join(names)}]"])

    def look(probe: Probe) -> float:
        with same_chance(run):
            began = perf_counter()
            before = probe.before(run)
            seconds = perf_counter() - began
            run.step()
            run.meter.read()  # waits for the device
            began = perf_counter()
            list(probe.look(run, before))
            return seconds + perf_counter() - began

    torch.set_num_threads(run.threads)
    seconds = in_turns({type(probe).__name__.lower(): partial(look, probe) for probe in plan.probes}, rounds)
    return [Row("watching", f"probe {name}, a look", "s", each, **_named(case)) for name, each in seconds.items()]
