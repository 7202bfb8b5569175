"""Every option of every norm in every model: checked, built, trained a step, evaluated and looked at.

Helpers that show a model a batch of their own must show one that its norms take.
"""

import math

import pytest
from omegaconf import OmegaConf
from test_models import MODELS, NORMS

from bnexp.config import build, check
from bnexp.config.choices import conf_dir
from bnexp.config.compose import composed
from bnexp.errors import UserError
from bnexp.norms.kernels.batch_norm import interpreted
from bnexp.probes.layers import list_layers
from bnexp.probes.population import recompute_statistics, some_images, training_batches

SMALL = ("data.limit=64", "data.valid=32", "batch_size=16", "threads=1", "device=cpu", "steps=2")
NARROW = {"resnet": ["model.widths=[4,6]", "model.blocks=[1,1]"], "densenet": ["model.growth=4", "model.blocks=[1,1]"]}
# Other values than the default of options that are not true or false; a newer norm's other options keep theirs.
OTHERS = {
    "eps": [0.1], "momentum": ["null", 0, 1], "decay": [0.99], "groups": ["layer", 1], "virtual_batch": [2, 16],
    "running_var": ["biased"], "running_var_init": [0], "r_max": [1], "d_max": [0], "renorm_momentum": [0, 1],
    "warmup_steps": [0], "r_steps": [0], "d_steps": [0],
}  # fmt: skip


def variants():
    """(overrides) of every norm with its defaults, and with each option at another value."""
    for name in NORMS:
        if name == "fused" and not interpreted():
            continue
        entry = OmegaConf.to_container(OmegaConf.load(conf_dir() / "norm" / f"{name}.yaml"))
        blocks = ["norm.virtual_batch=8"] if "virtual_batch" in entry else []
        yield [f"norm={name}", *blocks]
        for key, value in entry.items():
            if not key.startswith("_"):
                others = [str(not value).lower()] if isinstance(value, bool) else OTHERS.get(key, [])
                yield from ([f"norm={name}", *blocks, f"norm.{key}={other}"] for other in others)


def run_of(*overrides):
    cfg = composed([*SMALL, *overrides])
    check.check(cfg)
    return build.build(cfg)


@pytest.mark.parametrize("overrides", list(variants()), ids=" ".join)
def test_every_option_of_every_norm_trains_and_is_looked_at(overrides):
    run = run_of("model=mlp", "model.hidden=[6]", *overrides)
    run.step()
    assert math.isfinite(run.evaluate(run.dataset.valid)[0])
    for num_images in (1, 2, 5, 1000):
        images = some_images(run, num_images).images
        assert run.forward(run.dataset.prepare(images)).isfinite().all()
    recompute_statistics(run.model, training_batches(run, 40), run.forward)
    run.step()
    assert list_layers(run.model, run.dataset.in_shape, device="cpu")[-1].out_shape == (10,)
    assert run_of("model=mlp", "model.hidden=[6]", "threads=auto", *overrides).threads == 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("norm", ["norm.track_running_stats=false", "norm=ghost norm.virtual_batch=16"])
def test_norms_that_need_a_batch_in_evaluation_or_whole_blocks_train_in_every_model(model, norm):
    run = run_of(f"model={model}", *NARROW.get(model, ()), *norm.split())
    run.step()
    assert math.isfinite(run.evaluate(run.dataset.valid)[0])
    assert run.forward(run.dataset.prepare(some_images(run, 3).images)).isfinite().all()


@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_blocks_of_one_image_are_blamed_on_the_setting_that_makes_them(model):
    with pytest.raises(UserError) as caught:
        run_of(f"model={model}", "norm=ghost", "norm.virtual_batch=1")
    assert "norm.virtual_batch=1; set it to 2 or more" in str(caught.value) and "batch_size" not in str(caught.value)


def test_blocks_of_one_image_are_taken_where_every_block_has_pixels():
    run = run_of("model=resnet", *NARROW["resnet"], "norm=ghost", "norm.virtual_batch=1")
    run.step()
    assert run.forward(run.dataset.prepare(some_images(run, 3).images)).isfinite().all()


def test_one_image_to_evaluate_is_refused_where_its_norms_need_a_batch(tmp_path, monkeypatch):
    text = "class Own(BatchNorm):\n    def __init__(self, n, activation='identity'):\n"
    text += "        super().__init__(n, track_running_stats=False, activation=activation)"
    (tmp_path / "untracked.py").write_text(f"from bnexp.norms.scratch import BatchNorm\n\n{text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="norm.track_running_stats=false: evaluation on 1 valid image .*use more valid"):
        run_of("model=mlp", "data.valid=1", "norm.track_running_stats=false")
    with pytest.raises(UserError, match="^norm._target_=untracked.Own: evaluation .*, none, or another norm$"):
        run_of("model=mlp", "data.valid=1", "norm=none", "norm._target_=untracked.Own", "allow=[untracked]")
    for overrides in (["model=mlp"], ["model=mlp", "norm=group"], ["model=resnet", *NARROW["resnet"]]):
        run = run_of(*overrides, "data.valid=1")
        run.step()
        assert math.isfinite(run.evaluate(run.dataset.valid)[0])


@pytest.mark.parametrize("momentum", ["null", "0.1"])
def test_a_last_batch_of_one_image_is_refused_whatever_the_momentum(momentum):
    with pytest.raises(UserError, match="a batch of one image leaves a norm one value per channel"):
        run_of(
            "model=resnet", *NARROW["resnet"], "data.size=8", "data.limit=33", "drop_last=false",
            f"norm.momentum={momentum}",
        )  # fmt: skip
