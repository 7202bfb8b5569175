"""The arithmetic of a batch norm as checks, functions of a class: the real ones pass, broken copies do not.

A check raises AssertionError. A mutant is the text of scratch or library with one deliberate mistake.
"""

import copy
import inspect
import types

import pytest
import torch
from test_norms import (
    DOUBLE,
    TORCH,
    both,
    channels,
    close,
    closed_form,
    make,
    match,
    measure,
    randn64,
    statistics,
)
from torch import nn

from bnexp.models.initialize import initialize
from bnexp.models.lenet import LeNet
from bnexp.norms import library, scratch
from bnexp.norms.base import ACTIVATIONS

SHAPES = [(7, 3), (5, 3, 4), (4, 3, 5, 2), (2, 3, 2, 3, 3)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def check_training(norm):
    """Forward, every gradient, running statistics (unbiased, momentum weighs the new batch) and the counter."""
    for shape in SHAPES:
        for activation in ACTIVATIONS:
            for has_residual in (False, True):
                # A large eps tells inside the root from outside, an odd momentum tells new from old.
                module = make(norm, 3, 0.3, 0.2, activation=activation)
                running_mean, running_var = torch.zeros(3).double(), torch.ones(3).double()
                for batch in range(1, 4):
                    x, dy = randn64(*shape), randn64(*shape)
                    residual = randn64(*shape) if has_residual else None
                    mean, var = statistics(x)
                    m = x.numel() // 3
                    running_mean = 0.8 * running_mean + 0.2 * mean
                    running_var = 0.8 * running_var + 0.2 * var * m / (m - 1)
                    expected = closed_form(x, mean, var, module.weight, module.bias, 0.3, dy, residual, activation)
                    match(measure(module, x, dy, residual), expected, **DOUBLE)
                    close(module.running_mean, running_mean, "running_mean", **DOUBLE)
                    close(module.running_var, running_var, "running_var", **DOUBLE)
                    assert module.num_batches_tracked.item() == batch, "num_batches_tracked"


def check_evaluation(norm):
    """Running statistics stand in for the batch's, are constants to the gradient and stay as they are."""
    for shape in [*SHAPES, (1, 3), (1, 3, 1, 1)]:
        module = make(norm, 3, 0.3).eval()
        module.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
        module.running_var.copy_(torch.tensor([0.1, 1.0, 7.0]))
        before = copy.deepcopy(module.state_dict())
        x, dy, residual = randn64(*shape), randn64(*shape), randn64(*shape)
        mean, var = module.running_mean, module.running_var
        expected = closed_form(x, mean, var, module.weight, module.bias, 0.3, dy, residual, training=False)
        match(measure(module, x, dy, residual), expected, **DOUBLE)
        match(module.state_dict(), before, rtol=0, atol=0)


def check_settings(norm):
    """Every combination of momentum, affine and tracking does as torch does, in training and in evaluation."""
    for momentum in (None, 0, 0.1, 1):
        for affine in (True, False):
            for track in (True, False):
                settings = {"momentum": momentum, "affine": affine, "track_running_stats": track}
                module, expected = (make(each, 3, **settings) for each in (norm, nn.BatchNorm2d))
                for training in (True, True, True, False, True, False):
                    x, dy = randn64(4, 3, 5, 2), randn64(4, 3, 5, 2)
                    module.train(training), expected.train(training)
                    match(measure(module, x, dy), measure(expected, x, dy), **DOUBLE)
                    match(module.state_dict(), expected.state_dict(), **DOUBLE)


def check_large_mean(norm):
    """The variance is the mean of squared deviations: E[x^2] - E[x]^2 keeps no digit at mean 1e8, std 1."""
    x = torch.randn(64, 3, 2, 2, dtype=torch.float64) + 1e8
    module = norm(3, momentum=1.0, dtype=torch.float64)
    mean, var = statistics(x)
    # The mean is known to half a unit in its last place, 7e-9, which x - mean inherits; 64 roundings deep.
    close(module(x), (x - channels(mean, x)) / channels(var + 1e-5, x).sqrt(), "y", rtol=0, atol=1e-6)
    close(module.running_var, var * 256 / 255, "running_var", rtol=1e-6, atol=0)


def check_half_precision_statistics(norm):
    """Half-precision inputs are averaged in float32 or better and rounded once."""
    for dtype in (torch.bfloat16, torch.float16):
        x = randn64(64, 3, 8, 8).to(dtype)
        module = norm(3, momentum=1.0)
        y, (mean, var) = module(x), statistics(x)
        assert y.dtype == dtype and module.running_var.dtype == torch.float32
        # float32 sums of 4096 values; a sum in half precision is off by 1e-3 and more.
        close(module.running_mean.double(), mean, "running_mean", rtol=1e-5, atol=0)
        close(module.running_var.double(), var * 4096 / 4095, "running_var", rtol=1e-5, atol=0)
        expected = (x.double() - channels(mean, x)) / channels(var + 1e-5, x).sqrt()
        # Half a unit in the last place, and a little for float32 before it.
        ulp = torch.finfo(dtype).eps
        close(y.double(), expected, "y", rtol=0.51 * ulp, atol=1e-5)


def check_no_graph_on_buffers(norm):
    """Steps leave no history behind: memory stays flat and the module can be copied after a forward pass."""
    module = norm(3)
    for _ in range(3):
        module(torch.randn(4, 3, 2, 2, requires_grad=True)).sum().backward()
    for name, buffer in module.named_buffers():
        assert buffer.grad_fn is None and not buffer.requires_grad, name
    copy.deepcopy(module)


def check_second_order(norm):
    """Gradients of gradients, in training, in evaluation and without running statistics."""
    for options, training in (({}, True), ({}, False), ({"track_running_stats": False}, False)):
        module = make(norm, 2, 0.3, activation="tanh", **options).train(training)
        x, dy, residual = (randn64(4, 2, 3).requires_grad_() for _ in range(3))

        def forward(x, weight, bias, residual, module=module):
            return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x, residual))

        inputs = (x, module.weight, module.bias, residual)
        assert torch.autograd.gradgradcheck(forward, inputs, dy, raise_exception=False), "second order"


