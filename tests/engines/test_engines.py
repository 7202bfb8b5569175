"""Engines: another way to take the same steps. Captured ones are tried on a CPU by a stand-in for CUDA graphs."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from tape import Tape
from test_loop import different
from test_models import NORMS

from bnexp.config import build
from bnexp.config.compose import composed
from bnexp.engines.base import traits_of
from bnexp.engines.capture import warn_uncaptured
from bnexp.engines.compile import compile_line, compiled
from bnexp.engines.graph import Captured, captured
from bnexp.errors import UserError
from bnexp.optim import place_learning_rates

TINY = ("device=cpu", "threads=1", "data.size=16", "data.limit=64", "batch_size=20", "steps=9")  # epochs of 3 or 4
CPU = torch.device("cpu")
FUSED_ONLY = {"fused"}  # waits for Triton's interpreter, and computes as library does: see test_fused.py


@pytest.fixture(autouse=True)
def nothing_told():
    """What was told is told again."""
    warn_uncaptured.cache_clear()


def make(*overrides):
    """A run whose learning rates are tensors, as on a GPU."""
    run = build.build(composed([*TINY, *overrides]))
    place_learning_rates(run.optimizer, CPU)
    return run


def capture(run, warmup_steps=2, refuses=""):
    """Have the run step by replay, and return what does so."""
    steps = Captured(run, Tape(refuses), warmup_steps)
    run.take_step = steps.step
    return steps


def advance(run, num_steps):
    for _ in range(num_steps):
        run.step()


def state(run):
    """Everything that the next step depends on, the meter's entries included."""
    return run.state_dict()


RUNS = [
    *(("model=mlp", f"norm={norm}", "optimizer=sgd", "optimizer.momentum=0.9") for norm in NORMS
      if norm not in FUSED_ONLY),
    ("model=lenet", "norm=library", "optimizer=adam", "schedule=cosine", "data.augment=crop_flip"),
    ("model=lenet", "norm=scratch", "optimizer=adamw", "optimizer.weight_decay=0.1", "schedule=onecycle",
     "drop_last=false"),
    ("model=resnet", "norm=library", "optimizer=sgd", "model.blocks=[1]", "model.widths=[4]", "model.stem=cifar"),
    ("model=densenet", "norm=scratch", "optimizer=sgd", "model.blocks=[2]", "model.growth=4", "data.augment=flip"),
    ("model=mlp", "norm=library", "classes_per_batch=5", "precision=bf16"),
    ("model=mlp", "norm=library", "precision=fp16", "optimizer=sgd", "optimizer.momentum=0.9"),
]  # fmt: skip


@pytest.mark.parametrize("overrides", RUNS, ids=lambda each: "-".join(each[:3]))
def test_replayed_steps_are_the_eager_ones_bit_for_bit(overrides):
    ghost = ("norm.virtual_batch=10",) if "norm=ghost" in overrides else ()
    eager, replayed = make(*overrides, *ghost), make(*overrides, *ghost)
    steps = capture(replayed)
    for _ in range(3):
        advance(eager, 3)
        advance(replayed, 3)
        assert different(state(eager), state(replayed)) == []
        assert eager.meter.read() == replayed.meter.read()
        assert eager.evaluate(eager.dataset.valid) == replayed.evaluate(replayed.dataset.valid)
    assert steps.graphs.num_captures == 2 + ("drop_last=false" in overrides), "a graph each for steps and evaluation"


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_capture_leaves_everything_as_it_was(optimizer):
    more = ("optimizer.momentum=0.9",) if optimizer == "sgd" else ()
    run = make("model=lenet", f"optimizer={optimizer}", *more, "data.augment=crop_flip", "schedule=cosine")
    steps = capture(run, warmup_steps=5)
    advance(run, 2)  # uncaptured, then captured and replayed
    before = state(run)
    steps.replayed.replays.clear()
    assert steps.replayed.capture(20) is True
    assert different(before, state(run)) == []
    assert [int(m.num_batches_tracked) for m in run.model.modules() if hasattr(m, "num_batches_tracked")] == [2] * 4


