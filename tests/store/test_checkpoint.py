"""Checkpoints: never a moment without a whole one, damage is noticed and the one before is used, some stay."""

import os
import random

import pytest
import torch
from test_loop import built, different, flat, lines_of, toy

from bnexp.config import check
from bnexp.config.compose import composed
from bnexp.errors import UserError
from bnexp.store import checkpoint
from bnexp.store.run_folder import Status
from bnexp.store.settings import NUMBERS, decides
from bnexp.store.writer import NullWriter, Writer
from bnexp.train.drive import drive
from bnexp.train.loop import Loop, Plan
from bnexp.train.progress import NullProgress
from bnexp.train.recorder import Recorder, merit
from bnexp.train.run import Run

CPU = torch.device("cpu")
FILES = (checkpoint.NAME, checkpoint.PREVIOUS)


def state(step):
    return {"num_steps": step, "model": {"weight": torch.arange(6.0) + step, "bias": torch.full((2,), 0.5)}}


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of step 1, the one before, and of step 2."""
    for step in (1, 2):
        checkpoint.save(state(step), tmp_path)
    return tmp_path


def model():
    """What the states above are of."""
    module = torch.nn.Module()
    module.weight, module.bias = torch.nn.Parameter(torch.zeros(6)), torch.nn.Parameter(torch.zeros(2))
    return module


# ---------------------------------------------------------------- never a moment without


@pytest.mark.parametrize("links", [True, False])
def test_at_every_moment_there_is_a_whole_checkpoint_the_old_or_the_new(links, tmp_path, monkeypatch):
    """Looked at before everything that touches the folder, which is where somebody could be killed."""
    seen, step = [], 0

    def looking(call):
        def look(*arguments, **options):
            if step > 1:
                found = checkpoint.read(tmp_path / checkpoint.NAME, CPU)["num_steps"]
                assert found in (step - 1, step)
                seen.append((call.__name__, found))
            return call(*arguments, **options)

        return look

    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    for name in ("replace", "fsync", "unlink"):
        monkeypatch.setattr(os, name, looking(getattr(os, name)))
    monkeypatch.setattr(os, "link", looking(os.link) if links else refuse)
    for step in (1, 2, 3):  # noqa: B007 (the looker reads it)
        checkpoint.save(state(step), tmp_path)
    assert seen.count(("fsync", 1)) == 1, "the file is on the disk before it takes the name"
    assert seen.count(("fsync", 2)) == 2, "and the name is on the disk when the call returns"
    assert seen.index(("fsync", 1)) < seen.index(("replace", 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert [checkpoint.read(tmp_path / name, CPU)["num_steps"] for name in FILES] == [3, 2]


# ---------------------------------------------------------------- damaged


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    path = checkpoint.save(state(1), tmp_path)
    whole = path.read_bytes()
    random.seed(0)
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << random.randrange(8)
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{path}: not a checkpoint that can be read \("):
            checkpoint.load(tmp_path, CPU)
    path.write_bytes(whole)
    assert different(flat(checkpoint.load(tmp_path, CPU)), flat(state(1))) == []


def test_what_is_cut_short_anywhere_is_noticed(tmp_path):
    path = checkpoint.save(state(1), tmp_path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole) - 100, 37), *range(len(whole) - 100, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"checkpoint\.pt: not a checkpoint that can be read"):
            checkpoint.load(tmp_path, CPU)


def harm(path, how):
    whole = path.read_bytes()
    if how == "of another model":
        path.unlink()
        checkpoint.write({"num_steps": 9, "model": {"weight": torch.zeros(7)}}, path)
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "gone":
        path.unlink()
    else:
        flipped = whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]
        path.write_bytes({"half": whole[:500], "text": b"hello", "empty": b"", "a bit": flipped}[how])


HARMS = ["half", "text", "empty", "a bit", "a folder", "of another model"]


@pytest.mark.parametrize("how", HARMS)
@pytest.mark.parametrize("mend", [False, True])
def test_instead_of_a_bad_checkpoint_the_one_before_is_taken_and_that_is_said(how, mend, two, capsys):
    harm(two / checkpoint.NAME, how)
    files = sorted(path.name for path in two.iterdir())
    assert checkpoint.load(two, CPU, model(), mend=mend)["num_steps"] == 1
    err = capsys.readouterr().err
    assert err.startswith(f"bnexp: warning: {two / checkpoint.NAME}: not ")
    assert f"taking the one before, {two / checkpoint.PREVIOUS}, instead" in err and len(err.splitlines()) == 1
    assert "delete" not in err and "put back" not in err, "there is nothing to do"
    if not mend:
        assert sorted(path.name for path in two.iterdir()) == files, "who only looks changes nothing"
        return
    assert checkpoint.load(two, CPU, model(), mend=True)["num_steps"] == 1
    checkpoint.save(state(2), two)
    assert capsys.readouterr().err == ""
    assert [checkpoint.read(two / name, CPU)["num_steps"] for name in FILES] == [2, 1], "the bad one is no one's before"
    assert (two / checkpoint.DAMAGED).exists()


def test_a_checkpoint_that_lost_its_name_leaves_the_one_before(two, capsys):
    harm(two / checkpoint.NAME, "gone")
    assert checkpoint.load(two, CPU, model(), mend=True)["num_steps"] == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("how", HARMS)
def test_without_a_good_one_each_is_named_with_what_is_wrong_and_nothing_is_moved(how, two):
    for name in FILES:
        harm(two / name, how)
    with pytest.raises(UserError) as raised:
        checkpoint.load(two, CPU, model(), mend=True)
    assert all(f"{two / name}: not " in str(raised.value) for name in FILES)
    assert ("put back" if how == "of another model" else "delete it to start anew") in str(raised.value)
    assert sorted(path.name for path in two.iterdir()) == sorted(FILES)


def test_a_checkpoint_without_a_sum_is_held_to_those_of_its_zip(tmp_path):
    """As they were written before there was one."""
    path = tmp_path / checkpoint.NAME
    torch.save(state(3), path)
    assert checkpoint.load(tmp_path, CPU)["num_steps"] == 3
    whole = bytearray(path.read_bytes())
    whole[whole.index(state(3)["model"]["weight"].numpy().tobytes())] ^= 1
    path.write_bytes(whole)
    assert flat(torch.load(path, weights_only=True)).keys() == flat(state(3)).keys(), "torch does not notice"
    with pytest.raises(UserError, match="damaged in "):
        checkpoint.load(tmp_path, CPU)


# ---------------------------------------------------------------- which stay


def kept(folder, keep, *overrides):
    """A run driven with ``keep`` into ``folder``; returns it."""
    run, plan = built("steps=11", "data.limit=64", "batch_size=16", *overrides)  # 4 steps an epoch
    recorder = Recorder(Writer(folder), Status(folder, "cpu", []), folder, keep)
    drive(Loop(run, plan, recorder), NullProgress())
    return run


def steps_of(folder, pattern="*.pt"):
    return {path.name: checkpoint.read(path, CPU)["num_steps"] for path in folder.glob(pattern)}


def test_keep_last_leaves_the_last_and_the_one_before(tmp_path):
    kept(tmp_path, "last")
    assert steps_of(tmp_path) == {"checkpoint.pt": 11, "checkpoint.previous.pt": 8}


def test_keep_all_leaves_each_by_its_step(tmp_path):
    kept(tmp_path, "all", "checkpoint_every=3")
    assert steps_of(tmp_path, "checkpoint-*.pt") == {f"checkpoint-{step}.pt": step for step in (3, 6, 9, 11)}
    assert steps_of(tmp_path)["checkpoint.pt"] == 11


@pytest.mark.parametrize("valid, tag, sign", [(50, "accuracy/valid", 1), (0, "loss/train", -1)])
def test_keep_best_leaves_the_weights_of_the_first_best_reading(valid, tag, sign, tmp_path):
    kept(tmp_path, "best", f"data.valid={valid}", "log_every=2", "eval_every=1", "optimizer.lr=3", "model=mlp")
    readings = {line["step"]: sign * line[tag] for line in lines_of(tmp_path) if tag in line}
    best = max(readings, key=readings.get)  # the first of equals
    assert steps_of(tmp_path)["best.pt"] == best
    assert len(readings) > 4 and best != max(readings), "the last one would be no test"
    again, plan = built("steps=11", "data.limit=64", "batch_size=16", f"data.valid={valid}", "log_every=2",
                        "eval_every=1", "optimizer.lr=3", "model=mlp")  # fmt: skip
    again.load_state_dict(checkpoint.read(tmp_path / "best.pt", CPU))
    if valid:
        assert again.evaluate(again.dataset.valid)[1] == readings[best]


def test_a_run_that_goes_on_keeps_a_best_from_before_and_finds_a_better_one(tmp_path):
    run = toy()
    recorder = Recorder(NullWriter(), None, tmp_path, "best", best=0.75)
    run.dataset.valid.__dict__.update(run.dataset.train.__dict__)  # as if they were for validation
    for value, expected in ((0.75, False), (float("nan"), False), (0.8, True), (0.8, False)):
        (tmp_path / "best.pt").unlink(missing_ok=True)
        recorder._save_best(run, {"accuracy/valid": value})
        assert (tmp_path / "best.pt").exists() == expected
    assert merit({}, True) < merit({"accuracy/valid": 0.0}, True)


def test_checkpoints_come_by_the_clock_if_seconds_are_asked_for(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda state, folder: saved.append(state["num_steps"]))
    step, taken = Run.step, []
    monkeypatch.setattr(Run, "step", lambda run: (taken.append(run), step(run)))
    monkeypatch.setattr("bnexp.train.loop.perf_counter", lambda: float(len(taken)))  # a step takes a second
    for wanted, expected in (("0.5s", list(range(1, 12))), ("1000000s", [11]), ("2.5s", [3, 6, 9, 11])):
        kept(tmp_path, "last", f"checkpoint_every={wanted}")
        assert saved == expected
        saved.clear()


def test_a_checkpoint_counts_the_seconds_since_the_one_before():
    plan = Plan(1, 1, None, checkpoint_seconds=60.0)
    assert [plan.wants_checkpoint(5, seconds) for seconds in (0, 59.9, 60, 61)] == [False, False, True, True]


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true", "[1]", "0s", "-5s", "s", "60m", "1e9999s", "nan", "٣s"])
def test_a_checkpoint_every_that_cannot_be_is_refused_with_what_can(value):
    cfg = composed(["model=mlp"])
    cfg.checkpoint_every = {"1.5": 1.5, "true": True, "[1]": [1], "0": 0, "-1": -1}.get(value, value)
    with pytest.raises(UserError, match=r"^checkpoint_every=.*whole number of steps, 1 or more, .* as 60s$"):
        check.check(cfg)


def test_a_keep_that_cannot_be_is_refused_with_what_can():
    with pytest.raises(UserError, match=r"^keep=some: not known; choose one of last, best, all$"):
        check.check(composed(["keep=some"]))


def test_what_is_kept_and_when_is_no_variant_of_its_own():
    assert not any(decides(key) & NUMBERS for key in ("keep", "checkpoint_every", "resume"))
