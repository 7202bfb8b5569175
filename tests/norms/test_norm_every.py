"""What every norm in conf/norm has in common, whatever it computes: where it fits in, and that it is fair.

Walks conf/, so a new norm is held to this without a line here. What each computes stands in a file of its own.
"""

import copy
import inspect

import pytest
import torch
from test_models import NORMS, SMALL_BATCHES, load_entry, make_norm
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.optim.swa_utils import update_bn

from bnexp.errors import UserError
from bnexp.models.lenet import LeNet
from bnexp.norms import scratch
from bnexp.norms.base import ACTIVATIONS, BatchNormBase, finish
from bnexp.norms.kernels.batch_norm import interpreted
from bnexp.probes.layers import list_layers

every_norm = pytest.mark.parametrize("name", NORMS)
runnable = pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.skipif(
        name == "fused" and not interpreted(), reason="CPU tensors need TRITON_INTERPRET=1"
    )) for name in NORMS
])  # fmt: skip
UNNORMED = ("none", "skipinit")
INPUTS = {
    "N,C": lambda: images()[:, :, 0, 0],
    "N,C,H,W": lambda: images(),
    "channels_last": lambda: images().to(memory_format=torch.channels_last),
}
inputs = pytest.mark.parametrize("kind", INPUTS)


def images(seed=0):
    """4 images of 6 channels, neither centred nor scaled."""
    return torch.randn(4, 6, 3, 5, generator=torch.Generator().manual_seed(seed)) * 1.5 + 2


def trained(name, activation="identity"):
    """A norm whose scale and shift are not 1 and 0 and whose running statistics, if any, have moved."""
    module = make_norm(name)(6, activation=activation)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.linspace(-0.5, 1.5, 6) if parameter.dim() else torch.tensor(0.75))
        module(images(seed=9))
    return module


def test_three_norms_implement_batch_norm_and_the_others_say_that_they_do_not():
    targets = {name: load_entry("norm", name)[0] for name in NORMS}
    kin = {name: target.implements_batch_norm for name, target in targets.items() if issubclass(target, BatchNormBase)}
    assert {name for name, same in kin.items() if same} == {"scratch", "library", "fused"}
    assert {name for name, same in kin.items() if not same} >= {"ghost", "renorm"}


@every_norm
def test_an_unknown_activation_is_an_error_that_lists_the_known(name):
    with pytest.raises(UserError, match="activation=elu.*identity, relu, sigmoid, tanh"):
        make_norm(name)(6, activation="elu")


@every_norm
def test_a_norm_names_its_activation(name):
    assert make_norm(name)(6).activation == "identity"
    module = make_norm(name)(6, activation="tanh")
    assert module.activation == "tanh" and "activation=tanh" in repr(module)


@every_norm
def test_building_a_norm_draws_no_random_numbers(name):
    before = torch.get_rng_state()
    make_norm(name)(8, activation="relu")
    assert torch.equal(torch.get_rng_state(), before)


@runnable
@inputs
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residual_and_activation_come_last_and_nothing_else_changes(name, kind, training, activation):
    x, residual = INPUTS[kind](), torch.ones(6, 4).T.contiguous() if kind == "N,C" else images(seed=1)
    plain, module = trained(name).train(training), trained(name, activation).train(training)
    # Two roundings of float32, for the kernel that keeps the sum in a register.
    exact = {"rtol": 2e-7, "atol": 1e-6} if name == "fused" else {"rtol": 0, "atol": 0}
    y = 0.75 * plain(x) if name == "skipinit" else plain(x)  # whose scalar acts beside a residual only
    torch.testing.assert_close(module(x, residual), finish(y, residual, activation), **exact)
    for mine, theirs in zip(module.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="the residual's shape"):
        module(x, residual[:, :1])


@runnable
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_channels_last_stays_channels_last_and_gives_the_same_values(name, training):
    x = images().requires_grad_()
    expected = trained(name).train(training)(x)
    (dx,) = torch.autograd.grad(expected.square().sum(), x)
    last = images().to(memory_format=torch.channels_last).requires_grad_()
    actual = trained(name).train(training)(last)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    # Sums of 60 float32 terms in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(actual.square().sum(), last)[0], dx, rtol=1e-4, atol=1e-4)


@runnable
@inputs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_once_and_keeps_parameters_and_statistics_in_float32(name, kind, dtype):
    x = INPUTS[kind]().to(dtype)
    module, exact = trained(name), trained(name)
    y, expected = module(x), exact(x.float())
    y.sum().backward()
    kept = [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None)]
    kept += [b for b in module.buffers() if b.is_floating_point()]
    assert y.dtype == dtype and {t.dtype for t in kept} == {torch.float32}
    # Half a unit in the last place and a little for float32 before it; none rounds its bias, 1.5 at most, as well.
    # Triton's interpreter cuts bfloat16 off where a device rounds: up to a whole unit.
    eps, cut = torch.finfo(dtype).eps, name == "fused" and dtype == torch.bfloat16
    rtol, atol = (1.01 if cut else 0.51) * eps, eps if name in UNNORMED else 1e-5
    torch.testing.assert_close(y.float(), expected, rtol=rtol, atol=atol)
    for mine, theirs in zip(module.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@runnable
def test_under_autocast_activations_are_bfloat16_and_gradients_float32(name):
    net = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), make_norm(name)(6, activation="relu"))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(images().requires_grad_())
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    gradients = [p.grad for key, p in net.named_parameters() if (name, key) != ("skipinit", "1.alpha")]
    assert {each.dtype for each in gradients} == {torch.float32}
    assert all(each.isfinite().all() and each.any() for each in gradients)


