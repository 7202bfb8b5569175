"""Networks from elsewhere: the exchange changes nothing but the norm, and says what it did."""

import copy
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_models import NORMS, SMALL_BATCHES, load_entry
from torch import nn

from bnexp.errors import UserError
from bnexp.models import convert, foreign
from bnexp.norms import group, library, none, scratch
from bnexp.probes.layers import list_layers

long = pytest.mark.long
QUICK = ("mobilenet_v3_small", "shufflenet_v2_x0_5")
LISTED = ("resnet18", "mobilenet_v2", "mnasnet0_5", "regnet_y_400mf", "densenet121", "googlenet", "inception_v3",
          "vgg11_bn", "efficientnet_b0")  # fmt: skip
TIMMS = ("resnet26d", "efficientnet_b0", "regnetx_002", "mobilenetv3_small_050", "cspdarknet53", "ghostnet_050")
SMALL = (3, 32, 32)


class Net(nn.Module):
    """Biases before norms, an addition, dropout, and modules that no norm needs."""

    def __init__(self, num_classes=5, width=8, in_channels=3):
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.BatchNorm2d(width, eps=1e-3, momentum=0.2),
        )
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(self.drop(x.mean((2, 3))))


class Depends(Net):
    """Takes another way in evaluation mode, and torch.fx keeps the way of training."""

    def forward(self, x):
        return super().forward(x if self.training else -x)


class Branches(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class OtherNorm(nn.BatchNorm2d):
    pass


def own(kind, norm=library.BatchNorm, in_shape=SMALL, **options):
    torch.manual_seed(0)
    return foreign.own(in_shape, 5, norm, path=kind, **options)


def results(model, size):
    """Outputs of both modes, gradients and buffers, in float64."""
    images = torch.rand(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(1)  # dropout
    output = model.double().train()(images)
    output.square().mean().backward()
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()} | {"output": output.detach()}
    with torch.no_grad():
        return found | {"evaluation": model.eval()(images)}


def check_parity(theirs, ours, size):
    """The exchanged network is the original to the last bit; biases that were left out were 0."""
    lost = set(theirs.state_dict()) - set(ours.state_dict())
    assert {name.removesuffix(".bias") for name in lost} == set(ours.conversion.biases)
    assert not any(theirs.state_dict()[name].any() for name in lost)
    expected, found = results(theirs, size), results(ours, size)
    assert {name for name in expected if name.removeprefix("gradient of ") not in lost} == set(found)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    assert not any(isinstance(m, tuple(convert.EXACT)) and type(m) in convert.EXACT for m in ours.modules())


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(each, marks=long) for each in LISTED)])
def test_a_network_of_torchvision_is_the_same_with_our_batch_norm(name):
    from torchvision.models import get_model

    size = 75 if name == "inception_v3" else 32
    torch.manual_seed(0)
    theirs = get_model(name, weights=None, num_classes=5, **foreign.AUXILIARY.get(name, {}))
    torch.manual_seed(0)
    ours = foreign.torchvision((3, size, size), 5, library.BatchNorm, name=name)
    assert not ours.conversion.note and any(ours.conversion.sites.values())
    check_parity(theirs, ours, size)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", [pytest.param(each, marks=long) for each in TIMMS])
def test_a_network_of_timm_is_the_same_with_our_batch_norm(name, fuse):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=5)
    torch.manual_seed(0)
    ours = foreign.timm((3, 64, 64), 5, library.BatchNorm, name=name, fuse=fuse)
    is_frozen = fuse and name == "ghostnet_050"  # F.dropout(training=self.training), which torch.fx fixes at True
    assert ("differ" in ours.conversion.note) is is_frozen
    check_parity(theirs, ours, 64)


def test_an_own_network_keeps_its_function_weights_eps_and_momentum():
    torch.manual_seed(0)
    theirs, ours = Net(), own(Net)
    for conv in (theirs.conv1, theirs.conv2):
        assert torch.equal(
            conv.weight, ours.get_submodule(next(n for n, m in theirs.named_modules() if m is conv)).weight
        )
        conv.bias.data.zero_()
    assert ours.conversion.sites == {"bn1": "relu", "bn2": "add + relu"}
    assert ours.conversion.biases == ["conv1", "conv2"] and ours.conv1.bias is None and ours.fc.bias is not None
    assert (ours.bn1.eps, ours.bn1.momentum, ours.bn2.momentum) == (1e-3, 0.2, 0.1)
    check_parity(theirs, ours, 16)
    given = own(Net, partial(library.BatchNorm, eps=0.5))
    assert (given.bn1.eps, given.bn2.eps, given.bn1.momentum) == (0.5, 0.5, 0.2)
    assert "eps" not in given.conversion.own and given.conversion.own["momentum"] == [0.1, 0.2]


@pytest.mark.parametrize("norm", [scratch.BatchNorm, group.GroupNorm, none.Shift])
def test_another_norm_starts_from_the_same_weights(norm):
    first, other = own(Net), own(Net, norm)
    for name, weight in other.state_dict().items():
        assert name not in first.state_dict() or torch.equal(weight, first.state_dict()[name]), name
    assert type(other.bn1) is norm and (other.bn1.activation, other.bn2.activation) == ("relu", "relu")
    assert copy.deepcopy(other)(torch.rand(2, *SMALL)).shape == (2, 5)
    assert [layer.norm for layer in list_layers(other, SMALL) if layer.name == "relu"] == []  # fused away


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_can_be_the_exchange(name):
    kind, options = load_entry("norm", name)
    options = {k: v for k, v in (options | SMALL_BATCHES.get(name, {})).items() if k not in ("eps", "momentum")}
    ours = own(Net, partial(kind, **options), in_shape=(3, 6, 6), args={"width": 2})
    ours(torch.rand(4, 3, 6, 6)).square().sum().backward()
    assert type(ours.bn2) is kind and ours.bn2.activation == "relu" and ours.conv1.weight.grad.isfinite().all()
    assert ours.eval()(torch.rand(4, 3, 6, 6)).shape == (4, 5)


