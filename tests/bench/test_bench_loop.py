"""``tests/bench/loop.py``: the loops that it compares do the same work, and it tells what was measured."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import loop
import loop_epochs
import loop_processes
import loop_rows
import loop_session
import pytest
import torch
from loop_epochs import fold_rows, our_loop, setup_rows, training_only
from loop_processes import SCRIPTS, TutorialProcess, run_script, start_rows, sweep_rows
from loop_rivals import as_torchvision, bare_loop, prepare_images, tutorial_loop
from loop_rows import EPOCH, FLOOR, GOALS, OURS, Goal, LoopCase, Row, goal_of, payback_row, ratio_row, with_range
from loop_settings import LoopSettings, read_loop_settings
from loop_stopwatch import Stopwatch, Time, in_turns
from torch.nn.functional import cross_entropy

from bnexp.config import build
from bnexp.config.compose import composed
from bnexp.errors import UserError

CPU = torch.device("cpu")
# The workers of the tutorial's DataLoader are forked from a process with threads, of which Python 3.12 warns.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture(scope="module")
def make():
    """``make(overrides) -> (run, plan)`` on embedded digits, as the script has it."""
    datasets = {}

    def call(overrides):
        cfg = composed(["data=digits", "device=cpu", "threads=1", *overrides])
        run = build.build(cfg, datasets)
        return run, build.plan_of(cfg, run.batches.steps_per_epoch)

    return call


def seen(loss_of, images, labels):
    """The loss in training mode, of a model or what has one."""
    with torch.no_grad():
        return float(cross_entropy(loss_of(images), labels))


def bare(run, num_steps, order):
    """The bare floor over a run's model and images, in a given order."""
    images = prepare_images(run.dataset, torch.float32, torch.contiguous_format)
    size = run.batches.batch_size
    return bare_loop(run.model, images, run.dataset.train.labels, size, num_steps, lambda: order, threads=1)


# ---- the contestants do the same work ----


@pytest.mark.parametrize("model", ["mlp", "lenet"])
@pytest.mark.parametrize("writes", [True, False])
def test_the_bare_floor_and_our_loop_leave_the_same_weights_bit_for_bit(make, model, writes):
    overrides = [f"model={model}", "batch_size=32"]
    (mine, plan), (theirs, _) = make(overrides), make(overrides)
    order = mine.batches.order.clone()
    our_loop(training_only(mine, 10), plan, writes=writes)(Stopwatch(CPU))
    bare(theirs, 10, order)(Stopwatch(CPU))
    others = theirs.model.state_dict()
    assert mine.num_steps == 10
    for name, value in mine.model.state_dict().items():
        assert torch.equal(value, others[name]), name
    assert not torch.equal(next(make(overrides)[0].model.parameters()), next(mine.model.parameters()))


@forks
@pytest.mark.parametrize("kind", ["ours", "bare", "tutorial"])
def test_every_contestant_trains(make, kind):
    run, plan = make(["model=mlp", "batch_size=32"])
    images, labels = run.dataset.train.images[:512], run.dataset.train.labels[:512]
    # The tutorial's images are not normalized, as ToTensor leaves them.
    images = images / 255 if kind == "tutorial" else run.dataset.prepare(images)
    before = seen(run.model, images, labels)
    if kind == "tutorial":
        turn = tutorial_loop(run.model, run.dataset, 32, 20, threads=1)
    elif kind == "bare":
        turn = bare(run, 20, torch.randperm(len(run.dataset.train), generator=torch.Generator().manual_seed(0)))
    else:
        turn = our_loop(training_only(run, 20), plan)
    for _ in range(2):  # a turn goes on where the last one stopped
        middle = seen(run.model, images, labels)
        watch = Stopwatch(CPU)
        turn(watch)
        assert watch.total.clock > watch.single.clock > 0 and watch.total.processor > 0
    assert seen(run.model, images, labels) < 0.9 * middle < 0.8 * before


def test_the_tutorial_gets_torchvisions_mnist_of_the_same_images(make):
    from torchvision.datasets import MNIST

    split = make(["model=mlp"])[0].dataset.train
    plain, small = as_torchvision(split, (28, 28)), as_torchvision(split, (14, 14))
    image, label = plain[7]
    assert isinstance(plain, MNIST) and len(plain) == len(split)
    assert torch.equal(image, split.images[7] / 255) and label == split.labels[7]
    assert small[7][0].shape == (1, 14, 14)


