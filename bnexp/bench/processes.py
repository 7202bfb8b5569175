"""Processes of their own, for what cannot be measured in ours: a start, peak memory, a tutorial as it comes."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

from bnexp.bench.turns import Stopwatch, Time
from bnexp.startup import ENVIRONMENT

if TYPE_CHECKING:
    from bnexp.bench.epochs import Case

# The clock is the system's, so that a child can count from the moment at which its parent started it.
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
    else:  # VmHWM, because what getrusage counts begins with the parent's
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
TUTORIAL = """
from bnexp.bench.rivals import tutorial_loop
from bnexp.bench.turns import Stopwatch

device, threads, loops = torch.device(asked["device"]), torch.get_num_threads(), {}
for line in sys.stdin:
    case = json.loads(line)
    if line not in loops:
        data = find(asked["source"])(size=case["size"]).load().to(device)
        norm = find("bnexp.norms.library.BatchNorm")
        model = find(case["target"])(data.in_shape, len(data.class_names), norm).to(device)
        loops = {line: tutorial_loop(model, data, case["batch_size"], case["num_steps"], threads)}
    watch = Stopwatch(device)
    loops[line](watch)
    print(json.dumps([watch.total, watch.single]), flush=True)
"""


def environment() -> dict[str, str]:
    """Ours, for a process in another folder."""
    root = os.environ.get("BNEXP_DATA")
    return os.environ | ({"BNEXP_DATA": os.path.abspath(root)} if root else {})


def run(words: Sequence[str]) -> str:
    """What a command prints, in an empty folder of its own."""
    with TemporaryDirectory() as folder:
        done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a process that was to be timed failed:\n{done.stderr}")
    return done.stdout


def child(script: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Run a script that starts with ``BEGIN``; the last line it prints is what it found."""
    text = run([sys.executable, "-c", script, json.dumps({**asked, "began": perf_counter()})])
    return json.loads(text.splitlines()[-1])


class Tutorial:
    """A process that takes turns of the tutorial's loop when told to, torch and OpenMP being as they come.

    ``device`` is its name, ``source`` the class of the data.
    """

    def __init__(self, device: str, source: str) -> None:
        # What ours sets for itself. Where the user does, this takes it from the tutorial too.
        words = {name: value for name, value in environment().items() if name not in ENVIRONMENT}
        asked = json.dumps({"device": device, "source": source, "began": 0.0})
        script = [sys.executable, "-c", BEGIN + TUTORIAL, asked]
        self.process = subprocess.Popen(script, env=words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(self, case: "Case", size: int, watch: Stopwatch) -> None:
        """One turn of a case, its images being of ``size`` squared."""
        asked = {"target": case.target, "batch_size": case.batch_size, "num_steps": case.num_steps, "size": size}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process with the tutorial's loop has ended; what it said stands above")
        watch.total, watch.single = (Time(*each) for each in json.loads(line))

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
