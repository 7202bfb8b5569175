"""What the textbook's options do beyond torch's, and how long running statistics remember where they began.

TF-slim's center, scale, zero_debias and weights, TensorFlow's decay_warmup: each by its closed form.
"""

import copy
import itertools
import math

import pytest
import torch
from test_norm_mutants import mutate
from test_norms import DOUBLE, channels, close, closed_form, make, match, measure, randn64, statistics

from bnexp.errors import UserError
from bnexp.norms import fused, library, scratch
from bnexp.norms.ghost import GhostBatchNorm
from bnexp.norms.renorm import BatchRenorm

SHAPES = [(7, 3), (5, 3, 4), (4, 3, 5, 2), (2, 3, 2, 3, 3)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def check_affine(norm):
    """Without center no shift, without scale no scale, in value, gradient and state dict; affine=False drops both."""
    for affine, center, scale in itertools.product((True, False), repeat=3):
        module = norm(3, 0.3, affine=affine, center=center, scale=scale, dtype=torch.float64)
        has = {"weight": affine and scale, "bias": affine and center}
        assert {name for name, _ in module.named_parameters()} == {name for name in has if has[name]}
        assert module.state_dict().keys() == set(dict(module.named_parameters())) | set(dict(module.named_buffers()))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.linspace(-0.5, 1.5, 3))
        x, dy = randn64(4, 3, 5, 2), randn64(4, 3, 5, 2)
        mean, var = statistics(x)
        weight = module.weight if has["weight"] else torch.ones(3)
        bias = module.bias if has["bias"] else torch.zeros(3)
        expected = closed_form(x, mean, var, weight, bias, 0.3, dy)
        match(measure(module, x, dy), {k: v for k, v in expected.items() if has.get(k, True)}, **DOUBLE)
        module.reset_parameters()
        assert all(torch.equal(p, torch.full_like(p, name == "weight")) for name, p in module.named_parameters())


def check_zero_debias(norm):
    """The running mean is sum_t decay^(T-t) x_t / sum_t decay^(T-t): a weighted mean of the batches alone.

    So is the running variance if it starts at 0; if it starts at 1 it moves as it always does.
    """
    for start, decay in ((0.0, 0.9), (1.0, 0.9), (0.0, 0.0), (0.0, 0.999)):
        module = norm(3, decay=decay, zero_debias=True, running_var_init=start, dtype=torch.float64)
        means, variances = [], []
        for _ in range(5):
            x = randn64(4, 3, 5, 2)
            module(x)
            mean, var = statistics(x)
            means.append(mean)
            variances.append(var * 40 / 39)
            shares = [decay ** (len(means) - 1 - t) for t in range(len(means))]
            expected = sum(s * m for s, m in zip(shares, means, strict=True)) / sum(shares)
            close(module.running_mean, expected, "running_mean", **DOUBLE)
            total = sum(s * v for s, v in zip(shares, variances, strict=True))
            expected = total / sum(shares) if start == 0 else decay ** len(means) + (1 - decay) * total
            close(module.running_var, expected, "running_var", **DOUBLE)
        assert list(module.state_dict()) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def check_decay_warmup(norm):
    """The t-th batch, counted from 0, meets decay_t = min(decay, (1 + t) / (10 + t))."""
    for decay in (0.25, 0.999):  # reached after two batches, and never here
        module = norm(3, decay=decay, decay_warmup=True, dtype=torch.float64)
        running_mean, running_var = torch.zeros(3).double(), torch.ones(3).double()
        for decay_t in (min(decay, each) for each in (1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14)):
            x = randn64(4, 3, 5, 2)
            mean, var = statistics(x)
            running_mean = decay_t * running_mean + (1 - decay_t) * mean
            running_var = decay_t * running_var + (1 - decay_t) * var * 40 / 39
            module(x)
            close(module.running_mean, running_mean, "running_mean", **DOUBLE)
            close(module.running_var, running_var, "running_var", **DOUBLE)


def check_repeats(norm):
    """Whole-number weights are a batch that repeats its examples: values, statistics and the gradient of x."""
    for shape in SHAPES:
        for track in (True, False):
            times = torch.tensor([2, 0, 1, 3, 1, 1, 4])[: shape[0]]
            weighted, repeated = (make(norm, 3, 0.3, 0.2, track_running_stats=track) for _ in range(2))
            x, dy = randn64(*shape).requires_grad_(), randn64(*shape)
            rows = torch.arange(len(x)).repeat_interleave(times)
            y, expected = weighted(x, weights=times), repeated(x[rows])
            close(y[rows], expected, "y", **DOUBLE)
            match(weighted.state_dict(), repeated.state_dict(), **DOUBLE)
            ours, theirs = (torch.autograd.grad(each, x, dy[rows])[0] for each in (y[rows], expected))
            close(ours, theirs, "x", **DOUBLE)
            # The example of weight 0 is normalized by the others.
            mean, var = statistics(x.detach()[rows])
            zero = closed_form(x, mean, var, weighted.weight, weighted.bias, 0.3, dy)["y"]
            close(y.detach(), zero, "y", **DOUBLE)


