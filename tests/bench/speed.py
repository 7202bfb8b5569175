"""What the comfort costs: bnexp's loop against a bare one, its start, its data path and its memory.

    BNEXP_DATA=... python tests/bench/speed.py [--quick]

Prints ratios of things measured in turns in this one process, with how often and how far they spread; a ratio
holds on any machine, the times beside it only on this one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from bnexp import build  # noqa: E402
from bnexp.commands import composed  # noqa: E402
from bnexp.folder import Status  # noqa: E402
from bnexp.loop import Journal, Plan, drive  # noqa: E402
from bnexp.progress import LiveProgress, NullProgress  # noqa: E402
from bnexp.run import Run  # noqa: E402
from bnexp.writer import NullWriter, Writer  # noqa: E402

GOAL_LOOP, GOAL_DATA = 1.10, 2.0


def spread(values: list[float], unit: str = "", digits: int = 3) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f}, n={len(values)})"


def make_run(batch_size: int, num_steps: int, threads: str) -> Run:
    overrides = ["data=mnist", "norm=library", f"batch_size={batch_size}", f"steps={num_steps}", f"threads={threads}"]
    return build.build(composed([*overrides, "device=cpu"]))


def bare_loop(batch_size: int, num_steps: int, threads: str) -> Callable[[], None]:
    """The loop one would write by hand: floats that lie ready, one gather per step, nothing looked at."""
    run = make_run(batch_size, num_steps, threads)
    model, labels = run.model, run.dataset.train.labels
    images = run.dataset.prepare(run.dataset.train.images)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)

    def loop() -> None:
        order = torch.randperm(len(images), generator=generator)
        for picked in order[: num_steps * batch_size].split(batch_size):
            loss = cross_entropy(model(images[picked]), labels[picked])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return loop


def our_loop(batch_size: int, num_steps: int, threads: str, *, writes: bool, shows: bool) -> Callable[[], None]:
    """The command's loop over ``num_steps``: readings every 20 steps, no evaluation (the bare loop has none)."""
    run = make_run(batch_size, num_steps, threads)
    for split in ("valid", "test"):  # an evaluation is work that was asked for, not overhead
        object.__setattr__(run.dataset, split, run.dataset.valid.take(torch.arange(0)))

    def loop() -> None:
        run.num_steps = 0
        with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as null:
            folder = Path(name)
            status = Status(folder, "cpu", []) if writes else None
            journal = Journal(Writer(folder), status, folder) if writes else Journal(NullWriter())
            console = Console(file=null, force_terminal=True)
            progress = LiveProgress("bench", console, in_sweep=False) if shows else NullProgress()
            drive(run, Plan(20, num_steps, num_steps), journal, progress)

    return loop


def time_in_turns(loops: dict[str, Callable[[], None]], num_rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds by the clock, seconds of processor time) of each loop, in turns, so that a slow spell hits all.

    Whoever else uses the machine lengthens the first; the second counts this process alone, all threads of it.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for i in range(num_rounds + 1):
        for name, loop in loops.items():
            clock, processor = perf_counter(), process_time()
            loop()
            if i:  # the first round warms up
                seconds[name].append((perf_counter() - clock, process_time() - processor))
    return seconds


def bench_loop(batch_size: int, num_rounds: int, threads: str, num_images: int) -> None:
    num_steps = num_images // batch_size
    options = {
        "nothing written": {"writes": False, "shows": False},
        "folder": {"writes": True, "shows": False},
        "folder and bar": {"writes": True, "shows": True},
    }
    # The second is the first once more: how far it is from 1 is what this machine cannot tell apart today.
    loops = {name: bare_loop(batch_size, num_steps, threads) for name in ("bare", "bare again")}
    loops |= {name: our_loop(batch_size, num_steps, threads, **each) for name, each in options.items()}
    seconds = time_in_turns(loops, num_rounds)
    print(f"\nLeNet, {num_steps} steps of {batch_size} MNIST images, threads={threads}: seconds, and ratio to bare")
    for kind, what in enumerate(("clock", "processor")):
        for name, each in seconds.items():
            ratios = [ours[kind] / bare[kind] for ours, bare in zip(each, seconds["bare"], strict=True)]
            verdict = "" if name == "bare" else f"   ratio {spread(ratios)}"
            verdict += "" if "bare" in name else f"  goal {GOAL_LOOP}"
            print(f"  {what:<10}{name:<16}{spread([pair[kind] for pair in each], ' s')}{verdict}")


