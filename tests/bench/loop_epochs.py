"""Seconds per epoch of our loop, per engine, beside the bare floor and the tutorial's loop, all in turns.

Also what engines, probes and the writer take, and many small runs folded into one.
"""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, thread_time

import torch
from loop_processes import TutorialProcess
from loop_rivals import Turn, bare_loop, prepare_images, tutorial_loop
from loop_rows import (
    DATA,
    EAGER,
    FLOOR,
    FLOOR_AGAIN,
    FOLDED,
    FUSED,
    OURS,
    SCRATCH,
    SILENT,
    TUTORIAL,
    TUTORIAL_APART,
    LoopCase,
    Row,
    payback_row,
    ratio_row,
)
from loop_stopwatch import Stopwatch, in_turns
from rich.console import Console

from bnexp.engines.fold import Fold
from bnexp.engines.graph_fold import CapturedStack
from bnexp.store.run_folder import Status
from bnexp.store.writer import NullWriter, Writer
from bnexp.train.device import forked_rng
from bnexp.train.drive import drive
from bnexp.train.loop import Loop, Plan
from bnexp.train.probe import Probe
from bnexp.train.progress import LiveProgress, NullProgress
from bnexp.train.recorder import Recorder
from bnexp.train.run import Run

MakeRun = Callable[[Sequence[str]], tuple[Run, Plan]]  # from overrides
Key = tuple[str, str]  # what is measured, and the engine


# ---- the loops ----


def training_only(run: Run, num_steps: int) -> Run:
    """``run`` without images to evaluate, ending after ``num_steps``."""
    none = run.dataset.valid.take(torch.arange(0))
    run.batches.dataset = replace(run.dataset, valid=none, test=none)
    run.total_steps = num_steps
    return run


def our_loop(run: Run, plan: Plan, *, writes: bool = True) -> Turn:
    """The command's own loop to the run's last step, recorded and shown as by default, or neither."""

    def turn(watch: Stopwatch) -> None:
        run.num_steps = 0
        with TemporaryDirectory() as name, open(os.devnull, "w") as null:
            recorder, progress = Recorder(NullWriter()), NullProgress()
            if writes:
                folder = Path(name)
                recorder = Recorder(Writer(folder), Status(folder, "", []), folder)
                progress = LiveProgress("bench", Console(file=null, force_terminal=True), in_sweep=False)
                watch.count(recorder, "write", "writer")
                watch.count(progress, "update", "progress")
                watch.count(progress.bar.live, "refresh", "bar", thread_time)  # a thread that mostly waits
            for thing, method in ((recorder, "save"), (recorder, "end"), (progress, "start"), (progress, "end")):
                watch.count_once(thing, method)
            with watch.running():
                ended = drive(Loop(run, plan, recorder), progress)
        if ended != "finished":
            raise RuntimeError(f"the run {ended}, its times mean nothing")
        check_engine([run])

    return turn


def check_engine(runs: Sequence[Run]) -> None:
    """Raise RuntimeError if the engine of one of ``runs`` took eager steps, whose times are not its own."""
    for run in runs:
        if run.fallback:
            raise RuntimeError(f"it took eager steps: {run.fallback}")


def our_loop_with(make_run: MakeRun, case: LoopCase, what: str, engine: str) -> Turn:
    """Our loop of a case with one engine; raises what the engine raises where it cannot work."""
    norm = {SCRATCH: "scratch", FUSED: "fused"}.get(what, "library")
    run, plan = make_run([*case.overrides, f"engine={engine}", f"norm={norm}"])
    return our_loop(training_only(run, case.num_steps), plan, writes=what != SILENT)


def data_loop(run: Run, num_steps: int) -> Turn:
    """The data path of our loop alone: gather, scale and normalize."""

    def turn(watch: Stopwatch) -> None:
        torch.set_num_threads(run.threads)
        with watch.running():
            for _ in range(num_steps):
                run.batches.next()

    return turn