def test_our_loop_writes_shows_and_evaluates_as_by_default_and_counts_what_that_takes(make):
    run, plan = make(["model=mlp", "batch_size=32"])
    watch = Stopwatch(CPU)
    our_loop(training_only(run, 40), plan)(watch)
    assert watch.calls["writer"] == 40 // plan.log_every == 2
    assert watch.calls["progress"] == 40 and watch.calls["bar"] >= 2
    spent = sum(watch.seconds.values())
    assert 0 < spent < watch.total.clock
    assert run.dataset.train.images.shape[0] > 0 == len(run.dataset.valid) == len(run.dataset.test)


def test_a_run_that_diverges_gives_no_times(make):
    run, plan = make(["model=mlp", "batch_size=32"])
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the run diverged, its times mean nothing"):
        our_loop(training_only(run, 5), plan)(Stopwatch(CPU))


def test_folded_runs_are_timed_beside_the_same_runs_in_turn(make):
    case = LoopCase("mlp", 16, ("model=mlp", "batch_size=16"), 4, "", 1)
    slow, fast, faster = fold_rows(make, case, 2, CPU, num_runs=2, engine="eager")
    assert (slow.what, fast.what, faster.over) == ("in turn, eager", "folded", "folded")
    assert faster.values == [a / b for a, b in zip(slow.values, fast.values, strict=True)]


# ---- turns, rows, goals ----


def test_turns_rotate_and_the_first_round_warms_up():
    calls = []

    def turn(name):
        calls.append(name)
        return len(calls)

    found = in_turns({name: partial(turn, name) for name in "abc"}, 3)
    assert "".join(calls) == "cababcbcacab"
    assert found == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}


def test_what_an_epoch_has_once_is_not_multiplied():
    watch = Stopwatch(CPU)
    watch.total, watch.single = Time(1.25, 2.5), Time(0.25, 0.5)
    assert watch.epoch(10) == (10.25, 20.5)
    with watch.once():
        pass
    assert watch.single.clock > 0.25


def test_getting_ready_is_won_back_by_faster_epochs_or_never():
    slow, fast = (Row("epoch", "ours", "s", values, model="mlp") for values in ([3.0, 5.0, 4.0], [2.0, 5.0, 6.0]))
    row = payback_row(replace(fast, engine="compile"), slow, extra=12.0)
    assert (row.what, row.unit, row.engine, row.model) == ("ours, pays after", "epochs", "compile", "mlp")
    assert row.values == [12.0, math.inf, math.inf]
    assert row.as_dict("cpu") | {"median": None, "low": 12.0, "high": None} == row.as_dict("cpu")


