"""The summary: rows in the order of the forward pass, numbers that add up, a model left as it was."""

import copy
import io
import re

import pytest
import torch
from rich.console import Console
from test_models import MODELS, NORMS
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from bnexp.cli.inspect import summary_table
from bnexp.config import parts
from bnexp.config.compose import composed
from bnexp.errors import UserError
from bnexp.models.densenet import DenseNet
from bnexp.models.lenet import LeNet
from bnexp.models.mlp import MLP
from bnexp.models.resnet import ResNet
from bnexp.norms import library, none
from bnexp.norms.ghost import GhostBatchNorm
from bnexp.probes.layers import Layer, list_layers, smallest_batch

MNIST = (1, 28, 28)


def meta(*overrides):
    """A model on torch's meta device and the shape of its images."""
    cfg = composed(["data.size=32", *overrides])
    source = parts.part(cfg, "data")()
    return parts.meta_model(cfg, source), source.in_shape


def printed(table, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def printed_totals(table):
    """The last three lines, as what is counted and how much there is of it."""
    return dict(line.rsplit(maxsplit=1) for line in printed(table).splitlines()[-3:])


def test_the_rows_of_lenet():
    norm, dense_norm = "BatchNorm over N, H, W", "BatchNorm over N"
    assert list_layers(LeNet(MNIST, 10, library.BatchNorm), MNIST) == [
        Layer("conv1", (1, 28, 28), (6, 24, 24), 150, "", 6 * 24 * 24 * 25),
        Layer("norm1", (6, 24, 24), (6, 24, 24), 12, norm, 0),
        Layer("pool1", (6, 24, 24), (6, 12, 12), 0, "", 0),
        Layer("conv2", (6, 12, 12), (16, 8, 8), 2400, "", 16 * 8 * 8 * 6 * 25),
        Layer("norm2", (16, 8, 8), (16, 8, 8), 32, norm, 0),
        Layer("pool2", (16, 8, 8), (16, 4, 4), 0, "", 0),
        Layer("dense1", (256,), (120,), 30720, "", 256 * 120),
        Layer("norm3", (120,), (120,), 240, dense_norm, 0),
        Layer("dense2", (120,), (84,), 10080, "", 120 * 84),
        Layer("norm4", (84,), (84,), 168, dense_norm, 0),
        Layer("classifier", (84,), (10,), 850, "", 840),
    ]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", MODELS)
def test_the_parameters_of_all_rows_add_up_to_those_of_the_model(model, norm):
    model, in_shape = meta(f"model={model}", f"norm={norm}")
    layers = list_layers(model, in_shape)
    total = sum(p.numel() for p in model.parameters())
    assert sum(layer.num_parameters for layer in layers) == total
    assert len({layer.name for layer in layers}) == len(layers)
    assert printed_totals(summary_table(model, in_shape)) == {
        "trainable parameters": f"{total:,}",
        "buffer elements": f"{sum(b.numel() for b in model.buffers()):,}",
        "multiply-adds per image": f"{sum(layer.multiply_adds for layer in layers):,}",
    }


@pytest.mark.parametrize("model", [MLP, LeNet, ResNet, DenseNet])
def test_multiply_adds_are_half_of_what_torch_counts(model):
    model = model(MNIST, 10, library.BatchNorm).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(3, *MNIST, device="meta"))
    counted = sum(layer.multiply_adds for layer in list_layers(model, MNIST))
    assert counted == counter.get_total_flops() / 2 / 3


def test_parameters_that_do_not_train_are_not_in_the_total():
    model = MLP(MNIST, 10, library.BatchNorm, hidden=[])
    model.classifier.bias.requires_grad_(False)
    table = summary_table(model, MNIST)
    assert printed_totals(table)["trainable parameters"] == "7,840"
    assert re.search(r"^parameters +7,850", printed(table), re.M), "what the rows add up to"


@pytest.mark.parametrize("model", [MLP, LeNet, ResNet, DenseNet])
def test_80_columns_hold_every_row_on_one_line(model):
    model = model((1, 224, 224), 10, library.BatchNorm)
    table = summary_table(model, (1, 224, 224))
    narrow = [line.rstrip() for line in printed(table, 80).splitlines()]
    # one heading, one rule, one gap before the totals
    assert len(narrow) == table.row_count + 3
    assert narrow == [line.rstrip() for line in printed(table, 200).splitlines()]


