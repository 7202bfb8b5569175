"""A sweep survives whatever happens to its processes: Ctrl-C, kill -9 anywhere, company."""

import os
import random
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
from faults import Place, Warm, misdrawn
from test_sweep import NAMES, SWEEP, numbers, snapshot, start, statuses, step_that, table, writers

from bnexp.cli.main import main
from bnexp.store.run_folder import DONE, read_status

# In the order in which a sweep comes by, so that all of them can be had on the way through one.
PLACES = [
    Place("mkdir", "/sweep", 1), Place("link", ".sweep.json", 1), Place("remove", ".sweep.json", 1),
    Place("mkdir", "none-s0", 1), Place("link", ".config.yaml", 1), Place("remove", ".config.yaml", 1),
    Place("rename", ".status.json", 1), Place("open", "metrics.jsonl", 1), Place("truncate", "metrics.jsonl", 1),
    Place("write", "events", 1, "killed halfway"), Place("write", "metrics.jsonl", 1, "killed halfway"),
    Place("write", ".checkpoint.pt", 2, "killed halfway"), Place("rename", ".checkpoint.pt", 3),
    Place("remove", ".checkpoint.pt", 3), Place("rename", ".status.json", 8), Place("open", ".checkpoint.pt", 12),
]  # fmt: skip
NUM_TOUCHES = 900  # of files, about, from the start of SWEEP to its end


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The numbers of SWEEP, run by one process from start to end."""
    folder = tmp_path_factory.mktemp("undisturbed") / "sweep"
    assert main(["train", "-m", *SWEEP, "quiet=true", f"out={folder}"]) == 0
    return numbers(folder)


@pytest.fixture
def warm(tmp_path):
    """See :class:`faults.Warm`."""
    with closing(Warm(["train", "-m", *SWEEP, "steps=1", "out=warm"], tmp_path)) as process:
        yield process


@pytest.mark.parametrize("num_kills", [4, pytest.param(60, marks=pytest.mark.long)])
def test_a_sweep_killed_anywhere_ends_as_if_undisturbed_and_does_no_job_twice(num_kills, warm, tmp_path, undisturbed):
    began = time.perf_counter()
    assert warm(["train", "-m", *SWEEP, f"out={tmp_path / 'whole'}"]) == 0
    duration = time.perf_counter() - began
    random.seed(0)
    places, num_random = list(PLACES), 0
    for number in range(10 * num_kills):
        folder = tmp_path / str(number) / "sweep"
        folder.parent.mkdir()
        finished, code = {}, -signal.SIGKILL
        while code == -signal.SIGKILL:
            place, seconds = None, None
            if places:
                place = places.pop(0)
            elif random.random() < 0.6:
                place = Place("any", "/sweep/", random.randint(1, NUM_TOUCHES // 2))
            else:
                seconds = random.uniform(0, duration / 2)
            code = warm(["train", "-m", *SWEEP, f"out={folder}"], seconds, place)
            num_random += code == -signal.SIGKILL and place not in PLACES
            assert code == -signal.SIGKILL or place not in PLACES, f"nobody came by at {place}"
            for name, files in finished.items():
                assert snapshot(folder / name) == files, f"{name} was finished and yet touched again"
            finished = {name: snapshot(folder / name) for name, status in statuses(folder).items() if status in DONE}
        assert code == 0 and sorted(finished) == NAMES
        assert numbers(folder) == undisturbed
        for name in NAMES:
            assert misdrawn(folder / name) == {}
        if num_random >= num_kills:
            break
    assert num_random >= num_kills
    assert not list(tmp_path.rglob("*.new")), "what a killed process left half-written is taken over by the next"
    print(f"a sweep survived {num_random + len(PLACES)} kills")


def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on_from_it(bnexp, tmp_path, capsys, undisturbed):
    slow = [*SWEEP, "quiet=true", "out=sweep"]
    slow[slow.index("steps=30")] = "steps=3000"  # as long as it takes until the signal arrives
    process = start("train", "-m", *slow, cwd=tmp_path)
    while not (tmp_path / "sweep/none-s0/checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate()
    assert process.returncode == 130 and out == "sweep\n" and "Traceback" not in error
    assert statuses(tmp_path / "sweep") == {"none-s0": "interrupted"}
    with pytest.MonkeyPatch.context() as patch:  # the same in process, where the step of the signal is known
        step_that(lambda: os.kill(os.getpid(), signal.SIGINT), patch, at=16, seed=1)
        assert bnexp("train", "-m", *SWEEP, "out=short") == 130
    assert statuses(Path("short")) == {"none-s0": "finished", "none-s1": "interrupted"}
    assert "to go on, repeat the command with out=short" in capsys.readouterr().err
    assert read_status(Path("short/none-s1"))["step"] == 17
    finished = snapshot(Path("short/none-s0"))
    assert bnexp("train", "-m", *SWEEP, "quiet=true", "out=short") == 0
    assert snapshot(Path("short/none-s0")) == finished
    assert numbers(Path("short")) == undisturbed


def test_two_processes_on_one_folder_share_the_work_and_end_in_the_same_table(tmp_path, undisturbed):
    # What both need first takes longer than the jobs, so they do it before they begin together.
    wait = "import contextlib, io, sys, time, pathlib, bnexp.cli.sweep.launch, bnexp.cli.main\n"
    wait += "with contextlib.redirect_stdout(io.StringIO()): bnexp.cli.main.main(['summary', 'model=mlp'])\n"
    wait += "pathlib.Path(sys.argv.pop(1)).touch()\n"
    wait += "while not pathlib.Path('go').exists(): time.sleep(0.001)\nsys.exit(bnexp.cli.main.main(sys.argv[1:]))"
    command = ["train", "-m", *SWEEP, "out=sweep"]
    both = [start(name, *command, cwd=tmp_path, program=("-c", wait)) for name in "ab"]
    while not all((tmp_path / name).exists() for name in "ab"):
        assert all(each.poll() is None for each in both), [each.communicate() for each in both]
        time.sleep(0.001)
    (tmp_path / "go").touch()
    outputs = [each.communicate() for each in both]
    assert [each.returncode for each in both] == [0, 0], outputs
    starts = {name: writers(tmp_path / "sweep" / name) for name in NAMES}
    assert all(len(each) == 1 for each in starts.values()), f"a job was started twice: {starts}"
    assert {each for (each,) in starts.values()} == {str(each.pid) for each in both}, "one of them did all the work"
    assert table(outputs[0][0]) == table(outputs[1][0])
    assert numbers(tmp_path / "sweep") == undisturbed