def check_weights(norm):
    """Fractions weigh too, the unbiased variance counts them as frequencies, evaluation takes no notice."""
    weights = torch.tensor([0.5, 2.25, 1.0, 0.25])
    module, x = make(norm, 3, 0.3, 1.0), randn64(4, 3, 5)
    w = weights.double()[:, None, None]
    mean = (w * x).sum((0, 2)) / (4 * 5)
    var = (w * (x - channels(mean, x)) ** 2).sum((0, 2)) / (4 * 5)
    expected = closed_form(x, mean, var, module.weight, module.bias, 0.3, x)["y"]
    close(module(x, weights=weights), expected, "y", **DOUBLE)
    close(module.running_mean, mean, "running_mean", **DOUBLE)
    close(module.running_var, var * 20 / 19, "running_var", **DOUBLE)
    module.eval()
    assert torch.equal(module(x, weights=weights), module(x)), "evaluation"


def check_refused_weights(norm):
    """Another number of weights, weights that are no frequencies, and too few to have a variance."""
    for weights, words in (([1.0, 1.0], "one weight per example"), ([[1.0]] * 3, "one weight per example"),
                           ([2.0, -1.0, 1.0], "0 or more"), ([1.0, math.nan, 1.0], "0 or more"),
                           ([1.0, math.inf, 1.0], "finite"), ([0.0, 1.0, 0.0], "more than 1 value per channel"),
                           ([0.0, 0.0, 0.0], "more than 1 value per channel")):  # fmt: skip
        module = norm(3)
        try:
            module(torch.ones(3, 3), weights=torch.tensor(weights))
        except ValueError as error:
            assert words in str(error), error
        except Exception as error:
            raise AssertionError(f"{weights} are not refused but fail") from error
        else:
            raise AssertionError(f"{weights} went through")
        assert module.num_batches_tracked.item() == 0


CHECKS = [value for name, value in globals().items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_real_class_passes(check):
    check(scratch.BatchNorm)


# The mistake, the check that has to notice it, what is written there and what instead.
MUTANTS = [
    ("center and scale swapped", check_affine, "if not scale:", "if not center:"),
    ("no shift without a scale", check_affine, "xhat, self.weight, self.bias",
     "xhat, self.weight, None if self.weight is None else self.bias"),
    ("no shift taken out", check_affine, "bias=bias and center", "bias=bias"),
    ("not corrected", check_zero_debias, "if not self.zero_debias or", "if True or"),
    ("one batch late", check_zero_debias, "** self.num_batches_tracked.double()",
     "** (self.num_batches_tracked.double() + 1)"),
    ("what starts at 1 is corrected too", check_zero_debias,
     "self.debias(momentum) if self.running_var_init == 0 else momentum",
     "self.debias(momentum)"),
    ("the variance never corrected", check_zero_debias,
     "self.debias(momentum) if self.running_var_init == 0 else momentum",
     "momentum"),
    ("counted from 1", check_decay_warmup, "self.num_batches_tracked.double() - 1",
     "self.num_batches_tracked.double()"),
    ("decay not the limit", check_decay_warmup, ".clamp(max=1 - momentum)", ""),
    ("weights forgotten in the variance", check_weights, "average((z - per_channel(mean, z)).square(), weights)",
     "average((z - per_channel(mean, z)).square(), None)"),
    ("the sum instead of the mean", check_weights, "(weights.sum() * z[:1, :1].numel())", "weights.sum()"),
    ("counted without weights", check_repeats, "count = count_values(x, weights)", "count = count_values(x, None)"),
    ("divided by the examples", check_repeats, "(weights.sum() * z[:1, :1].numel())", "z[:, 0].numel()"),
    ("nothing is refused", check_refused_weights, "if not count > 1:", "if False:"),
    ("negative weights", check_refused_weights, "(weights >= 0) & ", ""),
]  # fmt: skip


@pytest.mark.parametrize(("check", "old", "new"), [each[1:] for each in MUTANTS], ids=[each[0] for each in MUTANTS])
def test_a_broken_copy_is_caught(check, old, new):
    mutant = mutate(scratch, old, new)
    with pytest.raises(AssertionError):
        check(mutant)


def test_every_check_catches_somebody():
    assert {mutant[1] for mutant in MUTANTS} == set(CHECKS)


def test_weights_of_one_are_no_weights():
    x = randn64(4, 3, 5, 2)
    plain, weighted = make(scratch.BatchNorm, 3), make(scratch.BatchNorm, 3)
    close(weighted(x, x, torch.ones(4)), plain(x, x), "y", **DOUBLE)
    match(weighted.state_dict(), plain.state_dict(), **DOUBLE)
    assert weighted(x[:0], weights=torch.ones(0)).shape == (0, 3, 5, 2)
    assert weighted.num_batches_tracked.item() == 2 and weighted.running_var.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_debias": True, "decay_warmup": True}, "norm.zero_debias=True and norm.decay_warmup=True: .* one of"),
        ({"zero_debias": True, "momentum": None}, "norm.zero_debias=True: .*norm.momentum=None"),
        ({"zero_debias": True, "momentum": 0}, "norm.zero_debias=True: .*norm.momentum=0"),
        ({"decay_warmup": True, "momentum": None}, "norm.decay_warmup=True: .*norm.momentum=None"),
        ({"decay_warmup": True, "decay": 1.0}, "norm.decay_warmup=True: .*norm.momentum=0"),
    ],
)
def test_ways_of_averaging_that_contradict_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        scratch.BatchNorm(3, **options)