@pytest.mark.parametrize("training", [True, False])
def test_a_summary_leaves_the_model_and_the_random_numbers_as_they_were(training):
    model = LeNet(MNIST, 10, library.BatchNorm).train(training)
    before, random_before = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    summary_table(model, MNIST)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(torch.random.get_rng_state(), random_before)
    assert all(module.training is training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


OPTIONS = {
    "momentum": ["null", "0.5"], "affine": ["false"], "track_running_stats": ["false"], "running_var": ["biased"],
    "running_var_init": ["0.0"], "decay": ["0.9"], "center": ["false"], "scale": ["false"], "zero_debias": ["true"],
    "decay_warmup": ["true"], "groups": ["1", "layer"], "virtual_batch": ["1", "7", "64"], "r_max": ["1.0"],
    "d_max": ["0.0"], "renorm_momentum": ["0.0"], "warmup_steps": ["0"], "r_steps": ["0"], "d_steps": ["0"],
    "eps": ["0.1"], "alpha_init": ["0.1"],
}  # fmt: skip


def every_option(norm):
    """Overrides: the norm as it is, and with each of its options at other values."""
    options = [key for key in composed([f"norm={norm}"]).norm if not key.startswith("_")]
    return [[f"norm={norm}"]] + [[f"norm={norm}", f"norm.{key}={value}"] for key in options for value in OPTIONS[key]]


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("overrides", [each for norm in NORMS for each in every_option(norm)], ids=" ".join)
def test_layers_are_listed_with_every_option_of_every_norm(overrides, device):
    cfg = composed(["model=lenet", "data.size=16", *overrides])
    source = parts.part(cfg, "data")()
    model = parts.make_model(cfg, source)
    assert len(list_layers(model, source.in_shape, device)) == 11


@pytest.mark.parametrize("block", [1, 2, 7, 48])
def test_a_norm_that_normalizes_blocks_in_evaluation_is_shown_whole_blocks(block):
    class Untracked(GhostBatchNorm):
        def __init__(self, num_features, activation):
            super().__init__(num_features, virtual_batch=block, activation=activation)
            self.running_mean = self.running_var = None

    model = LeNet(MNIST, 10, lambda n, activation: Untracked(n, activation) if block > 1 or n < 20 else nn.Identity())
    assert smallest_batch(model) == max(2, block)
    assert len(list_layers(model, MNIST, "cpu")) == 11
    tracked = LeNet(MNIST, 10, lambda n, activation: GhostBatchNorm(n, virtual_batch=48, activation=activation))
    assert smallest_batch(tracked) == 2, "running statistics do not depend on the batch"


def test_a_norm_that_takes_no_batch_is_heard_itself():
    class Never(library.BatchNorm):
        def check_batch_size(self, batch_size):
            raise UserError("never")

    assert smallest_batch(MLP(MNIST, 10, lambda n, activation: Never(n, track_running_stats=False))) == 2


@pytest.mark.parametrize("norm", ["library", "scratch"])
def test_a_run_without_running_statistics_trains_and_is_summed_up_and_inspected(norm, bnexp, train):
    options = ("model=mlp", f"norm={norm}", "norm.track_running_stats=false", "data.limit=64", "batch_size=16")
    path = train(*options, "steps=2", "threads=auto", "probe=[shapes,features,statistics,activations]")
    assert bnexp("summary", *options) == 0
    assert bnexp("inspect", str(path), "--images", "0") == 0


class Inner(nn.Module):
    """A norm with parameters of its own and a child, that tells nobody that it is one."""

    def __init__(self, num_features, activation):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_features))
        self.inner = nn.BatchNorm1d(num_features)

    def forward(self, x, residual=None):
        return self.scale * self.inner(input=x)


class Outer(Inner):
    def reduces_over(self, num_dims):
        return "N"


def test_a_norm_with_a_child_is_a_row_with_its_own_parameters():
    layers = list_layers(MLP(MNIST, 10, Inner, hidden=[5]), MNIST)
    rows = {layer.name: layer.num_parameters for layer in layers}
    assert rows == {"flatten": 0, "dense1": 3920, "norm1.inner": 10, "norm1": 5, "classifier": 60}
    layers = list_layers(MLP(MNIST, 10, Outer, hidden=[5]), MNIST)
    rows = {layer.name: (layer.num_parameters, layer.norm) for layer in layers}
    assert rows == {
        "flatten": (0, ""), "dense1": (3920, ""), "norm1": (15, "Outer over N"), "classifier": (60, "")
    }  # fmt: skip


