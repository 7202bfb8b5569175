"""Folders written before the package was put in order: a run and a sweep that still load, resume and report."""

import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bnexp.store.run_folder import read_status

HERE = Path(__file__).parent / "before"
SWEEP = (
    "model=mlp", "model.hidden=[8]", "data.size=8", "data.limit=256", "batch_size=32", "optimizer.lr=0.01", "threads=1",
    "device=cpu", "quiet=true", "log_every=4", "norm=none,library", "seed=0,1", "epochs=2",
    "model.init=torch",  # which was the only one
)  # fmt: skip


@pytest.fixture
def old(tmp_path):
    for name in ("run", "sweep"):
        shutil.copytree(HERE / name, tmp_path / name)
    return tmp_path


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss/train"] for row in rows if "loss/train" in row}


def test_a_run_is_resumed_and_ends_as_one_that_was_never_interrupted(old, bnexp):
    assert read_status(old / "run")["status"] == "interrupted"
    assert bnexp("resume", "run") == 0
    assert bnexp("rerun", "run", "out=fresh") == 0
    assert read_status(old / "run")["status"] == "finished"
    # Another version of torch may round otherwise than the one that wrote the checkpoint.
    assert losses(old / "run") == pytest.approx(losses(old / "fresh"), rel=1e-3)
    assert len(losses(old / "run")) == 6


def test_a_run_is_inspected(old, bnexp, capsys):
    assert bnexp("inspect", "run") == 0
    assert "weights of step 13" in capsys.readouterr().out


def test_a_sweep_is_reported_as_far_as_it_is_done_and_its_command_goes_on(old, bnexp, capsys):
    assert bnexp("report", "sweep") == 0
    out = capsys.readouterr().out
    assert "library" in out and "interrupted" in out
    assert bnexp("train", "-m", *SWEEP[:-1], "out=sweep") == 2
    assert "model.init is torch there and auto here" in capsys.readouterr().err
    assert bnexp("train", "-m", *SWEEP, "out=sweep") == 0
    assert {read_status(folder)["status"] for folder in (old / "sweep").iterdir() if folder.is_dir()} == {"finished"}


def test_every_part_that_an_old_config_names_is_where_it_was(old):
    from bnexp.config import check
    from bnexp.config.stored import stored_config

    for path in sorted(old.rglob("config.yaml")):
        cfg = stored_config(path.parent)
        check.check(cfg, free=False)
        assert OmegaConf.to_container(cfg)["norm"]["_target_"].startswith("bnexp.norms.")


def test_an_old_folder_keeps_torchs_weights_and_a_word_of_today_wins(old):
    from bnexp.config.stored import rerun_config, stored_config

    assert stored_config(old / "run").model.init == "torch"
    assert rerun_config(old / "run", ["seed=1"])[0].model.init == "torch"
    assert rerun_config(old / "run", ["model.init=auto"])[0].model.init == "auto"
    assert rerun_config(old / "run", ["model.init=he"])[0].model.init == "he"


@pytest.mark.parametrize("bias", [True, False])
def test_an_old_network_without_norm_keeps_the_shifts_of_its_checkpoint(bias, old):
    from bnexp.config import parts
    from bnexp.config.stored import stored_config

    path = old / "sweep/none-s0/config.yaml"
    path.write_text(path.read_text().replace("bias: false", f"bias: {str(bias).lower()}"))
    cfg = stored_config(path.parent)
    model = parts.make_model(cfg, parts.part(cfg, "data")())
    assert model.norm1.bias is not None and (model.dense1.bias is not None) == bias
