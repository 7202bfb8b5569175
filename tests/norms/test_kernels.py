"""The kernels compute batch norm, residual addition and activation and every gradient of it, to rounding.

They run on the GPU if there is one, else under triton's interpreter. The oracle is the formula in float64
with autograd, not ``F.batch_norm``, whose float32 statistics on a CPU are less exact than the kernels'.
"""

import pytest
import torch

from bnexp.norms.base import ACTIVATIONS
from bnexp.norms.kernels import batch_norm as bn
from bnexp.norms.kernels import tiling as planning
from bnexp.norms.kernels.tiling import dense, tiling_for

DEVICE = "cuda" if torch.cuda.is_available() and not bn.interpreted() else "cpu"
if DEVICE == "cpu" and not bn.interpreted():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)
# Half a unit in the last place is what rounding the output costs; float32 also rounds a few times on the way.
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
NAMES = ("y", "dx", "dresidual", "dweight", "dbias", "running_mean", "running_var")


# Those that foreign models bring are quick on a small shape (below), and long on all.
BROUGHT = ("relu6", "silu", "hardswish", "gelu")
EVERY = [pytest.param(each, marks=pytest.mark.long) if each in BROUGHT else each for each in ACTIVATIONS]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Every output and workspace starts as NaN (bits as ones): what a kernel forgets to write shows."""

    def filled(allocate):
        def fill(*arguments, **options):
            t = allocate(*arguments, **options)
            return t.fill_(float("nan") if t.is_floating_point() else 255)

        return fill

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))


@pytest.fixture(params=["local", "two-launch"])
def tier(request, monkeypatch):
    """Small shapes run locally; with tiny tiles they take two launches of many programs and ragged tiles."""
    if request.param == "two-launch":
        small_tiles(monkeypatch)
    return request.param


def small_tiles(monkeypatch):
    for name, value in (("TILE_SIZE", 64), ("ON_CHIP", 0), ("MIN_VALUES", 1)):
        monkeypatch.setattr(planning, name, value)


def oracle(x, dy, residual, weight, bias, mean, var, training, momentum, eps, activation):
    """All of ``NAMES`` in float64."""
    x, dy, residual, weight, bias, mean, var = (
        t if t is None else t.detach().double() for t in (x, dy, residual, weight, bias, mean, var)
    )
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias) if t is not None]
    column = (1, -1) + (1,) * (x.dim() - 2)
    dims = [0, *range(2, x.dim())]
    if training:
        used_mean, used_var = x.mean(dims), x.var(dims, unbiased=False)
        if mean is not None:
            with torch.no_grad():
                mean = (1 - momentum) * mean + momentum * used_mean
                var = (1 - momentum) * var + momentum * x.var(dims, unbiased=True)
    else:
        used_mean, used_var = mean, var
    z = (x - used_mean.view(column)) / (used_var.view(column) + eps).sqrt()
    z = z if weight is None else z * weight.view(column)
    z = z if bias is None else z + bias.view(column)
    z = z if residual is None else z + residual
    y = z if activation == "identity" else ACTIVATIONS[activation](z)
    y.backward(dy)
    gradients = {id(t): t.grad for t in leaves}
    found = [gradients.get(id(t)) for t in (x, residual, weight, bias)]
    return dict(zip(NAMES, (y.detach(), *found, mean, var), strict=True))


def inputs(shape, dtype=torch.float32, last=False, affine=True, residual=True, seed=0):
    """x, dy, residual, weight, bias, running mean and variance; x has mean 1 and deviation 2."""
    g = torch.Generator(DEVICE).manual_seed(seed)  # on a GPU the shapes of networks would take minutes from a CPU

    def draw(*size):
        return torch.randn(*size, generator=g, device=DEVICE)

    def like_x(t):
        if last and len(shape) > 2:
            t = t.movedim(1, -1).contiguous().movedim(-1, 1)
        return t.to(DEVICE, dtype)

    c = shape[1]
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy, r = like_x(1 + 2 * draw(*shape)), like_x(draw(*shape)), like_x(draw(*shape))
    weight, bias, mean, var = (t.to(DEVICE, kind) for t in (draw(c), draw(c), draw(c), draw(c).exp()))
    return x, dy, r if residual else None, weight if affine else None, bias if affine else None, mean, var


def ours(x, dy, residual, weight, bias, mean, var, training, momentum, eps, activation, counter=None):
    """All of ``NAMES`` as the kernels find them, in float64."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, residual, weight, bias)]
    mean, var = (t if t is None else t.clone() for t in (mean, var))
    options = {"training": training, "momentum": momentum, "eps": eps, "activation": activation}
    y = bn.batch_norm(*leaves, mean, var, counter, **options)
    y.backward(dy)
    found = (y.detach(), *(t if t is None else t.grad for t in leaves), mean, var)
    return {n: t if t is None else t.double() for n, t in zip(NAMES, found, strict=True)}


