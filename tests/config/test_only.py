"""optimizer.only: what is trained moves, everything else keeps every bit."""

import pytest
import torch
from test_models import MODELS

from bnexp.config import build, check
from bnexp.config.compose import composed
from bnexp.errors import UserError

SMALL = ("data.limit=64", "data.size=16", "batch_size=16", "threads=1", "device=cpu", "steps=3")
DECAYED = ("optimizer.lr=0.01", "optimizer.weight_decay=0.1", "optimizer.norm_weight_decay=0.1")
NARROW = {
    "resnet": ["model.widths=[4,6]", "model.blocks=[1,1]"],
    "densenet": ["model.growth=4", "model.blocks=[1,1]", "model.stem_width=4"],
}


def run_of(*overrides):
    cfg = composed([*SMALL, *overrides])
    check.check(cfg)
    return build.build(cfg)


def moved(*overrides):
    """The names of the parameters that three steps change, and of the others."""
    run = run_of(*overrides)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for _ in range(3):
        run.step()
    same = {name for name, p in run.model.named_parameters() if torch.equal(p, before[name])}
    return before.keys() - same, same


@pytest.mark.parametrize("model", MODELS)
def test_only_the_chosen_parameters_move_even_with_decay(model):
    words = (f"model={model}", *NARROW.get(model, ()), "optimizer=adamw", *DECAYED)
    trained, kept = moved(*words, "optimizer.only=norm")
    assert trained and all("norm" in name for name in trained)
    assert {name for name in kept if "norm" in name} == set(), "every scale and every shift is trained"
    trained, kept = moved(*words, "optimizer.only=classifier")
    assert trained == {"classifier.weight", "classifier.bias"} and kept


def test_without_a_norm_only_the_shifts_in_its_place_are_trained():
    assert moved("model=mlp", "norm=none", "optimizer.only=norm")[0] == {"norm1.bias", "norm2.bias"}


def test_the_initial_weights_and_the_batches_are_those_of_a_run_that_trains_all():
    free, bound = run_of("model=mlp"), run_of("model=mlp", "optimizer.only=norm")
    assert all(map(torch.equal, free.model.state_dict().values(), bound.model.state_dict().values()))
    assert torch.equal(free.batches.next()[0], bound.batches.next()[0])


def test_several_runs_at_once_keep_what_is_not_trained_too(bnexp, tmp_path):
    words = ("model=mlp", *SMALL, "optimizer.only=norm", "quiet=true", "out=s")
    assert bnexp("train", "-m", *words, "seed=0,1", "replicas=2") == 0
    folders = sorted(path.parent for path in tmp_path.glob("s/*/checkpoint.pt"))
    for seed, folder in zip((0, 1), folders, strict=True):
        state = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
        start = run_of("model=mlp", f"seed={seed}").model.state_dict()
        kept = [name for name in start if "dense" in name or "classifier" in name]
        assert all(torch.equal(state[name], start[name]) for name in kept)
        assert not torch.equal(state["norm1.weight"], start["norm1.weight"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer.only=norms"], "optimizer.only=norms: not known; choose one of norm, classifier"),
        (["optimizer.only=3"], "optimizer.only=3: text or null is expected"),
        (["optimizer.only=norm", "norm.affine=false"], "the model has no norm with a scale or a shift"),
        (["optimizer.only=norm", "model.hidden=[]", "model=mlp"], "the model has no norm with a scale or a shift"),
    ],
)
def test_what_leaves_nothing_to_train_is_refused(words, said):
    with pytest.raises(UserError) as caught:
        run_of(*words)
    assert said in str(caught.value)
