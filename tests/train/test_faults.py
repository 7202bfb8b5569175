"""A run survives being killed anywhere, and a disk that takes nothing more, with not a bit lost."""

import errno
import gc
import json
import os
import random
import re
import socket
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import torch
from faults import Place, Warm, faulty, misdrawn, trace
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from test_probes import SHRUNK, probing
from test_resume import BASE, RUNS, assert_same
from test_sweep import SWEEP, numbers, statuses

from bnexp.cli.main import main
from bnexp.errors import UserError
from bnexp.report.records import read_runs
from bnexp.store import checkpoint
from bnexp.store.files import write_new
from bnexp.store.readings import Scalar
from bnexp.store.run_folder import Status, check_own, read_status, taken
from bnexp.store.writer import Writer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """See :class:`faults.Warm`."""
    with closing(Warm([*BASE, *RUNS[0], "steps=1", "out=warm"], tmp_path_factory.mktemp("warm"))) as process:
        yield process


@pytest.fixture(scope="module", autouse=True)
def every_status():
    """Each one is written in this process, so that as much is done to files however long it takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnexp.store.run_folder.STATUS_EVERY", 0.0)
        yield


# ---------------------------------------------------------------- killed anywhere

INSIDE = [  # a checkpoint, its name, a line, an event, a status
    Place("write", ".checkpoint.pt", 3, "killed halfway"), Place("rename", ".checkpoint.pt", 2),
    Place("write", "metrics.jsonl", 2, "killed halfway"), Place("write", "events", 7, "killed halfway"),
    Place("write", ".status.json", 4, "killed halfway"), Place("remove", ".checkpoint.pt", 4),
    Place("link", "/checkpoint.pt", 2), Place("open", ".status.json", 1),
]  # fmt: skip
NUM_TOUCHES = 140  # of files, about, from the start of such a run to its end


def somewhere(folder):
    """Any moment of a run: before it touches a file for the so-manieth time, within that, or by the clock."""
    if random.random() < 0.2:
        return {"seconds": random.uniform(0.02, 0.3)}
    how = random.choice(["killed", "killed halfway"])
    return {"place": Place("any", folder.name, random.randint(1, NUM_TOUCHES), how)}


@pytest.mark.parametrize(
    "num_kills, runs",
    [pytest.param(12, [RUNS[0], RUNS[4]], id="12"), pytest.param(100, RUNS, marks=pytest.mark.long, id="100")],
)
def test_a_run_killed_anywhere_again_and_again_ends_as_if_undisturbed(num_kills, runs, warm, tmp_path):
    """Half of those that go on are killed again."""
    random.seed(0)
    fixed, killed = list(INSIDE), Counter()
    for number in range(10 * num_kills):
        overrides = runs[number % len(runs)]
        command = [*BASE, *overrides, *SHRUNK[overrides[0].removeprefix("model=")], "resume=true"]
        whole, folder = tmp_path / f"whole-{number % len(runs)}", tmp_path / f"killed-{number}"
        if not whole.exists():
            assert warm([*command, f"out={whole}"]) == 0
        code = None
        while code is None or (code == -9 and random.random() < 0.5):
            where = {"place": fixed.pop()} if fixed else somewhere(folder)
            code = warm([*command, f"out={folder}"], **where)
            assert code in (0, -9), f"it ended with {code} after {where}"
            if code == -9:
                killed[where["place"].operation if "place" in where else "by the clock"] += 1
                assert not (folder / "config.yaml").exists() or is_told_dead(folder)
        assert warm([*command, f"out={folder}"]) == 0
        assert_same(folder, whole)
        if killed.total() >= num_kills:
            break
    assert killed.total() >= num_kills
    print(f"single runs survived {killed.total()} kills: {dict(killed)}")


def test_a_run_killed_after_its_last_checkpoint_has_its_last_readings_in_its_status_too(undisturbed, bnexp, tmp_path):
    """They need not have been written there when they were taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnexp.store.run_folder.STATUS_EVERY", 3600.0)
        patch.setattr("bnexp.train.recorder.Recorder.end", lambda self, *_, **__: self.writer.close(True))  # no further
        assert bnexp(*RUN, "out=run") == 0
    assert read_status(tmp_path / "run")["status"] == "running"
    assert bnexp(*RUN, "out=run") == 0
    assert_same(tmp_path / "run", undisturbed[0])