def check(arguments, training=True, momentum=0.1, eps=1e-5, activation="identity", slack=1.0):
    """Ours is the oracle's, each result by name, to the rounding of its type."""
    expected = oracle(*arguments, training, momentum, eps, activation)
    found = ours(*arguments, training, momentum, eps, activation)
    x, residual = arguments[0], arguments[2]
    for name in NAMES:
        want, have = expected[name], found[name]
        assert (want is None) == (have is None), name
        if want is None:
            continue
        rounding = ROUNDING[x.dtype]
        if x.dtype != torch.float64 and name.startswith(("dw", "db", "run")):
            # Sums and statistics are float32 whatever x is; the output that sigmoid and tanh save is not.
            saved = residual is not None and activation in ("sigmoid", "tanh") and name.startswith("d")
            rounding = max(ROUNDING[torch.float32], rounding if saved else 0.0)
        if name.startswith("run"):  # with infinity in the channel torch has inf on a CPU and NaN on a GPU
            want, have = (t.where(t.isfinite(), float("nan")) for t in (want, have))
        scale = max(1.0, want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0)
        assert torch.equal(want.isnan(), have.isnan()), f"{name}: NaN elsewhere than in the oracle"
        near = {"rtol": 0, "atol": 4 * slack * rounding * scale, "equal_nan": True}
        torch.testing.assert_close(have, want, **near, msg=lambda text, name=name: f"{name}: {text}")


