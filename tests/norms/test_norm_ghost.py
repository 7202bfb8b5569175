"""norm=ghost: every block by batch norm's closed form, running statistics over blocks, batches that do not divide."""

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from test_norm_mutants import mutate
from test_norms import DOUBLE, close, closed_form, make, match, measure, randn64, statistics

from bnexp.errors import UserError
from bnexp.norms import ghost, scratch
from bnexp.norms.base import ACTIVATIONS
from bnexp.norms.ghost import GhostBatchNorm

SHAPES = [(6, 3), (6, 3, 4), (6, 3, 5, 2), (6, 3, 2, 3, 3)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def check_training(norm):
    """Forward and gradients are batch norm's of every block; running statistics move once, by the mean of blocks."""
    for shape in SHAPES:
        for activation, virtual_batch in itertools.product(ACTIVATIONS, (2, 3, 6)):
            module = make(norm, 3, 0.3, 0.2, activation=activation, virtual_batch=virtual_batch)
            running_mean, running_var = torch.zeros(3).double(), torch.ones(3).double()
            for batch in range(1, 4):
                x, dy, residual = randn64(*shape), randn64(*shape), randn64(*shape)
                blocks = [each.split(virtual_batch) for each in (x, dy, residual)]
                parts, means, variances = [], [], []
                for x_b, dy_b, residual_b in zip(*blocks, strict=True):
                    mean, var = statistics(x_b)
                    m = x_b.numel() // 3
                    means.append(mean)
                    variances.append(var * m / (m - 1))
                    parts.append(
                        closed_form(x_b, mean, var, module.weight, module.bias, 0.3, dy_b, residual_b, activation)
                    )
                expected = {key: torch.cat([part[key] for part in parts]) for key in ("y", "x", "residual")}
                expected |= {key: sum(part[key] for part in parts) for key in ("weight", "bias")}
                match(measure(module, x, dy, residual), {key: expected[key] for key in parts[0]}, **DOUBLE)
                running_mean = 0.8 * running_mean + 0.2 * sum(means) / len(means)
                running_var = 0.8 * running_var + 0.2 * sum(variances) / len(variances)
                close(module.running_mean, running_mean, "running_mean", **DOUBLE)
                close(module.running_var, running_var, "running_var", **DOUBLE)
                assert module.num_batches_tracked.item() == batch, "num_batches_tracked"


def check_one_block(norm):
    """A block that is the whole batch is batch norm, bit for bit, in training and in evaluation."""
    for shape in SHAPES:
        for momentum in (0.1, None):
            module = make(norm, 3, momentum=momentum, virtual_batch=6)
            plain = make(scratch.BatchNorm, 3, momentum=momentum)
            for training in (True, True, False):
                x, dy, residual = randn64(*shape), randn64(*shape), randn64(*shape)
                module.train(training), plain.train(training)
                match(measure(module, x, dy, residual), measure(plain, x, dy, residual), rtol=0, atol=0)
                match(module.state_dict(), plain.state_dict(), rtol=0, atol=0)


def check_evaluation(norm):
    """Running statistics stand in, whatever the number of examples, and stay as they are."""
    module = make(norm, 3, 0.3, virtual_batch=3).eval()
    module.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
    module.running_var.copy_(torch.tensor([0.1, 1.0, 7.0]))
    before = copy.deepcopy(module.state_dict())
    for shape in [*SHAPES, (1, 3), (7, 3, 2, 2)]:
        x, dy = randn64(*shape), randn64(*shape)
        mean, var = module.running_mean, module.running_var
        expected = closed_form(x, mean, var, module.weight, module.bias, 0.3, dy, training=False)
        match(measure(module, x, dy), expected, **DOUBLE)
        match(module.state_dict(), before, rtol=0, atol=0)


def check_population(norm):
    """Over all batches of four independent draws the running statistics average to the population's, without bias.

    The population is 0, 0, 3: mean 1 and variance 2.
    """
    module = norm(1, momentum=1.0, virtual_batch=2, dtype=torch.float64)
    means, variances = [], []
    for batch in itertools.product((0.0, 0.0, 3.0), repeat=4):
        module(torch.tensor(batch, dtype=torch.float64)[:, None])
        means.append(module.running_mean.item())
        variances.append(module.running_var.item())
    assert abs(sum(means) / 81 - 1) < 1e-12, "mean"
    assert abs(sum(variances) / 81 - 2) < 1e-12, "variance"


def check_refusals(norm):
    """Batches that cannot be split, and blocks of one value, leave the state as it was."""
    one = "more than 1 value per channel in every block"
    for virtual_batch, shape, words in (
        (4, (6, 3), "split"), (8, (6, 3), "split"), (1, (6, 3), one), (1, (6, 3, 1, 1), one),
    ):  # fmt: skip
        module = norm(3, virtual_batch=virtual_batch)
        try:
            module(torch.ones(shape))
        except UserError as error:
            assert words in str(error)
        except Exception as error:
            raise AssertionError(f"{shape} in blocks of {virtual_batch} is not refused but fails") from error
        else:
            raise AssertionError(f"{shape} went through in blocks of {virtual_batch}")
        assert module.num_batches_tracked.item() == 0


def check_half_precision(norm):
    """bfloat16 is averaged in float32 and rounded once."""
    x = randn64(64, 3, 8, 8).bfloat16()
    module = norm(3, momentum=1.0)
    y = module(x)
    parts = [statistics(block) for block in x.split(32)]
    close(module.running_mean.double(), sum(mean for mean, _ in parts) / 2, "running_mean", rtol=1e-5, atol=0)
    wide = torch.cat([F.batch_norm(block.double(), None, None, training=True) for block in x.split(32)])
    close(y.double(), wide, "y", rtol=0.51 * torch.finfo(torch.bfloat16).eps, atol=1e-5)


CHECKS = [value for name, value in globals().items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_real_class_passes(check):
    check(GhostBatchNorm)


MEAN, VARIANCE = "z.mean(dims, keepdim=True)", "(z - mean).square().mean(dims, keepdim=True)"
# The mistake, the check that has to notice it, what is written there and what instead.
MUTANTS = [
    ("interleaved blocks", check_training, "z.unflatten(0, (len(x) // self.virtual_batch, self.virtual_batch))",
     "z.unflatten(0, (self.virtual_batch, len(x) // self.virtual_batch)).transpose(0, 1)"),
    ("blocks not kept apart", check_training, "if d not in (0, 2)", "if d != 2"),
    ("unbiased variance for the block itself", check_training, VARIANCE, "z.var(dims, keepdim=True)"),
    ("eps outside the root", check_training, "torch.sqrt(var + self.eps)).flatten(0, 1)",
     "(var.sqrt() + self.eps)).flatten(0, 1)"),
    ("the batch's count corrects a block's variance", check_training, "z[:1, :, :1].numel()", "z[:, :, :1].numel()"),
    ("biased running variance", check_population, "(count / (count - 1))", "1.0"),
    ("the last block only", check_training, "mean.mean(0), momentum", "mean[-1], momentum"),
    ("moved once per block", check_training, "momentum = self.count_batch()",
     "momentum = 1 - (1 - self.count_batch()) ** len(mean)"),
    ("gradient stops at the mean", check_training, f"mean = {MEAN}", f"mean = {MEAN}.detach()"),
    ("the batch's statistics in evaluation", check_evaluation,
     "if self.uses_batch_statistics():\n            z =", "if len(x) == 6:\n            z ="),
    ("evaluation asks for whole blocks", check_evaluation,
     "if not self.uses_batch_statistics():", "if False:"),
    ("no cumulative average", check_one_block, "momentum = self.count_batch()",
     "self.count_batch(); momentum = self.momentum or 0.0"),
    ("a batch that is smaller than a block", check_refusals, "if batch_size % self.virtual_batch:",
     "if batch_size > self.virtual_batch and batch_size % self.virtual_batch:"),
    ("one value becomes zero", check_refusals, "self.virtual_batch * x[0, 0].numel() == 1", "False"),
    ("statistics in half precision", check_half_precision, "z = x if x.dtype == torch.float64 else x.float()", "z = x"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "old", "new"), [each[1:] for each in MUTANTS], ids=[each[0] for each in MUTANTS])
def test_a_broken_copy_is_caught(check, old, new):
    mutant = mutate(ghost, old, new, "GhostBatchNorm")
    with pytest.raises((AssertionError, UserError)):
        check(mutant)


def test_every_check_catches_somebody():
    assert {mutant[1] for mutant in MUTANTS} == set(CHECKS)


def test_gradients_of_gradients():
    module = make(GhostBatchNorm, 2, 0.3, activation="tanh", virtual_batch=2)
    inputs = tuple(randn64(4, 2, 3).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(module, inputs) and torch.autograd.gradgradcheck(module, inputs)


def test_blocks_of_one_image_are_instance_norm():
    x = randn64(4, 3, 5, 2)
    close(make(GhostBatchNorm, 3, affine=False, virtual_batch=1)(x), F.instance_norm(x), "y", **DOUBLE)


@pytest.mark.parametrize(
    ("virtual_batch", "batch_size", "message"),
    [
        (32, 100, "norm=ghost: a batch of 100 cannot be split into blocks of 32; set norm.virtual_batch to a divisor "
         "of 100 (2, 4, 5, 10, 20, 25, 50, 100) or batch_size to a multiple of 32"),
        (32, 16, "a divisor of 16 (2, 4, 8, 16)"),
        (2, 7, "a divisor of 7 (7)"),
        (2, 1, "a divisor of 1 (1)"),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_split_is_refused_with_what_can(virtual_batch, batch_size, message):
    module = GhostBatchNorm(3, virtual_batch=virtual_batch)
    with pytest.raises(UserError, match=re.escape(message)):
        module.check_batch_size(batch_size)
    with pytest.raises(ValueError, match=re.escape(message)):
        module(torch.ones(batch_size, 3, 2))


def test_a_batch_of_whole_blocks_is_fine():
    for virtual_batch, batch_size in ((32, 32), (32, 64), (1, 7), (7, 7)):
        GhostBatchNorm(3, virtual_batch=virtual_batch).check_batch_size(batch_size)


@pytest.mark.parametrize("virtual_batch", [0, -2, 2.0, True, "all"])
def test_a_block_is_a_positive_number_of_examples(virtual_batch):
    with pytest.raises(UserError, match=f"norm.virtual_batch={virtual_batch}"):
        GhostBatchNorm(3, virtual_batch=virtual_batch)


def test_an_empty_batch_is_counted_and_nothing_else():
    for shape in ((0, 3), (0, 3, 4, 4), (2, 3, 0, 4)):
        module = GhostBatchNorm(3, virtual_batch=2)
        assert module(torch.ones(shape)).shape == shape
        assert module.num_batches_tracked.item() == 1
        assert torch.equal(module.running_var, torch.ones(3)) and not module.running_mean.any()


def test_without_running_statistics_the_batchs_own_are_used_from_then_on():
    module = make(GhostBatchNorm, 3, virtual_batch=2)
    module.running_mean = module.running_var = module.num_batches_tracked = None
    x = randn64(4, 3, 5, 2)
    assert torch.equal(module(x), module.eval()(x))


def test_a_checkpoint_is_that_of_batch_norm():
    module, plain = make(GhostBatchNorm, 3, virtual_batch=2), make(scratch.BatchNorm, 3)
    module(randn64(4, 3, 5, 2))
    plain.load_state_dict(module.state_dict())
    x = randn64(5, 3, 5, 2)
    assert torch.equal(plain.eval()(x), module.eval()(x))


def test_ghost_compiles_into_one_graph():
    module, x = GhostBatchNorm(3, virtual_batch=2), torch.randn(4, 3, 5, 2)
    twin = copy.deepcopy(module)
    assert torch.equal(torch.compile(twin, backend="eager", fullgraph=True)(x), module(x))
    match(twin.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_it_says_how_many_examples_form_a_block():
    module = GhostBatchNorm(6, virtual_batch=8)
    assert (module.reduces_over(2), module.reduces_over(4)) == ("8 of N", "8 of N, H, W")
    assert "momentum=0.1" in repr(module) and "virtual_batch=8" in repr(module)
