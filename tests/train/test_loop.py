"""The loop: what is seen is what was trained, whoever looks, stops or goes on; and every end is a clean one."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from bnexp.config import build, check
from bnexp.config.compose import composed
from bnexp.data.batches import Batches
from bnexp.data.dataset import Dataset, Split
from bnexp.errors import StorageError
from bnexp.optim import constant, make_optimizer
from bnexp.startup import SIGNALS
from bnexp.store import checkpoint, files
from bnexp.store.run_folder import Status, read_status
from bnexp.store.writer import NullWriter, Writer
from bnexp.train.drive import drive
from bnexp.train.interrupt import raised_signals
from bnexp.train.loop import Loop, Plan
from bnexp.train.progress import NullProgress
from bnexp.train.recorder import Recorder
from bnexp.train.run import Run

# What a clock measures is never the same twice; everything else is.
CLOCKED = ("seconds", "time/setup", "time/step", "throughput/images_per_s")
SMALL = ("threads=1", "device=cpu", "batch_size=32")


def lines_of(folder):
    """metrics.jsonl without what clocks measure."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in lines]


def built(*overrides):
    """A run and its plan."""
    cfg = composed([*SMALL, *overrides])
    check.check(cfg)
    run = build.build(cfg)
    return run, build.plan_of(cfg, run.batches.steps_per_epoch)


class Keep(NullWriter):
    """Keeps lines in a list."""

    def __init__(self):
        self.lines = []

    def write(self, step, epoch, seconds, readings):
        metrics = super().write(step, epoch, seconds, readings)
        self.lines.append({"step": step} | {k: v for k, v in metrics.items() if k not in CLOCKED})
        return metrics


def recorded_in(folder):
    """A recorder that writes into ``folder``."""
    return Recorder(Writer(folder), Status(folder, "cpu", []), folder)


def driven(*overrides):
    """A finished run and its lines, nothing written anywhere."""
    run, plan = built(*overrides)
    writer = Keep()
    assert drive(Loop(run, plan, Recorder(writer)), NullProgress()) == "finished"
    return run, writer.lines


def flat(state):
    """Every tensor and number of a nested state, by path."""
    if isinstance(state, dict):
        return {f"{key}.{rest}": value for key, item in state.items() for rest, value in flat(item).items()}
    if isinstance(state, list | tuple):
        return flat(dict(enumerate(state)))
    return {"": state}


def is_same(one, two):
    return torch.equal(one, two) if torch.is_tensor(one) and torch.is_tensor(two) else one == two


def different(one, two, ignore=()):
    """The paths at which two states differ by as much as a bit."""
    one, two = flat(one), flat(two)
    same = {k for k in one.keys() & two.keys() if is_same(one[k], two[k])}
    return sorted(path for path in (one.keys() | two.keys()) - same if not path.startswith(tuple(ignore)))


def state_of(run):
    """All that a run has become; the meter holds what has not been read, which is the observer's business."""
    state = run.state_dict()
    return {key: state[key] for key in ("num_steps", "model", "optimizer", "batches", "scaler")}


# ---------------------------------------------------------------- reproducible, and untouched by observation


def test_the_same_seed_gives_the_same_curve_bit_for_bit_and_another_seed_another(train):
    overrides = ("batch_size=64", "epochs=1", "log_every=5", "data.augment=crop_flip")
    one, two, other = train(*overrides), train(*overrides), train(*overrides, "seed=1")
    assert lines_of(one) == lines_of(two)
    assert [line["step"] for line in lines_of(one)] == [5, 10, 15, 20]
    assert all(a["loss/train"] != b["loss/train"] for a, b in zip(lines_of(one), lines_of(other), strict=True))
    states = [checkpoint.load(folder, torch.device("cpu")) for folder in (one, two, other)]
    assert different(states[0], states[1], ignore=["seconds"]) == []
    assert "model.conv1.weight." in different(states[0], states[2])