@pytest.mark.parametrize("options", [{"zero_debias": True}, {"decay_warmup": True}])
def test_the_host_does_not_wait_to_know_the_weight_of_a_batch(options):
    """On the meta device nothing can be read back."""
    module = scratch.BatchNorm(3, **options).to("meta")
    assert module(torch.empty(4, 3, 5, 2, device="meta")).shape == (4, 3, 5, 2)


@pytest.mark.parametrize("options", [{"zero_debias": True}, {"decay_warmup": True}])
def test_without_a_counter_every_batch_has_the_weight_of_momentum(options):
    module, plain = scratch.BatchNorm(3, **options), scratch.BatchNorm(3)
    module.num_batches_tracked = plain.num_batches_tracked = None
    x = torch.randn(4, 3, 5, 2)
    module(x), plain(x)
    match(module.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_the_repr_names_what_differs_from_torch():
    assert repr(scratch.BatchNorm(3)).endswith("running_var=unbiased)")
    assert repr(scratch.BatchNorm(3, affine=False)).endswith("running_var=unbiased)")
    text = repr(scratch.BatchNorm(3, scale=False, center=True, zero_debias=True))
    assert "scale=False" in text and "center=False" not in text and "zero_debias=True" in text
    text = repr(scratch.BatchNorm(3, center=False, decay_warmup=True))
    assert "center=False" in text and "scale=False" not in text and "decay_warmup=True" in text


# ---- share_left ----

REMEMBERING = {
    "scratch": (scratch.BatchNorm, {}),
    "scratch, decay 0.99": (scratch.BatchNorm, {"decay": 0.99}),
    "scratch, cumulative": (scratch.BatchNorm, {"momentum": None}),
    "scratch, momentum 0": (scratch.BatchNorm, {"momentum": 0}),
    "scratch, momentum 1": (scratch.BatchNorm, {"momentum": 1}),
    "scratch, zero_debias from 0": (scratch.BatchNorm, {"zero_debias": True, "running_var_init": 0}),
    "scratch, zero_debias from 1": (scratch.BatchNorm, {"zero_debias": True}),
    "scratch, decay_warmup": (scratch.BatchNorm, {"decay_warmup": True}),
    "scratch, decay_warmup below 0.3": (scratch.BatchNorm, {"decay_warmup": True, "decay": 0.3}),
    "library": (library.BatchNorm, {"momentum": 0.3}),
    "library, cumulative": (library.BatchNorm, {"momentum": None}),
    "ghost": (GhostBatchNorm, {"virtual_batch": 2}),
    "renorm": (BatchRenorm, {}),
}


@pytest.mark.parametrize("name", REMEMBERING)
def test_share_left_is_what_is_left_after_batches_of_zeros(name):
    norm, options = REMEMBERING[name]
    module = norm(2, dtype=torch.float64, **options)
    with torch.no_grad():  # so that both can be seen to fade
        module.running_mean.fill_(1)
        module.running_var.fill_(1)
    assert module.share_left(0) == 1.0
    for num_batches in range(1, 13):
        module(torch.zeros(4, 2, dtype=torch.float64))
        share = module.share_left(num_batches)
        left = max(float(buffer.abs().max()) for buffer in (module.running_mean, module.running_var))
        assert type(share) is float
        assert share == pytest.approx(left, rel=1e-12, abs=1e-15)  # 1 minus a weight of 1 may leave one rounding


def test_share_left_of_the_pitfall_that_tf_slim_names():
    assert scratch.BatchNorm(3, decay=0.999).share_left(500) == pytest.approx(0.6064, abs=1e-4)
    assert fused.BatchNorm(3).share_left(500) == pytest.approx(0.9**500)
    # Half-way through its warm-up a slow average has forgotten nearly all: the product of (1 + t) / (10 + t).
    expected = math.prod((1 + t) / (10 + t) for t in range(500))
    assert scratch.BatchNorm(3, decay=0.999, decay_warmup=True).share_left(500) == pytest.approx(expected)


def test_where_nothing_is_tracked_nothing_is_left():
    for norm in (scratch.BatchNorm, library.BatchNorm):
        module = norm(3, track_running_stats=False)
        assert [module.share_left(n) for n in (0, 1, 100)] == [0.0, 0.0, 0.0]


def test_options_compile_into_one_graph():
    for options in ({"zero_debias": True}, {"decay_warmup": True}):
        module, x = scratch.BatchNorm(3, **options), torch.randn(4, 3, 5, 2)
        twin = copy.deepcopy(module)
        assert torch.equal(torch.compile(twin, backend="eager", fullgraph=True)(x), module(x))
        match(twin.state_dict(), module.state_dict(), rtol=0, atol=0)