def test_parameters_that_are_shared_unused_or_not_in_a_leaf_are_counted_once():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.zeros(784))
            self.first, self.second, self.unused = nn.Linear(784, 784), nn.Linear(784, 784), nn.Linear(2, 3)
            self.second.weight = self.first.weight
            self.attention = nn.MultiheadAttention(784, 2, batch_first=True)

        def forward(self, x):
            x = self.second(self.first(x.flatten(1) + self.position))[:, None]
            return self.attention(x, x, x)[0][:, 0]

    layers = list_layers(Odd(), MNIST)
    assert sum(layer.num_parameters for layer in layers) == sum(p.numel() for p in Odd().parameters())
    rows = {layer.name: (layer.num_parameters, layer.out_shape) for layer in layers}
    assert rows["second"] == (784, (784,)) and rows[""] == (784, (784,))
    assert rows["unused"] == (9, ()) and rows["attention"] == (3 * 784 * 785, ())
    lines = printed(summary_table(Odd(), MNIST)).splitlines()
    assert any(re.match(r"unused +- +9 +-$", line.rstrip()) for line in lines), "no shape, for no image passes it"
    assert any(line.startswith("(model)") for line in lines)


def test_a_norm_is_one_row_and_says_itself_what_it_reduces_over():
    class Pair(nn.Module):
        def __init__(self, num_features, activation):
            super().__init__()
            self.inner = nn.ModuleDict({"first": nn.BatchNorm1d(num_features), "last": nn.Identity()})

        def reduces_over(self, num_dims):
            return "half of N" if num_dims == 2 else ""

        def forward(self, x, residual=None):
            return self.inner["last"](self.inner["first"](x))

    layers = list_layers(MLP(MNIST, 10, Pair, hidden=[5]), MNIST)
    assert [layer.name for layer in layers] == ["flatten", "dense1", "norm1", "classifier"]
    assert layers[2] == Layer("norm1", (5,), (5,), 10, "Pair over half of N", 0)


def test_a_norm_that_averages_nothing_shows_its_class_and_other_layers_a_dash():
    class Silent(none.Shift):
        normalizes = True

        def reduces_over(self, num_dims):
            return ""

    lines = printed(summary_table(MLP(MNIST, 10, Silent, hidden=[5]), MNIST)).splitlines()
    assert [line.split()[-1] for line in lines[2:6]] == ["-", "-", "Silent", "-"]


class Gated(library.BatchNorm):
    """A norm of bnexp with dense layers inside; both see every image twice, in rows that do not begin with N."""

    def __init__(self, num_features, activation):
        super().__init__(num_features, activation=activation)
        self.gate = nn.Sequential(nn.Linear(num_features, 3), nn.ReLU(), weight_norm(nn.Linear(3, num_features)))

    def forward(self, x, residual=None):
        return super().forward(x, residual) * self.gate(torch.cat([x, x])).unflatten(0, (2, -1)).sum(0)


class GatedOuter(Outer):
    def __init__(self, num_features, activation):
        super().__init__(num_features, activation)
        self.gate = nn.Sequential(nn.Linear(num_features, 3), nn.Linear(3, num_features))

    def forward(self, x, residual=None):
        return super().forward(x) * self.gate(x)


@pytest.mark.parametrize(("norm", "calls"), [(Gated, 2), (GatedOuter, 1)])
def test_a_norm_costs_what_the_dense_layers_inside_it_cost(norm, calls):
    layers = list_layers(MLP((1, 12, 12), 10, norm, hidden=[32, 32]), (1, 12, 12))
    cost = {layer.name: layer.multiply_adds for layer in layers}
    assert cost["norm1"] == cost["norm2"] == 192 * calls
    assert sum(cost.values()) == 5952 + 2 * 192 * calls


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_layer_with_a_parametrization_is_one_row(bias):
    model = nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(784, 5, bias=bias)))
    assert [layer[:4] for layer in list_layers(model, MNIST)] == [
        ("0", MNIST, (784,), 0), ("1", (784,), (5,), 785 * 5 + 5 * bias)
    ]  # fmt: skip
    assert list_layers(model, MNIST)[1].multiply_adds == 784 * 5
