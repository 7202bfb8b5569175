"""Measurements in processes of their own: a start, peak memory, a sweep, the tutorial's loop with torch's defaults."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from loop_rows import LoopCase, Row, ratio_row
from loop_stopwatch import Stopwatch, Time, in_turns

from bnexp.startup import ENVIRONMENT

# Measured with lightning-hydra-template on a machine where import torch took TEMPLATE_IMPORT_S seconds.
TEMPLATE_START_S, TEMPLATE_SWEEP_S, TEMPLATE_IMPORT_S = 5.1, 47.6, 1.9
SWEEP = ("model=mlp", "epochs=1", "optimizer.lr=0.0003,0.001,0.003,0.01", "quiet=true")
TWO_JOBS = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")

# Every script begins with this. perf_counter is the system's clock: a child counts from the moment that its parent
# started it.
BEGIN = """
import importlib, json, os, sys
from time import perf_counter

asked = json.loads(sys.argv[1])
marks = {}

def mark(name):
    if "torch" in sys.modules and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    marks[name] = perf_counter() - asked["began"]

def end():
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    else:  # VmHWM, because getrusage begins with the parent's peak
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        peak = int(status["VmHWM"].split()[0]) * 2**10
    print(json.dumps({"marks": marks, "peak": peak}), flush=True)
    os._exit(0)

def find(name):
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(module), name)

mark("interpreter")
import torch
mark("import torch")
"""
OURS_SCRIPT = """
from bnexp.cli import main, train
from bnexp.config import build
from bnexp.train.run import Run
mark("import hydra and bnexp")
make, step = build.build, Run.step

def built(*args, **options):
    mark("compose and check")
    run = make(*args, **options)
    mark("build")
    return run

def stepped(run):
    if run.num_steps == 0:
        mark("open the folder")
    step(run)
    if run.num_steps == 1:
        mark("first step")
    if run.num_steps == asked["num_steps"]:
        end()

build.build, Run.step = built, stepped
sys.exit(main.main(["train", *asked["overrides"]]))
"""
HAND_WRITTEN_SCRIPT = """
from torch.nn.functional import cross_entropy

torch.set_num_threads(asked["threads"])
device, size = torch.device(asked["device"]), asked["batch_size"]
data = find(asked["source"])().load().to(device)
model = find(asked["model"])(data.in_shape, len(data.class_names), find("bnexp.norms.library.BatchNorm")).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
mark("build")
cross_entropy(model(data.prepare(data.train.images[:size])), data.train.labels[:size]).backward()
optimizer.step()
mark("first step")

from loop_rivals import bare_loop, prepare_images, tutorial_loop
from loop_stopwatch import Stopwatch
if asked["kind"] == "bare":
    images = prepare_images(data, torch.float32, torch.contiguous_format)
    draw = lambda: torch.randperm(len(images), device=device)
    turn = bare_loop(model, images, data.train.labels, size, asked["num_steps"], draw, asked["threads"])
else:
    turn = tutorial_loop(model, data, size, asked["num_steps"], asked["threads"])
turn(Stopwatch(device))
end()
"""
TUTORIAL_SCRIPT = """
from loop_rivals import tutorial_loop
from loop_stopwatch import Stopwatch

device, threads, turns = torch.device(asked["device"]), torch.get_num_threads(), {}
for line in sys.stdin:
    case = json.loads(line)
    if line not in turns:
        data = find(asked["source"])(size=case["size"]).load().to(device)
        norm = find("bnexp.norms.library.BatchNorm")
        model = find(case["target"])(data.in_shape, len(data.class_names), norm).to(device)
        turns = {line: tutorial_loop(model, data, case["batch_size"], case["num_steps"], threads)}
    watch = Stopwatch(device)
    turns[line](watch)
    print(json.dumps([watch.total, watch.single]), flush=True)
"""
SCRIPTS = {
    "ours": BEGIN + OURS_SCRIPT,
    "bare": BEGIN + HAND_WRITTEN_SCRIPT,
    "tutorial": BEGIN + HAND_WRITTEN_SCRIPT,
}


def child_environment() -> dict[str, str]:
    """The environment of a process in another folder: it finds the same data and the modules beside this one."""
    environment = dict(os.environ)
    if root := environment.get("BNEXP_DATA"):
        environment["BNEXP_DATA"] = os.path.abspath(root)
    here, *others = str(Path(__file__).parent.resolve()), *environment.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join([here, *(os.path.abspath(each) for each in others if each)])
    return environment


def run_process(words: Sequence[str]) -> str:
    """The output of a command that is run in an empty folder; RuntimeError if it fails."""
    with TemporaryDirectory() as folder:
        done = subprocess.run(words, cwd=folder, env=child_environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a process that was to be timed failed:\n{done.stderr}")
    return done.stdout


def run_script(script: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The last line, read as JSON, that a script which starts with ``BEGIN`` prints."""
    text = run_process([sys.executable, "-c", script, json.dumps({**asked, "began": perf_counter()})])
    return json.loads(text.splitlines()[-1])