def test_a_loaded_run_is_replayed_from_where_it_was_saved():
    overrides = ("model=mlp", "norm=scratch", "schedule=cosine", "data.augment=flip")
    whole, first, second = make(*overrides), make(*overrides), make(*overrides)
    advance(whole, 8)
    capture(first)
    advance(first, 4)  # into the second epoch, a reading outstanding
    capture(second)
    second.load_state_dict(first.state_dict())
    advance(second, 4)
    assert different(state(whole), state(second)) == []


def test_more_steps_than_the_meter_has_places_for_are_all_read():
    eager, replayed = make("model=mlp"), make("model=mlp")
    steps = capture(replayed)
    for name, buffer in steps.meter.buffers.items():
        steps.meter.buffers[name] = buffer[:4].clone()
    advance(eager, 9)
    advance(replayed, 9)
    assert replayed.meter.is_finite()
    assert eager.meter.read() == replayed.meter.read()


def test_a_loss_that_is_not_finite_is_found_at_its_step():
    run = make("model=mlp", "norm=none", "optimizer=sgd", "optimizer.lr=1e30")
    eager = make("model=mlp", "norm=none", "optimizer=sgd", "optimizer.lr=1e30")
    capture(run)
    advance(run, 6)
    advance(eager, 6)
    assert not run.meter.is_finite()
    ours, theirs = run.meter.read(), eager.meter.read()
    assert [loss == loss for loss in ours.losses] == [loss == loss for loss in theirs.losses]
    assert ours.num_bad == theirs.num_bad


def test_a_step_that_asks_for_a_value_goes_on_uncaptured_and_says_why(capsys):
    eager, run = make("model=mlp", "norm.momentum=null"), make("model=mlp", "norm.momentum=null")
    steps = capture(run)
    advance(eager, 5)
    advance(run, 5)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "step cannot be captured (RuntimeError: a value was asked for" in told
    assert "a value was asked for" in run.fallback
    assert steps.graphs.num_captures == 0
    run.tally_of = lambda split, model, tally=run.tally_of: counts.append(1) or tally(split, model)
    counts = []
    assert different(state(eager), state(run)) == []
    assert eager.evaluate(eager.dataset.valid) == run.evaluate(run.dataset.valid)
    assert (steps.graphs.num_captures, counts) == (0, [1]), "evaluation is not captured either"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("optimizer=other", "optimizer._target_=torch.optim.RMSprop"), "this is RMSprop"),
        (("optimizer=adam", "optimizer.fused=false"), "optimizer.fused=true"),
    ],
)
def test_what_is_known_not_to_be_capturable_is_told_and_goes_step_by_step(overrides, reason, capsys):
    run = make("model=mlp", *overrides)
    assert captured(run) == run.eager_step
    told = capsys.readouterr().err
    assert reason in told and told.startswith("bnexp: warning: engine=graph:") and told.count("\n") == 1
    assert reason in run.fallback


@pytest.mark.parametrize("refuses", ["steps", "evaluation"])
def test_what_the_device_fails_to_capture_is_computed_without_and_said(refuses, capsys):
    eager, run = (make("model=mlp", "data.augment=crop_flip") for _ in range(2))
    steps = capture(run, refuses=refuses)
    for _ in range(2):
        advance(eager, 4)
        advance(run, 4)
        assert different(state(eager), state(run)) == []
        assert eager.evaluate(eager.dataset.valid) == run.evaluate(run.dataset.valid)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "cannot be captured (RuntimeError: CUDA error: operation failed)" in told
    assert run.fallback in told and run.fallback.startswith("evaluation" if refuses == "evaluation" else "the step")
    assert steps.graphs.num_captures == (refuses == "evaluation"), "without its steps nothing is captured"


