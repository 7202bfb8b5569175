"""The studies judge honestly: they fail where their sides are swapped, and where batch norm is broken."""

import json
from pathlib import Path

import pytest

from bnexp.config.choices import choices
from bnexp.config.study import choose, load
from bnexp.report.expectations import Expectation, judge
from bnexp.report.records import read_runs

BROKEN = """\
from bnexp.norms.base import finish
from bnexp.norms.library import BatchNorm

class Identity(BatchNorm):
    def forward(self, x, residual=None):
        return finish(x, residual, self.activation)

class NeverUpdates(BatchNorm):
    def count_batch(self):
        return 0.0

class WrongSign(BatchNorm):
    def forward(self, x, residual=None):
        if self.training:
            return super().forward(x, residual)
        self.running_mean.neg_()
        try:
            return super().forward(x, residual)
        finally:
            self.running_mean.neg_()
"""
NAMES = ("Identity", "NeverUpdates", "WrongSign")
# A claim of batch norm on digits, made of the sound norm and of the three broken ones.
OWN = """\
title: Batch norm learns where the inputs of a tanh saturate
source: the study preactivations
takes: 2 s
how: sweep
settings: [model=mlp, "model.hidden=[20,20]", model.activation=tanh, model.weight_init_std=1, data=digits,
  optimizer.lr=0.03, batch_size=32, steps=30, threads=1, quiet=true]
seeds: 3
variants:
  none: norm=none
  sound: norm=library
""" + "".join(f"  {name}: [norm=library, norm._target_=broken_norms.{name}]\n" for name in NAMES) + """\
expect:
""" + "".join(
    f"  - {{says: {name} is ahead, of: {name}, minus: none, tag: accuracy/test, above: 0.2}}\n"
    for name in ("sound", *NAMES)
)  # fmt: skip


@pytest.fixture
def broken_norms(tmp_path, monkeypatch):
    """A module ``broken_norms``: batch norms with one fault each."""
    (tmp_path / "broken_norms.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    import sys

    sys.modules.pop("broken_norms", None)


@pytest.mark.usefixtures("broken_norms")
def test_three_broken_norms_do_not_meet_a_claim_of_batch_norm(bnexp, tmp_path):
    (tmp_path / "own.yaml").write_text(OWN)
    assert bnexp("study", "own.yaml", "allow=[broken_norms]", "out=s") == 3
    findings = json.loads((tmp_path / "s/study.json").read_text())["findings"]
    assert [each["holds"] for each in findings] == [True, False, False, False]


def claims_an_order(expectation: Expectation) -> bool:
    """Whether no number is within the limits together with the number of swapped sides."""
    if expectation.other_tag or not (expectation.minus or expectation.over):
        return False
    numbers = [10**power for power in range(-4, 5)]
    numbers = [*numbers, *(-each for each in numbers)] if expectation.minus else numbers
    pairs = [(each, -each if expectation.minus else 1 / each) for each in numbers]
    return not any(expectation.holds_for(one) and expectation.holds_for(other) for one, other in pairs)


@pytest.mark.parametrize("name", choices("study"))
@pytest.mark.parametrize("form", ["", "quick=true"])
def test_every_study_says_which_side_is_ahead(name, form):
    study, _ = choose(load(name), [form] if form else [])
    assert any(claims_an_order(each) for each in study.expectations())
    assert study.settled_on, "the seeds that the expectations were found with are named"


def judge_swapped(name: str, folder: Path, form: str) -> list[list[bool]]:
    """For each pair of sides in an order that the study claims: which of its expectations hold with the two swapped."""
    study, _ = choose(load(name), [form])
    expectations = study.expectations()
    runs = {role: read_runs(sorted(folder.glob(f"{role}-*")))[0] for role in study.variants}
    pairs = {(each.of, each.minus or each.over) for each in expectations if claims_an_order(each)}
    return [[judge(each, runs | {one: runs[other], other: runs[one]}).holds for each in expectations]
            for one, other in sorted(pairs)]  # fmt: skip


@pytest.mark.long
@pytest.mark.usefixtures("mnist_root")
@pytest.mark.parametrize("name", choices("study"))
def test_the_quick_form_holds_on_its_own_seeds_and_not_with_sides_swapped(name, bnexp):
    assert bnexp("study", name, "quick=true", "quiet=true", "threads=1", "out=s") == 0
    swapped = judge_swapped(name, Path("s"), "quick=true")
    assert swapped and not any(all(each) for each in swapped)


@pytest.mark.long
@pytest.mark.usefixtures("mnist_root", "broken_norms")
@pytest.mark.parametrize("name", ["mnist_lab", "preactivations", "sigmoid_lenet"])
@pytest.mark.parametrize("norm", NAMES)
def test_three_broken_norms_make_studies_fail(name, norm, bnexp):
    own = choose(load(name), ["quick=true"])[0].variants["batch_norm"]
    words = " ".join([own] if isinstance(own, str) else own)
    broken = f"variants.batch_norm={words} norm._target_=broken_norms.{norm}"
    assert bnexp("study", name, "quick=true", "quiet=true", "threads=1", "allow=[broken_norms]", broken, "out=s") == 3
