"""What a model of the user's own draws, by dropout for example, is the run's own: the same bits every time."""

import copy
import json
from pathlib import Path

import pytest
import torch

from bnexp.config import build
from bnexp.config.compose import composed
from bnexp.store import checkpoint
from bnexp.store.writer import NullWriter
from bnexp.train.drive import drive
from bnexp.train.loop import Loop
from bnexp.train.progress import NullProgress
from bnexp.train.recorder import Recorder

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, in_shape, num_classes, norm, hidden, **options):
        super().__init__()
        layers = [nn.Linear(64, 16), norm(16), nn.Dropout(0.5), nn.Linear(16, num_classes)]
        self.body = nn.Sequential(nn.Flatten(), *layers)
    def forward(self, x):
        return self.body(x)

class Unsure(Net):  # draws when it is evaluated too
    def forward(self, x):
        self.body[3].train()
        return self.body(x)

class Plain(Net):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.body[3] = nn.Identity()

class Langevin(torch.optim.SGD):
    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.data += 1e-3 * torch.randn(p.shape)
"""
SMALL = ("threads=1", "device=cpu", "model=mlp", "data.size=8", "batch_size=32", "steps=6", "eval_every=2",
         "log_every=1", "allow=[drawing_parts]", "quiet=true")  # fmt: skip
PROBES = ("probe=[activations,gradients,statistics,landscape]", "probe.activations.every=4")


@pytest.fixture
def words(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "drawing_parts.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    return (*SMALL, "model._target_=drawing_parts.Net")


def built(*words):
    cfg = composed(words)
    run = build.build(cfg)
    return Loop(run, build.plan_of(cfg, run.batches.steps_per_epoch), Recorder(NullWriter()))


def trained(*words):
    loop = built(*words)
    drive(loop, NullProgress())
    return state_of(loop)


def state_of(loop):
    state = loop.run.state_dict()
    return {key: value for key, value in state.items() if key != "seconds"}


def same(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(value, two[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize("model", ["Net", "Unsure"])
def test_a_run_is_the_same_every_time_and_leaves_torchs_generator_alone(words, model):
    words = (*words, f"model._target_=drawing_parts.{model}")
    torch.manual_seed(1)
    first = trained(*words)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(2)
    assert same(first, trained(*words))
    assert same(first["model"], trained(*words, *PROBES, "eval_every=1")["model"]), "looks change nothing"
    assert not same(first["draws"], trained(*words, "seed=1")["draws"])


def test_a_run_goes_on_from_any_step_as_if_it_had_not_stopped(words, tmp_path):
    whole = trained(*words)
    loop = built(*words)
    for _ in range(5):
        loop.step()
        checkpoint.save(loop.run.state_dict(), tmp_path)
        torch.rand(7)
        again = built(*words)
        again.run.load_state_dict(checkpoint.load(tmp_path, torch.device("cpu")))
        drive(again, NullProgress())
        assert same(whole, state_of(again))


def test_a_checkpoint_of_an_older_version_can_be_continued(words):
    loop = built(*words)
    loop.step()
    state = copy.deepcopy(loop.run.state_dict())
    del state["draws"]
    again = built(*words)
    again.run.load_state_dict(state)
    drive(again, NullProgress())
    assert again.status == "finished"


def numbers(folder):
    clocked = ("seconds", "time/", "throughput/")
    lines = {path.parent.name: path.read_text().splitlines() for path in folder.glob("*/metrics.jsonl")}
    return {
        name: [{k: v for k, v in json.loads(line).items() if not k.startswith(clocked)} for line in each]
        for name, each in lines.items()
    }


def test_lockstep_a_sweep_and_a_run_alone_give_the_same_numbers(bnexp, words):
    grid = (*words, "norm=none,library", "seed=0,1")
    assert bnexp("compare", *grid, "out=compare") == 0
    assert bnexp("train", "-m", *grid, "out=sweep") == 0
    assert bnexp("train", *words, "norm=library", "seed=1", "out=alone/library-s1") == 0
    together = numbers(Path("compare"))
    assert len(together) == 4 and together == numbers(Path("sweep"))
    assert together["library-s1"] == numbers(Path("alone"))["library-s1"]


def test_runs_of_a_model_that_draws_are_not_computed_as_one(bnexp, capsys, words):
    assert bnexp("compare", *words, "norm=none,library", "seed=0,1", "replicas=2", "out=compare") == 2
    assert "cannot be computed as one" in capsys.readouterr().err


def test_an_optimizer_that_draws_is_the_runs_own_in_a_fold_too(bnexp, words):
    plain = [word for word in words if "drawing_parts.Net" not in word]
    grid = (*plain, "model._target_=drawing_parts.Plain", "optimizer=other",
            "optimizer._target_=drawing_parts.Langevin", "seed=0,1")  # fmt: skip
    assert bnexp("train", "-m", *grid, "out=sweep") == 0
    assert bnexp("train", "-m", *grid, "replicas=2", "out=fold") == 0
    alone, fold = numbers(Path("sweep")), numbers(Path("fold"))
    for name, lines in alone.items():
        for one, other in zip(lines, fold[name], strict=True):
            assert other == pytest.approx(one, abs=1e-5), "sums are taken in another order"


def test_bnexps_own_models_pay_nothing():
    run = build.build(composed(["device=cpu", "threads=1", "model=mlp", "data.size=8"]))
    assert run.draws.generators == run.state_dict()["draws"] == []
