"""Norms do what torch.nn.BatchNorm1d/2d/3d do, to the letter, and what the paper's formulas say in float64.

test_norm_mutants.py states the arithmetic as checks and shows that they tell right from wrong;
test_norm_every.py asks of every norm in conf/ what all have in common.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from bnexp.errors import UserError
from bnexp.norms import library, scratch
from bnexp.norms.base import ACTIVATIONS, finish
from bnexp.norms.none import Shift

TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
LAYOUTS = {
    "N,C": lambda randn: randn(7, 3),
    "N,C,L": lambda randn: randn(5, 3, 4),
    "N,C,H,W": lambda randn: randn(4, 3, 5, 2),
    "N,C,D,H,W": lambda randn: randn(2, 3, 2, 3, 3),
    "channels_last": lambda randn: randn(4, 3, 5, 2).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda randn: randn(2, 3, 2, 3, 3).to(memory_format=torch.channels_last_3d),
    "every other row": lambda randn: randn(4, 3, 10, 2)[:, :, ::2],
    "every other channel": lambda randn: randn(4, 6, 5, 2)[:, ::2],
    "every other row, channels_last": lambda randn: randn(4, 5, 10, 3)[:, :, ::2].permute(0, 3, 1, 2),
    "one column, expanded": lambda randn: randn(4, 3, 5, 1).expand(4, 3, 5, 2),
}
ALL = [scratch.BatchNorm, library.BatchNorm]
both = pytest.mark.parametrize("norm", ALL, ids=["scratch", "library"])
# Roundings to double of up to some hundred terms around 1.
DOUBLE = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn64(*shape):
    """Neither centred nor scaled, so that forgetting to subtract or divide shows."""
    return torch.randn(shape, dtype=torch.float64) * 1.5 + 2


def channels(t, like):
    """(C,) made to broadcast against an input with channels at dimension 1."""
    return t.view([-1 if d == 1 else 1 for d in range(like.dim())])


def close(actual, expected, what, rtol, atol):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


def closed_form(x, mean, var, weight, bias, eps, dy, residual=None, activation="identity", training=True):
    """y and the gradients of sum(y dy) by name, in float64 and without autograd.

    With dz = dy activation'(z), in training dx = weight rstd (dz - sum(dz) / M - xhat sum(dz xhat) / M).
    """
    x, mean, var, weight, bias, dy = (t.detach().double() for t in (x, mean, var, weight, bias, dy))
    dims, m = [d for d in range(x.dim()) if d != 1], x.numel() // x.shape[1]
    rstd = channels(1 / (var + eps).sqrt(), x)
    xhat = (x - channels(mean, x)) * rstd
    z = channels(weight, x) * xhat + channels(bias, x)
    if residual is not None:
        z = z + residual.detach().double()
    y = {
        "identity": z, "relu": z.clamp(min=0), "sigmoid": 1 / (1 + (-z).exp()), "tanh": z.tanh(),
        "relu6": z.clamp(0, 6), "silu": z / (1 + (-z).exp()), "hardswish": z * (z + 3).clamp(0, 6) / 6,
        "gelu": z * (1 + torch.erf(z / 2**0.5)) / 2,
    }[activation]  # fmt: skip
    sigmoid, normal = 1 / (1 + (-z).exp()), (-(z**2) / 2).exp() / (2 * torch.pi) ** 0.5
    dz = dy * {
        "identity": 1, "relu": (z > 0).double(), "sigmoid": y * (1 - y), "tanh": 1 - y**2,
        "relu6": ((z > 0) & (z < 6)).double(), "silu": sigmoid + z * sigmoid * (1 - sigmoid),
        "hardswish": torch.where(z.abs() < 3, (2 * z + 3) / 6, (z > 0).double()),
        "gelu": (1 + torch.erf(z / 2**0.5)) / 2 + z * normal,
    }[activation]  # fmt: skip
    dweight, dbias = (dz * xhat).sum(dims), dz.sum(dims)
    through = (channels(dbias, x) + xhat * channels(dweight, x)) / m if training else 0
    dx = channels(weight, x) * rstd * (dz - through)
    return {"y": y, "x": dx, "weight": dweight, "bias": dbias} | ({} if residual is None else {"residual": dz})


def statistics(x):
    """Mean and biased variance of every channel, in float64."""
    dims = [d for d in range(x.dim()) if d != 1]
    return x.double().mean(dims), x.double().var(dims, unbiased=False)


def measure(module, x, dy, residual=None):
    """y and the gradients of sum(y dy), by name."""
    leaves = {"x": x, "weight": module.weight, "bias": module.bias, "residual": residual}
    leaves = {name: t for name, t in leaves.items() if t is not None}
    leaves |= {name: t.detach().requires_grad_() for name, t in leaves.items() if not isinstance(t, nn.Parameter)}
    y = module(leaves["x"]) if residual is None else module(leaves["x"], leaves["residual"])
    gradients = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True, materialize_grads=True)
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def make(norm, *args, dtype=torch.float64, **options):
    """A norm with a scale and a shift that are not 1 and 0."""
    module = norm(*args, dtype=dtype, **options)
    if module.affine:
        with torch.no_grad():
            module.weight.copy_(torch.linspace(-0.5, 1.5, module.num_features))
            module.bias.copy_(torch.linspace(1, -1, module.num_features))
    return module


def match(actual, expected, rtol, atol):
    assert actual.keys() == expected.keys()
    for name in expected:
        close(actual[name], expected[name], name, rtol, atol)


@both
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype_gives_torchs_values_and_memory_format(norm, layout, dtype, training):
    """library equals torch bit for bit; scratch equals the formulas (torch's own sums on a CPU are less exact)."""
    x = LAYOUTS[layout](lambda *shape: randn64(*shape).to(dtype))
    dy = torch.randn_like(x)
    param_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    module, reference = (make(each, 3, 0.3, dtype=param_dtype) for each in (norm, TORCH[x.dim()]))
    for each in (module, reference):
        each.running_mean.fill_(0.5)
        each.train(training)
    mean, var = statistics(x) if training else (module.running_mean, module.running_var)
    exact = closed_form(x, mean, var, module.weight, module.bias, 0.3, dy, training=training)
    actual, expected = measure(module, x, dy), measure(reference, x, dy)
    assert actual["y"].stride() == expected["y"].stride()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
    if norm is library.BatchNorm:
        match(actual, expected, rtol=0, atol=0)
        match(module.state_dict(), reference.state_dict(), rtol=0, atol=0)
    else:
        # Rounded once to the input's dtype; the terms of a gradient, up to 40 of them, cancel before that.
        eps, wide = torch.finfo(dtype).eps, torch.finfo(param_dtype).eps
        for name, value in exact.items():
            rtol = 100 * wide if name in ("weight", "bias") else max(0.51 * eps, 100 * wide)
            close(actual[name].double(), value, name, rtol=rtol, atol=100 * wide)


@both
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3), "2-D to 5-D"),
        (torch.ones(2, 3, 1, 1, 1, 1), "2-D to 5-D"),
        (torch.ones(4, 2, 5, 5), "expected 3 channels"),
        (torch.ones(4, 3, dtype=torch.int64), "floating-point"),
    ],
    ids=["1-D", "6-D", "2 channels", "integers"],
)
def test_other_input_is_refused(norm, x, message):
    for module in (norm(3), norm(3).eval()):
        with pytest.raises(ValueError, match=message):
            module(x)
        assert module.num_batches_tracked.item() == 0