def test_observing_changes_nothing():
    base = ("steps=11", "data.limit=150", "data.augment=crop_flip", "optimizer=adam")
    reference, _ = driven(*base)
    for watched in (
        ["log_every=1", "eval_every=1", "eval_train=true", "checkpoint_every=1"],
        ["log_every=3", "eval_every=4"],
        ["log_every=1000", "eval_every=1000"],
    ):
        assert different(state_of(reference), state_of(driven(*base, *watched)[0])) == []


def test_checkpoints_and_progress_change_nothing(train, tmp_path):
    base = ("steps=7", "data.limit=100", "batch_size=32")
    often = train(*base, "checkpoint_every=1", "log_every=1", "quiet=false")
    once = train(*base, "checkpoint_every=1000")
    states = [checkpoint.load(folder, torch.device("cpu")) for folder in (often, once)]
    assert different(*states, ignore=["seconds"]) == []


def test_the_observer_sees_the_same_numbers_however_often_others_look():
    base = ("steps=8", "data.limit=100")
    each = {line["step"]: line for line in driven(*base, "log_every=1", "eval_every=1")[1]}
    for line in driven(*base, "log_every=4", "eval_every=2")[1]:
        assert line["loss/valid"] == each[line["step"]]["loss/valid"]
        if "loss/train" in line:  # every batch has 32 images, so the mean of the four steps' means
            steps = range(line["step"] - 3, line["step"] + 1)
            assert line["loss/train"] == pytest.approx(sum(each[s]["loss/train"] for s in steps) / 4, rel=1e-12)
            assert line["accuracy/train"] == pytest.approx(sum(each[s]["accuracy/train"] for s in steps) / 4)


def in_float64(run):
    run.model.double()
    forward = run.model.forward
    run.model.forward = lambda images: forward(images.double())


def trained(norm, optimizer, convert=lambda run: None):
    run, plan = built("epochs=1", "log_every=1", f"optimizer={optimizer}", f"norm={norm}")  # 40 steps
    convert(run)
    writer = Keep()
    drive(Loop(run, plan, Recorder(writer)), NullProgress())
    return [line["loss/train"] for line in writer.lines] + [writer.lines[-1]["loss/valid"]]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_scratch_and_library_train_alike_to_float_rounding(optimizer):
    scratch, library, none = (trained(norm, optimizer) for norm in ("scratch", "library", "none"))
    gaps = [abs(a - b) for a, b in zip(scratch, library, strict=True)]
    # Losses are about 1 and float32 has an eps of 1.2e-7. Rounding differs from the first step on and training
    # amplifies it: Adam divides small gradients by their own size, and a max pooling that picks another of two
    # nearly equal pixels jumps by up to 1e-3 (seen: 5e-4 in an epoch).
    assert max(gaps[:3]) < 5e-6
    assert max(gaps) < (2e-5 if optimizer == "sgd" else 5e-3)
    assert abs(none[0] - library[0]) > 1e-2


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_in_float64_they_train_alike_to_nine_digits(optimizer):
    """No jump hides anything here: an eps of 2e-16, amplified like that of float32, stays below 1e-9."""
    scratch, library = (trained(norm, optimizer, in_float64) for norm in ("scratch", "library"))
    assert max(abs(a - b) for a, b in zip(scratch, library, strict=True)) < 1e-9


# ---------------------------------------------------------------- when and what is read


def test_readings_come_when_they_are_due():
    _, lines = driven("steps=9", "data.limit=100", "log_every=2", "eval_train=true")  # 3 steps an epoch
    trained = [line["step"] for line in lines if "loss/train" in line]
    valid = [line["step"] for line in lines if "loss/valid" in line]
    assert trained == [2, 4, 6, 8, 9]
    assert valid == [line["step"] for line in lines if "accuracy/train_eval" in line] == [3, 6, 9]
    assert [line["step"] for line in lines if "loss/test" in line] == [9]


