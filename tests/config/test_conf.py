"""Every yaml under conf/ names something that exists and says exactly what its signature says.

Walks conf/, so a new entry is held to this without a line here.
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bnexp.config.schema import Train
from bnexp.report.question import MARGIN
from bnexp.report.records import PRIMARY

CONF = Path(__file__).resolve().parents[2] / "conf"
ENTRIES = sorted(path for path in CONF.rglob("*.yaml") if path.parent != CONF)
# What the caller supplies, not the config: the model's and the norm's place in the network, a tensor's home.
SUPPLIED = {
    "model": {"in_shape", "num_classes", "norm"},
    "norm": {"num_features", "activation", "bias", "device", "dtype"},  # bias: torch's spelling of no shift
    "schedule": {"step", "total_steps"},
    "engine": {"run"},
}
# The loop splits the parameters into groups; torch never sees this one.
NOT_TORCHS = {"norm_weight_decay", "only"}


def read(path):
    """The target's dotted name, whether it is partial, and the options of an entry, read as Hydra reads it."""
    options = OmegaConf.to_container(OmegaConf.load(path))
    return options.pop("_target_", None), options.pop("_partial_", False), options


def resolve(target):
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def plain(value):
    """Without the difference between a list and a tuple, which yaml does not know."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def same(a, b):
    """Equal and of one kind: 1, 1.0 and True are three different defaults, lists and tuples are not."""
    a, b = plain(a), plain(b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def differences(options, function, supplied=frozenset()):
    """What a yaml and a signature disagree about, one sentence each."""
    parameters = {name: p for name, p in inspect.signature(function).parameters.items() if name not in supplied}
    found = [f"{key} is in the yaml only" for key in options if key not in parameters]
    for name, parameter in parameters.items():
        if name not in options:
            found.append(f"{name} is in the signature only")
        elif not same(options[name], parameter.default):
            found.append(f"{name} is {options[name]!r} in the yaml and {parameter.default!r} in the signature")
    return found


def entries(package):
    """The entries whose target lies in ``package``."""
    chosen = [path for path in ENTRIES if str(read(path)[0]).partition(".")[0] == package]
    return pytest.mark.parametrize("path", chosen, ids=[f"{path.parent.name}/{path.stem}" for path in chosen])


@entries("bnexp")
def test_yaml_and_signature_give_the_same_options_the_same_defaults(path):
    target, _, options = read(path)
    assert differences(options, resolve(target), SUPPLIED.get(path.parent.name, frozenset())) == []


@entries("bnexp")
def test_an_entry_is_partial_exactly_where_the_caller_supplies_something(path):
    target, partial, options = read(path)
    required = [name for name, p in inspect.signature(resolve(target)).parameters.items()
                if p.default is inspect.Parameter.empty]  # fmt: skip
    assert partial is bool(required)
    assert not set(required) & set(options), "the caller supplies it, the yaml must not"


@entries("torch")
def test_torch_takes_every_option(path):
    target, partial, options = read(path)
    parameters = inspect.signature(resolve(target)).parameters
    assert partial is True
    assert "lr" in options
    assert set(options) - set(parameters) <= NOT_TORCHS


@pytest.mark.parametrize("group", ["model", "norm", "data", "optimizer", "schedule", "engine", "probe"])
def test_every_entry_of_a_group_of_parts_has_a_target(group):
    paths = [path for path in ENTRIES if path.parent.name == group]
    assert paths, f"nothing in conf/{group}"
    for path in paths:
        target = read(path)[0]
        assert target is not None, path.name
        # ??? is filled in by the user (optimizer=other); everything else is ours or torch's.
        assert target == "???" or target.partition(".")[0] in ("bnexp", "torch", "torchvision"), path.name


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rate": 0.1, "sizes": [1, 2]}, "flag is in the signature only"),
        ({"rate": 0.1, "sizes": [1, 2], "flag": True, "rte": 1}, "rte is in the yaml only"),
        ({"rate": 0.2, "sizes": [1, 2], "flag": True}, "rate is 0.2 in the yaml and 0.1 in the signature"),
        ({"rate": "0.1", "sizes": [1, 2], "flag": True}, "rate is '0.1' in the yaml and 0.1 in the signature"),
        ({"rate": 0.1, "sizes": [1, 2.0], "flag": True}, "sizes is [1, 2.0] in the yaml and (1, 2) in the signature"),
        ({"rate": 0.1, "sizes": [1, 2], "flag": 1}, "flag is 1 in the yaml and True in the signature"),
        ({"rate": 0.1, "sizes": [1, 2], "flag": True}, None),
    ],
)
def test_a_disagreement_is_found_and_named(options, complaint):
    def function(given, rate=0.1, sizes=(1, 2), *, flag=True):
        raise NotImplementedError

    assert differences(options, function, supplied={"given"}) == ([complaint] if complaint else [])


def test_a_report_without_configs_asks_what_the_schema_says():
    assert (Train.primary, Train.margin, Train.target) == (PRIMARY.key, MARGIN, None)