def test_the_loss_scaler_is_captured_once_a_step_has_moved_the_weights(capsys):
    """Its first scale, 65536, is too large in the first steps, and torch skips these."""
    eager, run = (make("model=mlp", "precision=fp16", "optimizer=sgd", "optimizer.momentum=0.9") for _ in range(2))
    for each in (eager, run):
        weight = each.parameters[0]
        weight.register_hook(lambda g, run=each: torch.full_like(g, torch.inf) if run.num_steps < 2 else g)
    steps = capture(run)
    advance(eager, 3)
    advance(run, 3)
    assert steps.graphs.num_captures == 0, "the third is the first that moves"
    advance(eager, 5)
    advance(run, 5)
    assert different(state(eager), state(run)) == [] and run.scaler.get_scale() == 65536 / 4
    assert steps.graphs.num_captures == 1 and not capsys.readouterr().err


def test_a_state_that_is_loaded_after_the_capture_is_gone_on_from():
    """A graph holds the addresses of the optimizer's state, which a loaded state replaces."""
    overrides = ("model=mlp", "schedule=cosine", "data.augment=flip")
    whole, run = make(*overrides), make(*overrides)
    capture(run)
    advance(run, 4)
    kept = copy.deepcopy(run.state_dict())
    advance(run, 4)
    run.load_state_dict(kept)
    advance(run, 5)
    advance(whole, 9)
    assert different(state(whole), state(run)) == []


def test_a_graph_without_a_gpu_is_refused_before_any_work(bnexp, capsys, tmp_path):
    assert bnexp("train", "engine=graph", "device=cpu", "out=run") == 2
    assert "engine=graph: a CUDA graph needs a GPU, and this is device=cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("overrides", RUNS, ids=lambda each: "-".join(each[:3]))
def test_on_a_gpu_replayed_steps_are_the_eager_ones_bit_for_bit(overrides, capsys):
    ghost = ("norm.virtual_batch=10",) if "norm=ghost" in overrides else ()
    both = [*overrides, *ghost, "device=cuda", "deterministic=true"]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        eager, replayed = (build.build(composed([*TINY, *both, f"engine={name}"])) for name in ("eager", "graph"))
        advance(eager, 9)
        advance(replayed, 9)
    finally:
        torch.use_deterministic_algorithms(False)
    assert different(state(eager), state(replayed)) == []
    assert eager.evaluate(eager.dataset.valid) == replayed.evaluate(replayed.dataset.valid)
    steps = replayed.take_step.__self__
    assert steps.replayed.replays and steps.tallies, "it was captured"
    assert not replayed.fallback and "cannot be captured" not in capsys.readouterr().err


def test_any_function_is_an_engine_that_runs_anywhere_and_is_not_folded():
    said = traits_of(lambda run: run.eager_step)
    assert said.make_stack is None
    for device in ("cpu", "cuda"):
        said.require_device(torch.device(device))


# ---------------------------------------------------------------- compiled


def test_compiled_steps_are_the_eager_ones_to_rounding_and_count_exactly(train):
    overrides = (
        "data.size=16",
        "data.limit=64",
        "batch_size=32",
        "steps=6",
        "log_every=1",
        "model=mlp",
        "optimizer=sgd",
        "optimizer.lr=0.1",
    )  # Adam would make whole steps of gradients that are rounding
    folders = [train(*overrides, f"engine={name}") for name in ("eager", "compile")]
    eager, compiled = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders
    )
    assert "time/setup" in compiled[0] and "time/step" not in compiled[0] and "time/step" in compiled[1]
    assert not any("time/setup" in line for line in [*eager, *compiled[1:]])
    for one, other in zip(eager, compiled, strict=True):
        # Losses of about 2, sums of float32 in another order: an ulp is 2e-7, and six steps pass it on.
        assert one["loss/train"] == pytest.approx(other["loss/train"], abs=5e-6)
    models = [torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in folders]
    for key, value in models[0].items():
        if key.endswith("num_batches_tracked"):
            assert value == models[1][key] == 6
        else:
            assert torch.allclose(value, models[1][key], atol=1e-5), key


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("overrides", [(), ("norm.momentum=null",)], ids=["as one graph", "in pieces"])
def test_the_tenth_model_of_a_process_is_compiled_like_the_first(overrides, capsys, monkeypatch):
    """torch compiles at most 8 models by the same code, and counts them over the whole process."""
    compile_by, sizes = torch.compile, []

    def backend(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_by(*args, backend=backend, **options))
    graphs = []
    for width in range(2, 12):
        run = build.build(composed([*TINY, "model=mlp", f"model.hidden=[{width}]", "engine=compile", *overrides]))
        advance(run, 2)
        graphs.append(list(sizes))
        sizes.clear()
    assert graphs[1:] == [graphs[1]] * 9 and len(graphs[1]) == (3 if overrides else 1)
    assert capsys.readouterr().err.count("compiled in pieces") == 10 * bool(overrides)


