"""norm=group: the formulas by hand and torch's group norm in float64, the words for groups, what cannot be split."""

import re

import pytest
import torch
import torch.nn.functional as F
from test_norm_mutants import mutate
from test_norms import DOUBLE, close, make, match, measure, randn64
from torch import nn

from bnexp.errors import UserError
from bnexp.models.densenet import DenseNet
from bnexp.models.lenet import LeNet
from bnexp.models.mlp import MLP
from bnexp.models.resnet import ResNet
from bnexp.norms import group
from bnexp.norms.base import ACTIVATIONS
from bnexp.norms.group import GroupNorm

SHAPES = [(7, 6), (5, 6, 4), (4, 6, 5, 2), (2, 6, 2, 3, 3)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def closed_form(x, num_groups, weight, bias, eps, dy):
    """y and the gradients of sum(y dy), a group at a time and without autograd.

    With dz = dy weight over the M values of an example's group, dx = rstd (dz - sum(dz) / M - xhat sum(dz xhat) / M).
    """
    n, c = x.shape[:2]
    flat, dy = x.detach().reshape(n, c, -1), dy.reshape(n, c, -1)
    y, dx, xhat = (torch.empty_like(flat) for _ in range(3))
    width = c // num_groups
    for i in range(n):
        for begin in range(0, c, width):
            one = (i, slice(begin, begin + width))
            values = flat[one]
            rstd = (((values - values.mean()) ** 2).mean() + eps) ** -0.5
            xhat[one] = (values - values.mean()) * rstd
            dz = dy[one] * weight.detach()[one[1], None]
            dx[one] = rstd * (dz - dz.mean() - xhat[one] * (dz * xhat[one]).mean())
    y = xhat * weight.detach()[:, None] + bias.detach()[:, None]
    dweight, dbias = (dy * xhat).sum((0, 2)), dy.sum((0, 2))
    return {"y": y.view(x.shape), "x": dx.view(x.shape), "weight": dweight, "bias": dbias}


def check_formula(norm):
    """Forward and every gradient, by the formulas and by torch; in training and in evaluation alike."""
    for shape in SHAPES:
        for groups in (1, 2, 3, "layer"):
            for training in (True, False):
                module = make(norm, 6, groups, 0.3).train(training)  # a large eps tells inside the root from outside
                x, dy = randn64(*shape), randn64(*shape)
                number = 1 if groups == "layer" else groups
                actual = measure(module, x, dy)
                match(actual, closed_form(x, number, module.weight, module.bias, 0.3, dy), **DOUBLE)
                expected = F.group_norm(x, number, module.weight, module.bias, 0.3)
                close(actual["y"], expected, "y", **DOUBLE)


def check_end(norm):
    """The residual is added to what is scaled and shifted, then the activation."""
    for activation, function in ACTIVATIONS.items():
        module = make(norm, 6, activation=activation)
        x, residual = randn64(4, 6, 5, 2), randn64(4, 6, 5, 2)
        expected = F.group_norm(x, 2, module.weight, module.bias) + residual
        close(module(x, residual), function(expected) if function else expected, "y", **DOUBLE)


def check_instance(norm):
    """A group per channel is instance norm; one value per group is refused, in every mode."""
    module = make(norm, 6, "instance")
    x = randn64(4, 6, 5, 2)
    close(module(x), F.instance_norm(x, weight=module.weight, bias=module.bias), "y", **DOUBLE)
    for groups in ("instance", 6):
        for shape in ((4, 6), (4, 6, 1), (1, 6, 1, 1)):
            try:
                norm(6, groups).eval()(torch.ones(shape))
            except UserError as error:
                assert f"size {shape} with norm.groups={groups}" in str(error) and "norm.groups=layer" in str(error)
            else:
                raise AssertionError(f"one value per group went through: {shape}")


def check_half_precision(norm):
    """bfloat16 is averaged in float32 and rounded once."""
    x = (randn64(4, 6, 32, 32) + 20).bfloat16()
    y, expected = norm(6)(x), F.group_norm(x.double(), 2)
    # Half a unit in the last place and some roundings of a float32 mean near 22.
    close(y.double(), expected, "y", rtol=0.51 * torch.finfo(torch.bfloat16).eps, atol=2e-5)


def check_large_mean(norm):
    """E[x^2] - E[x]^2 keeps no digit at mean 1e8, std 1."""
    x = torch.randn(4, 6, 8, 8, dtype=torch.float64) + 1e8
    close(norm(6)(x), F.group_norm(x - 1e8, 2), "y", rtol=0, atol=1e-6)


CHECKS = [value for name, value in globals().items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_real_class_passes(check):
    check(GroupNorm)


MEAN, VARIANCE = "z.mean(dims, keepdim=True)", "(z - mean).square().mean(dims, keepdim=True)"
# The mistake, the check that has to notice it, what is written there and what instead.
MUTANTS = [
    ("interleaved groups", check_formula, "z.unflatten(1, (self.num_groups, self.num_features // self.num_groups))",
     "z.unflatten(1, (self.num_features // self.num_groups, self.num_groups)).transpose(1, 2)"),
    ("the batch averaged as well", check_formula, "dims = list(range(2, z.dim()))",
     "dims = [0, *range(2, z.dim())]"),
    ("pixels not averaged", check_formula, "dims = list(range(2, z.dim()))", "dims = [2]"),
    ("unbiased variance", check_formula, VARIANCE, "z.var(dims, keepdim=True)"),
    ("eps outside the root", check_formula, "torch.sqrt(var + self.eps)", "(var.sqrt() + self.eps)"),
    ("gradient stops at the mean", check_formula, f"mean = {MEAN}", f"mean = {MEAN}.detach()"),
    ("gradient stops at the variance", check_formula, f"var = {VARIANCE}", f"var = {VARIANCE}.detach()"),
    ("layer and instance swapped", check_instance, 'groups == "layer"', 'groups != "layer"'),
    ("one value per group becomes zero", check_instance, "z[0, 0].numel() == 1", "False"),
    ("residual forgotten", check_end, "residual, self.activation)", "None, self.activation)"),
    ("statistics in half precision", check_half_precision, "z = x if x.dtype == torch.float64 else x.float()", "z = x"),
    ("variance as E[x^2] - E[x]^2", check_large_mean, VARIANCE,
     "z.square().mean(dims, keepdim=True) - mean.square()"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "old", "new"), [each[1:] for each in MUTANTS], ids=[each[0] for each in MUTANTS])
def test_a_broken_copy_is_caught(check, old, new):
    mutant = mutate(group, old, new, "GroupNorm")
    with pytest.raises(AssertionError):
        check(mutant)


def test_every_check_catches_somebody():
    assert {mutant[1] for mutant in MUTANTS} == set(CHECKS)


def test_by_hand():
    x = torch.tensor([[1.0, 3.0, 10.0, 10.0], [0.0, 0.0, -2.0, 2.0]])
    # pairs of channels: means 2, 10, 0, 0 and variances 1, 0, 0, 4; without eps but where the variance is 0
    expected = torch.tensor([[-1.0, 1.0, 0.0, 0.0], [0.0, 0.0, -1.0, 1.0]])
    torch.testing.assert_close(GroupNorm(4, 2, eps=1e-12)(x), expected)
    # all four: mean 6 and variance 16.5; mean 0 and variance 2
    rows = [torch.tensor([-5.0, -3.0, 4.0, 4.0]) / 16.5**0.5, torch.tensor([0.0, 0.0, -2.0, 2.0]) / 2**0.5]
    torch.testing.assert_close(GroupNorm(4, "layer", eps=1e-12)(x), torch.stack(rows))


def test_gradients_of_gradients():
    module = make(GroupNorm, 4, 2, 0.3, activation="tanh")
    inputs = tuple(randn64(3, 4, 2).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(module, inputs) and torch.autograd.gradgradcheck(module, inputs)


@pytest.mark.parametrize("groups", [1, 2, 6, "layer", "instance"])
def test_an_example_does_not_depend_on_its_batch(groups):
    module, x = GroupNorm(6, groups, dtype=torch.float64), randn64(4, 6, 3, 3)
    close(module(x)[1:2], module(x[1:2]), "y", **DOUBLE)
    assert module(x[:0]).shape == (0, 6, 3, 3)
    assert not list(module.buffers())


def test_a_checkpoint_is_that_of_torch():
    module, reference = make(GroupNorm, 6, 3), nn.GroupNorm(3, 6, dtype=torch.float64)
    reference.load_state_dict(module.state_dict())
    x = randn64(4, 6, 5, 2)
    close(module(x), reference(x), "y", **DOUBLE)
    bare = GroupNorm(6, affine=False)
    assert not bare.state_dict() and torch.allclose(bare(x.float()), F.group_norm(x.float(), 2), atol=1e-5)
    module.reset_parameters()
    assert torch.equal(module.weight, torch.ones(6).double()) and not module.bias.any()


@pytest.mark.parametrize(
    ("num_features", "groups", "message"),
    [
        (16, 5, "norm=group: 16 channels cannot be split into 5 groups; "
         "set norm.groups to a divisor of 16 (1, 2, 4, 8, 16)"),
        (6, 12, "6 channels cannot be split into 12 groups; set norm.groups to a divisor of 6 (1, 2, 3, 6)"),
        (6, 0, "norm.groups=0: not known; give a positive whole number, layer or instance"),
        (6, -1, "norm.groups=-1"),
        (6, True, "norm.groups=True"),
        (6, 2.0, "norm.groups=2.0"),
        (6, "batch", "norm.groups=batch"),
    ],
)  # fmt: skip
def test_groups_that_cannot_be_are_refused_with_what_can(num_features, groups, message):
    with pytest.raises(UserError, match=re.escape(message)):
        GroupNorm(num_features, groups)


@pytest.mark.parametrize("model", [MLP, LeNet, ResNet, DenseNet])
def test_two_groups_and_one_fit_every_width_of_the_models(model):
    for groups in (2, "layer"):
        net = model((1, 28, 28), 10, lambda n, activation, groups=groups: GroupNorm(n, groups, activation=activation))
        assert net(torch.randn(1, 1, 28, 28)).isfinite().all()


def test_instance_norm_of_dense_layers_says_what_to_do():
    net = LeNet((1, 28, 28), 10, lambda n, activation: GroupNorm(n, "instance", activation=activation))
    with pytest.raises(UserError, match=r"\(8, 120\) with norm.groups=instance; after dense .*set norm.groups=layer"):
        net(torch.randn(8, 1, 28, 28))


@pytest.mark.parametrize(
    ("groups", "over"),
    [(2, ["C/2", "C/2, L", "C/2, H, W"]), ("layer", ["C", "C, L", "C, H, W"]), (1, ["C", "C, L", "C, H, W"]),
     ("instance", ["", "L", "H, W"]), (6, ["", "L", "H, W"])],
)  # fmt: skip
def test_a_group_norm_says_what_it_reduces_over(groups, over):
    assert [GroupNorm(6, groups).reduces_over(num_dims) for num_dims in (2, 3, 4)] == over


def test_the_repr_says_how_many_groups():
    assert "6, groups=instance, eps=1e-05, affine=True, bias=True, activation=relu" in repr(
        GroupNorm(6, "instance", activation="relu")
    )
