"""A sweep survives whatever happens to its processes: Ctrl-C, kill -9 anywhere, company."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_sweep import NAMES, SWEEP, numbers, snapshot, start, statuses, step_that, table, writers

from bnexp.cli import main
from bnexp.folder import DONE, read_status

# A process that has imported everything and forks a child for every command that it is given, to be killed after some
# seconds, or before it does something (or anything) for the n-th time to a file of a certain name, or within a write.
WARM = """
import json, os, signal, sys, time, torch
torch.set_num_threads(1)
import bnexp.multirun, bnexp.writer
from bnexp.cli import main

FILES = "open", "os.mkdir", "os.link", "os.rename", "os.remove", "os.truncate"

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_before(event, name, count):
    seen = []
    def hook(now, arguments):
        if now in FILES and event in (now, "any") and name in str(arguments[0]):
            seen.append(now)
            if len(seen) == count:
                die()
    sys.addaudithook(hook)

def die_within(what, name, count):
    def half(data, file):
        file.write(data[:len(data) // 2])
        die()
    if what == "half a checkpoint":
        torch.save = lambda state, file: half(bytes(1000), file)
    else:
        bnexp.writer.append = lambda file, data: half(data, file) if name in str(file.name) else file.write(data)

sys.stdout, out = open(os.devnull, "w"), sys.stdout
assert main([*json.loads(sys.stdin.readline()), "steps=1", "out=warm"]) == 0  # imports what is imported late
sys.stdout = out
for line in sys.stdin:
    arguments, seconds, where = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends whoever goes round and round
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if where:
            (die_within if where[0].startswith("half") else die_before)(*where)
        os._exit(main(arguments))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# In the order in which a sweep comes by, so that all of them can be had on the way through one.
PLACES = [
    ("os.mkdir", "/sweep", 1), ("os.link", ".sweep.json", 1), ("os.remove", ".sweep.json", 1),
    ("os.mkdir", "none-s0", 1), ("os.link", ".config.yaml", 1), ("os.remove", ".config.yaml", 1),
    ("os.rename", ".status.json", 1), ("open", "metrics.jsonl", 1), ("os.truncate", "metrics.jsonl", 1),
    ("half an event", "events", 1), ("half a line", "metrics.jsonl", 1), ("half a checkpoint", "", 1),
    ("os.rename", ".checkpoint.pt", 3), ("os.remove", ".checkpoint.pt", 3), ("os.rename", ".status.json", 8),
    ("open", ".checkpoint.pt", 12),
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The numbers of SWEEP, run by one process from start to end."""
    folder = tmp_path_factory.mktemp("undisturbed") / "sweep"
    assert main(["train", "-m", *SWEEP, "quiet=true", f"out={folder}"]) == 0
    return numbers(folder)


@pytest.fixture
def warm(tmp_path):
    """``warm(arguments, seconds, where) -> exit code`` of one forked child, -9 if it was killed."""
    program = [sys.executable, "-c", WARM]
    with subprocess.Popen(program, cwd=tmp_path, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        print(json.dumps(["train", "-m", *SWEEP]), file=process.stdin, flush=True)

        def call(arguments, seconds=None, where=None) -> int:
            print(json.dumps([arguments, seconds, where]), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield call
        process.stdin.close()


def test_a_sweep_killed_anywhere_ends_as_if_undisturbed_and_does_no_job_twice(warm, tmp_path, undisturbed):
    began = time.perf_counter()
    assert warm(["train", "-m", *SWEEP, f"out={tmp_path / 'whole'}"]) == 0
    duration = time.perf_counter() - began
    random.seed(0)
    places, num_random = list(PLACES), 0
    for number in range(100):
        folder = tmp_path / str(number) / "sweep"
        folder.parent.mkdir()
        finished, code = {}, -signal.SIGKILL
        while code == -signal.SIGKILL:
            where, seconds = None, None
            if places:
                where = places.pop(0)
            elif random.random() < 0.6:
                where = ("any", "/sweep/", random.randint(1, 200))  # of about 450 from start to end
            else:
                seconds = random.uniform(0, duration / 2)
            code = warm(["train", "-m", *SWEEP, f"out={folder}"], seconds, where)
            num_random += code == -signal.SIGKILL and where not in PLACES
            assert code == -signal.SIGKILL or where not in PLACES, f"nobody came by at {where}"
            for name, files in finished.items():
                assert snapshot(folder / name) == files, f"{name} was finished and yet touched again"
            finished = {name: snapshot(folder / name) for name, status in statuses(folder).items() if status in DONE}
        assert code == 0 and sorted(finished) == NAMES
        assert numbers(folder) == undisturbed
        if num_random >= 20:
            break
    assert num_random >= 20
    assert not list(tmp_path.rglob("*.new")), "what a killed process left half-written is taken over by the next"


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
    wait = "import sys, time, pathlib, bnexp.multirun, bnexp.cli\npathlib.Path(sys.argv.pop(1)).touch()\n"
    wait += "while not pathlib.Path('go').exists(): time.sleep(0.001)\nsys.exit(bnexp.cli.main(sys.argv[1:]))"
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