COMPILERS = {  # what CXX or CC names, and what the error says of it
    "no-such-compiler": "",
    "": "",
    "/bin": "Permission denied",
    "cc-with-errors": "licence expired",
    "cc-without-a-word": "exit code 3",
    "true": "cannot open shared object file",
}


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("variable", ["CXX", "CC"])
def test_without_a_compiler_that_works_a_run_that_asks_for_one_is_refused_before_any_work(
    variable, compiler, bnexp, capsys, monkeypatch, tmp_path
):
    import torch._inductor.config as inductor

    compile_line.cache_clear()
    for name, said in (("cc-with-errors", "echo licence expired >&2; "), ("cc-without-a-word", "")):
        (tmp_path / name).write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0; {said}exit 3\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv(variable, compiler)
    told = rf"{variable}={compiler} makes nothing that runs \(.*{COMPILERS[compiler]}.*by the environment variable"
    if variable == "CC":
        with pytest.raises(UserError, match=f"needs a C compiler, and {told} CC"):
            traits_of(compiled).require_device(torch.device("cuda"))
        return
    with inductor.patch("cpp.cxx", (None, compiler)):
        assert bnexp("train", "engine=compile", "device=cpu", "model=mlp", "out=run") == 2
    error = capsys.readouterr().err
    assert re.search(told, error) and error.count("\n") == 1 and not Path("run").exists()


def test_a_folder_for_compiled_code_that_cannot_be_written_is_refused_before_any_work(bnexp, capsys, monkeypatch):
    compile_line.cache_clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/dev/null")
    assert bnexp("train", "engine=compile", "device=cpu", "model=mlp", "out=run") == 2
    assert "'/dev/null'" in (error := capsys.readouterr().err) and "TORCHINDUCTOR_CACHE_DIR" in error
    assert not Path("run").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_compiler_that_fails_leaves_the_run_eager_and_says_why_once(capsys, monkeypatch):
    def fails(*_):
        raise RuntimeError("Python.h: No such file")

    compile_by = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_by(*args, backend=fails, **options))
    eager, run = (build.build(composed([*TINY, "model=mlp", *more])) for more in ((), ("engine=compile",)))
    advance(eager, 3)
    advance(run, 3)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "engine=compile: not compiled (" in told and "Python.h: No such file" in told
    assert different(state(eager), state(run)) == []


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
def test_what_cannot_be_one_graph_is_compiled_in_pieces_and_the_batches_stay_the_same(capsys):
    eager = build.build(composed([*TINY, "model=mlp", "model.hidden=[4]", "norm.momentum=null"]))
    pieces = build.build(composed([*TINY, "model=mlp", "model.hidden=[4]", "norm.momentum=null", "engine=compile"]))
    advance(eager, 2)
    advance(pieces, 2)
    assert "engine=compile: compiled in pieces" in capsys.readouterr().err
    assert pieces.setup_seconds > 0
    losses = [run.meter.read().losses for run in (eager, pieces)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32, another order of sums