SHAPES = [
    (2, 1), (2, 3), (13, 7), (67, 8), (3, 257), (1, 3, 5), (5, 3, 11), (2, 5, 1, 1), (1, 1, 1, 2),
    (5, 3, 4, 7), (11, 9, 5, 2), (2, 2, 9, 16), (7, 11, 3, 1), (11, 5, 4, 4), (2, 3, 3, 2, 5),
    (3, 9, 1, 1, 7), (1, 2, 13, 11),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_in_both_layouts(shape, tier):
    for last in (False, True):
        check(inputs(shape, last=last), activation="relu")


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", EVERY)
@pytest.mark.parametrize("dtype", ROUNDING, ids=lambda d: str(d)[6:])
def test_every_type_and_activation(dtype, activation, residual, tier):
    for last in (False, True) if dtype == torch.float32 else (residual,):  # layouts know nothing of types
        check(inputs((5, 9, 3, 5), dtype, last, residual=residual), activation=activation)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", BROUGHT)
def test_activations_of_foreign_models(activation, residual):
    """Inputs reach beyond 6 and -3, where relu6 and hardswish have their corners."""
    x, dy, r, weight, *rest = inputs((3, 2, 7), residual=residual)
    check((x, dy, r, 4 * weight, *rest), activation=activation, training=residual)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", EVERY)
def test_evaluation_normalizes_by_constants_and_so_do_its_gradients(activation, residual, tier):
    for last in (False, True):
        check(inputs((4, 9, 3, 5), last=last, residual=residual), training=False, activation=activation)


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_without_weight_bias_or_running_statistics(activation, tier):
    arguments = inputs((4, 9, 3, 5), affine=False)
    check(arguments, activation=activation)
    check((*arguments[:-2], None, None), activation=activation)
    x, dy, r, weight, bias, mean, var = inputs((4, 9, 3, 5))
    check((x, dy, r, weight, None, mean, var), activation=activation)
    check((x, dy, None, None, bias, mean, var), activation=activation)


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_momentum_is_the_weight_of_the_new_batch_and_eps_is_inside_the_root(momentum, eps, tier):
    check(inputs((3, 5, 4)), momentum=momentum, eps=eps)


def test_the_counter_moves_and_weighs_a_cumulative_average(tier):
    mean, var = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
    counter = torch.zeros((), dtype=torch.int64, device=DEVICE)
    means, variances = [], []
    for seed in range(3):
        x = inputs((5, 6, 7), seed=seed)[0]
        bn.batch_norm(x, None, None, None, mean, var, counter, training=True, momentum=None)
        means.append(x.double().mean((0, 2)).cpu())
        variances.append(x.double().var((0, 2), unbiased=True).cpu())
        assert counter.item() == seed + 1
    torch.testing.assert_close(mean.cpu().double(), torch.stack(means).mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.cpu().double(), torch.stack(variances).mean(0), rtol=1e-6, atol=1e-6)
    bn.batch_norm(x, None, None, None, mean, var, counter, training=True, momentum=0.1)
    assert counter.item() == 4
    bn.batch_norm(x, None, None, None, mean, var, counter, training=False)
    assert counter.item() == 4


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_a_mean_far_above_the_deviation_costs_no_accuracy(last, tier, monkeypatch):
    monkeypatch.setattr(planning, "TILE_SIZE", 1024)
    x, dy, r, weight, bias, mean, var = inputs((64, 8, 6, 6), last=last)
    x = x / 2 + 1e4
    arguments = (x, dy, None, weight, bias, torch.zeros_like(mean), torch.zeros_like(var))
    expected, found = (f(*arguments, True, 1.0, 1e-5, "identity") for f in (oracle, ours))
    # The means of tiles, rounded to 5e-4, differ by some 0.04: 2 * 5e-4 * 0.04 of the variance, seldom more.
    # E[x^2] - E[x]^2 in float32 would be off by several times the variance.
    torch.testing.assert_close(found["running_var"], expected["running_var"], rtol=4e-5, atol=0)
    # The float32 nearest to a mean of 1e4 is up to 5e-4 away: that much of y, times the weight.
    torch.testing.assert_close(found["y"], expected["y"], rtol=0, atol=4e-3)
    torch.testing.assert_close(found["dx"], expected["dx"], rtol=0, atol=4e-3)
    torch.testing.assert_close(found["dbias"], expected["dbias"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e4])
def test_a_constant_channel_ends_as_its_bias_exactly(value, tier):
    for last in (False, True):
        x, _, _, weight, bias, mean, var = inputs((3, 8, 7, 3), last=last)
        x.fill_(value)
        y = bn.batch_norm(x, None, weight, bias, mean, var, training=True, momentum=1.0)
        assert torch.equal(y, bias.view(1, 8, 1, 1).expand_as(y))
        assert torch.equal(mean, torch.full_like(mean, value)) and not var.any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from inf - inf in the interpreter
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ["identity", "relu", "tanh"])
def test_nan_and_infinity_spread_as_in_torch(activation, residual, tier):
    for last in (False, True):
        x, dy, r, *rest = inputs((4, 9, 3, 5), last=last, residual=residual)
        x[0, 1, 0, 0], x[1, 2, 1, 1], x[2, 8, 2, 4] = float("nan"), float("inf"), -float("inf")
        if residual:
            r[3, 4, 0, 0], r[0, 5, 0, 0], r[1, 6, 0, 0] = float("nan"), float("inf"), -float("inf")
        if activation == "identity" and residual:
            r[0, 5], r[1, 6] = 0, 0  # an infinite output has no distance from another
        if activation == "relu" and residual:
            r[0, 5] = 0
        check((x, dy, r, *rest), activation=activation)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_relu_passes_the_gradient_exactly_where_its_output_is_positive(dtype, residual, tier):
    """Also for values so near zero that rounding, or another order of operations, would flip them."""
    for last in (False, True):
        x, _, r, _, _, mean, _ = inputs((6, 8, 5, 5), dtype, last, residual=residual)
        weight, bias, one = (
            torch.full((8,), 1e-7, device=DEVICE),
            torch.zeros_like(mean),
            torch.ones_like(mean),
        )
        x = ((4 * x).round() / 4).requires_grad_()  # z is exactly 0 for some, and rounds to 0 in float16 for more
        r = None if r is None else (1e-7 * r).requires_grad_()
        y = bn.batch_norm(x, r, weight, bias, one, one, training=False, activation="relu")
        y.backward(torch.ones_like(y))
        assert 0.2 < (y > 0).float().mean() < 0.8
        assert torch.equal(x.grad != 0, y > 0)
        assert r is None or torch.equal(r.grad != 0, y > 0)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_halves_with_statistics_reduced_across_ranks_are_the_whole(last, tier):
    x, dy, r, weight, bias, mean, var = inputs((7, 9, 3, 5), last=last)
    expected = oracle(x, dy, r, weight, bias, mean, var, True, 0.1, 1e-5, "relu")
    cuts = (slice(0, 2), slice(2, 7))  # two ranks of unequal size
    parts = [bn.statistics(x[cut]) for cut in cuts]
    total_mean, m2, count = bn.combine(*(torch.stack(each) for each in zip(*parts, strict=True)))
    rstd = bn.rsqrt(m2, count, 1e-5)
    outputs = [bn.apply(x[cut], total_mean, rstd, weight, bias, r[cut], "relu") for cut in cuts]
    shared = [(x[cut], total_mean, rstd, weight, bias, saved, "relu")
              for cut, (_, saved) in zip(cuts, outputs, strict=True)]  # fmt: skip
    sums = sum(bn.gradient_sums(dy[cut], *each) for cut, each in zip(cuts, shared, strict=True))
    slopes = [bn.gradient_apply(dy[cut], *each, sums, count) for cut, each in zip(cuts, shared, strict=True)]
    found = {
        "y": torch.cat([y for y, _ in outputs]), "dx": torch.cat([dx for dx, _ in slopes]),
        "dresidual": torch.cat([d for _, d in slopes]), "dbias": sums[0], "dweight": sums[1],
    }  # fmt: skip
    for name, have in found.items():
        torch.testing.assert_close(have.double(), expected[name], rtol=0, atol=2e-5, msg=name)
    assert count.tolist() == [105.0] * 9


