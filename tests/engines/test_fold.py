"""Folded runs: many computed as one are what each is alone, up to rounding; what cannot be folded is refused."""

import os
import signal
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tape import Tape
from test_loop import Synchronizations, different, flat
from test_models import NORMS
from test_sweep import SMALL, numbers, statuses, table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnexp.cli.sweep.grid import Job
from bnexp.cli.sweep.lockstep import together
from bnexp.config import build
from bnexp.config.compose import composed
from bnexp.engines import fold
from bnexp.engines.capture import warn_uncaptured
from bnexp.engines.fold import Fold, Stack
from bnexp.engines.graph_fold import CapturedStack
from bnexp.errors import UserError
from bnexp.optim import place_learning_rates
from bnexp.store.run_folder import read_status
from bnexp.store.writer import NullWriter
from bnexp.train.drive import Group, lockstep
from bnexp.train.interrupt import OutOfPatience
from bnexp.train.loop import Loop, Plan
from bnexp.train.recorder import Recorder
from bnexp.train.run import Run

# 40 training images: steps of 16, 16 and 8, so that the short last batch of an epoch is among them.
BASE = ("threads=1", "device=cpu", "data.limit=40", "data.valid=0", "batch_size=16", "drop_last=false", "steps=9")
MLP = ("model=mlp", "model.hidden=[8]", "data.size=8")
LENET = ("model=lenet", "data.size=16")
OPTIONS = {
    "ghost": ("norm.virtual_batch=8",),
    "group": ("norm.groups=layer",),
    "renorm": ("norm.warmup_steps=1", "norm.r_steps=2", "norm.d_steps=2"),  # r and d move within these few steps
}
FOLDABLE = [norm for norm in NORMS if norm != "fused"]
# The corners of a digit are black in every image. What such a pixel's weight adds is the same for all images and a norm
# takes it out again, so its gradient is rounding alone; Adam would make full steps of it, but for this eps.
ADAM = ("optimizer=adam", "optimizer.eps=1e-4")
OPTIMIZERS = {
    "sgd": ("optimizer=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.1", "optimizer.weight_decay=0.01"),
    "adam": ADAM,
    "adamw": ("optimizer=adamw", "optimizer.eps=1e-4", "optimizer.weight_decay=0.1"),
}
# Sums in another order: an eps of 2e-16, some sums of a thousand terms, a few steps. Seen: 1e-13.
EXACT = 1e-12


DATASETS = {}  # that runs share, as those of one command do
composed = cache(composed)


def members(*overrides, rates=(3, 1, 3), double=True):
    """Runs with the seeds 0, 1, ... and these multiples of the learning rate, in float64."""
    cfg, runs = composed((*BASE, *overrides)), []
    for cfg.seed, rate in enumerate(rates):
        runs.append(build.build(cfg, DATASETS))
        for group in runs[-1].optimizer.param_groups:
            group["base_lr"] *= rate
        if double:
            runs[-1].model.double().register_forward_pre_hook(lambda model, images: (images[0].double(),))
    return runs


def in_turn(runs, num_steps):
    for _ in range(num_steps):
        for run in runs:
            run.step()
    return runs


def as_one(fold, runs, num_steps):
    for _ in range(num_steps):
        fold.step(runs)
    return runs


def gap(one, two):
    """The largest difference between the floats of two runs' states; all else in them is the same to the bit."""
    one, two = (flat({**run.state_dict(), "seconds": 0}) for run in (one, two))
    assert one.keys() == two.keys() and len(one) > 20
    floats = [key for key, value in one.items() if torch.is_tensor(value) and value.is_floating_point()]
    assert not [key for key in different(one, two) if key.rstrip(".") not in {each.rstrip(".") for each in floats}]
    return max(float((one[key].double() - two[key].double()).abs().max()) for key in floats)


def gaps(*overrides, num_steps=4, **options):
    """How far folded runs are from the same runs one by one, each."""
    alone, together = (members(*overrides, **options) for _ in range(2))
    return [gap(*pair) for pair in zip(in_turn(alone, num_steps), as_one(Fold(), together, num_steps), strict=True)]