def hand_written_loops(make_run: MakeRun, case: LoopCase, tutorial: TutorialProcess | None) -> dict[Key, Turn]:
    """The bare floor twice, which shows the noise, the tutorial's loop, and our data path alone.

    All have as many threads as our loop. With a process for it, the tutorial's loop also runs with torch's own number.
    """
    turns: dict[Key, Turn] = {}
    run, _ = make_run(case.overrides)
    layout = torch.channels_last if run.channels_last else torch.contiguous_format
    images = prepare_images(run.dataset, run.autocast_dtype or torch.float32, layout)
    generator = torch.Generator(run.device).manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randperm(len(images), generator=generator, device=run.device)

    for name in (FLOOR, FLOOR_AGAIN):
        model = make_run(case.overrides)[0].model
        turns[name, ""] = bare_loop(
            model, images, run.dataset.train.labels, case.batch_size, case.num_steps, draw, case.threads,
            run.autocast_dtype,
        )  # fmt: skip
    model = make_run(case.overrides)[0].model.to(memory_format=torch.contiguous_format)
    turns[TUTORIAL, ""] = tutorial_loop(model, run.dataset, case.batch_size, case.num_steps, case.threads)
    if tutorial:
        turns[TUTORIAL_APART, ""] = partial(tutorial.turn, case, run.dataset.in_shape[1])
    turns[DATA, ""] = data_loop(run, case.num_steps)
    return turns


# ---- their epochs ----


def measure_epochs(
    make_run: MakeRun,
    case: LoopCase,
    wanted: Sequence[Key],
    rounds: int,
    device: torch.device,
    tutorial: TutorialProcess | None = None,
) -> tuple[list[Row], dict[Key, str]]:
    """The rows of one case, and the reasons why some of ``wanted`` are not among them."""
    torch.compiler.reset()  # the cases before would count against the limit of recompilations
    turns, skipped, first_seconds = hand_written_loops(make_run, case, tutorial), {}, {}
    for what, engine in wanted:
        try:
            turn = our_loop_with(make_run, case, what, engine)
            if engine != EAGER:  # compiling and capturing fail in the first turn, if at all
                turn(watch := Stopwatch(device))
                first_seconds[what, engine] = watch.total.clock
        except Exception as error:
            if engine == EAGER:
                raise
            skipped[what, engine] = (str(error).splitlines() or [type(error).__name__])[0]
            continue
        turns[what, engine] = turn

    def timed(turn: Turn) -> Stopwatch:
        watch = Stopwatch(device)
        turn(watch)
        return watch

    results = in_turns({key: partial(timed, turn) for key, turn in turns.items()}, rounds)
    return epoch_rows(case, results) + setup_rows(case, first_seconds, results), skipped


def epoch_rows(case: LoopCase, results: Mapping[Key, Sequence[Stopwatch]]) -> list[Row]:
    """Seconds of the epochs, their ratios to the floor and to ours, and the writer's and the progress bar's share."""
    rows, clock, processor = [], {}, {}
    for (what, engine), watches in results.items():
        times = [watch.epoch(case.scale) for watch in watches]
        for kept, unit, field in ((clock, "s", "clock"), (processor, "s processor", "processor")):
            values = [getattr(time, field) for time in times]
            kept[what, engine] = Row("epoch", what, unit, values, engine=engine, **case.fields)
    for kept in (clock, processor):
        floor = kept[FLOOR, ""]
        rows += kept.values()
        rows += [ratio_row(row, floor) for key, row in kept.items() if key not in ((FLOOR, ""), (DATA, ""))]
        for (what, engine), row in kept.items():
            if what in (OURS, FUSED):
                others = ((FLOOR, ""), (TUTORIAL, ""), (TUTORIAL_APART, ""), (SCRATCH, engine))
                rows += [ratio_row(kept[key], row) for key in others if key in kept]
    for (what, engine), watches in results.items():
        if what == OURS:
            rows += _watching_rows(case, engine, watches)
    return rows


