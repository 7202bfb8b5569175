"""The summary: rows in the order of the forward pass, numbers that add up, a model left as it was."""

import copy
import io

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bnexp.cli.inspect import summary_table
from bnexp.models.densenet import DenseNet
from bnexp.models.lenet import LeNet
from bnexp.models.mlp import MLP
from bnexp.models.resnet import ResNet
from bnexp.norms import library, none, scratch
from bnexp.probes.layers import Layer, list_layers

MNIST = (1, 28, 28)


def printed(table, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def printed_totals(table):
    """The last three lines, as what is counted and how much there is of it."""
    return dict(line.rsplit(maxsplit=1) for line in printed(table).splitlines()[-3:])


def test_the_rows_of_lenet():
    layers = list_layers(LeNet(MNIST, 10, library.BatchNorm), MNIST, batch_size=4)
    norm, dense_norm = "BatchNorm over N, H, W", "BatchNorm over N"
    assert layers == [
        Layer("conv1", (4, 6, 24, 24), 150, "", 6 * 24 * 24 * 25),
        Layer("norm1", (4, 6, 24, 24), 12, norm, 0),
        Layer("pool1", (4, 6, 12, 12), 0, "", 0),
        Layer("conv2", (4, 16, 8, 8), 2400, "", 16 * 8 * 8 * 6 * 25),
        Layer("norm2", (4, 16, 8, 8), 32, norm, 0),
        Layer("pool2", (4, 16, 4, 4), 0, "", 0),
        Layer("dense1", (4, 120), 30720, "", 256 * 120),
        Layer("norm3", (4, 120), 240, dense_norm, 0),
        Layer("dense2", (4, 84), 10080, "", 120 * 84),
        Layer("norm4", (4, 84), 168, dense_norm, 0),
        Layer("classifier", (4, 10), 850, "", 840),
    ]


@pytest.mark.parametrize("norm", [none.Shift, scratch.BatchNorm, library.BatchNorm])
@pytest.mark.parametrize("model", [MLP, LeNet, ResNet, DenseNet])
def test_the_parameters_add_up(model, norm):
    model = model(MNIST, 10, norm)
    layers = list_layers(model, MNIST)
    total = sum(p.numel() for p in model.parameters())
    assert sum(layer.num_parameters for layer in layers) == total
    assert printed_totals(summary_table(model, MNIST)) == {
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
    assert printed_totals(summary_table(model, MNIST))["trainable parameters"] == "7,840"


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


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"momentum": None}, {"affine": False}])
@pytest.mark.parametrize("norm", [scratch.BatchNorm, library.BatchNorm])
def test_every_way_of_keeping_statistics_can_be_summed_up(norm, options):
    model = LeNet(MNIST, 10, lambda n, activation: norm(n, activation=activation, **options))
    assert len(list_layers(model, MNIST)) == 11


def test_a_norm_is_one_row_and_says_itself_what_it_reduces_over():
    class Pair(nn.Module):
        def __init__(self, num_features, activation):
            super().__init__()
            self.inner = nn.ModuleDict({"first": nn.BatchNorm1d(num_features), "last": nn.Identity()})

        def reduces_over(self, num_dims):
            return "half of N" if num_dims == 2 else ""

        def forward(self, x, residual=None):
            return self.inner["last"](self.inner["first"](x))

    layers = list_layers(MLP(MNIST, 10, Pair, hidden=[5]), MNIST, batch_size=2)
    assert [layer.name for layer in layers] == ["flatten", "dense1", "norm1", "classifier"]
    assert layers[2] == Layer("norm1", (2, 5), 10, "Pair over half of N", 0)


def test_a_norm_that_averages_nothing_shows_its_class_and_other_layers_a_dash():
    class Silent(none.Shift):
        normalizes = True

        def reduces_over(self, num_dims):
            return ""

    lines = printed(summary_table(MLP(MNIST, 10, Silent, hidden=[5]), MNIST)).splitlines()
    assert [line.split()[-1] for line in lines[2:6]] == ["-", "-", "Silent", "-"]
