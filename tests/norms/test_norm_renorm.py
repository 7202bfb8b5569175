"""norm=renorm: algorithm 1 of the paper in float64, r and d constant to the gradient, the schedule at given steps."""

import copy
import math

import pytest
import torch
from test_norm_mutants import mutate
from test_norms import DOUBLE, channels, close, closed_form, make, match, measure, randn64, statistics

from bnexp.errors import UserError
from bnexp.norms import renorm, scratch
from bnexp.norms.base import ACTIVATIONS
from bnexp.norms.renorm import BatchRenorm

SHAPES = [(7, 3), (5, 3, 4), (4, 3, 5, 2), (2, 3, 2, 3, 3)]
OPEN = {"r_max": 1e6, "d_max": 1e6, "warmup_steps": 0, "r_steps": 0, "d_steps": 0}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def underway(norm, *args, steps=10, mean=(1.0, -2.0, 0.5), var=(0.1, 1.0, 7.0), **options):
    """A norm that has seen ``steps`` batches and has these running statistics."""
    module = make(norm, 3, *args, **options)
    module.running_mean.copy_(torch.tensor(mean))
    module.running_var.copy_(torch.tensor(var))
    module.num_batches_tracked.fill_(steps)
    return module


def corrections(x, module, eps, r_max, d_max):
    """r and d of algorithm 1, (C,) each."""
    mean, var = statistics(x)
    sigma = (module.running_var + eps).sqrt()
    r = ((var + eps).sqrt() / sigma).clamp(1 / r_max, r_max)
    return r, ((mean - module.running_mean) / sigma).clamp(-d_max, d_max)


def by_hand(x, r, d, module, eps, residual, activation):
    """y, with mean and variance of ``x`` itself and r and d given, as plain tensor operations."""
    dims = [i for i in range(x.dim()) if i != 1]
    mean, var = x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)
    xhat = (x - mean) / (var + eps).sqrt() * channels(r, x) + channels(d, x)
    y = channels(module.weight, x) * xhat + channels(module.bias, x) + residual
    return ACTIVATIONS[activation](y) if ACTIVATIONS[activation] else y


def check_formula(norm):
    """Forward and every gradient, where some channels are clipped and some are not; r and d are constants."""
    for shape in SHAPES:
        for activation in ACTIVATIONS:
            options = OPEN | {"r_max": 2.0, "d_max": 1.0}
            module = underway(norm, 0.3, activation=activation, **options)
            x, dy, residual = randn64(*shape), randn64(*shape), randn64(*shape)
            r, d = corrections(x, module, 0.3, 2.0, 1.0)
            leaves = [t.requires_grad_() for t in (x.clone(), residual.clone())]
            y = by_hand(leaves[0], r, d, module, 0.3, leaves[1], activation)
            wanted = [leaves[0], module.weight, module.bias, leaves[1]]
            gradients = dict(zip(("x", "weight", "bias", "residual"), torch.autograd.grad(y, wanted, dy), strict=True))
            match(measure(module, x, dy, residual), {"y": y.detach()} | gradients, **DOUBLE)


def check_warm_up(norm):
    """While r = 1 and d = 0, and for ever with r_max = 1 and d_max = 0, it is batch norm, bit for bit."""
    for options in ({"warmup_steps": 3, "r_steps": 0, "d_steps": 0}, OPEN | {"r_max": 1.0, "d_max": 0.0}):
        for shape in SHAPES:
            module, plain = make(norm, 3, 0.3, **options), make(scratch.BatchNorm, 3, 0.3)
            for _ in range(3):
                x, dy, residual = randn64(*shape), randn64(*shape), randn64(*shape)
                match(measure(module, x, dy, residual), measure(plain, x, dy, residual), rtol=0, atol=0)


