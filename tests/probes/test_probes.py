"""Probes see what is there and change nothing; what they say is compared with the formula worked out another way."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from test_loop import built, different, state_of
from test_models import MODELS
from test_models import NORMS as EVERY_NORM
from torch import nn

from bnexp.config import check, parts
from bnexp.config.choices import choices
from bnexp.config.compose import composed
from bnexp.data.dataset import Split
from bnexp.errors import UserError
from bnexp.norms.base import ACTIVATIONS
from bnexp.norms.ghost import GhostBatchNorm
from bnexp.probes.activations import MOST_VALUES, SATURATED, Activations, describe, sample
from bnexp.probes.confusion import Confusion
from bnexp.probes.dead import evaluate_units
from bnexp.probes.features import Features, tile_maps, to_grey
from bnexp.probes.gradients import Gradients
from bnexp.probes.landscape import Landscape, loss_and_gradient
from bnexp.probes.layers import activation_sites, named_layers, tapped
from bnexp.probes.population import recompute_statistics, shadow, some_images, some_of, training_batches
from bnexp.probes.shapes import Shapes
from bnexp.probes.statistics import Statistics
from bnexp.store.readings import Histogram, Image, Scalar, Table
from bnexp.store.writer import NullWriter
from bnexp.train.drive import drive
from bnexp.train.loop import Loop
from bnexp.train.probe import Probe
from bnexp.train.progress import NullProgress
from bnexp.train.recorder import Recorder

NAMES = choices("probe")
# Small enough for interpreted Triton kernels, which take a program per channel.
TINY = ("data.size=16", "data.limit=64", "batch_size=8", "optimizer.lr=0.01")
SHRUNK = {
    "mlp": ["model.hidden=[6,5]"],
    "lenet": [],
    "resnet": ["model.widths=[3,4]", "model.blocks=[1,1]", "model.stem=cifar"],
    "densenet": ["model.growth=2", "model.blocks=[1,1]", "model.stem_width=4"],
}
NORMS = {"ghost": ["norm.virtual_batch=4"], "group": ["norm.groups=layer"]}
OF_WEIGHTS = ("activation/", "statistics/", "landscape/", "loss/")  # no number of these is one if no weight is
COUNTS = ("/unscaled", "/dead_units")
FEW = {"activations": ["images=16"], "statistics": ["images=16"], "landscape": ["images=8", "steps=[1.0,2.0]"]}


def probing(every=1, names=NAMES):
    """Overrides for all probes, each with few images, looking after every ``every``-th step."""
    found = [f"probe=[{','.join(names)}]"]
    for name in names:
        found += [f"probe.{name}.{option}" for option in FEW.get(name, [])]
        found += [f"probe.{name}.every={every}"] if name != "shapes" else []
    return found


def variant(model, norm):
    return (*TINY, f"model={model}", *SHRUNK[model], f"norm={norm}", *NORMS.get(norm, []))


class Watcher(NullWriter):
    """Keeps everything but what the clock measures, by step."""

    def __init__(self):
        self.steps = {}

    def write(self, step, epoch, seconds, readings):
        readings = list(readings)
        timed = [each for each in readings if each.tag.startswith(("time/", "throughput/"))]
        self.steps[step] = {each.tag: contents(each) for each in readings if each not in timed}
        self.timed = {each.tag for each in timed}
        return super().write(step, epoch, seconds, readings)


def contents(reading):
    if isinstance(reading, Image):
        return reading.pixels.tolist()
    return reading.value if isinstance(reading, Scalar) else reading


def watched(*overrides):
    """A finished run and what its recorder kept."""
    run, plan = built(*overrides)
    writer = Watcher()
    assert drive(Loop(run, plan, Recorder(writer)), NullProgress()) == "finished"
    return run, writer.steps


def looked(probe, run):
    """What a probe sees of a run after its next step, by tag."""
    before = probe.before(run)
    run.step()
    return {reading.tag: contents(reading) for reading in probe.look(run, before)}


def a_run(*overrides, num_steps=3):
    run, _ = built(*TINY, *overrides)
    for _ in range(num_steps):
        run.step()
    return run


# ---------------------------------------------------------------- they change nothing


# The interpreter of the fused kernels takes a second for the MLP, and for these half a minute.
TOO_SLOW = [("lenet", "fused"), ("densenet", "fused")]


@pytest.mark.parametrize("model, norm", [
    (model, norm) for model in MODELS for norm in EVERY_NORM if (model, norm) not in TOO_SLOW
])  # fmt: skip
def test_with_all_probes_on_a_run_is_the_same_to_the_last_bit(model, norm):
    num_steps = 1 if norm == "fused" and model != "mlp" else 2
    base = (*variant(model, norm), f"steps={num_steps}", "log_every=1", "data.augment=crop_flip")
    base += ("model.widths=[2]", "model.blocks=[1]", "data.size=4") if num_steps == 1 else ()
    torch.manual_seed(1)
    run, steps = watched(*base)
    chance = torch.get_rng_state()
    torch.manual_seed(1)
    probed, others = watched(*base, *probing())
    assert different(state_of(run), state_of(probed)) == []
    assert torch.equal(chance, torch.get_rng_state())
    gradients = [{name: p.grad for name, p in each.model.named_parameters()} for each in (run, probed)]
    assert different(*gradients) == []
    assert [m.training for m in run.model.modules()] == [m.training for m in probed.model.modules()]
    assert {step: {tag: value for tag, value in others[step].items() if tag in steps[step]} for step in others} == steps
    seen = {tag.partition("/")[0] for each in others.values() for tag in each}
    assert seen >= {"activation", "confusion", "gradient", "recall", "update", "landscape", "shapes"}
    assert "statistics" in seen
    assert ("features" in seen) == (model != "mlp")


def test_what_a_model_draws_while_it_is_looked_at_is_drawn_again_by_the_run():
    """Dropout in training mode draws from torch's own generator, as the run's steps do."""

    def dropping(*overrides):
        run, plan = built(*TINY, "model=mlp", "steps=4", *overrides)
        run.model.flatten = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
        torch.manual_seed(2)
        drive(Loop(run, plan, Recorder(NullWriter())), NullProgress())
        return run

    plain = dropping()
    assert different(state_of(plain), state_of(dropping(*probing()))) == []
    model, batch = shadow(plain), some_images(plain, 16)
    assert torch.equal(*(loss_and_gradient(plain, model, batch)[0] for _ in range(2))), "one network at every look"


@pytest.mark.parametrize("norm", ["library", "renorm"])
def test_a_run_that_is_resumed_is_seen_as_it_would_have_been(norm):
    base = (*variant("lenet", norm), "steps=7", "log_every=100", *probing(2))
    _, steps = watched(*base)
    run, plan = built(*base)
    loop = Loop(run, plan, Recorder(NullWriter()))
    for _ in range(3):
        loop.step()
    state = copy.deepcopy(run.state_dict())
    again, plan = built(*base)
    again.load_state_dict(state)
    writer = Watcher()
    drive(Loop(again, plan, Recorder(writer)), NullProgress())
    assert sorted(steps) == [1, 2, 4, 6, 7], "shapes once, the others every second step and at the last"
    assert writer.steps == {step: each for step, each in steps.items() if step > 3}


def test_a_run_says_how_long_it_was_looked_at():
    run, plan = built(*TINY, "model=mlp", "steps=2", "log_every=1", *probing(2))
    writer, times = Watcher(), []
    loop = Loop(run, plan, Recorder(writer))
    for _ in range(2):
        loop.step()
        times.append("time/probes" in writer.timed)
    assert times == [True, True]  # the shapes at 1, all others at 2
    run, plan = built(*TINY, "model=mlp", "steps=1", "log_every=1")
    drive(Loop(run, plan, Recorder(writer)), NullProgress())
    assert "time/probes" not in writer.timed


# ---------------------------------------------------------------- they survive


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("model", MODELS)
def test_weights_that_are_no_numbers_are_looked_at_without_a_fault(model, bad):
    """pytest makes every warning an error."""
    run, plan = built(*variant(model, "library"), "steps=9", *probing())
    run.step()
    with torch.no_grad():
        for p in run.model.parameters():
            p.fill_(bad)
    for probe in plan.probes:
        readings = list(probe.look(run, probe.before(run)))
        assert not [each for each in readings if isinstance(each, Histogram) and not math.isfinite(sum(each.edges))]
        scalars = {each.tag: each.value for each in readings if isinstance(each, Scalar)}
        if math.isnan(bad):
            numbers = [v for tag, v in scalars.items() if tag.startswith(OF_WEIGHTS)
                       and not tag.endswith(COUNTS)]  # fmt: skip
            assert all(math.isnan(value) for value in numbers), scalars
            assert not any(isinstance(each, Histogram) for each in readings)
        assert all(each.pixels.dtype == torch.uint8 for each in readings if isinstance(each, Image))


def test_a_run_that_diverges_under_all_probes_diverges_and_nothing_else():
    run, plan = built(*TINY, "optimizer=sgd", "optimizer.lr=1e20", "norm=none", "steps=6", "log_every=6", *probing())
    writer = Watcher()
    assert drive(Loop(run, plan, Recorder(writer)), NullProgress()) == "diverged"
    assert math.isnan(writer.steps[5]["gradient/all"]) and math.isnan(writer.steps[5]["activation/norm1/p50"])


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.valid=0",),
        ("data.valid=1",),
        ("norm=ghost", "norm.virtual_batch=4", "data.valid=13"),
        ("norm=ghost", "norm.virtual_batch=8", "data.valid=5"),
        ("norm=none", "batch_size=1", "steps=2"),
        ("batch_size=60", "data.limit=50", "drop_last=false"),
        ("norm.track_running_stats=false",),
        ("norm.affine=false", "norm.momentum=null"),
        ("norm=scratch", "norm.scale=false", "norm.zero_debias=true"),
        ("precision=bf16",),
        ("precision=fp16",),
        ("channels_last=true",),
        ("model=mlp", "model.hidden=[]"),
        ("model.activation=identity",),
        ("optimizer=sgd",),
    ],
    ids=" ".join,
)
def test_all_probes_look_at_runs_of_every_kind(overrides):
    run, steps = watched(*TINY, "steps=3", *probing(2), *overrides)
    assert "gradient/all" in steps[run.total_steps] and "landscape/loss" in steps[run.total_steps]


@pytest.mark.parametrize("sizes", [{8}, {4, 8}])
def test_a_batch_to_look_at_is_one_that_the_norms_take(sizes):
    run = a_run("data.valid=21", "data.limit=64", num_steps=0)

    class Picky(nn.Module):
        def check_batch_size(self, size):
            if size not in sizes:
                raise UserError("no")

    assert len(some_images(run, 100)) == 21
    assert len(some_images(run, 9)) == 9
    run.model.add_module("picky", Picky())
    assert len(some_images(run, 9)) == 8  # a whole batch of the run
    assert len(some_images(run, 100)) == len(some_images(run, 5)) == 8
    assert len(some_images(run, 4)) == min(sizes)


@pytest.mark.parametrize("labels", [torch.arange(3).repeat_interleave(100), torch.arange(3).repeat(100)])
def test_images_are_of_every_class_in_whatever_order_the_files_come(labels):
    split = Split(torch.arange(300).view(300, 1, 1, 1), labels)
    found = some_of(split, 60)
    assert found.labels.bincount().min() >= 12  # 20 of each on average, and the same every time
    assert torch.equal(some_of(split, 60).images, found.images) and len(found.images.unique()) == 60
    assert min(batch.bincount(minlength=3).min() for batch in found.labels.split(20)) >= 2
    assert len(some_of(split, 1000)) == 300
    assert len(some_of(Split(split.images[:0], split.labels[:0]), 4)) == 0


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "options, words",
    [
        (["activations.layers=[norm1,norm9]"], "probe.activations.layers=['norm1', 'norm9']: norm9 is no norm with an "
         "activation of this model; there are norm1, norm2, norm3, norm4"),
        (["gradients.layers=[pool1]"], "probe.gradients.layers=['pool1']: pool1 is no layer with a trained weight"),
        (["activations.unit=6"], "probe.activations.unit=6: norm1 has 6 units; give 0 to 5, or null for all"),
        (["activations.unit=-1"], "probe.activations.unit=-1: "),
        (["activations.images=1"], "probe.activations.images=1: images that make a batch; give a whole number, 2 or"),
        (["activations.bins=0"], "probe.activations.bins=0: "),
        (["statistics.images=0"], "probe.statistics.images=0: "),
        (["landscape.images=1"], "probe.landscape.images=1: "),
        (["confusion.images=1"], "probe.confusion.images=1: images that are classified; give a whole number, 2 or"),
        (["landscape.steps=[1.0]"], "probe.landscape.steps=[1.0]: multiples of the learning rate; give two or more"),
        (["landscape.steps=[0,1]"], "probe.landscape.steps=[0, 1]: "),
        (["confusion.split=all"], "probe.confusion.split=all: no part of the data; choose one of train, valid, test"),
        (["features.layers=0"], "probe.features.layers=0: "),
        (["features.channels=0"], "probe.features.channels=0: "),
        (["features.images=0"], "probe.features.images=0: "),
        (["shapes.layers=0"], "probe.shapes.layers=0: "),
        (["landscape.steps=near"], "probe.landscape.steps=near: "),
        *([(f"{name}.every=0",), f"probe.{name}.every=0: steps between looks; "] for name in NAMES if name != "shapes"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_looked_at_is_refused_before_any_work(options, words):
    name = options[0].partition(".")[0]
    with pytest.raises(UserError) as caught:
        check.check(composed([*TINY, "device=cpu", f"probe=[{name}]", *(f"probe.{each}" for each in options)]))
    assert str(caught.value).startswith(words)


def test_a_model_without_what_a_probe_looks_for_says_so():
    with pytest.raises(UserError, match=r"norm1 is no norm with an activation of this model; there are none"):
        Activations(layers=["norm1"]).check(nn.Linear(2, 2))


def test_every_probe_of_conf_is_one_and_looks_when_it_should():
    cfg = composed([f"probe=[{','.join(NAMES)}]"])
    for name, probe in zip(NAMES, parts.probes_of(cfg), strict=True):
        assert isinstance(probe, Probe) and type(probe).__name__.lower() == name
        looks = [step for step in range(1, 2501) if probe.is_due(step, 2500)]
        assert looks == ([1] if name == "shapes" else sorted({*range(probe.every, 2501, probe.every), 2500}))


# ---------------------------------------------------------------- activations


SEEN = [("lenet", "library"), ("resnet", "scratch"), ("mlp", "none"), ("lenet", "ghost")]


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("model, norm", SEEN)
def test_percentiles_are_those_of_what_the_activation_got(model, norm, activation):
    """Looked at from behind: these activations rise, so the percentiles of their outputs are theirs of the inputs."""
    # Torch's weights keep the inputs close together, see the tolerance below.
    run = a_run(*variant(model, norm), f"model.activation={activation}", "model.init=torch")
    found = looked(Activations(images=16), run)
    behind, other = {}, shadow(run)
    with tapped(activation_sites(other), lambda name, _, y: behind.update({name: y.detach().double()})):
        run.forward(run.dataset.prepare(some_images(run, 16).images), other)
    assert {f"activation/{name}" for name in behind} == {tag for tag in found if tag.count("/") == 1}
    for name, y in behind.items():
        assert y.numel() <= MOST_VALUES
        for percentile in (15, 50, 85):
            expected = torch.quantile(y, percentile / 100)
            got = ACTIVATIONS[activation](torch.tensor(found[f"activation/{name}/p{percentile}"]).double())
            # Between two neighbouring values the line through the inputs is not the one through the outputs.
            assert float(got) == pytest.approx(float(expected), abs=2e-3)
        slope = y * (1 - y) / 0.25 if activation == "sigmoid" else 1 - y.square()
        share = float((slope < 0.05).double().mean())
        assert found[f"activation/{name}/saturation"] == pytest.approx(share, abs=1 / y.numel())
        histogram = found[f"activation/{name}"]
        assert sum(histogram.counts) == y.numel() and len(histogram.counts) == 64
        below = ACTIVATIONS[activation](torch.tensor(histogram.edges[32], dtype=torch.float64))
        assert abs(sum(histogram.counts[:32]) - int((y < below).sum())) <= 1


def test_one_unit_of_chosen_layers_can_be_looked_at():
    run = a_run("model=mlp", "model.activation=tanh")
    one = looked(Activations(images=16, unit=3, layers=["norm2"]), copy.deepcopy(run))
    assert {tag.split("/")[1] for tag in one} == {"norm2"}
    assert sum(one["activation/norm2"].counts) == 16
    run.step()
    model, seen = shadow(run), {}
    with torch.no_grad(), tapped({"norm2": model.norm2}, lambda name, _, y: seen.update({name: y})):
        run.forward(run.dataset.prepare(some_images(run, 16).images), model)
    inputs = torch.atanh(seen["norm2"][:, 3].double())
    assert one["activation/norm2/p85"] == pytest.approx(float(torch.quantile(inputs, 0.85)), rel=1e-4)


@pytest.mark.parametrize("name", SATURATED)
def test_saturated_is_where_the_slope_is_below_a_twentieth_of_the_steepest(name):
    x = torch.linspace(-9, 9, 3001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ACTIVATIONS[name](x).sum(), x)
    assert torch.equal(SATURATED[name](x.detach()), slope < 0.05 * slope.max())
    assert set(SATURATED) == {name for name, function in ACTIVATIONS.items() if function is not None}


def test_a_histogram_counts_every_finite_value_between_the_smallest_and_the_largest():
    values = torch.tensor([0.0, 0.1, 0.9, 1.0, 1.0, 4.0, math.inf, math.nan])
    readings = {each.tag: each for each in describe("t", values, "relu", 4)}
    assert readings["t"].edges == (0, 1, 2, 3, 4) and readings["t"].counts == (3, 2, 0, 1)
    assert all(math.isnan(readings[f"t/{name}"].value) for name in ("p15", "p50", "p85", "saturation"))
    for constant in (0.0, -7.0, 3e38, 1e-45):
        readings = {each.tag: each for each in describe("t", torch.full((5,), constant), "relu", 4)}
        edges = readings["t"].edges
        assert sorted(set(edges)) == list(edges) and edges[0] < constant < edges[-1]
        assert sum(readings["t"].counts) == 5
        assert readings["t/p50"].value == pytest.approx(constant)
    assert [each.tag for each in describe("t", torch.full((5,), math.nan), "relu", 4)] == [
        "t/p15", "t/p50", "t/p85", "t/saturation",
    ]  # fmt: skip
    ends = torch.tensor([-3e38, 3e38])
    assert sum(next(each for each in describe("t", ends, "relu", 3) if each.tag == "t").counts) == 2


@pytest.mark.parametrize("shape", [(256, 6, 24, 24), (64, 64, 32, 32), (7, 1, 200, 300), (100, 400)])
def test_a_sample_prefers_no_image_channel_row_or_column(shape):
    picked = sample(torch.arange(math.prod(shape)).view(shape).double()).long()
    assert MOST_VALUES / 3 < len(picked) <= MOST_VALUES
    position = picked
    for size in reversed(shape):
        counts = torch.bincount(position % size, minlength=size).double()
        assert counts.max() <= 1.15 * counts.mean() + 2 and counts.min() >= 0.85 * counts.mean() - 2
        position = position // size
    assert sample(torch.arange(5.0)).tolist() == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- gradients


def test_gradients_are_those_of_the_very_step_and_updates_what_it_did():
    run = a_run("model=lenet", "optimizer=sgd", "optimizer.lr=0.5")
    twin = copy.deepcopy(run)
    found = looked(Gradients(), run)
    images, labels = twin.batches.next()
    F.cross_entropy(twin.forward(images), labels).backward()
    names = ["conv1", "conv2", "dense1", "dense2", "classifier"]
    assert set(found) == {f"{kind}/{name}" for kind in ("gradient", "update", "angle") for name in names} | {
        "gradient/all"
    }
    for name in names:
        weight = twin.model.get_submodule(name).weight
        length = float(weight.grad.double().norm())
        assert found[f"gradient/{name}"] == pytest.approx(length, rel=1e-5)
        # plain gradient descent moves by lr times the gradient; weights are rounded to 6e-8 of their size
        assert found[f"update/{name}"] == pytest.approx(0.5 * length / float(weight.detach().norm()), rel=1e-3)
    everything = torch.cat([p.grad.flatten() for p in twin.model.parameters()])
    assert found["gradient/all"] == pytest.approx(float(everything.double().norm()), rel=1e-5)


def test_layers_can_be_chosen_norms_among_them():
    found = looked(Gradients(layers=["norm2"]), a_run("model=mlp"))
    assert set(found) == {"gradient/norm2", "update/norm2", "gradient/all"}
    assert 0 < found["update/norm2"] < 1


def test_rows_turn_by_the_angle_of_plane_geometry_and_equilibrium_is_its_share_of_root_2_lr_wd():
    run = a_run("model=mlp", "model.hidden=[2]", "data.size=1", "optimizer=sgd", "optimizer.weight_decay=0.02")
    weight, before = run.model.classifier.weight, torch.tensor([[3.0, 0.0]] * 9 + [[0.0, 2.0]])
    before_all = Gradients().before(run) | {"classifier": before}
    tiny, right = 1e-5, math.pi / 2  # the cosine of 1e-5 rounds to 1 in float32
    with torch.no_grad():
        weight[:9] = torch.tensor([math.cos(tiny), math.sin(tiny)]) * 7
        weight[9] = torch.tensor([-5.0, 0.0])
    found = {reading.tag: reading.value for reading in Gradients().look(run, before_all)}
    assert found["angle/classifier"] == pytest.approx((9 * tiny + right) / 10, rel=1e-6)
    run.optimizer.param_groups[0]["lr"] = 0.5
    found = {reading.tag: reading.value for reading in Gradients().look(run, before_all)}
    assert found["equilibrium/classifier"] == pytest.approx(found["angle/classifier"] / math.sqrt(2 * 0.5 * 0.02))
    assert "angle/norm1" not in looked(Gradients(layers=["norm1"]), run), "a vector has no rows"
    assert not [tag for tag in looked(Gradients(), a_run("model=mlp")) if "equilibrium" in tag], "no weight decay"


def test_a_row_that_only_shrinks_does_not_turn_and_decay_alone_does_nothing_else():
    run = a_run("model=mlp", "optimizer=sgd", "optimizer.lr=0.1", "optimizer.weight_decay=0.5")
    before = Gradients().before(run)
    with torch.no_grad():
        for weight in (run.model.dense1.weight, run.model.dense2.weight):
            weight *= 0.95
    found = {reading.tag: reading.value for reading in Gradients().look(run, before)}
    assert found["update/dense1"] == pytest.approx(0.05, rel=1e-5)
    assert found["angle/dense1"] < 1e-7


def test_growth_is_the_geometric_mean_of_the_factor_of_the_squared_gradient_from_layer_to_layer():
    names = ["dense2", "dense3", "dense4"]
    run = a_run("model=mlp", "model.hidden=[8,8,8,8]")
    found = looked(Gradients(layers=names), run)
    squares = [found[f"gradient/{name}"] ** 2 for name in names]
    factors = [squares[0] / squares[1], squares[1] / squares[2]]
    assert found["gradient/growth"] == pytest.approx(math.sqrt(math.prod(factors)), rel=1e-5)
    assert "gradient/growth" not in looked(Gradients(), run), "layers of other shapes have other gradients"


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "other"])
def test_under_fp16_gradients_are_free_of_the_loss_scale(optimizer):
    base = (*TINY, "model=mlp", f"optimizer={optimizer}")
    base += ("optimizer._target_=torch.optim.RMSprop",) if optimizer == "other" else ()
    base += ("optimizer.lr=0.01",)
    found = looked(Gradients(), built(*base, "precision=fp16")[0])
    expected = looked(Gradients(), built(*base)[0])
    assert found["gradient/all"] == pytest.approx(expected["gradient/all"], rel=0.02)  # fp16 has 11 bits
    assert found["gradient/dense1"] == pytest.approx(expected["gradient/dense1"], rel=0.02)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_that_the_scaler_skips_has_no_gradient_and_no_update(optimizer):
    run, _ = built(*TINY, "model=mlp", "precision=fp16", f"optimizer={optimizer}", "optimizer.lr=0.01")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    found = looked(Gradients(), run)
    assert all(math.isnan(value) for tag, value in found.items() if tag.startswith("gradient/"))
    assert all(value == 0 for tag, value in found.items() if tag.startswith("update/"))
    run, _ = built(*TINY, "model=mlp", "precision=fp16", f"optimizer={optimizer}")
    run.step()
    run.model.classifier.bias.grad[0] = math.inf  # one is enough for the scaler to skip a step
    found = {reading.tag: reading.value for reading in Gradients().look(run, Gradients().before(run))}
    assert math.isnan(found["gradient/dense1"])


# ---------------------------------------------------------------- statistics


def population_of(run, num_images):
    """Mean and unbiased variance of what the first dense layer of an MLP puts out, in float64."""
    x = torch.cat(list(training_batches(run, num_images)))
    z = F.linear(x.flatten(1).double(), run.model.dense1.weight.double())
    return z.mean(0), z.var(0)


@pytest.mark.parametrize("norm", ["library", "scratch", "fused", "ghost", "renorm"])
def test_recomputed_statistics_are_those_of_all_images_together(norm):
    run = a_run(*variant("mlp", norm), "data.augment=flip")
    model = shadow(run).eval()
    model.norm2.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recompute_statistics(model, training_batches(run, 48), run.forward)
    mean, var = population_of(run, 48)
    torch.testing.assert_close(model.norm1.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norm1.running_var.double(), var, rtol=1e-5, atol=1e-6)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"norm{i}.running_{kind}" for i in (1, 2) for kind in ("mean", "var")}
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes == {name: name == "norm2" for name in modes}
    assert not any(module._forward_hooks for module in model.modules())
    once = copy.deepcopy(model.state_dict())
    recompute_statistics(model, [], run.forward)
    assert different(once, model.state_dict()) == []


def test_deeper_norms_are_given_what_training_makes_of_the_batches_and_not_evaluation():
    run = a_run("model=mlp", "norm.momentum=0.001")  # running statistics of no use yet
    model, reference = shadow(run), shadow(run)
    recompute_statistics(model, training_batches(run, 32), run.forward)
    inputs = []
    with tapped({"norm2": reference.norm2}, lambda name, x, _: inputs.append(x.detach().double())):
        for images in training_batches(run, 32):
            run.forward(images, reference)
    torch.testing.assert_close(model.norm2.running_var.double(), torch.cat(inputs).var(0), rtol=1e-5, atol=1e-7)


def test_batches_to_recompute_from_are_whole_ones_from_all_over_the_training_set():
    run = a_run("data.augment=crop_flip", num_steps=0)
    state = copy.deepcopy(run.batches.state_dict())
    one, two = (list(training_batches(run, 30)) for _ in range(2))
    assert [len(each) for each in one] == [8, 8, 8]
    assert all(map(torch.equal, one, two))
    assert different(state, run.batches.state_dict()) == []
    plain = [run.dataset.prepare(some_of(run.dataset.train, 24).images[8 * i : 8 * i + 8]) for i in range(3)]
    assert not any(map(torch.equal, one, plain)), "augmented as the run's"
    assert [len(each) for each in training_batches(run, 2)] == [8]
    assert [len(each) for each in training_batches(run, 10**6)] == [8] * (len(run.dataset.train) // 8)
    run = a_run("data.normalize=false", num_steps=0)
    ascending = torch.arange(64, dtype=torch.uint8).view(64, 1, 1, 1).expand(64, 1, 16, 16)  # as if sorted by class
    object.__setattr__(run.dataset, "train", Split(ascending, run.dataset.train.labels[:64]))
    for images in training_batches(run, 32):
        picked = images[:, 0, 0, 0] * 255
        assert picked.min() < 20 and picked.max() > 43


def test_gaps_are_zero_at_the_population_and_otherwise_what_was_put_there():
    run = a_run("model=mlp", "model.hidden=[6,5]", "norm.eps=0.1")
    recompute_statistics(run.model, training_batches(run, 48), run.forward)
    probe, eps = Statistics(images=48), run.model.norm1.eps

    def found():
        return {reading.tag: reading.value for reading in probe.look(run, None)}

    for name in ("norm1", "norm2"):
        assert found()[f"statistics/{name}/mean_gap"] == pytest.approx(0, abs=1e-7)
        assert found()[f"statistics/{name}/variance_gap"] == pytest.approx(0, abs=1e-7)
    with torch.no_grad():
        var = run.model.norm1.running_var.clone()
        run.model.norm1.running_mean += torch.tensor([1.0, 2, 2, 0, 0, 0]) * (var + eps).sqrt()
        run.model.norm1.running_var.copy_((var + eps) * torch.tensor([math.e, 1, 1, 1, 1, math.exp(-0.2)]) - eps)
        run.model.norm2.weight.copy_(torch.tensor([1, -0.5, 2e-3, -5e-4, 0]))
    assert found()["statistics/norm1/mean_gap"] == pytest.approx(math.sqrt(9 / 6), rel=1e-4)
    assert found()["statistics/norm1/variance_gap"] == pytest.approx(1.2 / 6, rel=1e-4)
    assert found()["statistics/norm2/gamma_min"] == 0
    assert found()["statistics/norm2/unscaled"] == 2
    assert found()["statistics/norm1/unscaled"] == 0
    with torch.no_grad():
        run.model.dense1.weight[:2] = 0  # two units that put out 0 whatever they see
    assert found()["statistics/norm1/unscaled"] == 2


def test_the_two_accuracies_are_those_of_evaluation_with_either_statistics():
    run = a_run("model=mlp", "norm.momentum=0.001", "data.limit=null", num_steps=60)
    found = {reading.tag: reading.value for reading in Statistics(images=64).look(run, None)}
    valid = some_of(run.dataset.valid, 64)
    assert found["accuracy/valid_running"] == run.evaluate(valid)[1]
    model = shadow(run)
    recompute_statistics(model, training_batches(run, 64), run.forward)
    assert found["accuracy/valid_recomputed"] == run.evaluate(valid, model.eval())[1]
    assert found["accuracy/valid_recomputed"] > found["accuracy/valid_running"] + 0.1


@pytest.mark.parametrize("norm", ["none", "group"])
def test_norms_without_running_statistics_yield_dead_units_alone(norm):
    assert {tag.rpartition("/")[2] for tag in looked(Statistics(), a_run(*variant("mlp", norm)))} == {"dead_units"}


def dead_units(run):
    found = {tuple(reading.tag.split("/")): reading.value for reading in Statistics().look(run, None)}
    return {tag[1]: value for tag, value in found.items() if tag[-1] == "dead_units"}


@pytest.mark.parametrize("valid", [0, 40])
@pytest.mark.parametrize("norm", ["none", "library", "rms"])
@pytest.mark.parametrize("activation, bias", [("relu", -1e3), ("sigmoid", 20.0), ("tanh", -20.0), ("identity", None)])
def test_a_unit_is_dead_if_every_image_gets_the_same_output(norm, activation, bias, valid):
    words = "model=mlp", "model.hidden=[9,5]", f"norm={norm}", f"model.activation={activation}", f"data.valid={valid}"
    run = a_run(*words, num_steps=0)
    with torch.no_grad():
        for norm, shift in ((run.model.norm1, 9.0), (run.model.norm2, 999.0)):
            norm.bias.fill_(shift if activation == "relu" else 0.0)  # every unit fires
    before = dead_units(run)
    with torch.no_grad():
        if bias is None:
            run.model.dense1.weight[:3] = 0
        else:
            run.model.norm1.bias[:3] = bias
    assert (before, dead_units(run)) == ({"norm1": 0, "norm2": 0}, {"norm1": 3, "norm2": 0})


def test_a_channel_lives_if_one_pixel_of_one_image_differs(monkeypatch):
    monkeypatch.setattr("bnexp.train.run.EVALUATION_BATCH", 7)  # so that the image is in one batch of six
    run = a_run("model=lenet", "norm=none", "data.size=16", "data.valid=40", num_steps=0)
    split = run.dataset.valid
    with torch.no_grad():
        run.model.conv1.weight[0] = 0
        outputs = run.model.conv1(run.dataset.prepare(split.images))[:, 1].flatten().sort(descending=True).values
        run.model.norm1.bias[1] = -(outputs[0] + outputs[1]) / 2  # the largest alone stays above 0
    assert evaluate_units(run, split, run.model.eval())[1]["norm1"] == (1, 6)
    with torch.no_grad():
        run.model.norm1.bias[1] = -outputs[0] - 1
    assert evaluate_units(run, split, run.model)[1]["norm1"] == (2, 6)


# ---------------------------------------------------------------- confusion


def test_the_confusion_matrix_counts_true_classes_in_rows_and_predicted_ones_in_columns():
    run = a_run("model=mlp", "data.limit=200", num_steps=20)
    found = looked(Confusion(split="test"), run)
    table, test = found["confusion/test"], run.dataset.test
    assert table.head == ("true", *run.dataset.class_names)
    with torch.no_grad():
        predicted = run.model.eval()(run.dataset.prepare(test.images)).argmax(1)
    counts = [[0] * 10 for _ in range(10)]
    for true, other in zip(test.labels.tolist(), predicted.tolist(), strict=True):
        counts[true][other] += 1
    assert table.rows == tuple((name, *row) for name, row in zip(run.dataset.class_names, counts, strict=True))
    lowest = min(row[i] / sum(row) for i, row in enumerate(counts))
    assert found["recall/test_lowest"] == pytest.approx(lowest, abs=1e-6) and 0 < sum(map(sum, counts)) == 200


@pytest.mark.parametrize(
    "overrides, options, name, number",
    [
        ((), {}, "valid", 64),
        ((), {"images": 9}, "valid", 9),
        (("data.valid=0",), {}, "train", 64),
        ((), {"split": "train", "images": 20}, "train", 20),
    ],
)
def test_the_images_of_a_confusion_matrix_are_of_its_split_or_training_images(overrides, options, name, number):
    run = a_run("model=mlp", "data.valid=70", *overrides)
    table, recall = Confusion(**options).look(run, None)
    assert table.tag == f"confusion/{name}" and recall.tag == f"recall/{name}_lowest"
    counts = torch.tensor([row[1:] for row in table.rows])
    assert counts.sum() == number
    chosen = some_of(getattr(run.dataset, name), number).labels
    assert torch.equal(counts.sum(1), chosen.bincount(minlength=10))


def test_one_class_that_is_never_recognized_is_the_lowest_recall_and_one_without_images_is_not():
    run = a_run("model=mlp", "data.limit=null", num_steps=60)
    train = run.dataset.train
    object.__setattr__(run.dataset, "valid", train.take((train.labels < 5).nonzero().flatten()[:100]))
    with torch.no_grad():
        run.model.classifier.bias.fill_(0)
        before = Confusion().look(run, None)
        assert 0.3 < [*before][1].value < 1
        run.model.classifier.bias[3] = -1e9
    table, recall = Confusion().look(run, None)
    assert recall.value == 0 and sum(row[4] for row in table.rows) == 0
    assert all(sum(row[1:]) == 0 for row in table.rows[5:])


def test_a_confusion_matrix_is_kept_in_the_run_folder(train):
    path = train("model=mlp", "data.limit=64", "steps=2", "probe=[confusion]")
    (line,) = map(json.loads, (path / "probes.jsonl").read_text().splitlines())
    assert (line["tag"], line["step"], line["head"][0]) == ("confusion/valid", 2, "true")
    assert sum(sum(row[1:]) for row in line["rows"]) == 64
    metrics = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= metrics["recall/valid_lowest"] <= 1


# ---------------------------------------------------------------- landscape


def softmax_regression(weight, bias, images, labels):
    """Mean loss and its gradient by weight and bias, by the formula: (p - onehot) x / N."""
    logits = images @ weight.T + bias
    p = logits.softmax(1)
    gap = (p - F.one_hot(labels, 10)) / len(labels)
    return -p.gather(1, labels[:, None]).log().mean(), torch.cat([(gap.T @ images).flatten(), gap.sum(0)])


def test_the_landscape_is_that_of_the_formula():
    run = a_run("model=mlp", "model.hidden=[]", "optimizer=sgd", "optimizer.lr=0.4", "schedule=cosine", "steps=7")
    found = looked(Landscape(images=24, steps=(0.5, 1, 3)), run)
    rate = 0.4 * (1 + math.cos(math.pi * 3 / 7)) / 2  # of the fourth of seven steps
    batch = some_images(run, 24, of="train")
    x, labels = run.dataset.prepare(batch.images).flatten(1).double(), batch.labels
    weight, bias = (p.detach().double() for p in run.model.parameters())
    loss, g = softmax_regression(weight, bias, x, labels)
    steps = {k: -k * rate * g for k in (0.5, 1, 3)}
    there = {
        k: softmax_regression(weight + d[:-10].view_as(weight), bias + d[-10:], x, labels) for k, d in steps.items()
    }
    losses = [each for each, _ in there.values()]
    changes = {k: (other - g).norm() for k, (_, other) in there.items()}
    expected = {
        "loss": loss, "loss_range": max(losses) - min(losses), "gradient": g.norm(),
        "gradient_change": max(changes.values()), "gradient_change_relative": max(changes.values()) / g.norm(),
        "smoothness": max(changes[k] / steps[k].norm() for k in steps),
    }  # fmt: skip
    assert set(found) == {f"landscape/{name}" for name in expected}
    for name, value in expected.items():  # float32 against float64; differences of weights keep four digits
        assert found[f"landscape/{name}"] == pytest.approx(float(value), rel=1e-3), name


class Scaled(nn.Sequential):
    """A network whose output does not depend on the scale of its only weight."""

    def __init__(self, scale):
        super().__init__(nn.Flatten(), nn.Linear(256, 10, bias=False), nn.BatchNorm1d(10, eps=1e-12, affine=False))
        with torch.no_grad():
            self[1].weight.copy_(scale * torch.linspace(-1, 1, 2560).sin().mul(997).frac().view(10, 256))


def test_the_relative_change_is_the_one_that_a_scale_of_the_weights_does_not_move():
    """c w computes what w does; with c^2 times the learning rate it also takes the same path."""
    found = {}
    for c in (1.0, 4.0):
        run = a_run("model=mlp", "model.hidden=[]", "data.limit=null", num_steps=0)
        run.model = Scaled(c)
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.5 * c**2)
        found[c] = {reading.tag.partition("/")[2]: reading.value for reading in Landscape().look(run, None)}
    ratio = {name: found[4.0][name] / found[1.0][name] for name in found[1.0]}
    expected = {"loss": 1, "loss_range": 1, "gradient": 1 / 4, "gradient_change": 1 / 4, "smoothness": 1 / 16}
    assert ratio == pytest.approx(expected | {"gradient_change_relative": 1}, rel=1e-2)
    assert 0.01 < found[1.0]["gradient_change_relative"] < 10


def test_every_point_is_seen_with_the_same_running_statistics():
    """Batch renormalization trains on them, and every pass in training mode moves them."""
    run = a_run(*variant("mlp", "renorm"), "norm.warmup_steps=0", "norm.r_steps=0", "norm.d_steps=0")
    model, batch = shadow(run), some_images(run, 16)
    losses = [loss_and_gradient(run, model, batch)[0] for _ in range(3)]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    moved = shadow(run)
    run.forward(run.dataset.prepare(batch.images), moved)
    assert not torch.equal(losses[0], loss_and_gradient(run, moved, batch)[0]), "or else nothing is tested here"


def test_under_fp16_the_landscape_is_nearly_that_of_fp32():
    found, expected = (
        looked(Landscape(images=16), built(*TINY, "model=mlp", "optimizer=sgd", f"precision={precision}")[0])
        for precision in ("fp16", "fp32")
    )
    assert found["landscape/gradient"] == pytest.approx(expected["landscape/gradient"], rel=0.02)


# ---------------------------------------------------------------- features and shapes


def test_every_map_is_stretched_from_black_to_white():
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 5.0]], [[7.0, 7.0], [7.0, 7.0]]]])
    assert to_grey(maps).tolist() == [[[[0, 64], [128, 255]], [[0, 0], [0, 0]]]]
    assert to_grey(torch.tensor([[[[math.nan, 1.0], [3.0, math.inf]]]])).tolist() == [[[[0, 0], [255, 255]]]]


def test_maps_stand_in_rows_of_images_and_columns_of_channels_large_enough_to_be_seen():
    maps = torch.arange(2 * 3 * 25, dtype=torch.uint8).view(2, 3, 5, 5)
    picture = tile_maps(maps)
    side = 5 * 13  # 64 pixels or more
    assert picture.shape == (2 * (side + 2) + 2, 3 * (side + 2) + 2)
    for i in range(2):
        for j in range(3):
            top, left = 2 + i * (side + 2), 2 + j * (side + 2)
            assert torch.equal(picture[top : top + side : 13, left : left + side : 13], maps[i, j])
            assert torch.equal(picture[top + 12 : top + side : 13, left + 12 : left + side : 13], maps[i, j])
    assert picture[:2].eq(255).all() and picture[:, -2:].eq(255).all()
    assert tile_maps(maps.new_zeros(1, 1, 100, 80)).shape == (104, 84)


def test_features_are_what_the_first_layers_make_of_validation_images_in_evaluation():
    run = a_run("model=lenet", "data.size=28")
    readings = list(Features(images=3, channels=2).look(run, None))
    names = ["conv1", "norm1", "pool1", "conv2", "norm2", "pool2"]
    assert [reading.tag for reading in readings] == [f"features/{name}" for name in names]
    run.model.eval()
    with torch.no_grad():
        maps = run.model.norm1(run.model.conv1(run.dataset.prepare(some_of(run.dataset.valid, 3).images)))
    run.model.train()
    assert torch.equal(readings[1].pixels, tile_maps(to_grey(maps[:, :2])))
    assert len(list(Features(layers=2).look(run, None))) == 2
    assert list(Features().look(a_run("model=mlp"), None)) == []


@pytest.mark.parametrize("valid", [1, 9])
@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_one_image_is_looked_at_among_others_where_evaluation_takes_statistics_of_the_batch(model, valid):
    run = a_run(*variant(model, "library"), "norm.track_running_stats=false", num_steps=1)
    object.__setattr__(run.dataset, "valid", some_of(run.dataset.valid, valid))
    readings = list(Features(images=1, channels=1).look(run, None))
    assert len(readings) == (5 if model == "lenet" else 0)
    assert all(each.pixels.shape[0] < 2 * 64 for each in readings), "one row"
    run = a_run(*variant(model, "ghost"), num_steps=1)
    run.model.norm1.running_mean = run.model.norm1.running_var = None
    assert len(list(Features(images=3).look(run, None))) == len(readings)
    assert list(Shapes().look(run, None))


def test_the_table_of_shapes_names_the_first_layers_an_image_passes():
    run = a_run("model=lenet", "data.size=28", num_steps=1)
    assert list(Shapes(layers=4).look(run, None)) == [
        Table("shapes", ("layer", "input", "output"), (
            ("conv1", "1x28x28", "6x24x24"), ("norm1", "6x24x24", "6x24x24"),
            ("pool1", "6x24x24", "6x12x12"), ("conv2", "6x12x12", "16x8x8"),
        ))
    ]  # fmt: skip
    (table,) = Shapes().look(run, None)
    assert len(table.rows) == 8


def test_layers_are_norms_as_a_whole_and_what_has_no_parts():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def reduces_over(self, num_dims):
            return "N"

    model = nn.Sequential(nn.Linear(2, 2), Outer(), nn.Sequential(nn.ReLU(), GhostBatchNorm(2)))
    assert list(named_layers(model)) == ["0", "1", "2.0", "2.1"]


def test_a_call_without_arguments_is_not_seen():
    class Silent(nn.Module):
        def forward(self):
            return torch.ones(2)

    silent, other, seen = Silent(), nn.Identity(), []
    with tapped({"silent": silent, "other": other}, lambda name, x, output: seen.append(name)):
        other(silent())
    assert seen == ["other"]