def is_told_dead(folder):
    """Reports name the run as dead, unless it had come to its end before."""
    records, problems = read_runs([folder])
    return len(records) == 1 or [each.status for each in problems] == ["dead"]


# ---------------------------------------------------------------- nothing more can be written

RUN = ("train", "model=mlp", "model.hidden=[6,5]", "norm=scratch", "data.size=8", "data.limit=64", "batch_size=16",
       "steps=6", "log_every=1", "checkpoint_every=2", "keep=best", "threads=1", "quiet=true",
       "resume=true", *probing(2, ["activations", "gradients", "statistics", "shapes"]))  # fmt: skip
HOWS = ["ENOSPC", "EROFS", "EDQUOT", "ENOSPC from then on", "EROFS from then on"]
# The command ends at once then, and what it had open with it: at the latest by gc.collect().
LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file")
WHY = {
    "ENOSPC": ("No space left on device", "free some space"),
    "EROFS": ("Read-only file system", "make it writable again"),
    "EDQUOT": ("Disk quota exceeded", "free some space or ask for a larger quota"),
}


def kind(path):
    """The file that is meant, whichever scratch file of it this is."""
    name = re.sub(r"^(events)\.out.*", r"\1", os.path.basename(path))
    name = re.sub(r"^\.(.*)\.(new|\d+)$", r"\1", name)
    return "checkpoint.pt" if name == "checkpoint.previous.pt" else name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return traced(tmp_path_factory.mktemp("undisturbed"))


def traced(folder):
    """A run of RUN, and all that one does to files, as (operation, path)."""
    assert main([*RUN, f"out={folder / 'first'}"]) == 0  # imports what is imported late
    return folder / "first", trace(lambda: main([*RUN, f"out={folder / 'second'}"]), "second")


