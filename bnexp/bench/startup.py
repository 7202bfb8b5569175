"""What whole processes take: from their start to the first step, in memory, and for a sweep; all in turns."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import Any

from bnexp.bench.goals import TEMPLATE_IMPORT_S, TEMPLATE_START_S, TEMPLATE_SWEEP_S, Row, ratio
from bnexp.bench.processes import BEGIN, child, run
from bnexp.bench.turns import in_turns

SWEEP = ("model=mlp", "epochs=1", "optimizer.lr=0.0003,0.001,0.003,0.01", "quiet=true")
TWO_JOBS = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")

OURS = """
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
BY_HAND = """
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

from bnexp.bench.rivals import bare_loop, prepared, tutorial_loop
from bnexp.bench.turns import Stopwatch
if asked["kind"] == "bare":
    images = prepared(data, torch.float32, torch.contiguous_format)
    draw = lambda: torch.randperm(len(images), device=device)
    loop = bare_loop(model, images, data.train.labels, size, asked["num_steps"], draw, asked["threads"])
else:
    loop = tutorial_loop(model, data, size, asked["num_steps"], asked["threads"])
loop(Stopwatch(device))
end()
"""
SCRIPTS = {"ours": BEGIN + OURS, "bare": BEGIN + BY_HAND, "tutorial": BEGIN + BY_HAND}


def start_rows(asked: Mapping[str, Any], rounds: int) -> list[Row]:
    """Phases up to the first step of ours and of a bare script, and the peak memory of all three kinds of loop.

    ``asked`` names the model, its data, batch size, device, threads and steps, and the overrides that say the same.
    """
    kinds = {kind: partial(child, script, {**asked, "kind": kind}) for kind, script in SCRIPTS.items()}
    found = in_turns(kinds, rounds)
    fields = {"model": asked["name"], "batch_size": asked["batch_size"]}
    rows = []
    for kind in ("ours", "bare"):
        before = [0.0] * rounds
        for phase in found[kind][0]["marks"]:
            ends = [each["marks"][phase] for each in found[kind]]
            seconds = [end - began for end, began in zip(ends, before, strict=True)]
            rows.append(Row("start", f"{kind}, {phase}", "s", seconds, **fields))
            before = ends
    ours, bare = (
        Row("start", name, "s", [each["marks"]["first step"] for each in found[kind]], **fields)
        for name, kind in (("ours", "ours"), ("bare script", "bare"))
    )
    imports = [each["marks"]["import torch"] - each["marks"]["interpreter"] for each in found["bare"]]
    template = _template("start", TEMPLATE_START_S, imports)
    return [*rows, ours, bare, ratio(ours, bare), ratio(ours, template), *_memory(found, fields)]


def memory_rows(asked: Mapping[str, Any], rounds: int) -> list[Row]:
    """The peak memory of all three kinds of loop."""
    kinds = {kind: partial(child, script, {**asked, "kind": kind}) for kind, script in SCRIPTS.items()}
    return _memory(in_turns(kinds, rounds, warmup=0), {"model": asked["name"], "batch_size": asked["batch_size"]})


def _memory(found: Mapping[str, Sequence[Mapping]], fields: Mapping[str, Any]) -> list[Row]:
    names = {"ours": "ours", "bare": "bare floor", "tutorial": "tutorial's loop (without its workers)"}
    peaks = {kind: [each["peak"] / 2**20 for each in found[kind]] for kind in names}
    return [Row("memory", names[kind], "MB", values, **fields) for kind, values in peaks.items()]


def _template(part: str, seconds: float, imports: Sequence[float]) -> Row:
    """What the template would take here, in the rounds in which importing torch took ``imports`` seconds."""
    return Row(part, "template", "s", [seconds * each / TEMPLATE_IMPORT_S for each in imports])


def sweep_rows(data: str, device: str, rounds: int) -> tuple[list[Row], str]:
    """Seconds of a sweep of four learning rates, in turn and two jobs at a time, and why there is no second."""
    words = [sys.executable, "-m", "bnexp", "train", "-m", *SWEEP, f"data={data}", f"device={device}"]
    kinds, reason = {"import torch": [sys.executable, "-c", "import torch"], "in turn": words}, ""
    try:
        version("hydra-joblib-launcher")
        kinds["two jobs"] = [*words, *TWO_JOBS]
    except PackageNotFoundError:
        reason = "hydra-joblib-launcher is not installed; pip install hydra-joblib-launcher"

    def seconds(words: Sequence[str]) -> float:
        began = perf_counter()
        run(words)
        return perf_counter() - began

    found = in_turns({name: partial(seconds, each) for name, each in kinds.items()}, rounds, warmup=0)
    rows = {name: Row("sweep", name, "s", values, model="mlp") for name, values in found.items()}
    template = _template("sweep", TEMPLATE_SWEEP_S, found["import torch"])
    ratios = [ratio(template, rows["in turn"])]
    ratios += [ratio(rows["in turn"], rows["two jobs"])] if not reason else []
    return [*rows.values(), *ratios], reason