# ---------------------------------------------------------------- the same as alone


def thinned():
    """Every norm in both models, every optimizer with both models; each norm with another optimizer in each."""
    names = list(OPTIMIZERS)
    for i, norm in enumerate(FOLDABLE):
        yield norm, "mlp", names[i % 3]
        yield norm, "lenet", names[(i + 1) % 3]


@pytest.mark.parametrize("norm, model, optimizer", list(thinned()))
def test_folded_runs_are_what_each_is_alone(norm, model, optimizer):
    """Losses, hits, weights, running statistics and their counts, optimizer state, batches: all that a state holds."""
    size = {"mlp": MLP, "lenet": LENET}[model]
    assert max(gaps(*size, f"norm={norm}", *OPTIONS.get(norm, ()), *OPTIMIZERS[optimizer])) < EXACT


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=resnet", "model.stem=cifar", "model.blocks=[1,1]", "model.widths=[4,8]", "data.size=8"),
        ("model=densenet", "model.growth=2", "model.blocks=[1,2]", "model.stem_width=4", "data.size=16"),
        (*MLP, "norm=scratch", "norm.zero_debias=true", "norm.running_var_init=0", "norm.scale=false"),
        (*MLP, "norm=scratch", "norm.decay_warmup=true"),
        (*MLP, "norm.track_running_stats=false", "norm.affine=false"),
        (*MLP, "data.augment=crop_flip", "schedule=cosine", "schedule.warmup_steps=2"),
        (*MLP, "classes_per_batch=6", "optimizer.fused=false", "optimizer.amsgrad=true"),
        (*MLP, "optimizer=other", "optimizer._target_=torch.optim.RMSprop", "+optimizer.eps=1e-4"),
    ],
    ids=["resnet", "densenet", "debias", "warmup", "untracked", "augment", "few-classes", "rmsprop"],
)
def test_so_are_those_of_other_models_options_data_and_optimizers(overrides):
    adam = () if "optimizer=other" in overrides else ADAM
    changed = [f"+{each}" if "amsgrad" in each else each for each in overrides]
    assert max(gaps(*changed, *adam, num_steps=3)) < EXACT


def test_in_float32_they_differ_by_its_rounding():
    """Of values about 1, in sums over 16 images and 64 pixels: less than 100 times the eps of 1.2e-7, seen 5e-7."""
    smooth = (*MLP, "model.activation=tanh", "optimizer=sgd", "optimizer.lr=0.1")  # relu would jump now and then
    assert 0 < max(gaps(*smooth, double=False)) < 1e-5


def test_weights_with_like_numbers_are_moved_by_one_call():
    runs = members(*MLP, *ADAM, rates=(1, 2, 1, 2, 1))
    folded = Fold()
    folded.step(runs)
    groups = folded.stack.joint.optimizer.param_groups
    assert [len(part) for group in groups for part in group["params"][:1]] == [3, 3, 2, 2]  # two groups of each rate
    assert [group["base_lr"] for group in groups] == [1e-3, 1e-3, 2e-3, 2e-3]