def suffer(place, undisturbed, bnexp, tmp_path, capfd):
    """What RUN says of that fault, does in spite of it, and comes to when there is room again."""
    whole, touched = undisturbed
    folder = tmp_path / f"run-{place.count}"
    command = (*RUN, f"out={folder}")
    capfd.readouterr()
    with faulty(place._replace(name=folder.name)) as met:
        code = bnexp(*command)
    out, err = capfd.readouterr()
    operation, path = met[-1]
    file = kind(path).replace(folder.name, "")  # a folder that cannot be made or synchronized is told by what is in it
    if code == 0:  # the one thing that is done in another way then
        assert operation == "link" or (operation == "mkdir" and len(met) > 1)
    else:
        is_begun = file != "config.yaml" and (folder / "config.yaml").exists()
        assert code == (1 if is_begun else 2)
        assert err.count("\n") == 1 and "Traceback" not in err, err
        why, what_to_do = WHY[place.how.split()[0]]
        assert why in err
        assert not is_begun or re.search(rf"{re.escape(str(folder))}/{re.escape(file)}\S* could not be written: ", err)
        assert not is_begun or f"; {what_to_do}, then go on with bnexp resume {folder}\n" in err
        assert read_status(folder).get("status") in (None, "running", "failed"), "it has not come to its end"
        if (folder / "metrics.jsonl").exists() and place.how != "EROFS from then on":  # half a line is taken back
            assert all(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
        assert_kept(folder, met)
    assert bnexp(*command) == 0
    assert capfd.readouterr().err == "", "nothing was lost that it would have to tell"
    assert_same(folder, whole)
    return operation, file


def assert_kept(folder, met):
    """The last good checkpoint is there and is taken without a word."""
    num_saved = sum(each[0] == "rename" and each[1].endswith(".checkpoint.pt.new") for each in met[:-1])
    state = checkpoint.load(folder, CPU) if folder.exists() else None
    step = state["num_steps"] if state else 0
    assert step == 2 * num_saved or (step == 2 * num_saved + 2 and met[-1][0] == "rename")


@LEFT_OPEN
def test_a_disk_that_takes_nothing_more_is_told_by_file_and_loses_nothing(undisturbed, bnexp, tmp_path, capfd):
    """At the first, the middle and the last write to each file; at the last nothing more can be written at all."""
    writes = {}
    for number, (operation, path) in enumerate(undisturbed[1], start=1):
        if operation == "write":
            writes.setdefault(kind(path), []).append(number)
    hows = [("ENOSPC", "EDQUOT", "EROFS from then on"), ("EROFS", "ENOSPC", "ENOSPC from then on")]
    for i, numbers_of_one in enumerate(writes.values()):
        places = dict(zip([numbers_of_one[j] for j in (0, len(numbers_of_one) // 2, -1)], hows[i % 2], strict=True))
        for number, how in places.items():
            suffer(Place("any", "", number, how), undisturbed, bnexp, tmp_path, capfd)
    gc.collect()


def test_no_checkpoint_is_on_the_disk_before_the_readings_that_it_takes_for_granted(undisturbed):
    for name in ("metrics.jsonl", "probes.jsonl"):
        wanted = [(operation, kind(path)) for operation, path in undisturbed[1]]
        wanted = [what for what in wanted if what in (("write", name), ("fsync", name), ("rename", "checkpoint.pt"))]
        pairs = zip(wanted, wanted[1:], strict=False)
        before = [one for one, other in pairs if other[0] == "rename" and one[0] != "rename"]
        assert before == [("fsync", name)] * 3, "the checkpoint before gets its name first, so there are two in a row"


def test_where_there_are_no_hard_links_half_a_config_is_not_left_behind_either(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "config.yaml"
    with faulty(Place("write", "config.yaml", 2, "ENOSPC")), pytest.raises(OSError, match=f"No space left .*'{path}'"):
        write_new(path, "seed: 1")
    assert not list(tmp_path.iterdir())
    assert write_new(path, "seed: 1") and not write_new(path, "seed: 2")
    assert path.read_text() == "seed: 1" and list(tmp_path.iterdir()) == [path]


@LEFT_OPEN
@pytest.mark.long
@pytest.mark.parametrize("how", HOWS)
def test_so_it_is_at_every_touch_of_a_file(how, undisturbed, bnexp, tmp_path, capfd):
    found = Counter()
    for number in range(1, len(undisturbed[1]) + 1):
        found[suffer(Place("any", "", number, how), undisturbed, bnexp, tmp_path, capfd)] += 1
    gc.collect()
    with capfd.disabled():
        print(f"a run survived {found.total()} faults ({how}): {dict(found)}")


# ---------------------------------------------------------------- TensorBoard looks on


def test_a_page_that_was_open_all_along_shows_each_step_once_too(warm, tmp_path):
    """The same reader looks again after every death, and goes on from where it was."""
    random.seed(1)
    command = [*BASE, *RUNS[0], *SHRUNK["mlp"], "resume=true", f"out={tmp_path / 'run'}"]
    (tmp_path / "run").mkdir()
    reader = EventAccumulator(str(tmp_path / "run"), size_guidance={SCALARS: 0})
    for count in (7, 5, 4):  # within the events of steps 4, 6 or 8, which are written again
        assert warm(command, place=Place("write", "/events", count, "killed halfway")) == -9
        reader.Reload()
    assert warm(command) == 0
    reader.Reload()
    assert misdrawn(tmp_path / "run", reader) == {}


@pytest.mark.parametrize("clock", [-3600.0, 0.0, 3600.0])
def test_files_are_read_in_the_order_of_their_writing_whatever_the_clock_says(clock, tmp_path, monkeypatch):
    """As on another machine, where a run goes on."""
    for step in (0, 3, 2):
        writer = Writer(tmp_path, step=step)
        for i in range(step + 1, step + 5):
            writer.write(i, i / 4, float(i), [Scalar("loss/train", i + step / 10)])
        writer.close(success=False)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda now=now: now + clock)
    assert len(list(tmp_path.glob("events*"))) == 3
    assert misdrawn(tmp_path) == {}


# ---------------------------------------------------------------- many at once


@pytest.mark.parametrize(
    "size, num_kills, seeds",
    [pytest.param(3, 6, 2, id="3"), pytest.param(8, 100, 8, marks=pytest.mark.long, id="8")],
)
def test_processes_that_die_beside_each_other_do_every_job_once(size, num_kills, seeds, warm, tmp_path):
    """Of those that did not die each finds the sweep done in the end."""
    command = ["train", "-m", *SWEEP, f"seed=range({seeds})", "quiet=true"]
    assert warm([*command, f"out={tmp_path / 'whole'}"]) == 0
    codes, killed = warm.crowd([*command, f"out={tmp_path / 'sweep'}"], size, num_kills, tmp_path / "log")
    assert codes == [0] * size and killed == num_kills
    names = [f"{norm}-s{seed}" for norm in ("none", "scratch") for seed in range(seeds)]
    assert statuses(tmp_path / "sweep") == dict.fromkeys(names, "finished")
    ends = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len({name for name, _ in ends}) == len(ends), f"done twice: {ends}"
    for name, pid in ends:  # who dies between an end and its line leaves none
        assert read_status(tmp_path / "sweep" / name)["pid"] == int(pid), f"{name} was begun again after its end"
    assert numbers(tmp_path / "sweep") == numbers(tmp_path / "whole")
    for name in names:
        assert misdrawn(tmp_path / "sweep" / name) == {}
    print(f"{size} processes finished {len(names)} jobs once each in spite of {killed} kills")


def test_a_file_that_is_renamed_while_we_look_is_no_stranger(tmp_path, monkeypatch):
    """Who holds the run renames its checkpoint between our listing of the folder and our look at the file."""
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / ".checkpoint.pt.new"]))
    check_own(tmp_path)
    (tmp_path / ".checkpoint.pt.new").symlink_to("elsewhere")
    with pytest.raises(UserError, match="a link, a pipe or a folder"):
        check_own(tmp_path)


@pytest.mark.parametrize("command", [["train"], ["train", "resume=true"], ["resume"], ["compare", "norm=none,library"]])
def test_the_second_at_a_run_is_told_who_is_at_work(command, bnexp, capfd):
    first, *rest = command
    small = ("model=mlp", "data.limit=64", "steps=1", "quiet=true")
    if first == "compare":
        assert bnexp("compare", *small, *rest, "out=runs") == 0
        folder, arguments = Path("runs/library"), (*command, *small, "out=runs")
    else:
        assert bnexp("train", *small, "out=run") == 0
        folder, arguments = Path("run"), ("resume", "run") if first == "resume" else (*command, *small, "out=run")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    capfd.readouterr()
    with taken(folder):
        Status(folder, "cpu", [], goes_on=True)
        assert bnexp(*arguments) == 2
        who = re.escape(f"bnexp: error: {folder}: process {os.getpid()} on {socket.gethostname()} ")
        told = r"\(last heard of \d+ s ago\) is at work on this run; wait for it, or stop it first\n"
        assert re.fullmatch(who + told, capfd.readouterr().err)
        Status(folder, "cpu", [], goes_on=True).update(pid=2**22 + 1)  # of one that died before
        assert bnexp(*arguments) == 2
        assert f"{folder}: another process is at work on this run" in capfd.readouterr().err
    after = {path: path.read_bytes() for path in folder.iterdir()}
    assert [path.name for path in after if after[path] != before.get(path)] == ["status.json"], "which is ours here"
