"""What the probes cost at their default schedules: runs with all of them against the same runs without.

    BNEXP_DATA=... python tests/bench/probes.py [--epochs 3] [--rounds 3]

Trains the command's own way, folder, evaluation and checkpoints included, in turns in this one process. The ratio of
the processor times is the answer; the clock counts whoever else uses the machine.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from time import perf_counter, process_time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

from bnexp.config import build, parts  # noqa: E402
from bnexp.config.choices import conf_dir  # noqa: E402
from bnexp.config.compose import composed  # noqa: E402
from bnexp.store.run_folder import Status  # noqa: E402
from bnexp.store.writer import Writer  # noqa: E402
from bnexp.train.drive import drive  # noqa: E402
from bnexp.train.loop import Loop  # noqa: E402
from bnexp.train.progress import NullProgress  # noqa: E402
from bnexp.train.recorder import Recorder  # noqa: E402

GOAL = 1.05
NAMES = sorted(path.stem for path in (conf_dir() / "probe").glob("*.yaml"))


def spread(values: list[float], digits: int = 3) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}, n={len(values)})"


def train(model: str, batch_size: int, num_epochs: int, probes: list[str]) -> tuple[float, float, float]:
    """Seconds by the clock, of processor time, and those that the run itself counts for its probes."""
    overrides = [f"model={model}", "data=mnist", f"batch_size={batch_size}", f"epochs={num_epochs}", "threads=1"]
    cfg = composed([*overrides, "device=cpu", f"probe=[{','.join(probes)}]"])
    run = build.build(cfg)
    plan = build.plan_of(cfg, run.batches.steps_per_epoch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clock, processor = perf_counter(), process_time()
        recorder = Recorder(Writer(folder), Status(folder, "cpu", []), folder)
        drive(Loop(run, plan, recorder), NullProgress())
        clock, processor = perf_counter() - clock, process_time() - processor
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return clock, processor, sum(line.get("time/probes", 0.0) for line in lines)


def seconds_per_look(model: str, batch_size: int, num_looks: int = 7) -> dict[str, str]:
    """Milliseconds of processor time that each probe takes for one look."""
    cfg = composed([f"model={model}", "data=mnist", f"batch_size={batch_size}", "device=cpu", "threads=1",
                    f"probe=[{','.join(NAMES)}]"])  # fmt: skip
    run = build.build(cfg)
    run.step()
    found = {}
    for name, probe in zip(NAMES, parts.probes_of(cfg), strict=True):
        each = []
        for _ in range(num_looks):
            began = process_time()
            list(probe.look(run, probe.before(run)))
            each.append((process_time() - began) * 1e3)
        found[name] = f"{spread(each, 2)} ms, every {getattr(probe, 'every', '(once)')}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=["mlp", "lenet"], nargs="*", default=["mlp", "lenet"])
    parser.add_argument("--batch-size", type=int, nargs="*", default=[64, 256])
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    for model in given.model:
        for batch_size in given.batch_size:
            print(f"\n{model}, MNIST, batch {batch_size}, {given.epochs} epochs; processor time of a look")
            for name, text in seconds_per_look(model, batch_size).items():
                print(f"  {name:<14}{text}")
            rounds = [[train(model, batch_size, given.epochs, names) for names in ([], NAMES)]
                      for _ in range(given.rounds)]  # fmt: skip
            for i, what in enumerate(("clock", "processor")):
                ratios = [probed[i] / bare[i] for bare, probed in rounds]
                print(f"  {what:<14}without {spread([bare[i] for bare, _ in rounds], 2)} s, ratio {spread(ratios)}"
                      f"  goal {GOAL}")  # fmt: skip
            shares = [probed[2] / (probed[0] - probed[2]) for _, probed in rounds]
            print(f"  {'time/probes':<14}share of all other time {spread(shares)}")


if __name__ == "__main__":
    main()
