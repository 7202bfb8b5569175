"""Parts of the user's own packages that return something else than a run can use are refused before any training."""

import sys

import pytest

from bnexp.config import build, check
from bnexp.config.compose import composed
from bnexp.errors import UserError

SMALL = ("data.limit=64", "batch_size=16", "threads=1", "device=cpu", "model=mlp", "model.hidden=[6]", "norm=none")
PACKAGE = """
import torch
from torch import nn
from bnexp.data.digits import Digits
from bnexp.models.mlp import MLP
from bnexp.norms.none import Shift


class Good(Digits):
    def __init__(self, size=28, valid=0.1, limit=None, augment="none", normalize=True):
        super().__init__(size=size, valid=valid, limit=limit, augment=augment, normalize=normalize)


class Nothing(Good):
    def load(self):
        return None


class Pair(Good):
    def load(self):
        data = super().load()
        return data.train, data.test


class OtherShape(Good):
    def load(self):
        data = super().load()
        self.in_shape = (1, 20, 20)
        return data


class Nameless:
    def __init__(self, **options):
        self.class_names, self.in_shape, self.load = ("a", "b"), (1, 8, 8), lambda: None


class Classless(Good):
    class_names = None


class OneNumber(Good):
    def __init__(self, **options):
        super().__init__(**options)
        self.in_shape = 28


class Unloadable(Good):
    load = None


class Net(MLP):
    pass


class Tuple(MLP):
    def forward(self, images):
        return super().forward(images), images


class TupleInEvaluation(MLP):
    def forward(self, images):
        logits = super().forward(images)
        return logits if self.training else (logits, images)


class NoReturn(MLP):
    def forward(self, images):
        super().forward(images)


class TooFew(MLP):
    def forward(self, images):
        return super().forward(images)[:, 1:]


class Classes(MLP):
    def forward(self, images):
        return super().forward(images).argmax(1)


class NeedsNumbers(MLP):
    def forward(self, images):
        return {"logits": super().forward(images), "mean": images.mean().item()}


def no_model(in_shape, num_classes, norm, **options):
    return None


class Norm(Shift):
    pass


class Flat(Shift):
    def forward(self, x, residual=None):
        return super().forward(x, residual).mean(1)


class Statistics(Shift):
    def forward(self, x, residual=None):
        return super().forward(x, residual), x.mean(0)


class Silent(Shift):
    def forward(self, x, residual=None):
        super().forward(x, residual)


def no_norm(num_features, activation="identity"):
    return None


def no_factor(step, total_steps, **options):
    return None


def no_optimizer(groups, **options):
    return None


def no_probe(**options):
    return None
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_parts", None)


def built(*overrides):
    cfg = composed([*SMALL, "allow=[own_parts]", *overrides])
    check.check(cfg)
    return build.build(cfg)


def refusal(group, name):
    with pytest.raises(UserError) as caught:
        built(f"{group}._target_=own_parts.{name}")
    message = str(caught.value)
    assert message.startswith(f"{group}._target_=own_parts.{name}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("group, name", [("data", "Good"), ("model", "Net"), ("norm", "Norm")])
def test_parts_that_keep_the_contract_are_taken(group, name):
    run = built(f"{group}._target_=own_parts.{name}")
    run.step()
    assert run.evaluate(run.dataset.valid)[0] > 0


@pytest.mark.parametrize(
    "name, words",
    [
        ("Nothing", "load() returns None; return a bnexp.data.dataset.Dataset"),
        ("Pair", "load() returns an object of type tuple"),
        ("OtherShape", "its in_shape is (1, 20, 20), but load() returns a dataset with (1, 28, 28)"),
        ("Nameless", "has no name; name must be a text"),
        ("Classless", "has no class_names; class_names must be a tuple of texts"),
        ("OneNumber", "has 28 as in_shape; in_shape must be the tuple (channels, height, width)"),
        ("Unloadable", "has no load"),
    ],
)
def test_a_source_says_what_it_holds_and_loads_a_dataset(name, words):
    assert words in refusal("data", name)


@pytest.mark.parametrize(
    "name, words",
    [
        ("Tuple", "its forward returns an object of type tuple; return one floating-point tensor of shape (16, 10)"),
        ("TupleInEvaluation", "its forward returns an object of type tuple"),
        ("NoReturn", "its forward returns None"),
        ("TooFew", "returns a tensor of shape (16, 9) and type float32"),
        ("Classes", "returns a tensor of shape (16,) and type int64"),
        ("NeedsNumbers", "returns an object of type dict"),
        ("no_model", "returns None; return a torch.nn.modules.module.Module"),
    ],
)
def test_a_model_returns_one_logit_per_class(name, words):
    assert words in refusal("model", name)


@pytest.mark.parametrize(
    "name, words",
    [
        ("Flat", "returns a tensor of shape (16,) and type float32; return one floating-point tensor of shape (16, 6)"),
        ("Statistics", "returns an object of type tuple"),
        ("Silent", "returns None"),
        ("no_norm", "returns None; return a torch.nn.modules.module.Module"),
    ],
)
def test_a_norm_returns_a_tensor_of_the_shape_of_its_input(name, words):
    assert words in refusal("norm", name)


def test_a_schedule_returns_a_number():
    assert "returns None; return a number" in refusal("schedule", "no_factor")


def test_an_optimizer_and_a_probe_are_what_they_should_be():
    for words in (["optimizer._target_=own_parts.no_optimizer"], ["+probe.mine={_target_: own_parts.no_probe}"]):
        with pytest.raises(UserError, match="returns None; return a "):
            built(*words)


def test_the_command_ends_with_2_and_one_line_before_any_folder(bnexp, capfd, tmp_path):
    words = ("train", *SMALL, "allow=[own_parts]", "model._target_=own_parts.Tuple", "out=run")
    assert bnexp(*words) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_parts_of_bnexp_cost_no_forward_pass(monkeypatch):
    from bnexp.models.mlp import MLP

    def refuse(model, images):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(MLP, "forward", refuse)
    check.check(composed([*SMALL, "norm=library"]))


def test_hooks_of_the_check_do_not_stay_on_the_model():
    model = built("norm._target_=own_parts.Norm").model
    assert not any(module._forward_hooks for module in model.modules())
