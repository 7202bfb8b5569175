"""Advice before training: said where norms or initial weights cannot work, with numbers and a way out, nowhere else."""

import math
import re

import pytest
import torch
from torch import nn

from bnexp.config import build
from bnexp.config.advice import advice, signal_advice
from bnexp.config.compose import composed
from bnexp.norms import ghost, group, library, none, renorm, scratch
from bnexp.probes.population import some_of


def advise(*norms, num_steps=5000, batch_size=64):
    return advice(nn.Sequential(*norms), num_steps=num_steps, batch_size=batch_size)


@pytest.mark.parametrize(
    "norm",
    [none.Shift, scratch.BatchNorm, library.BatchNorm, group.GroupNorm, ghost.GhostBatchNorm, renorm.BatchRenorm],
)
def test_the_defaults_with_enough_steps_need_no_advice(norm):
    assert advise(norm(4), norm(8), num_steps=100) == []


@pytest.mark.parametrize("norm", [none.Shift, group.GroupNorm, nn.BatchNorm2d, nn.Identity])
def test_what_is_no_batch_norm_of_ours_is_never_advised(norm):
    assert advise(norm(4), num_steps=1, batch_size=2) == []


def test_a_momentum_that_cannot_move_the_statistics_in_time_is_told_with_what_is_left():
    (said,) = advise(library.BatchNorm(4, momentum=0.001), num_steps=500)
    assert said.startswith("norm.momentum=0.001: after the planned 500 steps the running statistics still hold 61% of")
    assert "use norm.momentum=0.1, train for 2,995 steps or more or let norm.momentum=null" in said
    assert "decay" not in said  # which library does not take


def test_a_decay_is_told_as_a_decay():
    (said,) = advise(scratch.BatchNorm(4, decay=0.999), num_steps=500)
    assert "(norm.decay=0.999): after the planned 500 steps the running statistics still hold 61% of" in said
    assert "(norm.decay=0.9)" in said


@pytest.mark.parametrize("num_steps", [1, 4, 5, 28, 29, 500])
@pytest.mark.parametrize("momentum", [0.0, 0.0001, 0.01, 0.1])
def test_what_is_told_is_what_is_left_and_the_ways_out_lead_out(momentum, num_steps):
    said = advise(library.BatchNorm(4, momentum=momentum), num_steps=num_steps)
    norm = library.BatchNorm(1, momentum=momentum)
    norm.running_mean.fill_(1.0)
    for _ in range(num_steps):
        norm(torch.tensor([[-1.0], [1.0]]))  # mean 0: what is left of the 1 is the share
    left = norm.running_mean.item()
    assert bool(said) == (left > 0.05)
    for sentence in said:
        assert f"still hold {left:.0%} of" in sentence
        other = re.search(r"use norm\.momentum=([\d.]+)", sentence)
        assert bool(other) == (num_steps >= 5)  # a momentum above one half would be another mistake
        if other:
            assert advise(library.BatchNorm(4, momentum=float(other[1])), num_steps=num_steps) == []
        longer = re.search(r"train for ([\d,]+) steps", sentence)
        assert bool(longer) == (momentum > 0)
        if longer:
            enough = int(longer[1].replace(",", ""))
            assert advise(library.BatchNorm(4, momentum=momentum), num_steps=enough) == []
            assert advise(library.BatchNorm(4, momentum=momentum), num_steps=enough - 1)
    assert advise(library.BatchNorm(4, momentum=None), num_steps=num_steps) == []


def test_averages_that_make_up_for_a_slow_start_need_no_advice():
    slow = {"decay": 0.9999, "running_var_init": 0.0}
    assert advise(scratch.BatchNorm(4, **slow), num_steps=500)
    assert advise(scratch.BatchNorm(4, **slow, zero_debias=True), num_steps=500) == []
    assert advise(scratch.BatchNorm(4, **slow, decay_warmup=True), num_steps=500) == []


