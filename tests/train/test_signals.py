"""Asked to stop, once or twice, at any moment: how soon, what is left behind, and that it goes on from there."""

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults import Place, faulty
from test_compare import each_alone, looped
from test_faults import LEFT_OPEN, RUN, kind, traced
from test_resume import assert_same
from test_sweep import SWEEP, numbers, statuses, step_that

from bnexp.cli.sweep import launch
from bnexp.config import build
from bnexp.report.records import read_runs
from bnexp.startup import SIGNALS
from bnexp.store import checkpoint
from bnexp.store.files import write_json
from bnexp.store.run_folder import is_taken, read_status, taken
from bnexp.train import interrupt, recorder
from bnexp.train.drive import Group, lockstep
from bnexp.train.interrupt import Interrupted, OutOfPatience, deferred_signals
from bnexp.train.run import Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def every_status():
    """Each one is written, so that as much is done to files however long it takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnexp.store.run_folder.STATUS_EVERY", 0.0)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return traced(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def impatient(monkeypatch):
    """As if 2 seconds were 0.3."""
    monkeypatch.setattr(interrupt, "PATIENCE", 0.3)


def timed(call, *arguments):
    """The seconds it took, and what came of it."""
    began = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - began, result


# ---------------------------------------------------------------- asked once


def stuck(number, monkeypatch, at, seed=0):
    """Have the evaluation after step ``at`` ask for the end and then go on for a minute, once."""
    evaluate, left = Run.evaluate, [number]

    def never_ends(run, *arguments):
        if run.num_steps == at and run.batches._orders.initial_seed() == seed and left:
            os.kill(os.getpid(), left.pop())
            time.sleep(60)
        return evaluate(run, *arguments)

    monkeypatch.setattr(Run, "evaluate", never_ends)


@pytest.mark.parametrize("patience", [0.3, pytest.param(interrupt.PATIENCE, marks=pytest.mark.long)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_long_evaluation_is_broken_off_and_the_checkpoint_is_of_the_step_before(
    number, patience, undisturbed, bnexp, tmp_path, monkeypatch, capfd
):  # fmt: skip
    monkeypatch.setattr(interrupt, "PATIENCE", patience)
    whole, _ = undisturbed
    command = (*RUN, "checkpoint_every=100", "out=run")
    with pytest.MonkeyPatch.context() as patch:
        stuck(number, patch, at=4)
        seconds, code = timed(bnexp, *command)
    assert code == 130 and seconds < 5
    assert (read_status(Path("run"))["status"], checkpoint.load(Path("run"), CPU)["num_steps"]) == ("interrupted", 3)
    capfd.readouterr()
    assert bnexp("report", "run") == 2
    assert "run interrupted: interrupted at step 4" in capfd.readouterr().err
    assert bnexp(*command) == 0
    assert_same(tmp_path / "run", whole)


def test_a_run_that_is_evaluated_quickly_is_not_copied_beforehand(bnexp, monkeypatch):
    copied = []
    monkeypatch.setattr(recorder, "copied_to_host", lambda state: copied.append(state["num_steps"]))
    monkeypatch.setattr("bnexp.train.loop.LONG", 0.0)
    command = (*[word for word in RUN if not word.startswith("probe")], "eval_every=2", "checkpoint_every=100")
    assert bnexp(*command, "out=slow") == 0
    assert copied == [1, 3, 5], "before each step that is evaluated"
    copied.clear()
    monkeypatch.setattr("bnexp.train.loop.LONG", 60.0)
    assert bnexp(*command, "out=quick") == 0
    assert copied == [1], "until it is known how long that takes"


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.usefixtures("impatient")
def test_sweeps_and_comparisons_do_not_wait_for_a_long_evaluation_either(command, bnexp, capfd):
    arguments = ["train", "-m", *SWEEP] if command == "train" else ["compare", *SWEEP]
    arguments += ["checkpoint_every=100", "out=sweep"]
    with pytest.MonkeyPatch.context() as patch:
        stuck(signal.SIGTERM, patch, at=5, seed=1)
        seconds, code = timed(bnexp, *arguments, "quiet=true")
    assert code == 130 and seconds < 5
    assert "Traceback" not in capfd.readouterr().err
    ended = {"none-s0": "finished", "none-s1": "interrupted"}
    if command == "compare":
        ended = dict.fromkeys(["none-s0", "none-s1", "scratch-s0", "scratch-s1"], "interrupted")
    assert statuses(Path("sweep")) == ended
    steps = {name: checkpoint.load(Path("sweep", name), CPU)["num_steps"] for name in ended}
    assert steps["none-s1"] == 4 and all(step in (4, 5, 30) for step in steps.values()), steps
    assert bnexp("report", "sweep") == (0 if command == "train" else 2)
    assert bnexp(*arguments, "quiet=true") == 0
    assert bnexp("train", "-m", *SWEEP, "quiet=true", "out=whole") == 0
    assert numbers(Path("sweep")) == numbers(Path("whole"))


@pytest.mark.usefixtures("impatient")
def test_a_checkpoint_that_takes_long_is_waited_for_and_written_once(bnexp, monkeypatch):
    save_into, steps = checkpoint.save_into, []

    def slow(file, state):
        steps.append(state["num_steps"])
        if steps == [2]:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2 * interrupt.PATIENCE)
        save_into(file, state)

    monkeypatch.setattr(checkpoint, "save_into", slow)
    command = (*RUN, "keep=last", "out=run")
    assert bnexp(*command) == 130
    assert steps == [2] and checkpoint.load(Path("run"), CPU)["num_steps"] == 2
    assert read_status(Path("run"))["status"] == "interrupted"
    assert bnexp(*command) == 0 and steps == [2, 4, 6]


@pytest.mark.parametrize(
    "number, whom, starting",
    [(signal.SIGTERM, "parent", False), (signal.SIGHUP, "all", True), *[pytest.param(*each, marks=pytest.mark.long)
     for each in (
        (signal.SIGINT, "all", False), (signal.SIGTERM, "all", False), (signal.SIGKILL, "parent", False),
        (signal.SIGHUP, "parent", False), (signal.SIGINT, "parent", False), (signal.SIGINT, "all", True),
        (signal.SIGUSR1, "parent", True),
    )]],
)  # fmt: skip
def test_jobs_side_by_side_hear_a_signal_and_each_leaves_a_checkpoint(number, whom, starting, tmp_path):
    """Ctrl-C reaches all processes, kill the parent alone; workers that are just starting hear it later."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the joblib launcher of Hydra is not installed")
    # The checkpoint of one is written at once, that of the other has 75 MB.
    slow = [*SWEEP, "norm=none", "seed=0", "steps=100000", "checkpoint_every=10", "model.hidden=[8],[2500,2500]"]
    command = [sys.executable, "-m", "bnexp", "train", "-m", *slow, "quiet=true", "out=sweep", "hydra/launcher=joblib"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "hydra.launcher.n_jobs=2"], cwd=tmp_path, start_new_session=True, **pipes)
    begun = {}
    while len(begun) < 2 and not (starting and is_loky_begun(process.pid)):
        assert process.poll() is None
        begun = {path.parent.name: path.parent for path in tmp_path.glob("sweep/*/checkpoint.pt")}
        time.sleep(0.01)
    (os.killpg if whom == "all" else os.kill)(process.pid, number)
    seconds, (_, error) = timed(process.communicate)
    assert seconds < 15
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 130
        assert error == "to go on, repeat the command with out=sweep\nbnexp: interrupted\n"
    while any(is_taken(folder) for folder in begun.values()):
        time.sleep(0.01)
    if not starting:
        assert [each.status for each in read_runs([tmp_path / "sweep"])[1]] == ["interrupted"] * 2
    for folder in begun.values():
        assert checkpoint.load(folder, CPU)["num_steps"] == read_status(folder)["step"]