@both
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residual_and_activation_come_after_normalization(norm, activation):
    x, residual = torch.randn(4, 3, 5, 2), torch.randn(4, 3, 5, 2)
    plain, module = norm(3), norm(3, activation=activation)
    assert torch.equal(module(x), finish(plain(x), None, activation))
    assert torch.equal(module(x, residual), finish(plain(x), residual, activation))
    with pytest.raises(ValueError, match="residual"):
        module(x, residual[:, :1])


@pytest.mark.parametrize("target", [*ALL, nn.BatchNorm2d], ids=["scratch", "library", "torch"])
@pytest.mark.parametrize("source", [*ALL, nn.BatchNorm2d], ids=["scratch", "library", "torch"])
def test_a_checkpoint_of_one_loads_into_every_other(source, target):
    trained, fresh = make(source, 3), make(target, 3)
    trained(randn64(4, 3, 5, 2))
    assert list(trained.state_dict()) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    fresh.load_state_dict(trained.state_dict())
    match(fresh.state_dict(), trained.state_dict(), rtol=0, atol=0)
    x = randn64(4, 3, 5, 2)
    close(fresh.eval()(x), trained.eval()(x), "y", **DOUBLE)
    assert not make(target, 3, affine=False, track_running_stats=False).state_dict()
    # torch before 0.4.1 had no counter, and its checkpoints carry no version.
    old = {key: value for key, value in trained.state_dict().items() if key != "num_batches_tracked"}
    fresh = make(target, 3)
    fresh.load_state_dict(old)
    assert fresh.num_batches_tracked.item() == 0


@both
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_after_a_forward_pass_goes_on_alike(norm, duplicate):
    module = make(norm, 3, 0.3, 0.2, activation="relu")
    module(randn64(4, 3, 5, 2).requires_grad_())
    twin, x = duplicate(module), randn64(4, 3, 5, 2)
    assert torch.equal(twin(x), module(x))
    match(twin.state_dict(), module.state_dict(), rtol=0, atol=0)
    assert repr(twin) == repr(module)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_modules_round_their_statistics_once(norm, dtype):
    x = randn64(16, 64, 4, 4).to(dtype)
    module = make(norm, 64, momentum=0.3, dtype=dtype)
    old_mean, old_var = (buffer.uniform_(1, 2).double() for buffer in (module.running_mean, module.running_var))
    y, (mean, var) = module(x), statistics(x)
    assert y.dtype == module.running_mean.dtype == module.running_var.dtype == dtype
    # Half a unit in the last place for scratch; torch on a CPU rounds the batch's mean and variance before.
    rtol = torch.finfo(dtype).eps * (0.51 if norm is scratch.BatchNorm else 1.5)
    close(module.running_mean.double(), 0.7 * old_mean + 0.3 * mean, "running_mean", rtol=rtol, atol=0)
    close(module.running_var.double(), 0.7 * old_var + 0.3 * var * 256 / 255, "running_var", rtol=rtol, atol=0)