def test_what_is_advised_fits_the_way_of_averaging():
    (said,) = advise(scratch.BatchNorm(4, decay=0.999, zero_debias=True), num_steps=500)  # but the variance starts at 1
    assert said.partition(" (1 layer")[0].endswith("or set norm.running_var_init=0")
    (said,) = advise(scratch.BatchNorm(4, decay_warmup=True), num_steps=1)
    assert said.partition(" (1 layer")[0].endswith("did; train for 2 steps or more")  # 1/10, then 2/11 of it


def test_before_the_first_step_there_is_nothing_to_say_of_an_average_of_all_batches():
    assert advise(library.BatchNorm(4, momentum=None), num_steps=0) == []


def test_statistics_that_nobody_keeps_need_no_time():
    assert advise(library.BatchNorm(4, momentum=0.001, track_running_stats=False), num_steps=5) == []
    assert advise(library.BatchNorm(4, momentum=0.9, track_running_stats=False), num_steps=5) == []


@pytest.mark.parametrize("batch_size", [2, 4, 7])
def test_small_batches_are_told_with_how_well_they_know_a_variance(batch_size):
    (said,) = advise(scratch.BatchNorm(4), batch_size=batch_size)
    draws = torch.randn(200_000, batch_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = draws.var(1).std().item()  # of a variance of 1; known to about 0.5% here
    told = int(re.search(r"an error of about (\d+)%", said)[1]) / 100
    assert told == pytest.approx(error, rel=0.02)  # and rounded to a whole percent
    assert said.startswith(f"batch_size={batch_size}: every statistic is over {batch_size} images")
    assert "use 8 or more images" in said and "norm=group" in said


@pytest.mark.parametrize("batch_size", [1, 8, 9])
def test_batches_of_eight_are_enough_and_batches_of_one_are_refused_elsewhere(batch_size):
    assert advise(scratch.BatchNorm(4), batch_size=batch_size) == []


def test_renormalization_is_made_for_small_batches():
    assert advise(renorm.BatchRenorm(4), batch_size=4) == []


@pytest.mark.parametrize(
    "block, batch_size, remedy",
    [
        (4, 60, "use norm.virtual_batch=10 or"),
        (2, 8, "use norm.virtual_batch=8 or"),
        (2, 4, "use batch_size=8 and norm"),
    ],
)
def test_small_blocks_are_told_and_not_the_batch_they_come_from(block, batch_size, remedy):
    (said,) = advise(ghost.GhostBatchNorm(4, virtual_batch=block), batch_size=batch_size)
    assert said.startswith(f"norm.virtual_batch={block}: every statistic is over {block} images")
    assert remedy in said
    assert f"about {math.sqrt(2 / (block - 1)):.0%}" in said
    if "batch_size=8" in said:
        batch_size = 8
    instead = int(re.search(r"norm\.virtual_batch=(\d+) or norm=group", said)[1])
    norm = ghost.GhostBatchNorm(4, virtual_batch=instead)
    norm.check_batch_size(batch_size)
    assert advise(norm, batch_size=batch_size) == []


def test_blocks_of_one_image_have_no_error_to_tell():
    (said,) = advise(ghost.GhostBatchNorm(4, virtual_batch=1), batch_size=16)
    assert "norm.virtual_batch=1: every statistic is over 1 image" in said and "norm.virtual_batch=8" in said


@pytest.mark.parametrize("momentum, meant", [(0.9, "0.1"), (0.99, "0.01"), (0.6, "0.4"), (1.0, "0.1")])
def test_a_weight_of_the_old_average_given_as_that_of_the_new_batch_is_told_with_what_was_meant(momentum, meant):
    (said,) = advise(library.BatchNorm(4, momentum=momentum))
    assert said.startswith(f"norm.momentum={momentum:g}: every batch replaces {momentum:.0%} of")
    assert f"probably norm.momentum={meant} was meant" in said
    assert advise(library.BatchNorm(4, momentum=0.5)) == []


def test_a_weight_of_the_new_batch_given_as_decay_is_told_with_what_was_meant():
    (said,) = advise(scratch.BatchNorm(4, decay=0.1))
    assert said.startswith("norm.momentum=0.9 (norm.decay=0.1): every batch")
    assert "probably norm.momentum=0.1 (norm.decay=0.9) was meant" in said


def test_renormalization_is_advised_by_its_own_option():
    (said,) = advise(renorm.BatchRenorm(4, renorm_momentum=0.99))
    assert said.startswith("norm.renorm_momentum=0.99:") and "norm.renorm_momentum=0.01 was meant" in said


def test_many_layers_with_one_problem_are_one_sentence():
    layers = [library.BatchNorm(4 + i, momentum=0.001) for i in range(20)]
    (said,) = advise(nn.Linear(3, 4), *layers, num_steps=500)
    assert said.endswith("(20 layers, the first is 1)")
    (said,) = advise(nn.Linear(3, 4), library.BatchNorm(4), layers[0], num_steps=500)
    assert said.endswith("(1 layer, 2)")
    assert advice(layers[0], num_steps=500, batch_size=8)[0].endswith("(1 layer, the model)")


def test_every_problem_of_a_layer_is_told():
    said = advise(library.BatchNorm(4, momentum=0.01), library.BatchNorm(4, momentum=0.9), num_steps=10, batch_size=4)
    assert [s.partition(":")[0] for s in said] == ["norm.momentum=0.01", "batch_size=4", "norm.momentum=0.9"]
    assert said[1].endswith("(2 layers, the first is 0)")


def test_advice_leaves_the_model_and_the_random_numbers_alone():
    model = nn.Sequential(nn.Linear(3, 4), scratch.BatchNorm(4, momentum=0.001))
    before, state = torch.random.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    assert advice(model, num_steps=5, batch_size=2)
    assert torch.equal(before, torch.random.get_rng_state()) and model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------- a signal that dies

HERE = ("norm=none", "device=cpu", "threads=1", "data.size=16")
DEEP = ("model=mlp", "model.hidden=[50,50,50,50,50,50,50,50]")
RESNET = ("model=resnet", "model.bias=true", "model.widths=[16,16,16,16]", "data.normalize=false")


@pytest.mark.parametrize("words, remedy", [
    ([*DEEP, "model.init=torch"], "model.init=he"),
    ([*DEEP, "model.weight_init_std=0.01", "model.activation=tanh"], "model.init=xavier model.weight_init_std=null"),
    ([*DEEP, "model.activation=sigmoid"], "use a norm, or model.activation=relu"),
    ([*RESNET, "model.init=torch"], "model.init=he"),
    (DEEP, ""),
    (RESNET, ""),
    (["model=lenet", "model.init=torch"], ""),
    ([*DEEP, "model.init=torch", "norm=library"], ""),
    ([*DEEP, "model.init=torch", "norm=group"], ""),
])  # fmt: skip
def test_logits_that_do_not_depend_on_the_image_are_told_with_weights_that_help(words, remedy):
    run = build.build(composed([*HERE, *words]))
    said = signal_advice(run, 0)
    assert len(said) == bool(remedy) and all(each.endswith(f"; {remedy}") for each in said)
    if said:
        told = float(re.search(r"two images differ by (\S+) before", said[0])[1])
        train = run.dataset.train
        logits = run.model(run.dataset.prepare(some_of(train, 8).images)).detach().double()
        pairs = [(logits[i] - logits[j]).square() for i in range(8) for j in range(i)]
        assert told == float(f"{torch.stack(pairs).mean().sqrt():.1g}")
    if "=" in remedy.partition(",")[0]:
        way = [each for each in remedy.split() if "=" in each]
        assert signal_advice(build.build(composed([*HERE, *words, *way])), 0) == []


def test_looking_for_a_signal_changes_no_number_of_the_run():
    run, other = (build.build(composed([*HERE, *DEEP, "model.init=torch"])) for _ in range(2))
    before = torch.random.get_rng_state()
    assert signal_advice(run, 0)
    assert torch.equal(before, torch.random.get_rng_state())
    for each in (run, other):
        each.step()
    assert all(map(torch.equal, run.model.state_dict().values(), other.model.state_dict().values()))