def check_unclipped(norm):
    """Past the warm-up and within the limits, the output is the normalization by the averages before this batch."""
    module = underway(norm, 0.3, **OPEN)
    x = randn64(4, 3, 5, 2)
    mean, var = module.running_mean.clone(), module.running_var.clone()
    expected = closed_form(x, mean, var, module.weight, module.bias, 0.3, x, training=False)["y"]
    evaluated = copy.deepcopy(module).eval()(x)
    close(module(x), expected, "y", **DOUBLE)
    close(evaluated, expected, "y in evaluation", **DOUBLE)


def check_clipping(norm):
    """r stays between 1 / r_max and r_max, d between -d_max and d_max."""
    # Deviations of the batch are 2, its mean is 10; the averages make r 20, 0.02, 1 and d 100, 0, -4 without limits.
    x = 10 + 2 * torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None].expand(2, 3)
    options = {"eps": 1e-30, "mean": (0.0, 10.0, 18.0), "var": (0.01, 1e4, 4.0)}  # 1e-30 vanishes beside 0.01
    r, d = underway(norm, **OPEN, **options).correction(*statistics(x))
    close(r, torch.tensor([20, 0.02, 1]).double(), "r", rtol=1e-6, atol=0)  # 0.01 is not a float32 number
    close(d, torch.tensor([100, 0, -4]).double(), "d", rtol=1e-6, atol=0)
    module = underway(norm, **OPEN | {"r_max": 4.0, "d_max": 3.0}, **options)
    r, d = module.correction(*statistics(x))
    close(r, torch.tensor([4, 0.25, 1]).double(), "r", rtol=0, atol=0)
    close(d, torch.tensor([3, 0, -3]).double(), "d", rtol=0, atol=0)
    xhat = torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None] * r + d
    close(module(x), module.weight * xhat + module.bias, "y", **DOUBLE)


def check_schedule(norm):
    """Shut for warmup_steps, then open linearly, over r_steps to r_max and over d_steps to d_max."""
    module = norm(3)
    for step, r_max, d_max in (
        (0, 1, 0), (99, 1, 0), (100, 1, 0), (101, 1 + 2 / 700, 5 / 400), (300, 1 + 2 * 200 / 700, 2.5),
        (500, 1 + 2 * 400 / 700, 5), (799, 1 + 2 * 699 / 700, 5), (800, 3, 5), (10**9, 3, 5),
    ):  # fmt: skip
        module.num_batches_tracked.fill_(step)
        assert [float(limit) for limit in module.limits()] == pytest.approx([r_max, d_max], abs=1e-12), step
    module = norm(3, warmup_steps=2, r_steps=0, d_steps=4)
    for step, r_max, d_max in ((0, 1, 0), (1, 1, 0), (2, 3, 0), (3, 3, 1.25), (6, 3, 5)):
        module.num_batches_tracked.fill_(step)
        assert [float(limit) for limit in module.limits()] == pytest.approx([r_max, d_max], abs=1e-12), step
    # The first batch has nothing to be corrected towards, whatever the schedule.
    module = norm(3, **OPEN)
    assert [float(limit) for limit in module.limits()] == [1, 0]


def check_averages(norm):
    """A plain average over the first batches, then one that gives each new batch renorm_momentum; unbiased variance."""
    for momentum in (0.25, 0.0):
        module = make(norm, 3, renorm_momentum=momentum)
        mean, var = torch.full((3,), math.nan).double(), torch.full((3,), math.nan).double()
        for batch in range(1, 8):
            x = randn64(4, 3, 5, 2)
            new_mean, new_var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            weight = max(1 / batch, momentum)
            mean = new_mean if batch == 1 else (1 - weight) * mean + weight * new_mean
            var = new_var if batch == 1 else (1 - weight) * var + weight * new_var
            module(x)
            close(module.running_mean, mean, "running_mean", **DOUBLE)
            close(module.running_var, var, "running_var", **DOUBLE)
            assert module.num_batches_tracked.item() == batch, "num_batches_tracked"


