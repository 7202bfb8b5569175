"""Numbers in the entries of norms, optimizers and schedules: what cannot mean anything is refused before any work."""

import math
from copy import deepcopy
from functools import cache

import pytest
from omegaconf import OmegaConf

from bnexp.config import build, check
from bnexp.config.choices import choices, conf_dir
from bnexp.config.compose import composed
from bnexp.errors import UserError
from bnexp.optim import set_learning_rate

SMALL = ("data.limit=64", "batch_size=16", "threads=1", "device=cpu", "model=mlp")
TRIED = (-0.1, -1, 0, 2, math.nan, math.inf, -math.inf)
# Which of these mean something, by the name of the option: one rule for every entry that has it. Of an option that is
# not listed, a newer norm's say, only that it takes no number that is not finite.
MEANT = {
    "eps": {2},  # 0: a constant channel, or a gradient of 0, would be divided by 0
    "momentum": {0},  # of a norm: statistics that stay as they are; of an optimizer: none
    "decay": {0},
    "running_var_init": {0, 2},
    "r_max": {2},
    "d_max": {0, 2},
    "renorm_momentum": {0},
    "warmup_steps": {0, 2},
    "r_steps": {0, 2},
    "d_steps": {0, 2},
    "virtual_batch": {2},
    "groups": {2},
    "lr": {0, 2},
    "weight_decay": {0, 2},
    "norm_weight_decay": {0, 2},
    "betas": {0},
    "final": {0, 2},
    "start": {0, 2},
    "gamma": {0, 2},
    "milestones": {0},
}
CHOSEN = {"other": ["optimizer._target_=torch.optim.RMSprop"]}


def options():
    """(group, entry, option, default) of every option that is a number, or may be one."""
    for group in ("norm", "optimizer", "schedule"):
        for name in choices(group):
            entry = OmegaConf.to_container(OmegaConf.load(conf_dir() / group / f"{name}.yaml"))
            for key, value in entry.items():
                is_number = value is None or isinstance(value, int | float | list) and not isinstance(value, bool)
                if is_number and not key.startswith("_"):
                    yield pytest.param(group, name, key, value, id=f"{group}={name} {key}")


@cache
def composed_entry(group, name):
    return composed([*SMALL, f"{group}={name}", *CHOSEN.get(name, ())])


@pytest.mark.parametrize(("group", "name", "key", "default"), list(options()))
def test_a_number_that_cannot_mean_anything_is_refused_before_any_work(group, name, key, default):
    for tried in TRIED:
        if key not in MEANT and math.isfinite(tried):
            continue
        cfg = deepcopy(composed_entry(group, name))
        cfg[group][key] = [tried, default[1]] if isinstance(default, list) else tried
        if tried in MEANT.get(key, ()):
            check.check(cfg, runs=False)
            continue
        with pytest.raises(UserError) as caught:
            check.check(cfg, runs=False)
        assert key in str(caught.value)


def test_every_listed_option_is_one_of_an_entry():
    assert MEANT.keys() <= {option.values[2] for option in options()}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("norm.momentum=1.5", "norm.momentum=1.5: the weight of a new batch cannot be below 0 or above 1"),
        ("norm.eps=0", "norm.eps=0: a channel of variance 0 is divided by the root of eps; give a finite"),
        ("norm.eps=inf", "norm.eps=inf: a finite number is expected"),
        ("optimizer.lr=null", "optimizer.lr=null: a number is expected"),
        ("optimizer.lr=true", "optimizer.lr=true: a number is expected"),
        ("warmup_steps=3", "warmup_steps: there is no such setting (did you mean schedule.warmup_steps?)"),
        ("optimizer.eps=0", "optimizer.eps=0: a gradient of 0 is divided by it"),
        ("optimizer.betas=[nan,0.9]", "optimizer.betas=[nan, 0.9]: a finite number is expected"),
        ("schedule.warmup_steps=-5", "schedule.warmup_steps=-5: cannot be negative"),
        ("schedule.warmup_steps=99999999999999999999", "=99999999999999999999: too large"),
        ("optimizer.lr=-1", "optimizer.lr=-1: the optimizer refuses"),
        ("optimizer.betas=[2,0.9]", "optimizer.betas=[2.0, 0.9]: the optimizer refuses"),
    ],
)
def test_what_is_refused_is_named_with_the_remedy(override, words):
    with pytest.raises(UserError) as caught:
        check.check(composed([*SMALL, override]))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "option", "words"),
    [
        ("SparseAdam", "lr=0.1", "optimizer._target_=torch.optim.SparseAdam: takes sparse gradients only"),
        ("SGD", "dampening=-5", "optimizer.dampening=-5: only 0 to 1 has a meaning"),
        ("SGD", "momentum=2", "optimizer.momentum=2: only 0 to 1 has a meaning"),
        ("RMSprop", "alpha=1.5", "optimizer.alpha=1.5: only 0 to 1 has a meaning"),
        ("ASGD", "lambd=-3", "optimizer.lambd=-3: cannot be negative"),
        ("ASGD", "t0=-3", "optimizer.t0=-3: cannot be negative"),
        ("SGD", "lr=1e39", "optimizer.lr=1e+39: a finite number is expected, and it has to be so in float32"),
    ],
)
def test_options_that_torch_does_not_check_are_checked(kind, option, words):
    with pytest.raises(UserError) as caught:
        chosen = ("optimizer=other", f"optimizer._target_=torch.optim.{kind}", f"++optimizer.{option}")
        check.check(composed([*SMALL, *chosen]))
    assert words in str(caught.value)


def test_a_factor_that_is_too_large_for_a_float_is_named_as_the_schedules():
    with pytest.raises(UserError, match="the learning rate would be multiplied by inf at step 19"):
        milestones = f"schedule.milestones=[{','.join(['0.9'] * 9)}]"
        check.check(composed([*SMALL, "schedule=step", "schedule.gamma=1e38", milestones, "steps=20"]))


@pytest.mark.parametrize("factor", [None, math.nan, -1.0, math.inf])
def test_a_schedule_that_goes_wrong_later_is_named(factor):
    optimizer = build.build(composed([*SMALL])).optimizer
    with pytest.raises(UserError, match="the schedule returns (None|nan|-1.0|inf); it must return a finite number"):
        set_learning_rate(optimizer, factor)


@pytest.mark.parametrize("norm", ["scratch", "library", "fused"])
@pytest.mark.parametrize("override", ["norm.momentum=-0.1", "norm.momentum=2", "norm.eps=0", "norm.eps=-1"])
def test_the_implementations_of_batch_norm_refuse_the_same_in_the_same_words(norm, override):
    said = set()
    for name in ("library", norm):
        with pytest.raises(UserError) as caught:
            check.check(composed([*SMALL, f"norm={name}", override]))
        said.add(str(caught.value))
    assert len(said) == 1


def test_a_run_at_the_limits_of_what_is_taken_goes_on():
    limits = (["norm.momentum=0"], ["norm.momentum=1"], ["optimizer=sgd", "optimizer.momentum=1"], ["optimizer.lr=0"])
    for overrides in limits:
        cfg = composed([*SMALL, *overrides])
        check.check(cfg)
        run = build.build(cfg)
        run.step()
        assert math.isfinite(run.evaluate(run.dataset.valid)[0])
