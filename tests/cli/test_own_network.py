"""A network from elsewhere through the commands: compared, trained, resumed, inspected and probed."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

README = (
    (Path(__file__).parents[2] / "README.md").read_text().partition("## Your own network\n")[2].partition("\n## ")[0]
)
OWN = ("model=own", "model.path=mine.Net")
FEW = ("data.limit=64", "batch_size=16", "steps=4", "quiet=true", "threads=1", "device=cpu")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The README's network in a module ``mine`` of the current folder; ``mine(old, new)`` changes its text."""
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    text = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]

    def write(old="", new=""):
        assert old in text
        (tmp_path / "mine.py").write_text(text.replace(old, new))

    write()
    yield write
    sys.modules.pop("mine", None)


def test_the_commands_of_the_readme(bnexp, mine, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    for command in re.findall(r"^bnexp .*$", README, re.MULTILINE):
        assert bnexp(*shlex.split(command)[1:], *["data.limit=64", "steps=4"] * ("compare" in command)) == 0, command
    told = capsys.readouterr()
    assert "BatchNorm over N, H, W + add + relu" in told.out and "2 batch norms exchanged" in told.err
    assert "group against library" in told.out and "none against library" in told.out
    status = json.loads((tmp_path / "mine-norms/library-s0/status.json").read_text())
    assert status["initial_weights"] == "own" and status["status"] == "finished"
    config = yaml.safe_load((tmp_path / "mine-norms/library-s0/config.yaml").read_text())
    assert not {"eps", "momentum"} & set(config["norm"])


@pytest.mark.parametrize("norm", ["library", "group"])
def test_a_run_with_dropout_is_resumed_bit_for_bit_and_looked_at(bnexp, mine, norm, tmp_path, capsys):
    mine("x.amax((2, 3))", "nn.functional.dropout(x.amax((2, 3)), 0.5, self.training)")  # torch.fx would freeze it
    probes = ("probe=[activations,statistics,gradients]", "probe.statistics.every=2", "log_every=1")
    run = ("train", *OWN, *FEW, f"norm={norm}", *probes, "checkpoint_every=2")
    assert bnexp(*run, "out=whole") == 0
    assert bnexp(*run, "out=half", "keep=all") == 0
    half, whole = tmp_path / "half", tmp_path / "whole"
    (half / "checkpoint-2.pt").replace(half / "checkpoint.pt")
    status = json.loads((half / "status.json").read_text())
    (half / "status.json").write_text(json.dumps(status | {"status": "interrupted", "step": 2}))
    assert bnexp("resume", "half") == 2 and "allow=[mine]" in capsys.readouterr().err
    assert bnexp("resume", "half", "allow=[mine]") == 0
    last = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]) for folder in (half, whole)]
    assert len({line["loss/test"] for line in last}) == 1
    assert bnexp("inspect", "half", "allow=[mine]") == 0
    assert "exchanged" in capsys.readouterr().out


def test_what_the_person_gives_wins_over_the_networks_own(bnexp, mine, tmp_path, capsys):
    assert bnexp("summary", *OWN, "norm.eps=1e-5") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "momentum 0.1;" in out and "eps" not in out.partition("exchanged")[2]


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["model=own"], "model.path=null"),
        (["model=own", "model.path=mine.Nett"], "cannot be found"),
        (["model=own", "model.path=nowhere.Net"], "no package nowhere here"),
        ([*OWN, "allow=[]"], "add allow=[mine]"),
        ([*OWN, "model.args={depth:3}"], "unexpected keyword argument 'depth'"),
        (["model=torchvision", "model.name=resnet81"], "did you mean resnet"),
        (["model=torchvision"], "model.name=null"),
    ],
)
def test_mistakes_are_told_before_any_work(bnexp, mine, overrides, text, capsys, tmp_path):
    assert bnexp("train", *overrides, "out=run") == 2
    told = capsys.readouterr().err
    assert text in told and "Traceback" not in told and not (tmp_path / "run").exists()