def is_loky_begun(parent: int) -> bool:
    """Whether the process has a worker process of joblib's."""
    commands = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):  # it has ended
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                commands.append((path / "cmdline").read_bytes())
    return any(b"popen_loky" in command for command in commands)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "where, command",
    [
        ("bnexp.config.build.load_dataset", ["train", *RUN[1:], "out=run"]),
        ("bnexp.config.build.load_dataset", ["compare", *SWEEP, "out=run"]),
        ("bnexp.cli.compare.make_report", ["compare", *SWEEP, "steps=1", "seed=0", "out=run"]),
        ("bnexp.report.report.make_report", ["report", "."]),
    ],
)
def test_a_signal_outside_of_training_ends_the_command_too(number, where, command, bnexp, monkeypatch, capfd):
    monkeypatch.setattr(where, lambda *_, **__: os.kill(os.getpid(), number))
    handlers = [signal.getsignal(each) for each in SIGNALS]
    assert bnexp(*command) == 130
    error = capfd.readouterr().err
    assert error.endswith("bnexp: interrupted\n") and "Traceback" not in error
    assert "to go on" in error or not Path("run").exists()
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


def test_an_interrupt_that_a_library_swallows_stops_the_run_after_its_first_step(bnexp, monkeypatch):
    load = build.load_dataset

    def swallows(*arguments):
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        return load(*arguments)

    monkeypatch.setattr(build, "load_dataset", swallows)
    assert bnexp(*RUN, "out=run") == 130
    assert read_status(Path("run"))["status"] == "interrupted"
    assert checkpoint.load(Path("run"), CPU)["num_steps"] == 1