def test_non_contiguous_tensors_of_every_kind(tier):
    x, dy, r, *rest = inputs((4, 10, 4, 5))
    views = [
        lambda t: t[::2], lambda t: t[:, ::2], lambda t: t[..., 1:4], lambda t: t.transpose(2, 3),
        lambda t: t.contiguous(memory_format=torch.channels_last)[:, 1:9, ::2],
        lambda t: t.permute(3, 1, 0, 2),
    ]  # fmt: skip
    for view in views:
        c = view(x).shape[1]
        check((view(x), view(dy), view(r), *(t[:c] for t in rest)), activation="relu")
    # The sum of M equal dy: M times the mean's rounding.
    check((x, dy[:1, :, :1, :1].expand_as(x), r.contiguous(memory_format=torch.channels_last), *rest), slack=4.0)


def test_the_same_input_gives_the_same_bits(tier):
    arguments = inputs((7, 9, 5, 5))
    first, second = (ours(*arguments, True, 0.1, 1e-5, "relu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_plans_cover_every_value_once(last):
    for n, c, s in (
        (128, 64, 12544),
        (256, 6, 576),
        (128, 2048, 49),
        (1, 1, 2),
        (8192, 1024, 1),
        (3, 2049, 7),
    ):
        for itemsize in (2, 4, 8):
            p = planning.choose_tiling(n, c, s, last=last, itemsize=itemsize, sms=132)
            rows, cols = (n * s, c) if last else (n, s)
            assert p == planning.choose_tiling(n, c, s, last=last, itemsize=itemsize, sms=132)
            assert p.programs * p.tiles_each >= p.tiles > (p.programs - 1) * p.tiles_each
            across = 1 if last else -(-cols // p.cols)
            assert p.tiles == -(-rows // p.rows) * across
            assert p.groups == (-(-c // p.cols) if last else c)
            assert cols % p.vec == 0 and p.cols % 8 == 0
            assert p.tier == "two-launch" or (p.tiles == 1 and p.rows * p.cols <= planning.ON_CHIP)


def test_the_tier_is_local_where_a_channel_fits_on_chip_and_two_launch_elsewhere(monkeypatch):
    small, large = torch.empty(128, 512, 7, 7, device="meta"), torch.empty(128, 64, 56, 56, device="meta")
    assert tiling_for(small, torch.device("cpu")).tier == "local"
    assert tiling_for(large, torch.device("cpu")).tier == "two-launch"
    small_tiles(monkeypatch)
    p = tiling_for(torch.empty(40, 3, 8, 7, device="meta"), torch.device("cpu"))
    assert p.tier == "two-launch" and p.programs > 1 and p.tiles > p.programs


def test_a_layout_is_recognized_without_a_copy():
    x = torch.empty(2, 3, 4, 5)
    for t, last in ((x, False), (x.contiguous(memory_format=torch.channels_last), True), (x[..., 0, 0], True),
                    (torch.empty(4, 1, 3), False), (torch.empty(6, 5), True)):  # fmt: skip
        same, found = dense(t)
        assert found == last and (same is t or not t.is_contiguous())
    assert dense(x[:, :2])[0].stride() == (40, 20, 5, 1)