def check_evaluation(norm):
    """Running statistics stand in, are constants to the gradient and stay as they are."""
    for shape in [*SHAPES, (1, 3)]:
        module = underway(norm, 0.3).eval()
        before = copy.deepcopy(module.state_dict())
        x, dy, residual = randn64(*shape), randn64(*shape), randn64(*shape)
        mean, var = module.running_mean, module.running_var
        expected = closed_form(x, mean, var, module.weight, module.bias, 0.3, dy, residual, training=False)
        match(measure(module, x, dy, residual), expected, **DOUBLE)
        match(module.state_dict(), before, rtol=0, atol=0)


def check_half_precision(norm):
    """bfloat16 is averaged in float32 and rounded once."""
    x = randn64(64, 3, 8, 8).bfloat16()
    module, (mean, var) = norm(3), statistics(x)
    y = module(x)
    close(module.running_mean.double(), mean, "running_mean", rtol=1e-5, atol=0)
    close(module.running_var.double(), var * 4096 / 4095, "running_var", rtol=1e-5, atol=0)
    expected = (x.double() - channels(mean, x)) / channels(var + 1e-5, x).sqrt()
    close(y.double(), expected, "y", rtol=0.51 * torch.finfo(torch.bfloat16).eps, atol=1e-5)


CHECKS = [value for name, value in globals().items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_real_class_passes(check):
    check(BatchRenorm)


CORRECT = "self.correction(mean.detach(), var.detach())"
# The mistake, the check that has to notice it, what is written there and what instead.
MUTANTS = [
    ("gradient through r and d", check_formula, CORRECT, "self.correction(mean, var)"),
    ("r upside down", check_formula, "torch.sqrt(var + self.eps) / sigma", "sigma / torch.sqrt(var + self.eps)"),
    ("d in the batch's deviations", check_formula, "self.running_mean.to(mean.dtype)) / sigma",
     "self.running_mean.to(mean.dtype)) / torch.sqrt(var + self.eps)"),
    ("d scaled by r", check_formula, "xhat * per_channel(r, z) + per_channel(d, z)",
     "(xhat + per_channel(d, z)) * per_channel(r, z)"),
    ("averaged before it is compared", check_unclipped, f"r, d = {CORRECT}",
     f"self.track(mean.detach(), var.detach(), 40); r, d = {CORRECT}"),
    ("without eps in sigma", check_unclipped, "torch.sqrt(self.running_var.to(var.dtype) + self.eps)",
     "torch.sqrt(self.running_var.to(var.dtype))"),
    ("r not limited below", check_clipping, "r.clamp(1 / r_max, r_max)", "r.clamp(max=r_max)"),
    ("d not limited below", check_clipping, "d.clamp(-d_max, d_max)", "d.clamp(max=d_max)"),
    ("no warm-up", check_warm_up, "torch.where(step < begin, 0.0, done.clamp(0, 1))", "done.clamp(0, 1)"),
    ("the first batch is corrected", check_schedule, "max(self.warmup_steps, 1)", "self.warmup_steps"),
    ("r_steps from the start", check_schedule, "(step - self.warmup_steps) / num_steps", "step / num_steps"),
    ("d as slow as r", check_schedule, "opened(self.d_steps)", "opened(self.r_steps)"),
    ("0 and 1 are averaged in", check_averages, ".clamp(min=slowest)", ".clamp(0, slowest)"),
    ("biased running variance", check_averages, "var * (count / (count - 1))", "var"),
    ("counter forgotten", check_averages, "self.num_batches_tracked.add_(1)", "self.num_batches_tracked.clamp_(min=1)"),
    ("the batch's statistics in evaluation", check_evaluation, "if self.uses_batch_statistics():", "if True:"),
    ("statistics in half precision", check_half_precision, "z = x if x.dtype == torch.float64 else x.float()", "z = x"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "old", "new"), [each[1:] for each in MUTANTS], ids=[each[0] for each in MUTANTS])
def test_a_broken_copy_is_caught(check, old, new):
    mutant = mutate(renorm, old, new, "BatchRenorm")
    with pytest.raises(AssertionError):
        check(mutant)


def test_every_check_catches_somebody():
    assert {mutant[1] for mutant in MUTANTS} == set(CHECKS)


def test_the_gradient_is_the_slope_of_the_formula_with_r_and_d_held():
    module = underway(BatchRenorm, 0.3, activation="tanh", **OPEN | {"r_max": 2.0, "d_max": 1.0})
    x, residual = (randn64(4, 3, 2).requires_grad_() for _ in range(2))
    r, d = corrections(x.detach(), module, 0.3, 2.0, 1.0)
    held = lambda x, residual: by_hand(x, r, d, module, 0.3, residual, "tanh")  # noqa: E731
    assert torch.autograd.gradcheck(held, (x, residual))
    expected = torch.autograd.grad(held(x, residual).square().sum(), x)[0]
    close(torch.autograd.grad(module(x, residual).square().sum(), x)[0], expected, "x", **DOUBLE)


def test_a_resumed_run_goes_on_exactly():
    options = {"warmup_steps": 1, "r_steps": 3, "d_steps": 2, "renorm_momentum": 0.3}
    whole, first, second = (make(BatchRenorm, 3, **options) for _ in range(3))
    batches = [randn64(4, 3, 5, 2) * (1 + i) for i in range(6)]
    expected = [whole(x) for x in batches]
    for x in batches[:3]:
        first(x)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(torch.equal(second(x), y) for x, y in zip(batches[3:], expected[3:], strict=True))


def test_the_host_never_waits_for_the_device():
    """On the meta device nothing can be read back, and compiling into one graph asks for nothing either."""
    module = BatchRenorm(3, **OPEN).to("meta")
    assert module(torch.empty(4, 3, 5, 2, device="meta")).shape == (4, 3, 5, 2)
    module, x = underway(BatchRenorm, **OPEN, steps=5), randn64(4, 3, 5, 2)
    twin = copy.deepcopy(module)
    assert torch.equal(torch.compile(twin, backend="eager", fullgraph=True)(x), module(x))
    match(twin.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_is_that_of_batch_norm():
    module, plain = make(BatchRenorm, 3), make(scratch.BatchNorm, 3)
    module(randn64(4, 3, 5, 2))
    plain.load_state_dict(module.state_dict())
    x = randn64(4, 3, 5, 2)
    assert torch.equal(plain.eval()(x), module.eval()(x))


def test_an_empty_batch_moves_neither_averages_nor_schedule():
    module = BatchRenorm(3)
    before = copy.deepcopy(module.state_dict())
    assert module(torch.ones(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    match(module.state_dict(), before, rtol=0, atol=0)


def test_without_running_statistics_it_is_batch_norm_from_then_on():
    module, plain = make(BatchRenorm, 3, **OPEN), make(scratch.BatchNorm, 3)
    module.running_mean = module.running_var = module.num_batches_tracked = None
    x = randn64(4, 3, 5, 2)
    for training in (True, False):
        assert torch.equal(module.train(training)(x), plain(x))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("r_max", [0.5, math.inf, math.nan]), ("d_max", [-1.0, math.inf, math.nan]), ("renorm_momentum", [-0.1, 1.5]),
        ("warmup_steps", [-1, 1.5, True]), ("r_steps", [-1]), ("d_steps", [-1]),
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_named(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"norm.{name}={value}"):
            BatchRenorm(3, **{name: value})


def test_one_value_per_channel_is_refused_as_in_batch_norm():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchRenorm(3)(torch.ones(1, 3))


def test_the_repr_says_the_limits_and_the_schedule():
    text = repr(BatchRenorm(3))
    assert "momentum=0.01" in text
    assert "r_max=3.0, d_max=5.0, warmup_steps=100, r_steps=700, d_steps=400" in text