def test_without_validation_and_test_images_there_is_nothing_to_report_on_them():
    run, plan = built("steps=3", "data.limit=100", "data.valid=0")
    object.__setattr__(run.dataset, "test", run.dataset.valid)
    writer = Keep()
    drive(Loop(run, plan, Recorder(writer)), NullProgress())
    tags = set().union(*writer.lines)
    assert not {"loss/valid", "loss/test", "accuracy/valid", "accuracy/test"} & tags
    assert "loss/train" in tags


@pytest.mark.parametrize("batch_size, drop_last", [(16, False), (16, True), (40, True)])
def test_training_readings_are_means_over_images(batch_size, drop_last):
    """With a learning rate of 0 and no norm, the mean over an epoch's images is the evaluation of them all."""
    run = toy(num_images=40, batch_size=batch_size, drop_last=drop_last, lr=0.0, num_steps=3 if not drop_last else 2)
    seen = run.dataset.train
    if batch_size == 16 and drop_last:  # the first 32 of the epoch's order
        seen = seen.take(run.batches.order[:32])
    while run.num_steps < -(-len(seen) // batch_size):
        run.step()
    measured = run.meter.read()
    assert len(measured.losses) == -(-len(seen) // batch_size)
    # Both are float32 sums over at most 40 losses of about 2, in another order.
    assert (measured.loss, measured.accuracy) == (pytest.approx(run.evaluate(seen)[0], rel=1e-6), run.evaluate(seen)[1])


def test_the_reading_of_unequal_batches_equals_the_computation_by_hand():
    run = toy(num_images=40, batch_size=16, drop_last=False, lr=0.1)
    twin = toy(num_images=40, batch_size=16, drop_last=False, lr=0.1)
    total, hits = 0.0, 0
    for size in (16, 16, 8):
        images, labels = twin.batches.next()
        assert len(labels) == size
        logits = twin.model(images)
        loss = cross_entropy(logits, labels)
        total += loss.item() * size
        hits += int((logits.argmax(1) == labels).sum())
        twin.optimizer.zero_grad()
        loss.backward()
        twin.optimizer.step()
        run.step()
    measured = run.meter.read()
    assert (measured.loss, measured.accuracy) == (pytest.approx(total / 40, rel=1e-12), hits / 40)
    run.step()
    assert len(run.meter.read().losses) == 1, "reading starts anew"


def test_evaluation_is_over_the_whole_set_in_evaluation_mode_and_leaves_no_trace():
    run, _ = built("batch_size=64", "data.valid=700")  # more than one chunk, and the last one is short
    for _ in range(3):
        run.step()
    split, before = run.dataset.valid, state_of(run)
    before = {key: value.clone() if torch.is_tensor(value) else value for key, value in flat(before).items()}
    loss, accuracy = run.evaluate(split)
    assert different(before, flat(state_of(run))) == []
    assert all(module.training for module in run.model.modules())
    run.model.eval()
    with torch.no_grad():
        logits = run.model(run.dataset.prepare(split.images)).double()
    # The reference sums in float64 what the run sums in float32.
    assert loss == pytest.approx(cross_entropy(logits, split.labels).item(), rel=1e-6)
    assert accuracy == (logits.argmax(1) == split.labels).double().mean().item()
    assert len(split) == 700


UNTRACKED = ("model=mlp", "norm=library", "norm.track_running_stats=false", "batch_size=64")


def by_class(split):
    """The same images, sorted by class, as files in folders are."""
    order = split.labels.argsort(stable=True)
    return Split(split.images[order], split.labels[order])


def test_an_evaluation_by_batch_statistics_does_not_depend_on_the_order_of_the_images():
    run, _ = built(*UNTRACKED, "data.valid=700")
    for _ in range(60):
        run.step()
    split = run.dataset.valid
    results = {name: run.evaluate(each) for name, each in (("as it is", split), ("by class", by_class(split)))}
    accuracies = [accuracy for _, accuracy in results.values()]
    # Other neighbours still move images at the edge between two classes: 3 of 700 here. In stored order, of which a
    # chunk has half of the classes, it is 200.
    assert min(accuracies) > 0.85 and max(accuracies) - min(accuracies) < 0.02
    assert run.evaluate(split) == results["as it is"], "always the same order"


@pytest.mark.parametrize("num_images, sizes", [(3, [3]), (512, [512]), (513, [257, 256]), (700, [350, 350])])
def test_chunks_of_an_evaluation_by_batch_statistics_are_shuffled_and_of_equal_size(num_images, sizes):
    run, _ = built(*UNTRACKED, f"data.valid={num_images}")
    chunks = run.chunks(run.dataset.valid, run.model.eval())
    assert [len(chunk) for chunk in chunks] == sizes
    assert torch.equal(torch.cat(chunks).sort().values, torch.arange(num_images))
    loss, _ = run.evaluate(run.dataset.valid)
    assert loss < 10, "no chunk is a single image, which a norm refuses"


def test_other_evaluations_keep_the_stored_order_whose_sums_keep_their_bits():
    for norm in ("none", "library", "group"):
        run, _ = built("model=mlp", f"norm={norm}", "data.valid=700", "batch_size=64")
        assert run.chunks(run.dataset.valid, run.model.eval()) == [slice(0, 512), slice(512, 1024)]


def test_the_status_says_how_a_run_was_evaluated_by_batch_statistics(train):
    folders = {norm: train(*UNTRACKED, f"norm={norm}", "steps=1") for norm in ("library", "scratch")}
    for folder in folders.values():
        assert read_status(folder)["evaluation"] == "batch statistics over shuffled chunks of at most 512 images"
    assert "evaluation" not in read_status(train("model=mlp", "norm=library", "steps=1"))


class Synchronizations(TorchDispatchMode):
    """Counts how often the host asks for a tensor's value."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_step_never_asks_the_device_for_a_value(optimizer):
    run, _ = built("data.limit=64", f"optimizer={optimizer}", "data.augment=crop_flip", "norm=scratch")
    with Synchronizations() as seen:
        for _ in range(5):  # over the end of an epoch too
            run.step()
        assert seen.count == 0
        run.meter.read()
        assert seen.count > 0


# ---------------------------------------------------------------- put away and taken up again


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=sgd", "optimizer.momentum=0.9", "schedule=cosine"],
        ["optimizer=adam", "data.augment=crop_flip", "norm=scratch"],
        ["optimizer=adamw", "drop_last=false", "model=mlp"],
        ["precision=fp16", "optimizer=adam"],
    ],
    ids=" ".join,
)
def test_a_run_continues_from_a_checkpoint_bit_for_bit(overrides, tmp_path):
    """Put away at step 5: in the middle of an epoch of 4 steps and, with log_every=3, between two readings."""
    base = ("steps=11", "data.limit=128", "log_every=3", *overrides)
    run, plan = built(*base)
    writer = Keep()
    loop = Loop(run, plan, Recorder(writer))
    for _ in range(5):
        loop.step()
    checkpoint.save(run.state_dict(), tmp_path)
    assert drive(loop, NullProgress()) == "finished"
    again, _ = built(*base)
    again.load_state_dict(checkpoint.load(tmp_path, torch.device("cpu")))
    assert again.num_steps == 5
    rest = Keep()
    drive(Loop(again, plan, Recorder(rest)), NullProgress())
    assert rest.lines == [line for line in writer.lines if line["step"] > 5]
    assert different(state_of(run), state_of(again)) == []


def test_a_checkpoint_is_a_copy_and_does_not_move_on_with_the_run(tmp_path):
    run, _ = built("data.limit=64")
    run.step()
    path = checkpoint.save(run.state_dict(), tmp_path)
    before = path.read_bytes()
    run.step()
    assert path.read_bytes() == before
    assert checkpoint.load(tmp_path, torch.device("cpu"))["num_steps"] == 1


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path, monkeypatch):
    run, _ = built("data.limit=64")
    checkpoint.save(run.state_dict(), tmp_path)
    run.step()

    def dies(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(run.state_dict(), tmp_path)
    assert checkpoint.load(tmp_path, torch.device("cpu"))["num_steps"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


# ---------------------------------------------------------------- divergence is a result


class Toy(nn.Module):
    """A linear model whose logits turn into ``bad`` at the given training step."""

    def __init__(self, bad_step=None, bad=float("nan")):
        super().__init__()
        self.linear = nn.Linear(64, 4)
        self.calls, self.bad_step, self.bad = 0, bad_step, bad

    def forward(self, x):
        self.calls += self.training
        logits = self.linear(x.flatten(1))
        return logits * self.bad if self.training and self.calls == self.bad_step else logits


def toy(*, num_images=40, batch_size=10, drop_last=True, lr=0.1, num_steps=12, bad_step=None, bad=float("nan")):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (num_images,), generator=generator)
    split, none = Split(images, labels), Split(images[:0], labels[:0])
    dataset = Dataset("toy", split, none, none, tuple("abcd"), (1, 8, 8), torch.tensor([0.5]), torch.tensor([0.3]))
    torch.manual_seed(0)
    model = Toy(bad_step, bad)
    optimizer = make_optimizer(lambda groups: torch.optim.SGD(groups, lr=lr), model)
    batches = Batches(dataset, batch_size, 0, drop_last=drop_last)
    return Run(model, optimizer, batches, total_steps=num_steps, schedule=constant)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad_step", [1, 2, 4, 5, 8, 9, 10, 12])  # readings at 4, 8 and 12
def test_divergence_is_reported_at_its_step_with_the_last_finite_loss(bad_step, bad, tmp_path):
    healthy = Keep()
    drive(Loop(toy(), Plan(1, 100, 100), Recorder(healthy)), NullProgress())
    losses = [line["loss/train"] for line in healthy.lines]
    run = toy(bad_step=bad_step, bad=bad)
    ended = drive(Loop(run, Plan(4, 100, 100), recorded_in(tmp_path)), NullProgress())
    status = read_status(tmp_path)
    assert ended == status["status"] == "diverged"
    assert status["diverged_step"] == bad_step
    assert status["last_finite_loss"] == (losses[bad_step - 2] if bad_step > 1 else None)
    assert status["step"] == -(-bad_step // 4) * 4, "noticed at the next reading"
    assert [line["step"] for line in lines_of(tmp_path)] == [s for s in (4, 8, 12) if s < bad_step]


def test_a_diverged_run_exits_with_0_and_leaves_a_readable_folder(train, capsys):
    folder = train("optimizer=sgd", "optimizer.lr=1e20", "norm=none", "epochs=2", "log_every=5", "quiet=false")
    out, err = capsys.readouterr()
    assert err == ""
    assert "diverged" in out
    assert out.splitlines()[-1] == folder.name
    status = read_status(folder)
    assert status["status"] == "diverged"
    assert 1 < status["diverged_step"] <= 5
    assert status["last_finite_loss"] > 0
    for text in ((folder / "status.json").read_text(), (folder / "metrics.jsonl").read_text()):
        assert "NaN" not in text and "Infinity" not in text, "neither is JSON"


# ---------------------------------------------------------------- interrupted


class Asks(NullProgress):
    """Somebody who presses Ctrl-C when step ``at`` is shown, ``times`` times."""

    def __init__(self, at, number=signal.SIGINT, times=1):
        self.at, self.number, self.times, self.ended = at, number, times, None

    def update(self, loop):
        if loop.run.num_steps == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)

    def end(self, loop):
        self.ended = loop.status


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint_that_continues_bit_for_bit(number, tmp_path):
    base = ("steps=9", "data.limit=128", "log_every=2")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    whole, lines = driven(*base)
    run, plan = built(*base)
    recorder = recorded_in(tmp_path)
    progress = Asks(5, number)
    with pytest.raises(KeyboardInterrupt):
        drive(Loop(run, plan, recorder), progress)
    status = read_status(tmp_path)
    assert (status["status"], status["step"], progress.ended) == ("interrupted", 5, "interrupted")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4]
    again, _ = built(*base)
    again.load_state_dict(checkpoint.load(tmp_path, torch.device("cpu")))
    writer = Keep()
    drive(Loop(again, plan, Recorder(writer)), NullProgress())
    assert writer.lines == [line for line in lines if line["step"] > 5]
    assert different(state_of(whole), state_of(again)) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_the_process_ignores_stays_ignored(number, tmp_path):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        run, plan = built("steps=4", "data.limit=128")
        with raised_signals():
            assert drive(Loop(run, plan, recorded_in(tmp_path)), Asks(2, number)) == "finished"
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_progress_that_cannot_be_shown_leaves_a_checkpoint(tmp_path):
    class Closed(NullProgress):
        def update(self, loop):
            if loop.run.num_steps == 3:
                raise OSError(5, "Input/output error")

    run, plan = built("steps=9", "data.limit=128")
    with pytest.raises(OSError, match="Input/output"):
        drive(Loop(run, plan, recorded_in(tmp_path)), Closed())
    assert read_status(tmp_path)["status"] == "interrupted"
    assert checkpoint.load(tmp_path, torch.device("cpu"))["num_steps"] == 3


def test_asking_twice_breaks_off_at_once(tmp_path):
    run, plan = built("steps=9", "data.limit=128")
    with pytest.raises(KeyboardInterrupt):
        drive(Loop(run, plan, recorded_in(tmp_path)), Asks(2, times=2))
    assert read_status(tmp_path)["status"] == "interrupted"


def test_ctrl_c_ends_the_command_with_130_a_checkpoint_and_the_folder_as_last_line(tmp_path):
    arguments = ["train", "epochs=100000", "log_every=1", "threads=1", "out=run"]
    with subprocess.Popen(
        [sys.executable, "-m", "bnexp", *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "bnexp: interrupted"
    assert out.splitlines()[-1] == "run"
    status = read_status(tmp_path / "run")
    state = checkpoint.load(tmp_path / "run", torch.device("cpu"))
    assert status["status"] == "interrupted"
    assert state["num_steps"] == status["step"] == lines_of(tmp_path / "run")[-1]["step"]


# ---------------------------------------------------------------- failed


@contextmanager
def no_file_beyond(num_bytes):
    """As if the disk were full: no file grows beyond ``num_bytes``, write(2) fails (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "num_bytes, overrides",
    [
        pytest.param(200_000, ["checkpoint_every=2"], id="checkpoint"),
        pytest.param(8_000, ["checkpoint_every=1000", "log_every=1"], id="metrics"),
    ],
)
def test_a_full_disk_stops_the_run_with_a_clear_message_and_what_was_written_stays_readable(
    num_bytes, overrides, bnexp, tmp_path, capfd
):
    arguments = ("train", "steps=100", "data.limit=64", "batch_size=32", "threads=1", "quiet=true", "out=run")
    with no_file_beyond(num_bytes):
        code = bnexp(*arguments, *overrides)
    out, err = capfd.readouterr()
    folder = tmp_path / "run"
    assert code == 1
    assert err.startswith("bnexp: error: the run stopped at step ")
    assert "stays readable in run; the file system takes no files of this size; choose another" in err
    assert len(err.splitlines()) == 1
    assert out.splitlines()[-1] == "run"
    lines = lines_of(folder)  # every line parses
    status = read_status(folder)
    assert status["status"] == "failed"
    assert "File too large" in status["error"]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert not list(folder.glob(".*checkpoint*")) and not list(folder.glob(".status*"))


class Full(io.FileIO):
    """A file on a disk with room for 100,000 bytes; a write beyond is cut off, the next one fails."""

    def write(self, data):
        room = 100_000 - self.tell()
        if not room:
            raise OSError(28, "No space left on device")
        return super().write(memoryview(data).cast("B")[:room])


def test_a_disk_full_while_a_checkpoint_is_written_is_told_and_not_what_torch_makes_of_it(tmp_path, monkeypatch):
    run, plan = built("steps=6", "data.limit=64", "log_every=1", "checkpoint_every=2")
    recorder = recorded_in(tmp_path)

    def open_full(path, *how, **more):
        is_checkpoint = Path(path).name == ".checkpoint.pt.new"
        return io.BufferedRandom(Full(path, "x+")) if is_checkpoint else open(path, *how, **more)

    monkeypatch.setattr(files, "open", open_full, raising=False)
    with pytest.raises(StorageError, match="stopped at step 2 .* No space left on device"):
        drive(Loop(run, plan, recorder), NullProgress())
    path = tmp_path / "checkpoint.pt"
    assert read_status(tmp_path)["error"] == f"OSError: [Errno 28] No space left on device: '{path}'"
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_a_disk_without_room_for_the_status_either_still_ends_with_the_message(tmp_path, monkeypatch):
    monkeypatch.setattr("bnexp.store.run_folder.STATUS_EVERY", 0.0)
    run, plan = built("steps=6", "data.limit=64", "log_every=1", "checkpoint_every=100")
    recorder = recorded_in(tmp_path)
    update, calls = Status.update, []

    def full(self, *args, **fields):
        calls.append(fields)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        update(self, *args, **fields)

    monkeypatch.setattr(Status, "update", full)
    with pytest.raises(StorageError, match="stopped at step 3 .* No space left"):
        drive(Loop(run, plan, recorder), NullProgress())
    assert read_status(tmp_path)["step"] == 2, "the status before stays whole"


def test_a_fault_of_ours_is_recorded_and_passed_on(tmp_path):
    run = toy()
    run.schedule = {0: 1.0, 1: 1.0}.__getitem__
    with pytest.raises(TypeError):
        drive(Loop(run, Plan(1, 100, 100), recorded_in(tmp_path)), NullProgress())
    status = read_status(tmp_path)
    assert status["status"] == "failed"
    assert status["error"].startswith("TypeError: ") and "\n" not in status["error"]
    assert "Traceback" in status["traceback"] and "run.py" in status["traceback"]


# ---------------------------------------------------------------- precision and memory format


@pytest.mark.parametrize("norm", ["none", "scratch", "library"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_on_the_cpu_with_weights_and_statistics_in_float32(precision, norm):
    base = ("steps=12", "data.limit=200", "log_every=1", f"norm={norm}")
    (run, lines), (_, reference) = driven(*base, f"precision={precision}"), driven(*base)
    assert {value.dtype for value in run.model.state_dict().values()} <= {torch.float32, torch.int64}
    gaps = [abs(a["loss/train"] - b["loss/train"]) for a, b in zip(lines, reference, strict=True)]
    # bfloat16 keeps 8 bits, float16 11: logits of size 1 are off by up to 1/256 and the losses by as much per step.
    assert max(gaps) < 0.1
    assert max(gaps) > 0, "it really computes in another precision"


def test_channels_last_changes_the_memory_format_and_nothing_else():
    base = ("steps=6", "data.limit=100", "log_every=1", "data.size=16", "model=resnet", "model.stem=cifar")
    base += ("model.widths=[8,16]", "model.blocks=[1,1]", "batch_size=16")
    (run, lines), (plain, reference) = driven(*base, "channels_last=true"), driven(*base)
    seen = []
    run.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run.step()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    weights = [p for p in run.model.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    gaps = [abs(a["loss/train"] - b["loss/train"]) for a, b in zip(lines, reference, strict=True)]
    assert max(gaps) < 1e-3  # other kernels, other order of summation, Adam amplifies it over six steps
    assert [tuple(p.shape) for p in run.model.parameters()] == [tuple(p.shape) for p in plain.model.parameters()]