def bench_data(num_rounds: int) -> None:
    print("\ndata path (gather, scale, normalize), microseconds per MNIST image")
    for batch_size in (32, 256):
        run = make_run(batch_size, 1, "1")
        each = []
        for _ in range(num_rounds):
            num_batches = 20_000 // batch_size
            began = perf_counter()
            for _ in range(num_batches):
                run.batches.next()
            each.append((perf_counter() - began) / (num_batches * batch_size) * 1e6)
        print(f"  batch {batch_size:<10}{spread(each, ' us')}  goal {GOAL_DATA}")


START = """
import json, sys, time
began = time.perf_counter()
marks = {}
def mark(name):
    marks[name] = time.perf_counter() - began
import torch; mark("import torch")
import bnexp.commands; mark("import hydra, bnexp.commands")
from bnexp import build, loop, progress, writer; mark("import the rest")
import bnexp.run as run
load, step = build.make_model, run.Run.step
build_build = build.build
def built(*args):
    mark("compose and check")
    result = build_build(*args)
    mark("build: model, data, optimizer")
    return result
def stepped(self):
    if "folder, writer" not in marks:
        mark("folder, writer")
        step(self)
        mark("first step")
    else:
        step(self)
build.build, run.Run.step = built, stepped
from bnexp.cli import main
code = main(["train", "steps=1", "quiet=true", "threads=auto", *sys.argv[1:]])
print(json.dumps(marks))
"""


def bench_start(num_rounds: int) -> None:
    for data in ("digits", "mnist"):
        rounds = []
        for _ in range(num_rounds):
            with tempfile.TemporaryDirectory() as name:
                began = perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", START, f"data={data}"], cwd=name, capture_output=True, text=True, check=True
                )
                rounds.append(json.loads(done.stdout.splitlines()[-1]) | {"whole process": perf_counter() - began})
        print(f"\nprocess start to first step, data={data}, seconds since the interpreter runs")
        before = 0.0
        for name in rounds[0]:
            values = [each[name] for each in rounds]
            step = statistics.median(values) - before
            print(f"  {name:<32}{spread(values, ' s', 2)}" + ("" if "whole" in name else f"   +{step:.2f}"))
            before = statistics.median(values)


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def bench_memory(num_epochs: int) -> None:
    """Resident memory after each epoch, of a run that reads, evaluates, writes and keeps checkpoints."""
    run = make_run(256, 1, "1")
    run.total_steps = num_epochs * run.batches.steps_per_epoch
    seen = []

    class Watch(NullProgress):
        def update(self, run, metrics):
            if run.num_steps % run.batches.steps_per_epoch == 0:
                seen.append(resident_megabytes())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        per_epoch = run.batches.steps_per_epoch
        journal = Journal(Writer(folder), Status(folder, "cpu", []), folder)
        drive(run, Plan(20, per_epoch, per_epoch), journal, Watch())
    print(f"\nresident memory after each of {num_epochs} epochs, MB: " + " ".join(f"{each:.1f}" for each in seen))
    print(f"  growth from the second to the last: {seen[-1] - seen[1]:+.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shorter epochs")
    parser.add_argument("--threads", default="auto")
    parser.add_argument("--only", choices=["loop", "data", "start", "memory"])
    given = parser.parse_args()
    num_rounds, num_images, num_epochs = (3, 12_800, 3) if given.quick else (5, 55_000, 10)
    print(f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    parts = {
        "loop": lambda: [bench_loop(size, num_rounds, given.threads, num_images) for size in (256, 32)],
        "data": lambda: bench_data(num_rounds),
        "start": lambda: bench_start(num_rounds),
        "memory": lambda: bench_memory(num_epochs),
    }
    for name, part in parts.items():
        if given.only in (None, name):
            part()


if __name__ == "__main__":
    main()
