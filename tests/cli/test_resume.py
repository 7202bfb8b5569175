"""Runs taken up again: whatever they are killed at they end as if undisturbed, and a dead one is told from a living."""

import fcntl
import json
import os
import shutil
import socket
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from faults import Place, Warm, misdrawn
from test_loop import CLOCKED, different
from test_probes import SHRUNK, probing
from test_report import write_run

from bnexp.errors import UserError
from bnexp.report.records import read_runs
from bnexp.store import checkpoint
from bnexp.store.run_folder import Status, is_taken, read_status, taken

CPU = torch.device("cpu")
# 4 steps an epoch, checkpoints after 3, 6, 9 and 11, so that all but the last fall into an epoch.
BASE = ("train", "data.size=16", "data.limit=64", "batch_size=16", "steps=11", "log_every=2", "checkpoint_every=3",
        "threads=1", "quiet=true", *probing(2, ["activations", "gradients", "statistics"]))  # fmt: skip
MOMENTUM = ("optimizer=sgd", "optimizer.lr=0.01", "optimizer.momentum=0.9")
# Every model, norm, optimizer and schedule at least once; fused computes in Triton's interpreter where there is no GPU.
RUNS = [
    ("model=mlp", "norm=scratch", *MOMENTUM, "schedule=cosine", "data.augment=crop_flip"),
    ("model=lenet", "norm=library", "optimizer=adam", "schedule=onecycle"),
    ("model=resnet", "norm=ghost", "norm.virtual_batch=4", *MOMENTUM, "schedule=step"),
    ("model=densenet", "norm=group", "norm.groups=layer", "optimizer=adamw", "drop_last=false", "batch_size=20"),
    ("model=mlp", "norm=none", "optimizer=adam", "precision=fp16", "keep=best"),
    ("model=lenet", "norm=renorm", "norm.warmup_steps=3", *MOMENTUM, "schedule.warmup_steps=5", "keep=all"),
    ("model=mlp", "norm=library", "norm.momentum=null", "optimizer=adamw", "classes_per_batch=5"),
    ("model=mlp", "norm=fused", "optimizer=adam"),
]
# Before the status is moved into place for the n-th time (first at the start, then at each reading), within a line,
# before the checkpoint is, and before the one before it gets its name.
PLACES = [
    Place("rename", ".status.json", 4), Place("write", "metrics.jsonl", 1, "killed halfway"),
    Place("rename", ".checkpoint.pt", 3), Place("rename", ".checkpoint.previous.pt", 2),
    Place("rename", ".checkpoint.pt", 4), Place("remove", ".checkpoint.pt", 2), Place("link", "/checkpoint.pt", 1),
    Place("write", ".checkpoint.pt", 9, "killed halfway"),
]  # fmt: skip


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """See :class:`faults.Warm`."""
    with closing(Warm([*BASE, *RUNS[0], "steps=1", "out=warm"], tmp_path_factory.mktemp("warm"))) as process:
        yield process


def lines(folder, name="metrics.jsonl"):
    """What was read, without what the clock decides."""
    rows = map(json.loads, (folder / name).read_text().splitlines())
    return [{key: value for key, value in row.items() if not is_clock(key)} for row in rows]


def is_clock(key):
    return key in (*CLOCKED, "time/probes")


def assert_same(folder, whole):
    """The run in ``folder`` has ended as the undisturbed one in ``whole``, times aside, and TensorBoard shows it."""
    ended = [read_status(each) for each in (folder, whole)]
    assert [each["status"] for each in ended] == ["finished"] * 2
    assert len({json.dumps({k: v for k, v in each["metrics"].items() if not is_clock(k)}) for each in ended}) == 1
    assert lines(folder) == lines(whole)
    assert misdrawn(folder) == {}
    assert (folder / "probes.jsonl").read_bytes() == (whole / "probes.jsonl").read_bytes()
    names = [{path.name for path in each.glob("*.pt")} - {checkpoint.PREVIOUS} for each in (folder, whole)]
    assert names[0] == names[1] and not list(folder.glob(".*.new"))
    for name in names[0]:
        found = [checkpoint.read(each / name, CPU) for each in (folder, whole)]
        assert different(*found, ignore=["seconds"]) == [], name