def test_what_is_asked_in_the_very_last_moment_of_a_job_ends_the_sweep(bnexp, monkeypatch):
    end = recorder.Recorder.end

    def asked(self, run, status, **fields):
        os.kill(os.getpid(), signal.SIGINT)
        end(self, run, status, **fields)

    monkeypatch.setattr(recorder.Recorder, "end", asked)
    assert bnexp("train", "-m", *SWEEP, "quiet=true", "out=sweep") == 130
    assert statuses(Path("sweep")) == {"none-s0": "finished"}


@pytest.mark.usefixtures("impatient")
def test_patience_has_an_end_where_it_began_and_the_handlers_are_put_back():
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(each) for each in names]
    with pytest.raises(OutOfPatience), deferred_signals() as asked:
        for _ in range(3):  # only Ctrl-C can be more urgent
            os.kill(os.getpid(), signal.SIGTERM)
        seconds, _ = timed(pytest.raises, OutOfPatience, time.sleep, 10)
        assert 0.2 < seconds < 5 and len(asked) == 1
        raise OutOfPatience
    assert [signal.getsignal(each) for each in names] == before
    with deferred_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * interrupt.PATIENCE)  # nothing is raised after the end


# ---------------------------------------------------------------- asked twice


def asked_at(number, how, undisturbed, bnexp, tmp_path, capfd):
    """Ask RUN for the end when it touches a file for the ``number``-th time, and go on."""
    whole, _ = undisturbed
    folder = tmp_path / f"run-{number}"
    command = (*RUN, f"out={folder}")
    capfd.readouterr()
    with faulty(Place("any", folder.name, number, how)):
        code = bnexp(*command)
    out, err = capfd.readouterr()
    assert (code, err) == (130, "bnexp: interrupted\n")
    is_begun = (folder / "status.json").exists()
    if is_begun:
        assert read_status(folder)["status"] in ("interrupted", "running", "finished")
        assert bnexp("report", str(folder)) in (0, 2)
        assert "Traceback" not in capfd.readouterr().err
    assert bnexp(*command) == 0
    assert capfd.readouterr().err == ""
    assert_same(folder, whole)