def test_a_first_turn_counts_as_getting_ready_beyond_what_a_turn_takes():
    """Here 7 s, of which a turn is 1; an epoch is two turns, and with eager four seconds."""
    case = LoopCase("mlp", 16, (), EPOCH // 32, "", 1)

    def turns(*seconds):
        watches = [Stopwatch(CPU) for _ in seconds]
        for watch, each in zip(watches, seconds, strict=True):
            watch.total = Time(each, each)
        return watches

    results = {("ours", "eager"): turns(2, 2), ("ours", "compile"): turns(1, 1)}
    first, pays = setup_rows(case, {("ours", "compile"): 7.0}, results)
    assert (first.what, first.values, pays.values) == ("ours, first turn", [7.0], [3.0, 3.0])
    assert setup_rows(case, {("ours, scratch", "compile"): 7.0}, results)[1:] == [], "nothing to win it from"


def test_a_ratio_is_taken_round_by_round():
    slow = Row("epoch", "slow", "s", [3.0, 40.0, 5.0], model="lenet", batch_size=256, engine="eager")
    fast = Row("epoch", "fast", "s", [1.0, 10.0, 2.0])
    found = ratio_row(slow, fast)
    assert (found.values, found.median) == ([3.0, 4.0, 2.5], 3.0)  # of the medians it would be 2.5
    assert (found.what, found.over, found.unit) == ("slow", "fast", "x")
    assert (found.model, found.batch_size, found.engine) == ("lenet", 256, "eager")
    with pytest.raises(ValueError):
        ratio_row(slow, Row("epoch", "fast", "s", [1.0]))


@pytest.mark.parametrize(
    "values, sense, verdict",
    [
        ([1.0, 1.04, 1.05], "<=", "met"),
        ([1.0, 1.04, 1.06], "<=", "met?"),
        ([1.0, 1.06, 1.07], "<=", "missed?"),
        ([1.06, 1.07, 1.08], "<=", "missed"),
        ([1.05, 1.06, 1.07], ">=", "met"),
        ([1.0, 1.01, 1.02], ">=", "missed"),
    ],
)
def test_a_verdict_is_the_medians_and_certain_only_if_every_round_agrees(values, sense, verdict):
    assert Goal({}, sense, 1.05).verdict(Row("epoch", "ours", "x", values)) == verdict


def test_goals_are_found_by_what_was_measured_and_where():
    def found(device="cpu", what=OURS, over=FLOOR, unit="x", size=256, engine="eager", model="lenet"):
        row = Row("epoch", what, unit, [1.0], over=over, model=model, batch_size=size, engine=engine)
        return str(goal_of(row, device) or "")

    assert [found(size=size) for size in (256, 32, 16, 64)] == ["<= 1.05", "<= 1.08", "<= 1.1", ""]
    assert found(model="mlp") == found(device="cuda") == found(unit="s") == ""
    assert found(what=loop_rows.TUTORIAL, over=OURS) == ">= 2.5"
    assert [found(what=loop_rows.SCRATCH, over=OURS, engine=e) for e in ("eager", "compile")] == ["<= 1.3", "<= 1.1"]
    assert found("cuda", engine="graph", over="", unit="s") == "<= 0.05"
    assert found("cuda", loop_rows.FUSED, engine="graph", over="", unit="s", model="resnet") == "<= 0.6"
    assert found("cuda", FLOOR, OURS, engine="graph") == ">= 3"
    assert str(goal_of(Row("watching", "writer and progress", "share", [0.01], model="lenet"), "cpu")) == "<= 0.02"
    assert str(goal_of(Row("start", "ours", "x", [1.0], over="template"), "cpu")) == "<= 0.6"
    assert len(GOALS) == len({str(goal.where) for goal in GOALS})


def test_numbers_are_shown_with_their_range_in_a_unit_that_fits():
    assert with_range(Row("epoch", "ours", "s", [3.0, 2.0, 4.5])) == "3.00 s (2.00-4.50)"
    assert with_range(Row("watching", "a look", "s", [0.0123])) == "12.3 ms"
    assert with_range(Row("watching", "a look", "share", [0.01, 0.02, 0.03])) == "2.00% (1.00-3.00)"
    assert with_range(Row("epoch", "ours", "x processor", [1.0, 1.0])) == "1.00x (1.00-1.00)"
    assert with_range(Row("engine", "ours", "epochs", [2.0, math.inf, 40.0])) == "40.0 epochs (2.00-never)"
    assert with_range(Row("engine", "ours", "epochs", [math.inf, math.inf, 40.0])) == "never (40.0-never)"


# ---- the command ----


@forks
def test_a_tiny_run_is_written_down_with_every_round(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["models=mlp", "batch_sizes=16", "engines=eager,graph", "data=digits", "images=64", "parts=epochs"]
    assert loop.main([*given, "rounds=2", "device=cpu", "out=mine"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "mine"
    assert "mlp, batch 16: an epoch of 60,000 images, from 4 steps, 2 times; 1 thread" in out
    reason = "not measured: mlp, batch 16, graph: ours: engine=graph: a CUDA graph needs a GPU"
    assert reason in " ".join(out.split())

    content = json.loads((tmp_path / "mine/bench.json").read_text())
    assert content["complete"] and content["command"].startswith("python tests/bench/loop.py models=mlp batch_sizes=16")
    assert content["versions"]["torch"].startswith(torch.__version__[:4])
    assert content["load"] >= 0 and content["cores"] >= 1
    assert list(content["skipped"]) == ["mlp, batch 16, graph: ours"]
    rows = {(row["what"], row["over"], row["unit"], row["part"]): row for row in content["rows"]}
    contestants = {"bare floor", "bare floor again", "tutorial's loop", "data path alone", "ours", loop_rows.SILENT}
    assert {what for what, over, unit, part in rows if (over, unit, part) == ("", "s", "epoch")} == contestants
    for row in content["rows"]:
        assert row["n"] == len(row["rounds"]) == 2 and row["model"] == "mlp" and row["batch_size"] == 16
        assert 0 <= row["low"] <= row["median"] <= row["high"]
    mine, floor = (rows[what, "", "s", "epoch"]["rounds"] for what in ("ours", "bare floor"))
    assert rows["ours", "bare floor", "x", "epoch"]["rounds"] == [a / b for a, b in zip(mine, floor, strict=True)]
    theirs = rows["tutorial's loop", "", "s", "epoch"]["rounds"]
    assert rows["tutorial's loop", "ours", "x", "epoch"]["rounds"] == [a / b for a, b in zip(theirs, mine, strict=True)]
    assert rows["ours", "bare floor", "x processor", "epoch"]["median"] > 0
    assert 0 < rows["writer and progress", "", "share", "watching"]["median"] < 1
    assert rows["probe gradients, a look", "", "s", "watching"]["median"] > 0

    with open(tmp_path / "mine/bench.csv") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["median"]) for line in lines] == [row["median"] for row in content["rows"]]
    assert {line["command"] for line in lines} == {content["command"]}
    assert loop.main(["out=mine"]) == 2 and "already holds a benchmark" in capsys.readouterr().err


def test_an_interruption_keeps_what_was_measured(make, monkeypatch, tmp_path, capsys):
    def measure(make, case, *rest):
        if case.batch_size == 32:
            raise KeyboardInterrupt
        return [Row("epoch", "ours", "s", [1.0], model=case.model, batch_size=case.batch_size)], {}

    monkeypatch.setattr(loop_session, "measure_epochs", measure)
    asked = LoopSettings(["mlp"], [16, 32], ["eager"], "digits", images=64, out=str(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        loop_session.measure_loop(make, asked, CPU, [], loop.COMMAND)
    content = json.loads((tmp_path / "out/bench.json").read_text())
    assert not content["complete"] and [row["batch_size"] for row in content["rows"]] == [16]
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")


def test_an_engine_that_fails_when_it_first_steps_is_skipped_with_its_reason(make, monkeypatch):
    case = LoopCase("mlp", 16, ("model=mlp", "batch_size=16"), 1, "", 1)
    monkeypatch.setattr(loop_epochs, "hand_written_loops", lambda *given: {})
    monkeypatch.setattr(loop_epochs, "epoch_rows", lambda case, results: list(results))

    def ours(make, case, what, engine):
        def turn(watch):
            if engine == "compile":
                raise RuntimeError("no compiler found\nat all")

        return turn

    monkeypatch.setattr(loop_epochs, "our_loop_with", ours)
    rows, skipped = loop_epochs.measure_epochs(make, case, [("ours", "eager"), ("ours", "compile")], 1, CPU)
    assert rows == [("ours", "eager")] and skipped == {("ours", "compile"): "no compiler found"}


def test_an_engine_that_took_eager_steps_is_skipped_with_its_reason(make, monkeypatch):
    """Its times would stand under its name."""
    case = LoopCase("mlp", 16, ("model=mlp", "batch_size=16"), 1, "", 1)
    monkeypatch.setattr(loop_epochs, "hand_written_loops", lambda *given: {})
    monkeypatch.setattr(loop_epochs, "epoch_rows", lambda case, results: list(results))

    def made(overrides):
        engine = next(word for word in overrides if word.startswith("engine="))
        run, plan = make([word for word in overrides if word != engine])
        run.fallback = "the step cannot be captured" if engine == "engine=graph" else ""
        return run, plan

    rows, skipped = loop_epochs.measure_epochs(made, case, [("ours", "eager"), ("ours", "graph")], 1, CPU)
    assert rows == [("ours", "eager")]
    assert skipped == {("ours", "graph"): "it took eager steps: the step cannot be captured"}
    everywhere = iter([made(["engine=graph", *case.overrides]) for _ in range(4)])
    with pytest.raises(RuntimeError, match="it took eager steps: the step cannot"):
        fold_rows(lambda words: next(everywhere), case, 1, CPU, num_runs=2, engine="eager")


def test_fused_norms_are_measured_on_a_gpu_and_judged_against_the_bare_floor():
    settings = LoopSettings(["resnet"], [256], ["eager", "graph"])
    wanted = {
        kind: loop_session.Session(None, settings, torch.device(kind), None).wanted(
            LoopCase("resnet", 256, (), 1, "", 1)
        ) for kind in ("cpu", "cuda")
    }  # fmt: skip
    assert [each for each in wanted["cuda"] if each not in wanted["cpu"]] == [
        (loop_rows.FUSED, "eager"), (loop_rows.FUSED, "graph")
    ]  # fmt: skip
    row = Row("epoch", FLOOR, "x", [1.1], over=loop_rows.FUSED, model="resnet", batch_size=256, engine="graph")
    assert str(goal_of(row, "cuda")) == ">= 1.2" and goal_of(replace(row, over=OURS), "cuda") is None


# ---- processes ----


def asked_of(kind):
    names = {"name": "mlp", "model": "bnexp.models.mlp.MLP", "source": "bnexp.data.digits.Digits", "device": "cpu"}
    overrides = ["model=mlp", "data=digits", "batch_size=64", "device=cpu", "quiet=true"]
    return names | {"kind": kind, "batch_size": 64, "num_steps": 3, "threads": 1, "overrides": overrides}


@pytest.mark.parametrize("kind", ["ours", pytest.param("bare", marks=pytest.mark.long)])
def test_a_process_says_when_it_came_how_far_and_what_it_held(kind):
    found = run_script(SCRIPTS[kind], asked_of(kind))
    phases = ["interpreter", "import torch", "build", "first step"]
    if kind == "ours":
        phases[2:3] = ["import hydra and bnexp", "compose and check", "build", "open the folder"]
    assert list(found["marks"]) == phases
    marks = list(found["marks"].values())
    assert marks == sorted(marks) and marks[0] > 0
    assert 50e6 < found["peak"] < 5e9  # bytes: torch itself has more than the first


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="(?s)was to be timed failed.*ZeroDivisionError"):
        run_script("1 / 0", {})


def test_phases_are_differences_and_the_template_is_scaled_by_the_import_of_torch(monkeypatch):
    marks = {
        "ours": {"interpreter": 0.5, "import torch": 2.0, "build": 2.5, "first step": 3.0},
        "bare": {"interpreter": 0.5, "import torch": 2.4, "build": 2.75, "first step": 2.5},
    }
    marks["tutorial"] = marks["bare"]
    monkeypatch.setattr(loop_processes, "run_script", lambda _, asked: {"marks": marks[asked["kind"]], "peak": 2**21})
    found = start_rows(asked_of(""), 2)
    rows = {f"{row.what} {row.over}".strip(): row for row in found if row.part == "start"}
    assert rows["ours, import torch"].values == [1.5, 1.5] and rows["ours, first step"].values == [0.5, 0.5]
    assert rows["ours"].values == [3.0, 3.0] and rows["ours bare script"].median == pytest.approx(1.2)
    # 1.9 s for the import, as where the template took 5.1 s
    assert rows["ours template"].median == pytest.approx(3.0 / 5.1)
    memory = {row.what: (row.values, row.unit) for row in found if row.part == "memory"}
    assert len(memory) == 3 and memory["bare floor"] == ([2.0, 2.0], "MB")


def test_a_sweep_is_the_commands_own_in_turn_and_with_two_jobs(monkeypatch):
    commands = []
    monkeypatch.setattr(loop_processes, "run_process", commands.append)
    rows, reason = sweep_rows("mnist", "cpu", 1)
    assert [" ".join(words[1:3]) for words in commands] == ["-c import torch", "-m bnexp", "-m bnexp"]
    assert commands[2] == [*commands[1], "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert {"-m", "model=mlp", "epochs=1", "data=mnist"} <= set(commands[1]) and not reason
    assert [(row.what, row.over) for row in rows][-2:] == [("template", "in turn"), ("in turn", "two jobs")]


def test_without_joblib_the_second_kind_of_sweep_is_left_out_with_a_reason(monkeypatch):
    def version(name):
        raise loop_processes.PackageNotFoundError(name)

    monkeypatch.setattr(loop_processes, "version", version)
    monkeypatch.setattr(loop_processes, "run_process", lambda words: None)
    rows, reason = sweep_rows("mnist", "cpu", 1)
    assert reason.endswith("pip install hydra-joblib-launcher") and "two jobs" not in {row.what for row in rows}


@pytest.mark.parametrize("script", [*SCRIPTS.values(), loop_processes.BEGIN + loop_processes.TUTORIAL_SCRIPT])
def test_scripts_of_processes_can_be_read(script):
    compile(script, "script", "exec")


@pytest.mark.long
@forks
def test_the_tutorials_processes_run():
    found = run_script(SCRIPTS["tutorial"], asked_of("tutorial"))
    assert found["peak"] > 50e6
    tutorial = TutorialProcess("cpu", "bnexp.data.digits.Digits")
    watch = Stopwatch(CPU)
    tutorial.turn(LoopCase("mlp", 64, (), 3, "bnexp.models.mlp.MLP", 1), 28, watch)
    tutorial.close()
    assert watch.total.clock > watch.single.clock > 0


# ---- settings ----


@pytest.mark.parametrize(
    "words, message",
    [
        (["models=lenet,mlpp"], r"models=lenet,mlpp: mlpp is not known \(did you mean mlp\?\); choose densenet, lenet"),
        (["model=mlp"], r"model=mlp: no setting of loop.py \(did you mean models\?\); settings are models, batch_s"),
        (["engines=graf"], r"graf is not known \(did you mean graph\?\); choose compile, eager, graph"),
        (["models=mlp,mlp"], "models=mlp,mlp: a value stands there twice; give each once"),
        (["data=cifar10"], "data=cifar10: cifar10 is not known; choose mnist, fashion_mnist, digits"),
        (["parts=start,stop"], "stop is not known.*; choose epochs, start, sweep"),
        (["set=long"], "set=long: long is not known; choose quick, full"),
        (["batch_sizes=16,0"], "batch_sizes=16,0: has to be whole numbers, with commas between them, 1 or more"),
        (["batch_sizes=16,a"], "batch_sizes=16,a: has to be whole numbers, with commas between them, 1 or more"),
        (["rounds=two"], "rounds=two: has to be a whole number, 1 or more"),
        (["images=100"], "images=100: not one batch of 256; give as many images or more, or smaller batch_sizes"),
        (["images="], "images=: has no value; give one as images=VALUE"),
        (["rounds=1", "rounds=2"], "rounds is given twice"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_what_can(words, message):
    with pytest.raises(UserError, match=message):
        read_loop_settings(words)


def test_settings_have_defaults_and_are_kept():
    plain = read_loop_settings([])
    assert plain == LoopSettings() and {"compile", "eager", "graph"} <= set(plain.engines)
    assert (plain.num_rounds, plain.num_steps("lenet", 256, "cpu")) == (5, 20)
    steps = [plain.num_steps("resnet", size, device) for size, device in ((16, "cpu"), (256, "cpu"), (16, "cuda"))]
    assert steps == [8, 1, 3200]
    given = read_loop_settings(["models=mlp", "batch_sizes=8,64", "engines=eager", "images=64", "rounds=2"])
    assert (given.models, given.batch_sizes, given.engines) == (["mlp"], [8, 64], ["eager"])
    assert (given.num_rounds, given.num_steps("mlp", 8, "cuda")) == (2, 8)


def test_missing_or_too_few_data_are_refused_before_any_work(monkeypatch, tmp_path, capsys):
    def download(source, *rest):
        raise UserError(f"data={source.name}: not there")

    monkeypatch.setattr("bnexp.data.mnist.download", download)
    monkeypatch.setenv("BNEXP_DATA", str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path)
    assert loop.main(["out=mine"]) == 2
    assert "data=mnist: not there; for this script, data.root=... is BNEXP_DATA=..." in capsys.readouterr().err
    assert loop.main(["data=digits", "images=5000", "out=mine"]) == 2
    assert "images=5000: digits has 1,293 training images; give as many or fewer" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def run_as_script(*words):
    return subprocess.run([sys.executable, loop.__file__, *words], capture_output=True, text=True)


def test_help_lists_every_choice():
    done = run_as_script("--help")
    assert done.returncode == 0 and not done.stderr
    assert all(word in done.stdout for word in ("densenet", "compile", "fashion_mnist", "sweep", "full", "images=N"))


def test_a_misspelt_setting_ends_the_script_in_one_sentence():
    done = run_as_script("set=quik")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "bnexp: error: set=quik: quik is not known (did you mean quick?); choose quick, full\n"


def test_settings_are_answered_before_torch_is_imported():
    code = "import sys, loop; print(loop.main(['set=quik']), 'torch' in sys.modules)"
    folder = str(Path(loop.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    assert done.stdout == "2 False\n"


@pytest.mark.long
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@forks
def test_on_a_gpu_every_engine_and_folded_runs_are_measured(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = ["models=lenet,resnet", "batch_sizes=16", "data=digits", "images=320", "parts=epochs,start"]
    assert loop.main([*given, "rounds=2", "device=cuda", "out=mine"]) == 0
    content = json.loads((tmp_path / "mine/bench.json").read_text())
    assert content["skipped"] == {}
    for model in ("lenet", "resnet"):
        timed = [row for row in content["rows"] if (row["model"], row["what"], row["unit"]) == (model, "ours", "s")]
        assert {row["engine"] for row in timed if row["part"] == "epoch"} == set(LoopSettings().engines)
    assert {row["what"] for row in content["rows"] if row["part"] == "fold"} == {"in turn, graph", "folded"}
