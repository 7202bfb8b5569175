"""Models: the shapes and parameter counts of the reference, every size, and starts that no norm moves."""

import importlib
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from bnexp.errors import UserError
from bnexp.models.densenet import DenseBlock, Transition
from bnexp.models.initialize import initialize
from bnexp.models.resnet import Residual, ResNet
from bnexp.norms.library import BatchNorm
from bnexp.norms.none import Shift

CONF = Path(__file__).parents[2] / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if "\ninit:" in path.read_text())  # bnexp's own
NORMS = sorted(path.stem for path in (CONF / "norm").glob("*.yaml") if path.stem != "own")
MNIST = (1, 28, 28)


def load_entry(group, name):
    """The class that a yaml names and the options that it gives it."""
    options = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    module, _, target = options.pop("_target_").rpartition(".")
    assert options.pop("_partial_") is True
    return getattr(importlib.import_module(module), target), options


# The batches here are smaller than a default block, but even.
SMALL_BATCHES = {"ghost": {"virtual_batch": 2}}


def make_norm(name):
    target, options = load_entry("norm", name)
    options |= SMALL_BATCHES.get(name, {})
    return lambda num_features, activation="identity": target(num_features, **options, activation=activation)


def make_model(name, norm="library", in_shape=MNIST, **overrides):
    target, options = load_entry("model", name)
    return target(in_shape, 10, make_norm(norm), **{**options, **overrides})


def generator(seed):
    return torch.Generator().manual_seed(seed)


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def is_weighted(module):
    return isinstance(module, nn.Conv2d | nn.Linear)


def walk(model, in_shape):
    """The output shape of every module, without the batch; on the meta device big images cost nothing."""
    shapes = {}
    for name, module in model.to("meta").eval().named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: shapes.update({name: out.shape[1:]}))
    model(torch.empty(1, *in_shape, device="meta"))
    return shapes