@LEFT_OPEN
def test_a_second_ctrl_c_leaves_a_folder_that_can_be_read_and_gone_on_with(undisturbed, bnexp, tmp_path, capfd):
    touched = [(operation, kind(path)) for operation, path in undisturbed[1]]
    inside = touched.index(("write", "checkpoint.pt")) + 3  # where torch has something to say about it too
    for i, number in enumerate(dict.fromkeys([inside, *range(3, len(touched), 15)])):
        asked_at(number, ["asked twice", "asked"][i % 2], undisturbed, bnexp, tmp_path, capfd)
    gc.collect()


@LEFT_OPEN
@pytest.mark.long
@pytest.mark.parametrize("how", ["asked twice", "asked"])
def test_so_it_does_at_every_touch_of_a_file(how, undisturbed, bnexp, tmp_path, capfd):
    for number in range(1, len(undisturbed[1]) + 1):
        asked_at(number, how, undisturbed, bnexp, tmp_path, capfd)
    gc.collect()
    with capfd.disabled():
        print(f"a run survived being {how} at {len(undisturbed[1])} places")


def test_a_second_ctrl_c_in_a_comparison_ends_every_run_at_once(bnexp):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        step_that(twice, patch, at=16, seed=0)
        assert bnexp("compare", *SWEEP, "quiet=true", "out=compare") == 130
    assert set(statuses(Path("compare")).values()) == {"interrupted"}
    steps = {checkpoint.load(path.parent, CPU)["num_steps"] for path in Path("compare").glob("*/config.yaml")}
    assert steps == {15}, "none is later than the last that was due"


@pytest.mark.parametrize("is_folded, steps", [(False, [4, 3]), (True, [4, 4])])
def test_a_round_of_runs_in_lockstep_that_takes_long_is_left_where_it_is_unless_it_was_computed(
    is_folded, steps, monkeypatch
):  # fmt: skip
    monkeypatch.setattr("bnexp.train.drive.HURRY", 0.0)
    loops = [looped([], name, 9) for name in "ab"]
    take = loops[0].run.step

    def asked():
        take()
        if loops[0].run.num_steps == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    loops[0].run.step = asked
    with pytest.raises(Interrupted):
        list(lockstep([Group(loops, step_each)] if is_folded else each_alone(loops)))
    assert [each.run.num_steps for each in loops] == steps
    assert all(each.is_between_steps for each in loops), "what was computed was looked at too"


def step_each(runs):
    for run in runs:
        run.step()


def test_runs_in_lockstep_are_ended_by_whoever_drives_them_and_not_when_they_are_forgotten():
    runs = [looped([], name, 9) for name in "abc"]

    def breaks_off():
        raise KeyboardInterrupt

    runs[1].run.step = breaks_off
    with pytest.raises(KeyboardInterrupt):
        list(lockstep(each_alone(runs)))
    assert [each.status for each in runs] == ["interrupted"] * 3


# ---------------------------------------------------------------- others at work


def test_a_sweep_that_waits_for_another_process_says_for_whom_once(bnexp, capfd, monkeypatch):
    assert bnexp("train", "-m", *SWEEP, "steps=2", "quiet=true", "out=sweep") == 0
    folder, naps, locks = Path("sweep/none-s1"), [], ExitStack()
    write_json(folder / "status.json", read_status(folder) | {"status": "running"})
    locks.enter_context(taken(folder))

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            locks.close()

    monkeypatch.setattr(launch, "time", SimpleNamespace(sleep=nap))  # other threads sleep too
    capfd.readouterr()
    assert bnexp("train", "-m", *SWEEP, "steps=2", "quiet=false", "out=sweep") == 0
    me = f"none-s1 (process {os.getpid()} on {socket.gethostname()} (last heard of "
    told = [line for line in capfd.readouterr().err.splitlines() if "waiting" in line]
    assert len(told) == 1 and me in told[0]