@pytest.mark.parametrize("overrides, place", list(zip(RUNS, PLACES, strict=True)), ids=str)
def test_a_run_that_was_killed_ends_as_if_undisturbed_bit_for_bit(overrides, place, warm, tmp_path):
    small = SHRUNK[overrides[0].removeprefix("model=")]
    arguments = [*BASE, *overrides, *small, "resume=true"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert warm([*arguments, f"out={whole}"]) == 0
    assert warm([*arguments, f"out={killed}"], place=place) == -9, f"nobody came by at {place}"
    before = checkpoint.load(killed, CPU)
    assert read_status(killed)["status"] == "running" and (before is None or 0 < before["num_steps"] < 11)
    assert [each.status for each in read_runs([killed])[1]] == ["dead"]
    assert warm([*arguments, f"out={killed}"]) == 0
    assert_same(killed, whole)


# ---------------------------------------------------------------- the same command again

TINY = ("model=mlp", "model.hidden=[8]", "data.limit=64", "batch_size=16", "steps=6", "checkpoint_every=2")


@pytest.fixture
def again(bnexp, capfd):
    """``again(*overrides) -> (exit code, stdout, stderr)`` of a run in the folder ``run``, begun or gone on with."""

    def call(*overrides):
        code = bnexp("train", *TINY, "threads=1", "quiet=true", "out=run", "resume=true", *overrides)
        return code, *capfd.readouterr()

    return call


def interrupted(folder, step=4):
    """As if the run had been killed after the checkpoint of ``step``."""
    status = json.loads((folder / "status.json").read_text()) | {"status": "running", "step": step}
    (folder / "status.json").write_text(json.dumps(status))
    os.replace(folder / "checkpoint.previous.pt", folder / "checkpoint.pt")


def files(folder):
    """Contents but for the lock's, which holds none."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_a_run_is_begun_gone_on_with_and_then_left_alone_by_one_command(again, tmp_path):
    assert again() == (0, "run\n", "")
    folder = tmp_path / "run"
    expected = lines(folder)
    interrupted(folder)
    assert again() == (0, "run\n", "")
    assert lines(folder) == expected and len(list(folder.glob("events*"))) == 2, "it did go on"
    before = files(folder)
    code, out, err = again("quiet=false")
    assert (code, out) == (0, "run\n") and err == "bnexp: run: this run is finished, nothing is left to do\n"
    assert files(folder) == before


def test_an_empty_folder_is_a_run_not_yet_begun(again, tmp_path):
    (tmp_path / "run").mkdir()
    assert again()[0] == 0
    assert read_status(tmp_path / "run")["step"] == 6


def test_other_settings_than_the_runs_are_refused_by_name_and_those_that_change_nothing_are_not(again, tmp_path):
    again()
    interrupted(tmp_path / "run")
    before = files(tmp_path / "run")
    code, _, err = again("optimizer.lr=0.5", "seed=3", "log_every=7")
    assert code == 2 and err.startswith("bnexp: error: out=run: holds a run with other settings (")
    for words in ("optimizer.lr is 0.001 there and 0.5 here", "seed is 0 there and 3 here", "log_every is 20 there"):
        assert words in err
    assert "give those of the run, or another folder" in err
    assert files(tmp_path / "run") == before
    assert again("allow=[numpy]", "quiet=false")[0] == 0


@pytest.mark.parametrize("words", [("resume", "run"), ("train", "resume=true", "out=run")], ids="-".join)
def test_a_resumed_run_remembers_where_its_data_are(words, again, bnexp, capfd, tmp_path, mnist_root):
    (tmp_path / "old").symlink_to(mnist_root)
    assert again("data=mnist", "data.root=old", "deterministic=true")[0] == 0
    (tmp_path / "old").rename(tmp_path / "new")
    interrupted(tmp_path / "run")
    command, *rest = words
    settings = [] if command == "resume" else [*TINY, "data=mnist", "threads=1", "quiet=true", "deterministic=true"]
    before = (tmp_path / "run/config.yaml").read_text()
    (raw := tmp_path / "other/MNIST/raw").mkdir(parents=True)
    for path in (mnist_root / "MNIST/raw").glob("*.gz"):
        kind = "images" if "images" in path.name else "labels"
        (raw / path.name).symlink_to(path.with_name(f"t10k-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz"))
    capfd.readouterr()
    assert bnexp(command, *rest, *settings, "data.root=other") == 2
    assert "than data.root=other holds now" in capfd.readouterr().err
    assert bnexp(command, *rest, *settings, "data.root=nowhere") == 2
    assert (tmp_path / "run/config.yaml").read_text() == before
    assert bnexp(command, *rest, *settings, "data.root=new") == 0
    assert (tmp_path / "run/config.yaml").read_text() == before.replace("root: old", "root: new")
    interrupted(tmp_path / "run")
    assert bnexp("resume", "run") == 0
    assert bnexp("inspect", "run") == 0 and bnexp("rerun", "run", "out=another") == 0


def test_which_run_has_to_be_said(bnexp, capsys):
    assert bnexp("train", "resume=true") == 2
    assert "resume=true: which run? Name its folder too, out=DIR" in capsys.readouterr().err


def test_a_run_in_other_hands_is_left_to_them(again, tmp_path):
    again()
    interrupted(tmp_path / "run")
    with taken(tmp_path / "run"):
        code, _, err = again()
    me = f"process {os.getpid()} on {socket.gethostname()}"
    assert code == 2 and f"run: {me} (last heard of " in err and "is at work on this run; wait for it" in err


def test_a_run_just_begun_that_somebody_else_took_up_at_once_is_left_to_them(bnexp, capsys, tmp_path, monkeypatch):
    @contextmanager
    def not_ours(folder):
        yield False

    monkeypatch.setattr("bnexp.cli.train.taken", not_ours)
    assert bnexp("train", *TINY, "threads=1", "out=run") == 2
    assert "run: another process is at work on this run" in capsys.readouterr().err
    assert not (tmp_path / "run/status.json").exists()


def test_a_checkpoint_of_another_model_is_refused_by_name_and_nothing_is_lost(again, tmp_path):
    again()
    folder = tmp_path / "run"
    interrupted(folder)
    state = checkpoint.load(folder, CPU)
    state["model"].popitem()
    checkpoint.write(state, folder / "checkpoint.pt")
    before = files(folder)
    code, _, err = again()
    assert code == 2 and "run/checkpoint.pt: not of this model, " in err and "put back" in err
    assert files(folder) == before


def test_a_damaged_checkpoint_leaves_the_one_before_which_ends_alike(again, tmp_path):
    again()
    folder = tmp_path / "run"
    expected, final = lines(folder), checkpoint.load(folder, CPU)
    before = (folder / "checkpoint.previous.pt").read_bytes()
    interrupted(folder)
    shutil.move(folder / "checkpoint.pt", folder / "checkpoint.previous.pt")
    (folder / "checkpoint.pt").write_bytes(before[:-100])
    code, _, err = again()
    assert code == 0 and err.startswith("bnexp: warning: run/checkpoint.pt: not a checkpoint that can be read")
    assert "taking the one before, run/checkpoint.previous.pt, instead" in err
    assert lines(folder) == expected
    assert different(checkpoint.load(folder, CPU), final, ignore=["seconds"]) == []


# ---------------------------------------------------------------- dead or alive


def test_a_status_says_whose_it_is_and_when_it_was_last_heard_of(train):
    began = time.time()
    folder = train(*TINY)
    status = read_status(folder)
    assert (status["host"], status["pid"]) == (socket.gethostname(), os.getpid())
    assert began <= status["started"] <= status["heartbeat"] <= time.time()
    Status(folder, "cpu", [], goes_on=True)  # whoever dies now has come as far as before
    again = read_status(folder)
    assert again["status"] == "running" and all(again[key] == status[key] for key in ("step", "started", "metrics"))


def test_a_run_that_nobody_holds_is_dead_one_that_is_held_runs_and_elsewhere_nobody_knows(tmp_path):
    here, long_ago = socket.gethostname(), time.time() - 600
    for name, seed, host in (("a", 0, here), ("b", 1, here), ("c", 2, "elsewhere"), ("d", 3, None)):
        write_run(tmp_path / name, seed=seed, status="running", host=host, heartbeat=long_ago)
    with taken(tmp_path / "b"):
        found = {each.path.name: (each.status, each.reason) for each in read_runs([tmp_path])[1]}
    assert found == {
        "a": ("dead", f"died at step 7; bnexp resume {tmp_path / 'a'} continues it"),
        "b": ("running", "running at step 7"),
        "c": ("running", "running at step 7 on elsewhere, last heard of 10 minutes ago"),
        "d": ("dead", f"died at step 7; bnexp resume {tmp_path / 'd'} continues it"),
    }


def test_a_run_that_ends_while_one_looks_is_over_and_not_dead(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "a", status="running")

    def ends(path):
        status = json.loads((path / "status.json").read_text())
        (path / "status.json").write_text(json.dumps(status | {"status": "finished"}))
        return False

    monkeypatch.setattr("bnexp.report.records.is_taken", ends)
    records, problems = read_runs([tmp_path])
    assert ([each.path for each in records], problems) == ([folder], [])


def test_to_look_whether_a_run_is_held_changes_nothing_and_waits_for_nobody(tmp_path):
    assert not is_taken(tmp_path) and not list(tmp_path.iterdir())
    with taken(tmp_path):
        assert is_taken(tmp_path)
    assert not is_taken(tmp_path)
    (tmp_path / ".lock").chmod(0o400)
    with open(tmp_path / ".lock") as file:  # somebody else who looks
        fcntl.flock(file, fcntl.LOCK_SH)
        assert not is_taken(tmp_path) and file.read() == ""
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    assert not is_taken(tmp_path), "and a pipe nobody writes to is not waited for"


def test_a_lock_that_names_another_file_is_refused_and_leaves_that_as_it_is(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    Path(tmp_path / "run/.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"run/\.lock: a link"), taken(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