@runnable
def test_a_copy_after_a_forward_pass_goes_on_alike(name):
    module = trained(name, "relu")
    module(images().requires_grad_())
    twin = copy.deepcopy(module)
    assert repr(twin) == repr(module)
    for seed in range(2):
        assert torch.equal(twin(images(seed)), module(images(seed)))
    assert all(torch.equal(a, b) for a, b in zip(twin.buffers(), module.buffers(), strict=True))
    assert all(not b.requires_grad for b in module.buffers())


@runnable
def test_evaluation_changes_nothing_and_images_do_not_see_each_other(name):
    module = trained(name).eval()
    before = copy.deepcopy(module.state_dict())
    together = module(images())
    one_by_one = torch.cat([module(image[None]) for image in images()])
    torch.testing.assert_close(one_by_one, together, rtol=1e-6, atol=1e-6)  # a rounding or two
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@every_norm
def test_a_summary_shows_the_norm_on_the_meta_device(name):
    layers = {layer.name: layer for layer in list_layers(LeNet((1, 28, 28), 10, make_norm(name)), (1, 28, 28))}
    module = make_norm(name)(6)
    assert layers["norm1"].out_shape == (6, 24, 24)
    assert layers["norm1"].num_parameters == sum(p.numel() for p in module.parameters())
    shown = [layers[each].norm for each in ("norm1", "norm3")]
    assert module.normalizes == (name not in UNNORMED)
    over = [f"{type(module).__name__} over {module.reduces_over(d)}".removesuffix(" over ") for d in (4, 2)]
    assert shown == (over if module.normalizes else ["", ""])


@every_norm
@pytest.mark.parametrize("eps", [-1.0, 0.0, 1e-46, 1e39, float("nan"), float("inf")])
def test_an_eps_that_is_not_positive_and_finite_in_float32_is_refused(name, eps):
    target, options = load_entry("norm", name)
    if "eps" in options:
        with pytest.raises(UserError, match="norm.eps="):
            target(6, **options | {"eps": eps})


# ---------------------------------------------------------------- torch's own tools


def averaged(module, batches):
    """The running mean and variance of each batch by itself, averaged over the batches."""
    found = []
    for batch in batches:
        alone = copy.deepcopy(module)
        alone.reset_running_stats()
        alone.momentum = 1.0
        alone(batch)
        found.append((alone.running_mean, alone.running_var))
    return [torch.stack(each).mean(0) for each in zip(*found, strict=True)]


def of_scratch(**options):
    return pytest.param(lambda: scratch.BatchNorm(6, **options), id=f"scratch {options}")


@pytest.mark.parametrize(
    "make",
    [pytest.param(lambda name=name: make_norm(name)(6), id=name) for name in NORMS
     if make_norm(name)(6).keeps_running_statistics() and (name != "fused" or interpreted())]
    + [of_scratch(momentum=0.3, running_var="biased"), of_scratch(decay_warmup=True), of_scratch(decay=0.999),
       of_scratch(zero_debias=True, running_var_init=0)],
)  # fmt: skip
def test_torchs_update_bn_averages_the_statistics_of_its_batches(make):
    module, batches = make(), [images(seed) for seed in range(3)]
    momentum = module.momentum
    module(images(seed=9))
    expected = averaged(make(), batches)
    update_bn(batches, nn.Sequential(module).eval())
    # Averages of three float32 numbers around 2, moved one after the other.
    torch.testing.assert_close([module.running_mean, module.running_var], expected, rtol=1e-6, atol=1e-6)
    assert module.num_batches_tracked == 3 and module.momentum == momentum and not module.training


@every_norm
def test_torchs_conversion_to_synchronized_statistics_changes_no_norm_in_silence(name):
    module = make_norm(name)(6, activation="relu")
    if isinstance(module, BatchNormBase):
        with pytest.raises(UserError, match="cannot be replaced by convert_sync_batchnorm, .*leave this norm out"):
            nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(module))
    else:
        assert nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(module))[0] is module


@runnable
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("fuse, layer, x", [
    (fuse_conv_bn_eval, nn.Conv2d(6, 6, 2), images()),
    (fuse_linear_bn_eval, nn.Linear(6, 6), images()[:, :, 0, 0]),
])  # fmt: skip
def test_a_norm_that_torch_puts_into_the_layer_before_it_loses_nothing_in_silence(name, activation, fuse, layer, x):
    module = make_norm(name)(6, activation=activation)
    if not module.keeps_running_statistics():
        pytest.skip("has no statistics to put anywhere")
    pair = nn.Sequential(layer, module)
    pair(x)
    pair.eval()
    if activation == "identity":
        torch.testing.assert_close(fuse(*pair)(x), pair(x))
    else:
        with pytest.raises(UserError, match=f"cannot be replaced by {fuse.__name__}, whose result has no activation"):
            fuse(*pair)


@runnable
def test_a_norm_takes_torchs_bias_argument(name):
    target, options = load_entry("norm", name)
    if "bias" not in inspect.signature(target).parameters:
        pytest.skip("takes none")
    full, without = (target(6, **options | SMALL_BATCHES.get(name, {}) | {"bias": bias}) for bias in (True, False))
    assert {n for n, _ in full.named_parameters()} - {n for n, _ in without.named_parameters()} == {"bias"}
    assert without.bias is None and "bias=False" in repr(without)
    torch.testing.assert_close(without(images()), full(images()), rtol=0, atol=0)  # whose bias is 0
    assert "bias" not in without.state_dict()
    if isinstance(without, BatchNormBase):
        without.reset_parameters()