def check_one_value_per_channel(norm):
    """It has no variance: refused wherever the batch's own statistics are used."""
    for shape in ((1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)):
        untracked = {"track_running_stats": False}
        for module in (norm(3, **untracked), norm(3, **untracked).eval(), norm(3)):
            before = copy.deepcopy(module.state_dict())
            try:
                module(torch.ones(shape))
            except ValueError as error:
                assert "more than 1 value per channel" in str(error)
            else:
                raise AssertionError(f"one value per channel went through: {shape}")
            match(module.state_dict(), before, rtol=0, atol=0)


def check_empty_batch(norm):
    """Counted, and nothing else: statistics stay, gradients are zero, as in torch."""
    for shape in ((0, 3), (0, 3, 4), (0, 3, 4, 4), (2, 3, 0, 4), (0, 3, 1, 2, 2)):
        for training in (True, False):
            module, expected = (make(each, 3).train(training) for each in (norm, TORCH[len(shape)]))
            x = randn64(*shape)
            match(measure(module, x, x), measure(expected, x, x), rtol=0, atol=0)
            match(module.state_dict(), expected.state_dict(), rtol=0, atol=0)


def check_buffers_set_to_none(norm):
    """How people turn tracking off in a finished network: the batch's own statistics from then on, as in torch."""
    running, counter = ["running_mean", "running_var"], ["num_batches_tracked"]
    for names in (running, counter, running + counter):
        module, expected = make(norm, 3), make(nn.BatchNorm2d, 3)
        for each in (module, expected):
            for name in names:
                setattr(each, name, None)
        for training in (True, False):
            x = randn64(4, 3, 5, 2)
            close(module.train(training)(x), expected.train(training)(x), "y", **DOUBLE)
        match(module.state_dict(), expected.state_dict(), **DOUBLE)


