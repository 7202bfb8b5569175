"""``bnexp compare``: the runs of ``train -m`` in lockstep, and a verdict that its folder keeps."""

import json
import os
import re
import signal
import struct
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_sweep import NAMES, SMALL, SWEEP, numbers, snapshot, statuses, step_that

from bnexp.cli.main import main
from bnexp.cli.sweep.grid import Job
from bnexp.cli.sweep.lockstep import standings
from bnexp.config import build
from bnexp.config.compose import composed
from bnexp.store.run_folder import read_status, taken
from bnexp.store.writer import NullWriter
from bnexp.train.drive import Group, lockstep
from bnexp.train.interrupt import Interrupted
from bnexp.train.loop import Loop, Plan
from bnexp.train.recorder import Recorder
from bnexp.train.run import Run

LENET = [each for each in SMALL if not each.startswith("model")] + ["model=lenet", "seed=0,1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison, once for all tests that only look at one."""
    folder = tmp_path_factory.mktemp("finished") / "compare"
    assert main(["compare", *SWEEP, "quiet=true", f"out={folder}"]) == 0
    return folder


def verdict(folder) -> dict:
    return json.loads(Path(folder, "comparison.json").read_text())


# ---------------------------------------------------------------- in lockstep


def looped(order, name: str, steps: int) -> Loop:
    """The loop of a real run that says in ``order`` which step it took."""
    cfg = composed([*SMALL, f"steps={steps}", "quiet=true"])
    run = build.build(cfg)
    take = run.step

    def step():
        order.append((name, run.num_steps))
        take()

    run.step = step
    return Loop(run, Plan(log_every=2, eval_every=2, checkpoint_every=9), Recorder(NullWriter()))


def each_alone(loops):
    return [Group([loop]) for loop in loops]


def test_every_run_takes_a_step_before_any_takes_the_next():
    order = []
    runs = [looped(order, name, steps) for name, steps in (("a", 3), ("b", 5), ("c", 3))]
    assert list(lockstep(each_alone(runs))) == [1, 2, 3, 4, 5]
    assert order == [(name, step) for step in range(3) for name in "abc"] + [("b", 3), ("b", 4)]
    assert [each.status for each in runs] == ["finished"] * 3


def test_who_is_behind_goes_first():
    order = []
    ahead, behind = looped(order, "ahead", 5), looped(order, "behind", 5)
    for _ in range(3):
        ahead.run.step()
    order.clear()
    assert list(lockstep(each_alone([ahead, behind]))) == [1, 2, 3, 4, 5]
    alone = [("behind", step) for step in range(3)]
    assert order == alone + [(name, step) for step in (3, 4) for name in ("ahead", "behind")]


def test_an_interrupt_waits_for_the_end_of_the_step_and_ends_every_run_there():
    order = []
    runs = [looped(order, name, 9) for name in "ab"]
    take = runs[0].run.step

    def interrupted_step():
        take()
        if runs[0].run.num_steps == 4:
            os.kill(os.getpid(), signal.SIGINT)

    runs[0].run.step = interrupted_step
    with pytest.raises(Interrupted):
        list(lockstep(each_alone(runs)))
    assert [each.run.num_steps for each in runs] == [4, 4]
    assert [each.status for each in runs] == ["interrupted"] * 2


def test_the_live_table_shows_means_per_variant_and_the_difference_of_the_seeds_that_both_have():
    runs = [looped([], "a", 1), looped([], "a", 1), looped([], "b", 1), looped([], "b", 1)]
    for each, accuracy in zip(runs, (0.5, 0.7, 0.6, 0.9), strict=True):
        each.latest = {"loss/valid": accuracy, "accuracy/valid": accuracy}
    pairs = zip("aabb", (0, 1, 0, 2), strict=True)
    jobs = [Job("", variant, (), Path(), OmegaConf.create({"seed": seed})) for variant, seed in pairs]
    assert standings(dict(zip(jobs, runs, strict=True))) == [
        ["a", "2", "", "0.6000", "60.00%", ""],
        ["b", "2", "", "0.7500", "75.00%", "+10.00 points"],
    ]


# ---------------------------------------------------------------- the same runs as train -m


def test_the_numbers_are_those_of_a_sweep_bit_for_bit(bnexp, finished):
    assert bnexp("train", "-m", *SWEEP, "quiet=true", "out=sweep") == 0
    assert numbers(Path("sweep")) == numbers(finished)
    assert statuses(finished) == dict.fromkeys(NAMES, "finished")


def test_ctrl_c_leaves_checkpoints_and_the_same_command_ends_as_if_undisturbed(bnexp, capsys, finished, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        once = iter([signal.SIGINT])  # a second Ctrl-C would break off at once
        step_that(lambda: [os.kill(os.getpid(), number) for number in once], patch, at=16, seed=0)
        assert bnexp("compare", *SWEEP, "quiet=true", "out=compare") == 130
    assert "to go on, repeat the command with out=compare" in capsys.readouterr().err
    assert statuses(Path("compare")) == dict.fromkeys(NAMES, "interrupted")
    assert {read_status(Path("compare", name))["step"] for name in NAMES} == {17}
    assert not Path("compare/comparison.json").exists()
    before = []
    take = Run.step
    monkeypatch.setattr(Run, "step", lambda run: (before.append(run.num_steps), take(run))[1])
    assert bnexp("compare", *SWEEP, "quiet=true", "out=compare") == 0
    assert min(before) == 17 and len(before) == 4 * 13, "it went on from the checkpoints"
    assert numbers(Path("compare")) == numbers(finished)
    assert verdict("compare")["verdict"] == verdict(finished)["verdict"]


def test_a_comparison_that_is_finished_is_only_shown_again(bnexp, capsys, finished):
    assert bnexp("compare", *SWEEP, "quiet=true", "out=compare") == 0
    runs = {name: snapshot(Path("compare", name)) for name in NAMES}
    first = Path("compare/comparison.json").read_bytes()
    capsys.readouterr()
    assert bnexp("compare", *SWEEP, "quiet=false", "out=compare") == 0
    assert {name: snapshot(Path("compare", name)) for name in NAMES} == runs
    assert Path("compare/comparison.json").read_bytes() == first
    assert "test accuracy, %, against none" in capsys.readouterr().out
    bands = [path.parent.name for path in Path("compare/bands").rglob("events*")]
    assert sorted(bands) == ["bands", "none", "scratch"], "made anew and not added to"


# ---------------------------------------------------------------- what it says


def test_the_folder_keeps_the_verdict_as_numbers_words_and_a_figure(finished):
    content = verdict(finished)
    assert content["baseline"] == "none" and len(content["verdict"]) == 1
    base, scratch = content["variants"]
    assert (base["label"], scratch["label"]) == ("none", "scratch")
    assert base["n"] == scratch["n"] == 2 and base["seeds"] == [0, 1] and base["paired"] is None
    rows = numbers(finished)
    for key, tag in (("accuracy/test", "accuracy/test"), ("loss/valid/final", "loss/valid")):
        values = {name: rows[name][-1][tag] for name in NAMES}
        low, mean, high = (scratch["metrics"][key][each] for each in ("low", "mean", "high"))
        # Sums of two floats, in whatever order.
        assert mean == pytest.approx((values["scratch-s0"] + values["scratch-s1"]) / 2, rel=1e-14)
        assert low < mean < high and ({low, high} & {0.0, 1.0} or high - mean == pytest.approx(mean - low, rel=1e-9))
        paired = scratch["paired"][key]
        differences = [values[f"scratch-s{seed}"] - values[f"none-s{seed}"] for seed in (0, 1)]
        assert paired["difference"] == pytest.approx(sum(differences) / 2, rel=1e-12)
        assert paired["low"] < paired["difference"] < paired["high"]
        assert 0 < paired["p"] <= 1 and paired["n"] == 2
    width, height = struct.unpack(">II", (finished / "comparison.png").read_bytes()[16:24])  # PNG's first chunk
    assert width == 1600 and 600 < height < 2400
    assert (finished / "comparison.svg").read_text().count("<path") > 10
    assert content["verdict"][0] in (finished / "comparison.md").read_text()


def test_report_on_the_folder_gives_the_same_numbers(bnexp, finished, capsys, monkeypatch):
    monkeypatch.chdir(finished.parent)
    assert bnexp("report", str(finished), "--json") == 0
    assert json.loads(capsys.readouterr().out) == verdict(finished) | {"looks": []}  # a report into no folder is none


@pytest.mark.parametrize(
    "baseline, label",
    [([], "scratch"), (["baseline=norm=none"], "none"), (["baseline=none"], "none"), (["baseline=scratch"], "scratch")],
)
def test_the_baseline_is_the_first_variant_unless_another_is_named(bnexp, baseline, label):
    one = (*SMALL, "steps=1", "norm=scratch,none", "quiet=true", "out=compare")
    assert bnexp("compare", *one, *baseline) == 0
    content = verdict("compare")
    assert content["baseline"] == label == content["variants"][0]["label"]


@pytest.mark.parametrize(
    "swept, baseline, label",
    [
        ("model.hidden=[8,4],[2]", [], "hidden=[8, 4]"),
        ("model.hidden=[2],[8,4]", ["baseline=model.hidden=[8,4]"], "hidden=[8, 4]"),
        ("optimizer.lr=0.1,0.01", ["baseline=optimizer.lr=1e-2"], "lr=0.01"),
        ("steps=1,2", [], "steps=1"),  # SMALL has steps too, and what is said last counts
    ],
)
def test_a_baseline_may_be_any_value(bnexp, swept, baseline, label):
    assert bnexp("compare", *SMALL, "steps=1", swept, *baseline, "quiet=true", "out=compare") == 0
    assert verdict("compare")["baseline"] == label
    assert len(verdict("compare")["variants"]) == 2 and "fits" not in str(verdict("compare")["notes"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["norm=none,library", "baseline=nonsense"], "not among the variants none, library"),
        (["norm=none,library", "baseline=norm=fused"], "not among the variants none, library"),
        (["norm=none,library", "baseline="], "not among the variants"),
        (["seed=0,1"], "nothing varies but the seed"),
        (["seed=0,1", "eval_train=true,false"], "nothing varies but the seed"),
        ([], "nothing varies but the seed"),
        (["norm=none,library", "hydra/launcher=joblib"], "hydra/launcher=joblib: these runs take turns in one process"),
        (["norm=none,library", "+hydra.launcher.n_jobs=2"], "hydra.launcher.n_jobs=2: these runs take turns"),
    ],
)
def test_bad_input_is_refused_before_any_work(bnexp, capsys, arguments, message):
    assert bnexp("compare", *SMALL, *arguments, "out=compare") == 2
    assert message in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_one_seed_is_shown_without_interval_and_without_p(bnexp, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert bnexp("compare", *SMALL, "norm=none,scratch", "out=compare") == 0
    out = capsys.readouterr().out
    assert "one seed, so no interval and no p" in out and "±" not in out and "not enough evidence" in out
    assert max(map(len, out.splitlines())) <= 100, "80 but for the lines of progress"
    paired = verdict("compare")["variants"][1]["paired"]
    assert paired.pop("accuracy/test/at_best")["n"] == 0
    assert {(each["n"], each["low"], each["high"], each["p"]) for each in paired.values()} == {(1, None, None, None)}


# ---------------------------------------------------------------- when runs go wrong


@pytest.mark.usefixtures("size17_fails")
def test_a_failing_run_stops_no_other(bnexp, capsys):
    assert bnexp("compare", *LENET, "data.size=16,17", "out=compare") == 1
    out = capsys.readouterr().out
    assert "2 runs left out" in out and "RuntimeError: out of luck" in out and "comparison.png" in out
    assert [each["n"] for each in verdict("compare")["variants"]] == [2]
    assert statuses(Path("compare"))["s1-size16"] == "finished"


def test_a_run_that_fails_on_the_way_stops_no_other(bnexp, monkeypatch):
    def fail():
        raise RuntimeError("out of luck")

    step_that(fail, monkeypatch, at=13, seed=1)
    assert bnexp("compare", *SWEEP, "quiet=true", "out=compare") == 1
    assert statuses(Path("compare")) == dict(zip(NAMES, ["finished", "failed"] * 2, strict=True))
    assert [each["n"] for each in verdict("compare")["variants"]] == [1, 1]


@pytest.mark.usefixtures("size17_fails")
def test_without_a_baseline_that_ended_there_is_no_comparison_but_all_that_happened_is_told(bnexp, capsys):
    assert bnexp("compare", *LENET, "data.size=17,16", "out=compare") == 1
    printed = capsys.readouterr()
    assert "no comparison: no run of the baseline, size17, has finished" in printed.err
    assert printed.out.count("failed: ") == 2 and re.search(r"library +2 ", printed.out)


def test_a_diverging_variant_takes_its_place_in_the_verdict(bnexp, capsys):
    rates = "optimizer.lr=0.1,1e30"
    assert bnexp("compare", *SMALL, "norm=none", "optimizer=sgd", rates, "seed=0,1", "out=compare") == 0
    lost = verdict("compare")["variants"][1]
    assert (lost["n"], lost["num_diverged"]) == (0, 2)
    assert (lost["speedup"]["reached"], lost["speedup"]["low"]) == (0, None)
    assert "lr=1e+30 fails in 2 of 2 seeds, 2 of them diverged." in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------- what is printed on the way


def test_without_a_terminal_each_evaluation_is_a_line(bnexp, capsys):
    assert bnexp("compare", *SWEEP, "out=compare") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [int(re.match(r"step (\d+)/30", line)[1]) for line in lines] == [5, 10, 15, 20, 25, 30]
    last = {name: rows[-1]["accuracy/valid"] for name, rows in numbers(Path("compare")).items()}
    base, other = ((last[f"{norm}-s0"] + last[f"{norm}-s1"]) / 2 for norm in ("none", "scratch"))
    assert f" {base:.2%};" in lines[-1] and lines[-1].endswith(f" {other:.2%} {100 * (other - base):+.2f} points")


def test_a_line_of_progress_begins_with_the_baseline_and_none_lies_beyond_the_end(bnexp, capsys):
    assert bnexp("compare", *SWEEP, "baseline=scratch", "steps=5", "eval_every=3", "out=compare") == 0
    shown = re.findall(r"^step (\d+/\d+)(?:, .*)?:  (\w+) 2 ", capsys.readouterr().out, re.MULTILINE)
    assert shown == [("3/5", "scratch"), ("5/5", "scratch")]


def test_quiet_prints_the_folder_alone(bnexp, capfd):
    assert bnexp("compare", *SWEEP, "steps=1", "quiet=true", "out=compare") == 0
    assert capfd.readouterr() == ("compare\n", "")


def test_a_run_that_another_process_holds_is_not_touched(bnexp, capsys):
    assert bnexp("compare", *SWEEP, "steps=1", "out=compare") == 0
    before = {path: path.read_bytes() for path in Path("compare").rglob("*") if path.is_file()}
    capsys.readouterr()
    with taken(Path("compare/scratch-s1")):
        assert bnexp("compare", *SWEEP, "steps=1", "out=compare") == 2
    assert "at work on this run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("compare").rglob("*") if path.is_file()} == before


def test_compare_takes_no_flags(bnexp, capsys):
    assert bnexp("compare", "-m", "norm=none,library") == 2
    assert "-m: compare takes settings only" in capsys.readouterr().err