# The interpreter that runs the fused kernels on a CPU takes a program per channel, so a few must do for it.
NARROW = {"resnet": {"widths": [4, 4, 8, 8]}, "densenet": {"growth": 4, "stem_width": 8}}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_a_step_with_every_norm(name, norm):
    model = make_model(name, norm, **(NARROW.get(name, {}) if norm == "fused" else {}))
    initialize(model, generator(0))
    x = torch.randn(4, *MNIST, generator=generator(1))
    logits = model(x)
    assert logits.shape == (4, 10)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert norm == "skipinit" and parameter_name.endswith("alpha"), parameter_name
            continue
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("activation", ["identity", "relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("name", MODELS)
def test_the_activation_reaches_every_norm_but_nothing_else(name, activation):
    sites = []

    def norm(num_features, activation="identity"):
        sites.append(activation)
        return Shift(num_features, activation=activation)

    target, options = load_entry("model", name)
    model = target(MNIST, 10, norm, **{**options, "activation": activation})
    assert set(sites) == {activation}
    assert len(sites) == sum(isinstance(m, Shift) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_an_activation_that_is_not_known_is_refused(name):
    with pytest.raises(UserError, match="activation=elu"):
        make_model(name, activation="elu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_bias_is_for_all_layers_and_the_classifier_has_one_always(name, bias):
    layers = [module for module in make_model(name, bias=bias).modules() if is_weighted(module)]
    assert [layer.bias is not None for layer in layers] == [bias] * (len(layers) - 1) + [True]


@pytest.mark.parametrize("name", MODELS)
def test_channels_and_classes_follow_the_dataset(name):
    target, options = load_entry("model", name)
    model = target((3, 20, 24), 7, make_norm("library"), **options)
    assert model(torch.zeros(2, 3, 20, 24)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_gives_the_same_logits(name):
    model = make_model(name, in_shape=(3, 20, 20)).double()
    x = torch.randn(2, 3, 20, 20, dtype=torch.float64, generator=generator(0))
    expected = model(x)
    actual = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    # float64 sums of at most 4,608 terms in another order, through batch norm of a few values: far below 1e-6
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


# --- sizes --------------------------------------------------------------------------------------------------


def works(name, height, width):
    """Whether a forward pass really works, with LeNet's own check kept out of the question."""
    x = torch.empty(2, 1, height, width, device="meta")
    try:
        if name == "lenet":
            model = make_model("lenet", "none").to("meta")
            x = model.pool1(model.conv1(x))
            return model.pool2(model.conv2(x)).numel() > 0
        return make_model(name, "none", (1, height, width)).to("meta")(x).shape == (2, 10)
    except RuntimeError:
        return False


SMALL = {
    "mlp": {},
    "lenet": {},
    "resnet": {"widths": [4, 4, 4, 4]},
    "densenet": {"growth": 2, "stem_width": 4},
}


@pytest.mark.parametrize("name", SMALL)
def test_a_size_is_refused_exactly_when_nothing_would_be_left(name):
    for height, width in [(n, n) for n in range(1, 41)] + [(n, 28) for n in range(1, 41, 2)] + [(28, 15)]:
        try:
            model = make_model(name, "none", (1, height, width), **SMALL[name])
        except UserError:
            assert not works(name, height, width), (height, width)
        else:
            out = model.to("meta")(torch.empty(2, 1, height, width, device="meta"))
            assert out.shape == (2, 10), (height, width)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 15, 40), (1, 40, 15)])
def test_lenet_names_the_smallest_size_that_works(shape):
    given = f"{shape[1]}x{shape[2]}"
    with pytest.raises(UserError, match=rf"{given} images are too small.* is 16x16 \(data.size=16\)"):
        make_model("lenet", in_shape=shape)
    assert make_model("lenet", in_shape=(1, 16, 16))(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


# --- the reference's shape walks ----------------------------------------------------------------------------


def test_lenet_leaves_256_inputs_to_the_dense_part_at_28():
    shapes = walk(make_model("lenet"), MNIST)
    assert shapes["conv1"] == (6, 24, 24)
    assert shapes["pool1"] == (6, 12, 12)
    assert shapes["conv2"] == (16, 8, 8)
    assert shapes["pool2"] == (16, 4, 4)
    assert make_model("lenet").dense1.in_features == 256
    assert [shapes[layer] for layer in ("dense1", "dense2", "classifier")] == [(120,), (84,), (10,)]


def test_resnet_walks_as_the_tutorial_at_224():
    shapes = walk(make_model("resnet", in_shape=(1, 224, 224)), (1, 224, 224))
    assert shapes["norm1"] == (64, 112, 112)
    assert shapes["pool1"] == (64, 56, 56)
    assert [shapes[f"stage{i}"] for i in range(1, 5)] == [
        (64, 56, 56),
        (128, 28, 28),
        (256, 14, 14),
        (512, 7, 7),
    ]
    assert shapes["classifier"] == (10,)


def test_the_cifar_stem_keeps_the_size():
    shapes = walk(make_model("resnet", stem="cifar", in_shape=(3, 32, 32)), (3, 32, 32))
    assert "pool1" not in shapes
    layers = ["norm1", "stage1", "stage2", "stage3", "stage4"]
    assert [shapes[layer][-1] for layer in layers] == [32, 32, 16, 8, 4]


def test_densenet_walks_as_the_tutorial_at_96_and_224():
    for size in (96, 224):
        shapes = walk(make_model("densenet", in_shape=(1, size, size)), (1, size, size))
        names = ["pool1", "block1", "transition1", "block2", "transition2", "block3", "transition3", "block4"]
        assert [shapes[name][0] for name in names] == [64, 192, 96, 224, 112, 240, 120, 248]
        sides = [size // divisor for divisor in (4, 4, 8, 8, 16, 16, 32, 32)]
        assert [shapes[name][1:] for name in names] == [(side, side) for side in sides]


def test_the_tutorials_dense_block_and_transition():
    norm = make_norm("library")
    y = DenseBlock(3, 2, 10, norm)(torch.randn(4, 3, 8, 8))
    assert y.shape == (4, 23, 8, 8)
    assert Transition(23, 10, norm)(y).shape == (4, 10, 4, 4)


def test_a_dense_block_keeps_its_input_in_front():
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(DenseBlock(3, 2, 10, make_norm("library"))(x)[:, :3], x)


def test_a_transition_averages_what_the_edge_of_an_odd_size_holds():
    transition = Transition(1, 1, lambda n, activation: nn.Identity())
    nn.init.ones_(transition.conv.weight)
    x = torch.arange(9.0).view(1, 1, 3, 3)
    # by hand: [0 1; 3 4], then [2; 5], then [6 7], then [8]
    assert transition(x).flatten().tolist() == [2.0, 3.5, 6.5, 8.0]


@pytest.mark.parametrize("out_channels, stride", [(3, 1), (3, 2), (6, 1), (6, 2)])
def test_a_residual_block_is_the_reference_formula(out_channels, stride):
    """conv3x3(stride) norm relu conv3x3 norm, plus shortcut, relu; 1x1 convolution where shapes change."""
    block = Residual(3, out_channels, make_norm("library"), stride=stride)
    x = torch.randn(4, 3, 6, 6, generator=generator(0))
    conv, batch_norm = nn.functional.conv2d, nn.functional.batch_norm
    y = batch_norm(conv(x, block.conv1.weight, stride=stride, padding=1), None, None, training=True).relu()
    y = batch_norm(conv(y, block.conv2.weight, padding=1), None, None, training=True)
    changes = stride != 1 or out_channels != 3
    shortcut = conv(x, block.shortcut.weight, stride=stride) if changes else x
    # the same operations in the same order; 1e-6 leaves room for another algorithm of the convolution
    torch.testing.assert_close(block(x), (y + shortcut).relu(), rtol=1e-6, atol=1e-6)


def test_the_last_step_of_a_residual_block_is_one_norm_call_with_the_shortcut():
    calls = []

    class Recorder(nn.Module):
        def __init__(self, num_features, activation):
            super().__init__()
            self.activation = activation

        def forward(self, x, residual=None):
            calls.append((self.activation, residual))
            return x

    x = torch.randn(2, 3, 4, 4)
    Residual(3, 3, Recorder, activation="tanh")(x)
    (first, no_residual), (second, residual) = calls
    assert first == second == "tanh"
    assert no_residual is None
    assert residual is x


# --- parameter counts ---------------------------------------------------------------------------------------


def test_lenet_has_44878_parameters_with_biases():
    assert num_parameters(make_model("lenet", bias=True)) == 44_878


def test_mlp_parameters_by_formula():
    for hidden in [[32, 32], [100, 100, 100], []]:
        widths = [784, *hidden]
        expected = sum((n + 2) * m for n, m in zip(widths, widths[1:], strict=False)) + (widths[-1] + 1) * 10
        assert num_parameters(make_model("mlp", hidden=hidden)) == expected


def test_resnet_is_torchvisions_without_the_norms_on_shortcuts():
    model = ResNet((3, 224, 224), 1000, BatchNorm)
    # torchvision's resnet18 has 11,689,512, of which a scale and a shift on three shortcuts are not ours
    assert num_parameters(model) == 11_689_512 - 2 * (128 + 256 + 512)


def test_resnet_with_other_blocks_widths_and_stem_by_formula():
    model = ResNet((3, 32, 32), 10, BatchNorm, stem="cifar", blocks=[3, 1], widths=[8, 20])
    stem = 3 * 8 * 9 + 2 * 8
    stage1 = 3 * (2 * 8 * 8 * 9 + 4 * 8)
    stage2 = (8 * 20 + 20 * 20) * 9 + 4 * 20 + 8 * 20
    assert num_parameters(model) == stem + stage1 + stage2 + 21 * 10


def test_densenet_parameters_by_formula():
    stem = 49 * 64 + 2 * 64
    blocks = sum((c + 32 * i) * (2 + 9 * 32) for c in (64, 96, 112, 120) for i in range(4))
    transitions = sum(c * (2 + c // 2) for c in (192, 224, 240))
    assert num_parameters(make_model("densenet")) == stem + blocks + transitions + 2 * 248 + 249 * 10


# --- initial weights ----------------------------------------------------------------------------------------


def drawn(model):
    """Every parameter that comes from random numbers, by name."""
    layers = [(name, module) for name, module in model.named_modules() if is_weighted(module)]
    return {f"{name}.{key}": p for name, module in layers for key, p in module.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_gives_the_same_weights_whatever_the_norm(name):
    starts = []
    for i, norm in enumerate(NORMS):
        torch.manual_seed(i)  # what the constructors drew must not survive
        model = make_model(name, norm, bias=True, init="torch")
        initialize(model, generator(3))
        starts.append(drawn(model))
    for start in starts[1:]:
        assert start.keys() == starts[0].keys()
        assert all(torch.equal(start[key], starts[0][key]) for key in start)
    other = make_model(name, bias=True, init="torch")
    initialize(other, generator(4))
    assert not any(torch.equal(weight, starts[0][key]) for key, weight in drawn(other).items())


@pytest.mark.parametrize("name", MODELS)
def test_torchs_weights_are_its_own_in_the_models_order(name):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = drawn(make_model(name, bias=True, init="torch"))
    model = make_model(name, bias=True, init="torch")
    before = torch.random.get_rng_state()
    initialize(model, generator(5))
    assert torch.equal(torch.random.get_rng_state(), before)
    actual = drawn(model)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", MODELS)
def test_torchs_weights_are_uniform_within_one_over_the_root_of_fan_in(name):
    model = make_model(name, bias=True, init="torch")
    initialize(model, generator(0))
    for module in filter(is_weighted, model.modules()):
        bound = 1 / math.sqrt(module.weight[0].numel())
        assert module.weight.abs().max() <= bound
        assert module.bias.abs().max() <= bound
        # the largest of n draws is below 0.9 of the bound with probability 0.9^n: 1e-7 for the fewest, 150
        assert module.weight.abs().max() > 0.9 * bound


def test_weight_init_std_asks_for_gaussian_weights_and_zero_biases():
    model = make_model("mlp", bias=True, weight_init_std=0.01)
    initialize(model, generator(0))
    weights = model.dense1.weight.flatten()
    # 25,088 draws: the standard deviation of the mean is 6.3e-5 and of the deviation 4.5e-5; five of each
    assert abs(weights.mean()) < 3.2e-4
    assert abs(weights.std() - 0.01) < 2.3e-4
    # 4.6% of a Gaussian lie beyond two deviations, none of a uniform distribution; 0.13% is one deviation
    assert abs((weights.abs() > 0.02).float().mean() - 0.0455) < 0.007
    assert all(not module.bias.any() for module in model.modules() if is_weighted(module))


# --- options that cannot work -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, overrides, named",
    [
        ("mlp", {"hidden": [32, 0]}, "model.hidden"),
        ("mlp", {"hidden": [-1]}, "model.hidden"),
        ("mlp", {"hidden": [True]}, "model.hidden"),
        ("mlp", {"hidden": 32}, "model.hidden"),
        ("mlp", {"hidden": "ab"}, "model.hidden"),
        ("mlp", {"weight_init_std": -1.0}, "model.weight_init_std"),
        ("mlp", {"weight_init_std": 0}, "model.weight_init_std"),
        ("mlp", {"weight_init_std": math.nan}, "model.weight_init_std"),
        ("mlp", {"weight_init_std": "abc"}, "model.weight_init_std"),
        ("resnet", {"stem": "vgg"}, "model.stem=vgg"),
        ("resnet", {"blocks": []}, "model.blocks"),
        ("resnet", {"blocks": [2, 2, 0, 2]}, "model.blocks"),
        ("resnet", {"blocks": 2}, "model.blocks"),
        ("resnet", {"widths": [64, 128, 256, -512]}, "model.widths"),
        ("resnet", {"widths": [64, 128, 256.5, 512]}, "model.widths"),
        ("resnet", {"blocks": [2, 2]}, r"model.blocks=\[2, 2\] has 2 stages and model.widths=.* has 4"),
        ("densenet", {"growth": 0}, "model.growth=0"),
        ("densenet", {"growth": "abc"}, "model.growth=abc"),
        ("densenet", {"stem_width": -1}, "model.stem_width=-1"),
        ("densenet", {"blocks": []}, "model.blocks"),
        ("densenet", {"blocks": [4, 0]}, "model.blocks"),
    ],
)
def test_an_option_that_cannot_work_is_named(name, overrides, named):
    with pytest.raises(UserError, match=named):
        make_model(name, **overrides)


def test_the_mlp_without_hidden_layers_is_one_dense_layer():
    model = make_model("mlp", hidden=[])
    x = torch.randn(2, *MNIST, generator=generator(0))
    assert torch.equal(model(x), model.classifier(x.flatten(1)))
    assert num_parameters(model) == 785 * 10


def test_module_names_are_readable_tags():
    models = [make_model(name) for name in ("mlp", "lenet", "resnet", "densenet")]
    names = {name for model in models for name, _ in model.named_modules()}
    assert names >= {"dense1", "norm4", "conv2", "stage1.block1.norm2", "stage4.block2.conv1", "classifier"}
    assert names >= {"stage2.block1.shortcut", "block1.layer4.norm", "transition3.conv"}


# --- the rules of model.init ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("activation, gain", [("relu", math.sqrt(2)), ("tanh", 5 / 3), ("sigmoid", 1), ("identity", 1)])
def test_a_rule_gives_the_deviation_of_its_formula_and_zero_biases(name, activation, gain):
    def weights(rule):
        model = make_model(name, bias=True, activation=activation, init=rule)
        initialize(model, generator(0))
        layers = [module for module in model.modules() if is_weighted(module)]
        assert not any(module.bias.any() for module in layers)
        return [(module.weight.detach(), module.weight[0].numel(), module.weight[:, 0].numel()) for module in layers]

    formulas = {
        "he": lambda n, m: gain**2 / n,
        "xavier": lambda n, m: 2 * gain**2 / (n + m),
        "lecun": lambda n, m: 1 / n,
    }
    for rule, formula in formulas.items():
        for weight, n, m in weights(rule):
            # The relative standard error of a variance is at most sqrt(2 / draws); five of them.
            assert float(weight.square().mean()) == pytest.approx(formula(n, m), rel=5 * math.sqrt(2 / weight.numel()))
            if rule == "xavier":
                assert weight.abs().max() <= gain * math.sqrt(6 / (n + m))
    auto, same = weights("auto"), weights("he" if activation == "relu" else "xavier")
    assert all(torch.equal(one[0], other[0]) for one, other in zip(auto, same, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_an_unknown_rule_is_an_error_that_lists_the_known(name):
    with pytest.raises(UserError, match="model.init=kaiming: not known; choose one of auto, torch, he, xavier, lecun"):
        make_model(name, init="kaiming")


def test_a_rule_beside_a_fixed_deviation_is_refused_and_auto_leaves_it_the_say():
    with pytest.raises(UserError, match="model.init=he and model.weight_init_std=0.01: both give the size"):
        make_model("mlp", init="he", weight_init_std=0.01)
    model = make_model("mlp", init="auto", weight_init_std=0.01)
    initialize(model, generator(0))
    assert float(model.dense1.weight.detach().std()) == pytest.approx(0.01, rel=0.03)  # 25,088 draws: an error of 0.4%