def setup_rows(
    case: LoopCase, first_seconds: Mapping[Key, float], results: Mapping[Key, Sequence[Stopwatch]]
) -> list[Row]:
    """Seconds of the first turn with each engine, and the number of epochs after which its setup has paid."""
    rows = []
    for (what, engine), seconds in first_seconds.items():
        rows.append(Row("engine", f"{what}, first turn", "s", [seconds], engine=engine, **case.fields))
        if (what, EAGER) in results:
            mine, eager = (
                Row("epoch", what, "s", [watch.epoch(case.scale).clock for watch in results[key]], **case.fields)
                for key in ((what, engine), (what, EAGER))
            )
            extra = seconds - statistics.median(watch.total.clock for watch in results[what, engine])
            rows.append(payback_row(replace(mine, engine=engine), eager, extra))
    return rows


def _watching_rows(case: LoopCase, engine: str, watches: Sequence[Stopwatch]) -> list[Row]:
    """The share of an epoch that the writer and the progress bar take, and the writer's seconds per reading."""
    shares = [
        sum(watch.seconds[name] for name in ("writer", "progress", "bar")) * case.scale / watch.epoch(case.scale).clock
        for watch in watches
    ]
    each = [watch.seconds["writer"] / watch.calls["writer"] for watch in watches]
    return [
        Row("watching", "writer and progress", "share", shares, engine=engine, **case.fields),
        Row("watching", "writer, a reading", "s", each, engine=engine, **case.fields),
    ]


# ---- probes and folds ----


def look_rows(make_run: MakeRun, case: LoopCase, names: Sequence[str], rounds: int) -> list[Row]:
    """Seconds that each probe takes for one look, in turns, on a run that goes on training."""
    run, plan = make_run([*case.overrides, f"probe=[{','.join(names)}]"])

    def look(probe: Probe) -> float:
        with forked_rng(run.device):
            began = perf_counter()
            before = probe.before(run)
            seconds = perf_counter() - began
            run.step()
            run.meter.read()  # waits for the device
            began = perf_counter()
            list(probe.look(run, before))
            return seconds + perf_counter() - began

    torch.set_num_threads(run.threads)
    results = in_turns({type(probe).__name__.lower(): partial(look, probe) for probe in plan.probes}, rounds)
    return [Row("watching", f"probe {name}, a look", "s", values, **case.fields) for name, values in results.items()]


def fold_rows(
    make_run: MakeRun, case: LoopCase, rounds: int, device: torch.device, num_runs: int = 32, engine: str = "graph"
) -> list[Row]:
    """Seconds until ``num_runs`` runs have had an epoch: one after the other, and folded into one."""

    def make_runs() -> list[Run]:
        made = (make_run([*case.overrides, f"engine={engine}", f"seed={seed}"])[0] for seed in range(num_runs))
        return [training_only(run, case.num_steps) for run in made]

    apart, together = make_runs(), make_runs()
    fold = Fold(CapturedStack if engine == "graph" else None)

    def epoch(groups: Sequence[Sequence[Run]], step: Callable[[Sequence[Run]], None]) -> float:
        """Train each group by ``step(group)``, one group after the other."""
        watch = Stopwatch(device)
        with watch.running():
            for group in groups:
                for run in group:
                    run.num_steps = 0
                for _ in range(case.num_steps):
                    step(group)
                for run in group:
                    run.meter.read()
        check_engine([run for group in groups for run in group])
        return watch.epoch(case.scale).clock

    contestants = {
        f"in turn, {engine}": partial(epoch, [[run] for run in apart], lambda runs: runs[0].step()),
        FOLDED: partial(epoch, [together], fold.step),
    }
    results = in_turns(contestants, rounds)
    slow, fast = (Row("fold", name, "s", results[name], **case.fields) for name in contestants)
    return [slow, fast, ratio_row(slow, fast)]
