"""SkipInit, dynamic tanh and RMS norm: what each computes, by loops over plain numbers, and how each starts."""

import math

import pytest
import torch
from test_models import make_model, make_norm
from torch import nn

from bnexp.errors import UserError
from bnexp.models.initialize import initialize
from bnexp.norms.dyt import DynamicTanh
from bnexp.norms.rms import RMSNorm
from bnexp.norms.skipinit import SkipInit


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5 + 2


def filled(module, **values):
    module.double()
    with torch.no_grad():
        for name, value in values.items():
            getattr(module, name).copy_(torch.as_tensor(value))
    return module


GAMMA, BETA = torch.linspace(-0.5, 1.5, 3), torch.linspace(1, 2, 3)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 2, 5)])
def test_rms_divides_every_example_by_the_root_of_its_mean_square(shape):
    x = double(*shape)
    y = filled(RMSNorm(3, eps=0.1), weight=GAMMA, bias=BETA)(x)
    for example, out in zip(x, y, strict=True):
        numbers = example.flatten().tolist()
        size = math.sqrt(sum(v * v for v in numbers) / len(numbers) + 0.1)
        for c in range(3):
            torch.testing.assert_close(out[c], GAMMA[c].double() * example[c] / size + BETA[c].double())


def test_rms_without_a_shift_is_torchs_over_all_channels_and_pixels():
    x = double(4, 3, 2, 5)
    expected = nn.functional.rms_norm(x, x.shape[1:], eps=1e-5)
    torch.testing.assert_close(RMSNorm(3, bias=False).double()(x), expected)
    scaled = RMSNorm(3, eps=1e-12).double()
    torch.testing.assert_close(scaled(7 * x), scaled(x))


def test_dynamic_tanh_is_scale_tanh_and_shift():
    x = double(4, 3, 2, 5)
    module = DynamicTanh(3)
    assert (module.alpha.item(), module.weight.tolist(), module.bias.tolist()) == (0.5, [1] * 3, [0] * 3)
    y = filled(module, alpha=0.3, weight=GAMMA, bias=BETA)(x)
    for index in [(0, 0, 0, 0), (3, 2, 1, 4), (1, 1, 0, 2)]:
        expected = GAMMA[index[1]].item() * math.tanh(0.3 * x[index].item()) + BETA[index[1]].item()
        assert y[index].item() == pytest.approx(expected, rel=1e-7)  # alpha is 0.3 in float32


def test_skipinit_begins_as_the_shortcut_and_is_a_shift_where_there_is_none():
    x, residual = double(4, 3, 2, 5), double(4, 3, 2, 5, seed=1)
    module = SkipInit(3, activation="relu")
    assert torch.equal(module(x, residual), residual.relu()) and torch.equal(module(x), x.relu())
    y = filled(module, alpha=-0.7, bias=BETA)(x, residual)
    shifted = x + BETA.double().view(3, 1, 1)
    torch.testing.assert_close(y, (-0.7 * shifted + residual).relu())
    torch.testing.assert_close(module(x), shifted.relu())


def test_a_resnet_with_skipinit_begins_without_its_residual_branches_and_its_scalars_learn():
    model = make_model("resnet", "skipinit", widths=[4, 4, 8, 8], init="he")
    initialize(model, torch.Generator().manual_seed(0))
    x = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    with torch.no_grad():
        logits = model(x)
        model.stage1.block2.conv2.weight.mul_(100)
        assert torch.equal(model(x), logits)
    scalars = {key: p.grad for key, p in model.named_parameters() if key.endswith("alpha")}
    assert {key for key, grad in scalars.items() if grad is not None} == {k for k in scalars if "norm2" in k}
    assert all(grad.ne(0) for grad in scalars.values() if grad is not None)


def test_an_alpha_that_gives_no_slope_is_refused():
    for alpha in (0.0, math.nan, math.inf):
        with pytest.raises(UserError, match="norm.alpha_init="):
            DynamicTanh(3, alpha_init=alpha)


def test_the_new_norms_take_a_batch_of_one():
    for name in ("rms", "dyt", "skipinit"):
        make_norm(name)(3).check_batch_size(1)
