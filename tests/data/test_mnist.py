"""Everything trains: every model with every norm on digits, and on real MNIST where its files are."""

import json

import pytest
from test_models import MODELS

from bnexp.config.choices import choices
from bnexp.store.run_folder import read_status

# Interpreted Triton kernels are a thousand times slower than compiled ones; their own tests train with them.
NORMS = [norm for norm in choices("norm") if norm in ("none", "scratch", "library")]
SMALL = {
    "resnet": ["model.stem=cifar", "model.widths=[16,32]", "model.blocks=[1,1]", "data.size=8"],
    "densenet": ["model.growth=8", "model.blocks=[2,2]", "model.stem_width=16", "data.size=16"],
}


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss/train"] for line in lines if "loss/train" in line]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_learns_digits_with_every_norm(model, norm, train):
    overrides = ("steps=40", "log_every=5", "optimizer.lr=0.01", *SMALL.get(model, ()))
    folder = train(f"model={model}", f"norm={norm}", *overrides)
    losses, metrics = losses_of(folder), read_status(folder)["metrics"]
    assert losses[-1] < 0.8 * losses[0]
    assert metrics["accuracy/test"] > 0.3  # chance is 0.1, the slowest of them reaches 0.47


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_small_models_learn_mnist_with_every_norm(model, norm, train, mnist_root):
    folder = train("data=mnist", f"data.root={mnist_root}", f"model={model}", f"norm={norm}", "steps=20", "log_every=5")
    losses, status = losses_of(folder), read_status(folder)
    assert (status["status"], status["step"]) == ("finished", 20)
    assert status["epoch"] == pytest.approx(20 / (55_000 // 64))
    assert losses[-1] < losses[0]
    assert status["metrics"]["accuracy/test"] > 0.25


@pytest.mark.parametrize("model", ["resnet", "densenet"])
def test_large_models_train_on_mnist_as_they_are(model, train, mnist_root):
    few = ("data.limit=64", "batch_size=32", "steps=6", "log_every=2", "optimizer.lr=1e-4")
    losses = losses_of(train("data=mnist", f"data.root={mnist_root}", f"model={model}", *few))
    assert losses[-1] < losses[0]


def test_lenet_with_batch_norm_is_above_90_percent_after_a_few_thousand_images_of_mnist(train, mnist_root):
    folder = train("data=mnist", f"data.root={mnist_root}", "steps=100")
    assert read_status(folder)["metrics"]["accuracy/test"] > 0.9