@pytest.mark.parametrize("norm", ["scratch", "renorm"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_folded_step_never_asks_the_device_for_a_value(norm, optimizer):
    runs = members(*MLP, f"norm={norm}", *OPTIMIZERS[optimizer])
    with Synchronizations() as seen:
        as_one(Fold(), runs, 4)
        assert seen.count == 0
        runs[0].meter.read()
        assert seen.count > 0


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_drawing_together_gives_the_batches_that_each_would_draw(augment):
    one, two = (members(*MLP, f"data.augment={augment}") for _ in range(2))
    for _ in range(4):  # into the second epoch
        images, labels = fold.draw_batches([run.batches for run in one])
        for i, run in enumerate(two):
            for got, expected in zip((images[i], labels[i]), run.batches.next(), strict=True):
                assert torch.equal(got, expected)


# ---------------------------------------------------------------- one among others


def looped(runs, log_every=1, eval_every=100):
    plan = Plan(log_every=log_every, eval_every=eval_every, checkpoint_every=100)
    return [Loop(run, plan, Recorder(NullWriter())) for run in runs]


def raced(loops, *alone):
    """How the loops, in a fold, and those beside it end."""
    for _ in lockstep([Group(loops, Fold().step), *(Group([loop]) for loop in alone)]):
        pass
    return [loop.status for loop in (*loops, *alone)]


def test_a_run_that_diverges_harms_no_other_and_is_moved_no_more():
    alone, together = (members(*MLP, *ADAM, rates=(1, 1e200, 1)) for _ in range(2))
    loops, state = looped(together, log_every=2), []

    def end(*_, **__):
        state.append(flat(together[1].state_dict()["model"]))

    loops[1].recorder.end = end
    assert raced(loops) == ["finished", "diverged", "finished"]
    for i in (0, 2):
        in_turn([alone[i]], 9)[0].meter.clear()
        assert gap(alone[i], together[i]) < EXACT
    at_the_end = flat(together[1].state_dict()["model"])
    assert together[1].num_steps < 5 and not all(value.isfinite().all() for value in at_the_end.values())
    assert all(torch.equal(state[0][key].nan_to_num(), at_the_end[key].nan_to_num()) for key in at_the_end)


def test_gradients_that_are_not_finite_are_counted_for_their_run():
    alone, together = (members(*MLP, "optimizer=sgd", rates=(1, 1e200, 1)) for _ in range(2))
    found = [[float(each) for each in run.meter.found] for run in in_turn(alone, 4) + as_one(Fold(), together, 4)]
    assert found[:3] == found[3:] and sum(found[1]) > 0 == sum(found[0] + found[2])
    for one, two in zip(alone[0].model.parameters(), together[0].model.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=0, atol=EXACT), "and everybody has his gradients"


def test_a_step_that_fails_fails_for_all_of_the_fold_and_for_nobody_else(monkeypatch):
    take = Stack.take

    def fail(stack):
        if stack.runs[0].num_steps == 3:
            raise RuntimeError("out of luck")
        return take(stack)

    monkeypatch.setattr(Stack, "take", fail)
    loops = looped(members(*MLP))
    assert raced(loops[:2], loops[2]) == ["failed", "failed", "finished"]
    assert [each.run.num_steps for each in loops] == [3, 3, 9]
    assert [str(each.error) for each in loops] == ["out of luck", "out of luck", "None"]


def test_a_look_that_fails_fails_for_its_run_alone(monkeypatch):
    loops = looped(members(*MLP))
    loops[1].recorder.write = None
    assert raced(loops) == ["finished", "failed", "finished"]
    assert [each.run.num_steps for each in loops] == [9, 1, 9]


@pytest.mark.parametrize("where", ["in the step", "at the second look"])
def test_a_step_that_is_broken_off_is_saved_as_of_the_step_before(where, monkeypatch):
    """Whether the weights are anywhere, or the step was taken and two of three runs were not yet looked at."""
    monkeypatch.setattr("bnexp.train.loop.LONG", 0.0)
    loops, saved = looped(members(*MLP), eval_every=1), {}
    for i, loop in enumerate(loops):
        loop.recorder.remember = lambda run, i=i: saved.update({i: run.num_steps})
        loop.recorder.save_remembered = lambda i=i: saved.update({i: f"{saved[i]} again"})
        loop.recorder.save = lambda run, i=i: saved.update({i: run.num_steps})
    descend, conclude = Stack.descend, Loop.conclude

    def asked(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise OutOfPatience

    def broken_off(stack, images, labels):
        return asked() if stack.runs[0].num_steps == 3 and where == "in the step" else descend(stack, images, labels)

    def looked(loop, seconds):
        return asked() if loop is loops[1] and loop.run.num_steps == 4 else conclude(loop, seconds)

    monkeypatch.setattr(Stack, "descend", broken_off)
    monkeypatch.setattr(Loop, "conclude", looked)
    with pytest.raises(KeyboardInterrupt):
        raced(loops)
    assert [loop.status for loop in loops] == ["interrupted"] * 3
    before = "3 again"
    assert list(saved.values()) == ([before] * 3 if where == "in the step" else [4, before, before])


def test_a_run_that_is_behind_goes_alone_until_all_are_level(monkeypatch):
    alone, together = (members(*MLP, *ADAM) for _ in range(2))
    in_turn(together[:2], 2)
    taken = []
    eager, take = Run.eager_step, Stack.take
    monkeypatch.setattr(Run, "eager_step", lambda run: (taken.append(("alone", run.num_steps)), eager(run)))
    monkeypatch.setattr(
        Stack, "take", lambda stack: (taken.append((len(stack.runs), stack.runs[0].num_steps)), take(stack))[1]
    )
    assert raced(looped(together, log_every=100)) == ["finished"] * 3
    assert taken == [("alone", 0), ("alone", 1)] + [(3, step) for step in range(2, 9)]
    for one, two in zip(in_turn(alone, 9), together, strict=True):
        one.meter.clear()
        assert gap(one, two) < EXACT


def test_every_run_is_given_its_share_of_the_time_of_a_step(monkeypatch):
    """By a clock that goes on by 3 seconds in a folded step and by 1 in a run's own."""
    clock = [0.0]

    def slow(step, seconds):
        def slow_step(self):
            clock[0] += seconds
            return step(self)

        return slow_step

    monkeypatch.setattr("bnexp.train.loop.perf_counter", lambda: clock[0])
    monkeypatch.setattr(Stack, "take", slow(Stack.take, 3.0))
    monkeypatch.setattr(Run, "eager_step", slow(Run.eager_step, 1.0))
    runs = members(*MLP)
    in_turn(runs[:2], 4)
    clock[0] = 0.0
    loops = looped(runs)
    raced(loops)
    assert [run.seconds for run in runs] == pytest.approx([5.0, 5.0, 4 * 1.0 + 5.0])
    assert [each.latest["time/step"] for each in loops] == pytest.approx([1.0] * 3)


# ---------------------------------------------------------------- put away and taken up


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_put_away_and_taken_up_again_they_go_on_to_the_bit(optimizer, tmp_path):
    options = (*MLP, *OPTIMIZERS[optimizer])
    undisturbed, first, second = (members(*options) for _ in range(3))
    one_fold, other = Fold(), Fold()
    as_one(Fold(), undisturbed, 6)
    for i, run in enumerate(as_one(one_fold, first, 2)):
        torch.save(run.state_dict(), tmp_path / f"{i}.pt")
        second[i].load_state_dict(torch.load(tmp_path / f"{i}.pt", weights_only=True))
    as_one(other, second, 2)
    other.release()
    for one, two in zip(as_one(one_fold, first, 1), second, strict=True):  # which are further already
        two.load_state_dict(one.state_dict())
    for one, two in zip(undisturbed, as_one(other, second, 3), strict=True):
        assert different(one.state_dict(), two.state_dict(), ignore=["seconds"]) == []


def test_what_a_run_writes_down_is_its_own_alone():
    runs = members(*MLP, *ADAM)
    folded = Fold()
    as_one(folded, runs, 2)
    whole = next(runs[0].model.parameters())
    assert whole.untyped_storage().nbytes() == 3 * whole.nbytes, "this is a view"
    tensors = [value for value in flat(runs[0].state_dict()).values() if torch.is_tensor(value)]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    state = runs[0].state_dict()
    folded.step(runs)
    assert "model.dense1.weight." in different(state, runs[0].state_dict()), "the state is of when it was asked for"
    folded.release()
    assert whole.untyped_storage().nbytes() == whole.nbytes
    own = [value for state in runs[0].optimizer.state.values() for value in state.values()]
    assert own and all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in own)


# ---------------------------------------------------------------- captured


def captured_and_not(*overrides, rates=(1, 2, 1)):
    """The same runs folded twice, the second time their step is captured; learning rates are tensors, as on a GPU."""
    both = [members(*overrides, rates=rates, double=False) for _ in range(2)]
    for run in both[0] + both[1]:
        place_learning_rates(run.optimizer, torch.device("cpu"))
    tape = Tape()
    return *both, Fold(), Fold(partial(CapturedStack, warmup_steps=2, graphs=tape)), tape


@pytest.mark.parametrize(
    "overrides",
    [
        *((*MLP, f"norm={norm}", *OPTIONS.get(norm, ()), *ADAM) for norm in FOLDABLE),
        (*MLP, *OPTIMIZERS["sgd"], "schedule=cosine", "schedule.warmup_steps=2", "data.augment=crop_flip"),
        (*LENET, *OPTIMIZERS["adamw"], "schedule=onecycle"),
    ],
    ids=[*FOLDABLE, "augment", "lenet"],
)
def test_a_captured_fold_is_the_one_that_is_not_bit_for_bit(overrides):
    """Into the third epoch of two full batches and a short one; runs of two learning rates."""
    eager, replayed, plain, capturing, tape = captured_and_not(*overrides)
    for num_steps in (3, 1, 4):  # last a short batch, a full one, a full one
        for one, two in zip(as_one(plain, eager, num_steps), as_one(capturing, replayed, num_steps), strict=True):
            assert different(one.state_dict(), two.state_dict(), ignore=["seconds"]) == []
            assert one.meter.read() == two.meter.read()
            assert one.evaluate(one.dataset.train) == two.evaluate(two.dataset.train)
            for p, q in zip(one.parameters, two.parameters, strict=True):
                assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)
    assert tape.num_captures == 2, "of a full batch and of the short one"
    assert all(run.setup_seconds > 0 for run in replayed) and not any(run.setup_seconds for run in eager)


def test_a_run_that_leaves_has_the_others_captured_anew():
    eager, replayed, one, two, tape = captured_and_not(*MLP, *ADAM)
    for folded, runs in ((one, eager), (two, replayed)):
        as_one(folded, runs, 2)
        as_one(folded, runs[1:], 4)
        in_turn(runs[:1], 1)  # by itself
    assert tape.num_captures == 1 + 2
    for each, other in zip(eager, replayed, strict=True):
        assert different(each.state_dict(), other.state_dict(), ignore=["seconds"]) == []


def test_a_captured_fold_goes_on_from_where_it_was_put_away():
    whole, first, plain, capturing, _ = captured_and_not(*MLP, *ADAM, "schedule=cosine", "data.augment=flip")
    _, second, _, other, _ = captured_and_not(*MLP, *ADAM, "schedule=cosine", "data.augment=flip")
    as_one(plain, whole, 9)
    as_one(capturing, first, 4)
    as_one(other, second, 2)  # captured already
    other.release()
    for one, two in zip(first, second, strict=True):
        two.load_state_dict(one.state_dict())
    for one, two in zip(whole, as_one(other, second, 5), strict=True):
        assert different(one.state_dict(), two.state_dict(), ignore=["seconds"]) == []


def test_a_fold_that_cannot_be_captured_says_why_once_and_goes_on(capsys):
    warn_uncaptured.cache_clear()
    eager, replayed, plain, capturing, tape = captured_and_not(*MLP, "optimizer=adam", "optimizer.fused=false")
    for one, two in zip(as_one(plain, eager, 4), as_one(capturing, replayed, 4), strict=True):
        assert different(one.state_dict(), two.state_dict(), ignore=["seconds"]) == []
    assert capsys.readouterr().err.count("engine=graph: only SGD, Adam and AdamW") == 1 and tape.num_captures == 0


class OwnAdam(torch.optim.Adam):
    """A class that may do anything, so that a fold steps each run's own."""


def test_a_fold_with_an_optimizer_of_its_own_class_is_not_captured_and_says_so(capsys):
    warn_uncaptured.cache_clear()
    runs = members(*MLP, *ADAM, double=False)
    for run in runs:
        run.optimizer.__class__ = OwnAdam
    as_one(Fold(partial(CapturedStack, graphs=Tape())), runs, 2)
    told = capsys.readouterr().err
    assert "each run has its own OwnAdam" in told and all(run.fallback in told and run.fallback for run in runs)


class Names(TorchDispatchMode):
    """Collects the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_no_operation_of_a_folded_step_scatters():
    """CUDA cannot both capture scatter_add and repeat its bits."""
    runs = members(*MLP, *ADAM, double=False)
    with Names() as seen:
        as_one(Fold(), runs, 2)
    assert "aten.nll_loss_backward.default" in seen.names
    assert not [name for name in seen.names if "scatter" in name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [MLP, LENET], ids=["mlp", "lenet"])
def test_on_a_gpu_a_captured_fold_is_the_one_that_is_not_bit_for_bit(size, capsys):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        deterministic = ("device=cuda", "deterministic=true")
        eager, replayed = (members(*size, *ADAM, *deterministic, rates=(1, 2, 1), double=False) for _ in range(2))
        as_one(Fold(), eager, 9)
        as_one(captured := Fold(CapturedStack), replayed, 9)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(captured.stack.replayed.replays) == 2 and not capsys.readouterr().err, "it was captured"
    for one, two in zip(eager, replayed, strict=True):
        assert different(one.state_dict(), two.state_dict(), ignore=["seconds"]) == []


# ---------------------------------------------------------------- who is folded with whom


def grouped(configs):
    """The jobs of these names and configs in groups, as names."""
    jobs = [Job(name, name, (), Path(name), cfg) for name, cfg in configs.items()]
    return [" | ".join(job.name for job in members) for members in together(jobs)]


def test_runs_are_grouped_that_differ_in_nothing_but_seed_and_the_optimizers_numbers():
    points = [("seed=0",), ("seed=1", "optimizer.lr=3", "optimizer.betas=[0.5,0.6]"), ("optimizer.fused=false",)]
    points += [("norm=none",), ("batch_size=8",), ("optimizer=sgd",), ("seed=3", "out=elsewhere")]
    first = "seed=0 | seed=1 optimizer.lr=3 optimizer.betas=[0.5,0.6] | seed=3 out=elsewhere"
    configs = {" ".join(point): composed((*SMALL, *point, "replicas=9")) for point in points}
    assert grouped(configs) == [first, *(" ".join(point) for point in points[2:6])]


@pytest.mark.parametrize("limit, sizes", [(1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 2, 2]), (4, [4, 3]), (7, [7])])
def test_groups_are_as_even_as_can_be(limit, sizes):
    cfg = composed((*SMALL, "replicas=9"))
    configs = {f"s{seed}": OmegaConf.merge(cfg, {"seed": seed, "replicas": limit}) for seed in range(7)}
    assert [each.count("s") for each in grouped(configs)] == sizes


# ---------------------------------------------------------------- refused


TWO = ("train", "-m", *SMALL, "seed=0,1", "replicas=2", "out=sweep")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("train", *SMALL, "replicas=4", "out=sweep"),
         "replicas=4: a single run cannot be computed together with others; give several values, bnexp train -m"),
        ((*TWO, "replicas=0"), "replicas=0: has to be a whole number, 1 or more"),
        ((*TWO, "replicas=1,2"), "replicas=1,2: belongs to the sweep as a whole; give one value"),
        (("compare", *SMALL, "seed=0,1", "replicas=1,2"), "compare: nothing varies but the seed"),
        ((*TWO, "hydra/launcher=joblib"), "replicas=2 and hydra/launcher=joblib: folded runs share one process"),
        ((*TWO, "engine=compile"), "replicas=2: bnexp.engines.compile.compiled computes the step of one run"),
        ((*TWO, "engine=graph"), "engine=graph: a CUDA graph needs a GPU"),
        ((*TWO, "precision=bf16"), "replicas=2 and precision=bf16: torch.vmap hides the operations"),
        ((*TWO, "channels_last=true"), "replicas=2 and channels_last=true: folded runs use torch's default"),
        ((*TWO, "norm.momentum=null"), "with norm.momentum=null every run reads back from the device how many batches"),
        ((*TWO, "norm=scratch", "norm.momentum=null"), "with norm.momentum=null every run reads back from the device"),
        ((*TWO, "norm=fused"), "cannot be computed as one (Batching rule not implemented for bnexp::batch_norm"),
        (("compare", *SMALL, "norm=none,fused", "replicas=2", "out=sweep"), "fused: replicas=2: runs of this model"),
    ],
)  # fmt: skip
def test_what_cannot_be_folded_is_refused_before_any_work(bnexp, capsys, arguments, message):
    assert bnexp(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("sweep").exists()


class Assigning(nn.BatchNorm1d):
    def forward(self, x):
        self.running_mean = 0.9 * self.running_mean + 0.1 * x.mean(0)
        return x - self.running_mean


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    "layer, reason",
    [
        (Assigning(64), "replaces the tensor 1.running_mean by a new one, which would be lost"),
        (Branching(64, 64), "data-dependent control flow"),
        (nn.Dropout(), "randomness"),
        (nn.Linear(64, 64), None),
    ],
)
def test_models_that_do_what_one_call_for_all_cannot_are_refused_with_the_reason(layer, reason):
    model = nn.Sequential(nn.Flatten(), layer).to("meta")
    told = (
        pytest.raises(UserError, match=rf"runs of this model cannot be computed as one \(.*{reason}.*\); leave out")
        if reason else nullcontext()
    )  # fmt: skip
    with told:
        fold.check_foldable(model, (4, 1, 8, 8), torch.device("cpu"))


# ---------------------------------------------------------------- from the command line

# By SGD, whose steps do not make more of rounding: losses of about 2 in float32, seen 3e-7.
PLAIN = (*SMALL, "optimizer=sgd", "optimizer.lr=0.1")
ROUNDING = 1e-5


def assert_alike(one, two):
    assert one.keys() == two.keys()
    for name, rows in one.items():
        assert len(rows) == len(two[name])
        for a, b in zip(rows, two[name], strict=True):
            assert b == pytest.approx(a, abs=ROUNDING), name


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of runs computed one by one: its numbers."""
    from bnexp.cli.main import main

    folder = tmp_path_factory.mktemp("compared") / "compare"
    assert main(["compare", *PLAIN, "norm=none,scratch", "seed=0,1,2", "quiet=true", f"out={folder}"]) == 0
    return numbers(folder)


COMPARE = ("compare", *PLAIN, "norm=none,scratch", "seed=0,1,2", "out=compare")


@pytest.fixture
def stacks(monkeypatch):
    """How many runs were stacked each time."""
    made, init = [], Stack.__init__

    def noted(self, runs):
        made.append(len(runs))
        init(self, runs)

    monkeypatch.setattr(Stack, "__init__", noted)
    return made


def test_a_folded_comparison_gives_the_same_numbers_and_says_who_was_alone(bnexp, capsys, compared, stacks):
    assert bnexp(*COMPARE, "replicas=2") == 0
    assert_alike(compared, numbers(Path("compare")))
    assert set(statuses(Path("compare")).values()) == {"finished"}
    assert stacks == [2, 2]
    said = [line for line in capsys.readouterr().err.splitlines() if "alone" in line]
    assert said == ["bnexp: computed alone, because no other run is left that differs in nothing but the seed and the "
                    "optimizer's numbers: none-s2, scratch-s2"]  # fmt: skip


def test_an_interrupted_folded_comparison_goes_on_also_with_another_number_of_replicas(bnexp, compared, capfd):
    with pytest.MonkeyPatch.context() as patch:
        once = iter([signal.SIGINT])
        take = Stack.take

        def asked(stack):
            if stack.runs[0].num_steps == 16:
                for number in once:
                    os.kill(os.getpid(), number)
            return take(stack)

        patch.setattr(Stack, "take", asked)
        assert bnexp(*COMPARE, "replicas=3", "quiet=true") == 130
    assert {read_status(path)["step"] for path in Path("compare").glob("none-s*")} == {17}, "the fold came level"
    capfd.readouterr()
    assert bnexp(*COMPARE, "replicas=2", "quiet=true") == 0
    assert capfd.readouterr() == ("compare\n", "")
    assert_alike(compared, numbers(Path("compare")))


def test_a_probe_that_compares_a_run_before_and_after_a_step_sees_in_a_fold_what_it_sees_otherwise(bnexp):
    looking = ("probe=[gradients]", "probe.gradients.every=2")
    sweep = ("train", "-m", *PLAIN, "norm=scratch", "seed=0,1", "steps=6", *looking)
    assert bnexp(*sweep, "quiet=true", "out=plain") == 0
    assert bnexp(*sweep, "quiet=true", "replicas=2", "out=folded") == 0
    plain, folded = numbers(Path("plain")), numbers(Path("folded"))
    for rows in (*plain.values(), *folded.values()):
        assert sum(any(tag.startswith("update/") for tag in row) for row in rows) == 3
        for row in rows:
            row.pop("time/probes", None)
    assert_alike(plain, folded)


def test_a_folded_sweep_gives_the_table_that_it_gives_otherwise(bnexp, capsys, stacks):
    sweep = ("train", "-m", *PLAIN, "norm=none", "seed=0,1", "optimizer.lr=0.1,0.2,1e30")
    assert bnexp(*sweep, "out=plain") == 0
    plain = capsys.readouterr().out
    assert bnexp(*sweep, "replicas=4", "out=folded") == 0
    folded = capsys.readouterr()
    assert_alike(*(numbers(Path(folder)) for folder in ("plain", "folded")))
    assert statuses(Path("plain")) == statuses(Path("folded"))
    assert table(plain) == table(folded.out) and folded.out.endswith("\nfolded\n") and folded.err == ""
    assert stacks == [3, 2, 3, 2], "two folds, each without the run that diverged from then on"
    assert bnexp("rerun", "folded/s0-lr0.1", "quiet=true", "out=again") == 0, "a run of a fold can be repeated alone"
    assert_alike({"again": numbers(Path())["again"]}, {"again": numbers(Path("folded"))["s0-lr0.1"]})


def test_a_folded_sweep_leaves_what_has_nobody_like_it_to_the_launcher_and_fails_if_a_run_does(bnexp, capsys):
    tries, conclude = [], Loop.conclude

    def fails(loop, seconds):
        if loop.run.num_steps == 4 and loop.run.batches._orders.initial_seed() == 1:
            tries.append(1)
            raise RuntimeError("out of luck")
        return conclude(loop, seconds)

    sweep = ("train", "-m", *PLAIN, "norm=none", "seed=0,1,2", "steps=5", "replicas=2", "out=sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "conclude", fails)
        assert bnexp(*sweep) == 1
    assert len(tries) == 1, "once per start"
    printed = capsys.readouterr()
    assert statuses(Path("sweep")) == {"s0": "finished", "s1": "failed", "s2": "finished"}
    assert printed.err.count("computed alone") == 1 and printed.err.endswith(": s2\n")
    assert bnexp(*sweep, "quiet=true") == 0
    assert set(statuses(Path("sweep")).values()) == {"finished"}
    assert [row["step"] for row in numbers(Path("sweep"))["s1"]] == [5]


def test_a_study_folds_too(bnexp, tmp_path, stacks):
    (tmp_path / "tiny.yaml").write_text(
        "title: a\nsource: b\ntakes: 1 s\nhow: sweep\nseeds: 2\n"
        "settings: [model=mlp, data.size=8, steps=3, threads=1, norm=none]\n"
        "variants: {slow: optimizer.lr=1e-9, fast: optimizer.lr=0.1}\n"
        "expect: [{says: c, of: fast, tag: accuracy/test, above: -1}]\n"
    )
    assert bnexp("study", "tiny.yaml", "seed=0,1", "replicas=4", "quiet=true", "out=s") == 0
    assert stacks == [4]