@pytest.mark.parametrize("kind, why", [(Depends, "differ"), (Branches, "cannot be used|bool|control flow")])
def test_a_network_that_the_graph_does_not_repeat_is_walked(kind, why):
    ours = own(kind)
    assert set(ours.conversion.sites.values()) == {""} and "exchanged one by one" in ours.conversion.note
    x = torch.rand(4, *SMALL)
    torch.manual_seed(0)
    theirs = kind()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for layer in (theirs.conv1, theirs.conv2):
        layer.bias.data.mul_(not ours.conversion.biases)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-6)  # biases before a norm round away


def test_a_constructor_that_computes_with_numbers_is_checked_on_the_meta_device_too():
    with torch.device("meta"):
        model = foreign.torchvision(SMALL, 5, library.BatchNorm, name="regnet_y_400mf")
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_without_fusing_every_batch_norm_is_exchanged_alone():
    ours = own(Net, fuse=False)
    assert ours.conversion.sites == {"bn1": "", "bn2": ""} and not ours.conversion.note
    assert ours.bn1.activation == "identity" and type(ours) is Net


@pytest.mark.parametrize(
    "layer, named",
    [(OtherNorm(8), "bn2 is a test_foreign.OtherNorm"), (nn.SyncBatchNorm(8), "bn2 is a torch.*SyncBatchNorm")],
)
def test_a_subclass_of_batch_norm_is_refused_by_name(layer, named):
    def net():
        model = Net()
        model.bn2 = layer
        return model

    with pytest.raises(UserError, match=named):
        own(net)


def test_groups_that_do_not_divide_a_width_name_the_layers_and_what_would():
    with pytest.raises(
        UserError, match=r"norm.groups=3: does not divide 8 channels \(bn1 and 1 more\); .*: 1, 2, 4, 8$"
    ):
        own(Net, partial(group.GroupNorm, groups=3))


def test_a_network_without_batch_norm_is_refused():
    with pytest.raises(UserError, match="no batch norm"):
        own(lambda num_classes: nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes)))


def test_grey_images_are_expanded_to_the_channels_of_the_network():
    ours = own(Net, in_shape=(1, 16, 16))
    images = torch.rand(4, 1, 16, 16)
    assert torch.equal(ours.eval()(images), ours(images.expand(-1, 3, -1, -1)))
    assert own(Net, in_shape=(1, 16, 16), args={"in_channels": 1}).conv1.in_channels == 1


def test_too_small_images_are_refused_with_the_smallest_size_that_works():
    wrong = pytest.raises(UserError, match=r"32x32 images do not fit .* that work are 75x75 \(data.size=75\)")
    with wrong, torch.device("meta"):
        foreign.torchvision(SMALL, 5, library.BatchNorm, name="inception_v3")


@pytest.mark.parametrize(
    "name, args, text",
    [
        ("resnet81", {}, r"did you mean resnet\d+"),
        ("resnet18", {"weights": "DEFAULT"}, "nothing is downloaded"),
        ("googlenet", {"aux_logits": True}, "leave it out"),
        (None, {}, "such as resnet18"),
    ],
)
def test_what_torchvision_cannot_give_is_told(name, args, text):
    with pytest.raises(UserError, match=text):
        foreign.torchvision(SMALL, 5, library.BatchNorm, name=name, args=args)


def test_an_activation_that_a_norm_does_not_take_stays_and_functions_are_fused():
    class Other(Net):
        def forward(self, x):
            x = F.leaky_relu(self.bn1(self.conv1(x)))
            return self.fc(F.relu6(self.bn2(self.conv2(x))).mean((2, 3)))

    assert own(Other).conversion.sites == {"bn1": "", "bn2": "relu6"}


TABLE = Path(__file__).parents[2] / "conf" / "model" / "README.md"


def table():
    """conf/model/README.md: what becomes of every classification network of torchvision, on torch's meta device."""
    from torchvision import models

    rows = []
    for name in models.list_models(module=models):
        try:
            with torch.device("meta"):
                found = foreign.torchvision((3, 224, 224), 1000, library.BatchNorm, name=name).conversion
        except UserError as error:
            assert "has no batch norm" in str(error), error
            continue
        kinds = ", ".join(f"{n} {kind or 'alone'}" for kind, n in Counter(found.sites.values()).most_common())
        left = ", ".join(f"{n} {kind}" for kind, n in found.left.items()) or "-"
        how = "walked" if found.note else "fused"
        rows.append(f"| `{name}` | {how} | {len(found.sites)} | {kinds} | {len(found.biases)} | {left} |")
    about = f"What becomes of the {len(rows)} networks of `torchvision.models` with batch norm, at 224x224"
    head = ["| model.name= | is | norms | with what follows in the same call | biases left out | norms left |"]
    return "\n".join(
        [f"{about} (written by `python tests/models/test_foreign.py`).", "", *head, "| --- " * 6 + "|", *rows, ""]
    )


@long
def test_the_table_of_torchvisions_networks_is_what_is_found():
    assert TABLE.read_text() == table()


if __name__ == "__main__":
    TABLE.write_text(table())