def train_lenet(norm, dtype, activation, seed):
    """The losses of 30 steps; start, images and labels are the same whatever the norm."""
    generator = torch.Generator().manual_seed(seed)
    net = LeNet((1, 16, 16), 10, norm, activation=activation, init="torch")
    initialize(net, generator)
    net.to(dtype)
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), []
    templates = torch.randn(10, 1, 16, 16, generator=generator)
    for _ in range(30):
        labels = torch.randint(10, (32,), generator=generator)
        images = templates[labels] + torch.randn(32, 1, 16, 16, generator=generator)
        loss = nn.functional.cross_entropy(net(images.to(dtype)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < 0.5 * losses[0], "the network does not learn"
    return torch.stack(losses)


def check_lenet_trains_like_library(norm):
    """The losses are the same but for roundings, which every step multiplies.

    In float64 30 steps make 1e-14 of 1e-16. In float32 they make 1e-6 of 1e-7, except when a rounding decides
    which of two near-equal pixels a max-pooling takes: then two right implementations part by 1e-2, once in
    some fifty seeds. So float32 asks for the median of three. Both figures are those of torch's weights.
    """

    def difference(dtype, activation, seed):
        ours, theirs = (train_lenet(each, dtype, activation, seed) for each in (norm, library.BatchNorm))
        return ((ours - theirs) / theirs).abs().max().item()

    assert difference(torch.float64, "relu", 0) < 1e-11
    assert sorted(difference(torch.float32, "sigmoid", seed) for seed in range(3))[1] < 1e-5


CHECKS = [value for name, value in globals().items() if name.startswith("check_")]


@both
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_real_classes_pass(norm, check):
    check(norm)


def mutate(module, old, new, name="BatchNorm"):
    """The class ``name`` of ``module``, a copy of its text in which ``old`` reads ``new``."""
    text = inspect.getsource(module)
    assert text.count(old) == 1, f"{old!r} is not in {module.__name__} once: mend this mutant"
    mutant = types.ModuleType("mutant")
    exec(text.replace(old, new), mutant.__dict__)
    return getattr(mutant, name)


TRACKING = "move(self.running_mean, mean, self.debias(momentum))"
VARIANCE = "average((z - per_channel(mean, z)).square(), weights)"
ROOT = "torch.sqrt(per_channel(var, z) + self.eps)"
COUNT = "momentum = self.count_batch()"
PRECISION = "z = x if x.dtype == torch.float64 else x.float()"
FINISH = "finish(y.to(x.dtype), residual, self.activation)"

# The mistake, the check that has to notice it, where it is, what is written there and what instead.
MUTANTS = [
    ("biased running variance", check_training, scratch, 'kind == "unbiased"', 'kind == "never"'),
    ("unbiased variance for the batch itself", check_training, scratch, VARIANCE, "z.var([0, *range(2, z.dim())])"),
    ("eps outside the root", check_training, scratch, ROOT, "(per_channel(var, z).sqrt() + self.eps)"),
    ("eps outside the root, seen in losses", check_lenet_trains_like_library, scratch, ROOT,
     "(per_channel(var, z).sqrt() + self.eps)"),
    ("eps not the one asked for", check_training, library, "self.eps,", "1e-5,"),
    ("swapped momentum", check_training, scratch, TRACKING,
     "move(self.running_mean, mean, 1 - self.debias(momentum))"),
    ("swapped momentum", check_training, library, COUNT, "momentum = 1 - self.count_batch()"),
    ("no cumulative average", check_settings, library, COUNT, "self.count_batch()"),
    ("counter forgotten", check_training, scratch, COUNT, "momentum = self.momentum"),
    ("variance as E[x^2] - E[x]^2", check_large_mean, scratch, VARIANCE,
     "average(z.square(), weights) - mean.square()"),
    ("float32 for float64 input", check_large_mean, scratch, PRECISION, "z = x.float()"),
    ("statistics in half precision", check_half_precision_statistics, scratch, PRECISION, "z = x"),
    ("graph on the running mean", check_no_graph_on_buffers, scratch, "self.track(mean.detach(), var.detach(),",
     "self.running_mean = 0.9 * self.running_mean + 0.1 * mean; (0,"),
    ("gradient stops at the mean", check_training, scratch, "mean = average(z, weights)",
     "mean = average(z.detach(), weights)"),
    ("gradient stops at the variance", check_training, scratch, VARIANCE, f"{VARIANCE}.detach()"),
    # The first derivative of the variance does not feel the mean move, the second does.
    ("gradient right, its gradient wrong", check_second_order, scratch, VARIANCE,
     VARIANCE.replace("(mean, z)", "(mean.detach(), z)")),
    ("the batch's statistics in evaluation", check_evaluation, scratch, "if self.uses_batch_statistics():", "if True:"),
    ("shift forgotten", check_training, scratch, "xhat, self.weight, self.bias", "xhat, self.weight, None"),
    ("residual forgotten", check_training, scratch, FINISH, "finish(y.to(x.dtype), None, self.activation)"),
    ("activation before the residual", check_training, scratch, FINISH,
     "finish(y.to(x.dtype), None, self.activation) + (0 if residual is None else residual)"),
    ("one value per channel becomes zero", check_one_value_per_channel, scratch, "self.check(x, residual)", "pass"),
    ("an empty batch is averaged", check_empty_batch, scratch, "count == 0 or ", ""),
    ("no count without buffers", check_buffers_set_to_none, library, COUNT,
     "momentum = 0.0 if self.running_mean is None else self.count_batch()"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "module", "old", "new"), [mutant[1:] for mutant in MUTANTS], ids=[mutant[0] for mutant in MUTANTS]
)
def test_a_broken_copy_is_caught(check, module, old, new):
    mutant = mutate(module, old, new)
    with pytest.raises(AssertionError):
        check(mutant)


@pytest.mark.parametrize("module", [scratch, library], ids=["scratch", "library"])
def test_a_copy_that_is_not_broken_passes(module):
    for check in CHECKS:
        check(mutate(module, "class BatchNorm(BatchNormBase):", "class BatchNorm(BatchNormBase):  # whole"))


def test_every_check_catches_somebody():
    assert {mutant[1] for mutant in MUTANTS} == set(CHECKS)