@both
def test_autocast_keeps_activations_in_bfloat16_and_statistics_in_float32(norm):
    net = nn.Sequential(nn.Linear(4, 3, bias=False), norm(3, momentum=1.0, activation="relu"))
    reference = nn.Sequential(copy.deepcopy(net[0]), nn.BatchNorm1d(3, momentum=1.0), nn.ReLU())
    x = torch.randn(64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = net(x), reference(x)
    y.sum().backward()
    assert y.dtype == expected.dtype == torch.bfloat16
    assert {t.dtype for t in (net[1].running_var, net[1].weight.grad, net[0].weight.grad)} == {torch.float32}
    close(y, expected, "y", rtol=torch.finfo(torch.bfloat16).eps, atol=1e-3)
    close(net[1].running_var, reference[1].running_var, "running_var", rtol=1e-3, atol=0)


def test_scratch_compiles_into_one_graph():
    module, x = scratch.BatchNorm(3, activation="relu"), torch.randn(4, 3, 5, 2)
    twin = copy.deepcopy(module)
    assert torch.equal(torch.compile(twin, backend="eager", fullgraph=True)(x), module(x))
    match(twin.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_scratch_keeps_its_digits_at_a_large_mean_in_float32():
    x = torch.randn(256, 3, 4, 4) + 1e4
    module = scratch.BatchNorm(3, momentum=1.0)
    y, (mean, var) = module(x), statistics(x)
    # Summing 4096 values leaves the mean within 16 units of its last place, 1e-2, which y inherits. The variance
    # feels the square of that; E[x^2] - E[x]^2 would be off by 1 and more.
    close(y.double(), (x - channels(mean, x)) / channels(var + 1e-5, x).sqrt(), "y", rtol=0, atol=1e-2)
    close(module.running_var.double(), var * 4096 / 4095, "running_var", rtol=1e-4, atol=0)


def test_scratch_options_state_the_conventions_of_other_tutorials():
    x = randn64(4, 3, 5, 2)
    mean, var = statistics(x)
    biased = scratch.BatchNorm(3, decay=0.9, running_var="biased", running_var_init=0, dtype=torch.float64)
    assert torch.equal(biased.running_var, torch.zeros(3).double())
    biased(x)
    close(biased.running_mean, 0.1 * mean, "running_mean", **DOUBLE)
    close(biased.running_var, 0.1 * var, "running_var", **DOUBLE)
    biased.reset_running_stats()
    assert torch.equal(biased.running_var, torch.zeros(3).double())
    assert scratch.BatchNorm(3, decay=0.9).momentum == pytest.approx(0.1, abs=1e-15)
    assert torch.equal(scratch.BatchNorm(3).running_var, torch.ones(3))


@pytest.mark.parametrize(
    "options", [{"momentum": 0.2, "decay": 0.9}, {"momentum": None, "decay": 0.9}, {"decay": 1.5}, {"running_var": "m"}]
)
def test_scratch_refuses_options_that_contradict(options):
    with pytest.raises(UserError, match="norm."):
        scratch.BatchNorm(3, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shift_adds_one_bias_per_channel(layout):
    x = LAYOUTS[layout](randn64)
    module = Shift(3, activation="tanh").double()
    with torch.no_grad():
        module.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    assert list(module.state_dict()) == ["bias"]
    residual = torch.randn_like(x)
    y = module(x, residual)
    expected = (x + channels(module.bias, x) + residual).tanh()
    close(y, expected, "y", **DOUBLE)
    (gradient,) = torch.autograd.grad(y.sum(), module.bias)
    dims = [d for d in range(x.dim()) if d != 1]
    close(gradient, (1 - expected**2).sum(dims), "bias", **DOUBLE)
    half = Shift(3, activation="relu")(x.bfloat16(), residual.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(half, (x.bfloat16() + residual.bfloat16()).relu())


def test_the_repr_says_what_the_norm_does():
    assert "3, eps=1e-05, momentum=0.1" in repr(library.BatchNorm(3))
    for text in ("activation=relu", "running_var=biased"):
        assert text in repr(scratch.BatchNorm(3, activation="relu", running_var="biased"))
    assert repr(Shift(3, activation="tanh")) == "Shift(3, bias=True, activation=tanh)"