class TutorialProcess:
    """A process that takes turns of the tutorial's loop, with torch's and OpenMP's own defaults.

    ``device`` is the device's name, ``source`` the path of the dataset's class.
    """

    def __init__(self, device: str, source: str) -> None:
        # Without what bnexp sets for itself. A value that the user has set is removed too.
        environment = {name: value for name, value in child_environment().items() if name not in ENVIRONMENT}
        asked = json.dumps({"device": device, "source": source, "began": 0.0})
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEGIN + TUTORIAL_SCRIPT, asked],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def turn(self, case: LoopCase, size: int, watch: Stopwatch) -> None:
        """Take one turn of a case with images of size x size."""
        asked = {"target": case.target, "batch_size": case.batch_size, "num_steps": case.num_steps, "size": size}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process with the tutorial's loop has ended; its error stands above")
        watch.total, watch.single = (Time(*each) for each in json.loads(line))

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def start_rows(asked: Mapping[str, Any], rounds: int) -> list[Row]:
    """The phases up to the first step of ours and of a bare script, and the peak memory of all three kinds of loop.

    ``asked`` holds the model, its data, batch size, device, threads and steps, and the overrides for the same run.
    """
    results = in_turns(_scripts(asked), rounds)
    fields = {"model": asked["name"], "batch_size": asked["batch_size"]}
    rows = []
    for kind in ("ours", "bare"):
        before = [0.0] * rounds
        for phase in results[kind][0]["marks"]:
            ends = [each["marks"][phase] for each in results[kind]]
            seconds = [end - began for end, began in zip(ends, before, strict=True)]
            rows.append(Row("start", f"{kind}, {phase}", "s", seconds, **fields))
            before = ends
    ours, bare = (
        Row("start", name, "s", [each["marks"]["first step"] for each in results[kind]], **fields)
        for name, kind in (("ours", "ours"), ("bare script", "bare"))
    )
    imports = [each["marks"]["import torch"] - each["marks"]["interpreter"] for each in results["bare"]]
    template = _template_row("start", TEMPLATE_START_S, imports)
    return [*rows, ours, bare, ratio_row(ours, bare), ratio_row(ours, template), *_peak_rows(results, fields)]


def memory_rows(asked: Mapping[str, Any], rounds: int) -> list[Row]:
    """The peak memory of all three kinds of loop."""
    results = in_turns(_scripts(asked), rounds, warmup=0)
    return _peak_rows(results, {"model": asked["name"], "batch_size": asked["batch_size"]})


def _scripts(asked: Mapping[str, Any]) -> dict[str, partial]:
    return {kind: partial(run_script, script, {**asked, "kind": kind}) for kind, script in SCRIPTS.items()}


def _peak_rows(results: Mapping[str, Sequence[Mapping]], fields: Mapping[str, Any]) -> list[Row]:
    names = {"ours": "ours", "bare": "bare floor", "tutorial": "tutorial's loop (without its workers)"}
    peaks = {kind: [each["peak"] / 2**20 for each in results[kind]] for kind in names}
    return [Row("memory", names[kind], "MB", values, **fields) for kind, values in peaks.items()]


def _template_row(part: str, seconds: float, imports: Sequence[float]) -> Row:
    """The template's time scaled to this machine, where importing torch took ``imports`` seconds."""
    return Row(part, "template", "s", [seconds * each / TEMPLATE_IMPORT_S for each in imports])


def sweep_rows(data: str, device: str, rounds: int) -> tuple[list[Row], str]:
    """Seconds of a sweep of four learning rates, in turn and with two jobs at a time.

    Also returns the reason why the second was not measured, empty if it was.
    """
    words = [sys.executable, "-m", "bnexp", "train", "-m", *SWEEP, f"data={data}", f"device={device}"]
    commands, reason = {"import torch": [sys.executable, "-c", "import torch"], "in turn": words}, ""
    try:
        version("hydra-joblib-launcher")
        commands["two jobs"] = [*words, *TWO_JOBS]
    except PackageNotFoundError:
        reason = "hydra-joblib-launcher is not installed; pip install hydra-joblib-launcher"

    def seconds(words: Sequence[str]) -> float:
        began = perf_counter()
        run_process(words)
        return perf_counter() - began

    results = in_turns({name: partial(seconds, each) for name, each in commands.items()}, rounds, warmup=0)
    rows = {name: Row("sweep", name, "s", values, model="mlp") for name, values in results.items()}
    template = _template_row("sweep", TEMPLATE_SWEEP_S, results["import torch"])
    ratios = [ratio_row(template, rows["in turn"])]
    ratios += [ratio_row(rows["in turn"], rows["two jobs"])] if not reason else []
    return [*rows.values(), *ratios], reason
