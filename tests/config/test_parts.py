"""Parts of the user's own packages that return something else than a run can use are refused before any training."""

import json
import sys

import pytest
import torch

from bnexp.config import build, check
from bnexp.config.compose import composed
from bnexp.data.dataset import Split
from bnexp.errors import UserError

SMALL = ("data.limit=64", "batch_size=16", "threads=1", "device=cpu", "model=mlp", "model.hidden=[6]", "norm=none")
PACKAGE = """
import sys
from dataclasses import replace

import torch
from torch import nn
from bnexp.data.digits import Digits
from bnexp.store.readings import Histogram, Scalar
from bnexp.train.probe import Probe
from bnexp.models.mlp import MLP
from bnexp.norms.none import Shift


class Good(Digits):
    def __init__(self, size=28, valid=0.1, limit=None, augment="none", normalize=True):
        super().__init__(size=size, valid=valid, limit=limit, augment=augment, normalize=normalize)


class Nothing(Good):
    def load(self):
        return None


class Pair(Good):
    def load(self):
        data = super().load()
        return data.train, data.test


class OtherShape(Good):
    def load(self):
        data = super().load()
        self.in_shape = (1, 20, 20)
        return data


class Nameless:
    def __init__(self, **options):
        self.class_names, self.in_shape, self.load = ("a", "b"), (1, 8, 8), lambda: None


class Classless(Good):
    class_names = None


class OneNumber(Good):
    def __init__(self, **options):
        super().__init__(**options)
        self.in_shape = 28


class Unloadable(Good):
    load = None


class Net(MLP):
    pass


class Tuple(MLP):
    def forward(self, images):
        return super().forward(images), images


class TupleInEvaluation(MLP):
    def forward(self, images):
        logits = super().forward(images)
        return logits if self.training else (logits, images)


class NoReturn(MLP):
    def forward(self, images):
        super().forward(images)


class TooFew(MLP):
    def forward(self, images):
        return super().forward(images)[:, 1:]


class Classes(MLP):
    def forward(self, images):
        return super().forward(images).argmax(1)


class NeedsNumbers(MLP):
    def forward(self, images):
        return {"logits": super().forward(images), "mean": images.mean().item()}


def no_model(in_shape, num_classes, norm, **options):
    return None


class Norm(Shift):
    pass


class Flat(Shift):
    def forward(self, x, residual=None):
        return super().forward(x, residual).mean(1)


class Statistics(Shift):
    def forward(self, x, residual=None):
        return super().forward(x, residual), x.mean(0)


class Silent(Shift):
    def forward(self, x, residual=None):
        super().forward(x, residual)


def no_norm(num_features, activation="identity"):
    return None


def no_factor(step, total_steps, **options):
    return None


def no_optimizer(groups, **options):
    return None


def no_probe(**options):
    return None


class Late(MLP):
    calls = 0

    def forward(self, images):
        self.calls += 1
        if self.calls > 9:
            raise KeyError("late")
        return super().forward(images)


class LateTuple(Late):
    def forward(self, images):
        self.calls += 1
        logits = MLP.forward(self, images)
        return (logits, images) if self.calls > 9 else logits


class OneSize(MLP):
    def forward(self, images):
        if self.training and len(images) != 16:
            raise RuntimeError("16 images are needed")
        return super().forward(images)


class OneSizeInEvaluation(MLP):
    def forward(self, images):
        if not self.training and len(images) % 16:
            raise RuntimeError("16 images are needed")
        return super().forward(images)


class Leaves(MLP):
    def forward(self, images):
        sys.exit(0)


class LateExit(Late):
    def forward(self, images):
        self.calls += 1
        return MLP.forward(self, images) if self.calls < 10 else sys.exit(0)


class LeavesAtLoad(Good):
    def load(self):
        sys.exit(0)


class NoForward(MLP):
    forward = nn.Module.forward


class Parameterless(nn.Module):
    def __init__(self, *args, **options):
        super().__init__()

    def forward(self, x):
        return x.flatten(1)[:, :10]


class Elsewhere(MLP):
    def forward(self, x):
        return super().forward(x).to("meta")


class SparseLogits(MLP):
    def forward(self, images):
        return super().forward(images).to_sparse()


class InPlace(MLP):
    def __init__(self, in_shape, num_classes, norm, **options):
        super().__init__(in_shape, num_classes, norm, **options)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        scaled = images * self.scale
        images.add_(1)
        return super().forward(scaled)


class Uninitialized(nn.Module):
    def __init__(self, *args, **options):
        pass


def text_norm(num_features, activation="identity"):
    return "norm"


def class_norm(num_features, activation="identity"):
    return Norm


class Unreadable(Good):
    @property
    def in_shape(self):
        raise OSError("no disk")

    @in_shape.setter
    def in_shape(self, value):
        pass


class Rotated(Good):
    def load(self):
        return replace(super().load(), augment="rot")


class NoGradient(MLP):
    def forward(self, images):
        return super().forward(images).detach()


class Sparse(nn.Module):
    def __init__(self, in_shape, num_classes, norm, hidden, **options):
        super().__init__()
        self.of_pixels = nn.Embedding(256, num_classes, sparse=True)

    def forward(self, images):
        return self.of_pixels(images.flatten(1)[:, :99].mul(9).long().abs() % 256).mean(1)


class LateNorm(Shift):
    calls = 0

    def forward(self, x, residual=None):
        self.calls += 1
        return super().forward(x, residual) if self.calls < 9 else None + x


class Double(Shift):
    def forward(self, x, residual=None):
        return super().forward(x.double(), residual)


class OfTheBatch(nn.Module):
    def __init__(self, num_features, activation="identity"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_features))

    def reduces_over(self, num_dims):
        return "N"

    def forward(self, x, residual=None):
        return (x - x.mean(0)) / (x.std(0) + 1e-5) * (1 + self.weight)


class OfTheWholeBatch(OfTheBatch):
    def forward(self, x, residual=None):
        if len(x) == 8:  # half a batch of the run
            raise RuntimeError("a whole batch is needed")
        return super().forward(x, residual)


class Whole(OfTheBatch):
    def forward(self, x, residual=None):
        assert len(x) % 16 == 0
        return x * (1 + self.weight)


class Argumentless(Whole):
    def reduces_over(self):
        return "N"


class Undecided(Whole):
    def reduces_over(self, num_dims):
        raise KeyError(num_dims)


class Gated(OfTheBatch):
    def forward(self, x, residual=None):
        return x + self.weight * super().forward(x)


class Moving(OfTheBatch):
    mean = 0

    def forward(self, x, residual=None):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class CentredModel(MLP):
    def forward(self, images):
        logits = super().forward(images)
        return logits - logits.mean(0)


class Lazy(OfTheBatch):
    def __init__(self, num_features, activation="identity"):
        super().__init__(num_features)
        self.mix, self.unlike = nn.LazyLinear(num_features), nn.LazyBatchNorm1d()

    def forward(self, x, residual=None):
        return self.unlike(self.mix(x))


class Unused(Lazy):
    def forward(self, x, residual=None):
        return x * self.weight


class Shared(OfTheBatch):
    kept = nn.Linear(6, 6)

    def __init__(self, num_features, activation="identity"):
        super().__init__(num_features)
        self.mix = Shared.kept

    def forward(self, x, residual=None):
        return self.mix(x)


KEPT = {}


def kept_norm(num_features, activation="identity"):
    return KEPT.setdefault(num_features, nn.Linear(num_features, num_features))


def late_factor(step, total_steps, **options):
    return [1.0, 1 / 0][step // 7] if step == 7 else 1.0


def late_nan(step, total_steps, **options):
    return float("nan") if step == 7 else 1.0


def late_text(step, total_steps, **options):
    return "x" if step == 7 else 1.0


def no_step(run):
    return None


def no_reading(run):
    return lambda: None


def late_step(run):
    def step():
        if run.num_steps > 4:
            raise OSError("engine")
        run.eager_step()

    return step


class LateOptimizer(torch.optim.SGD):
    calls = 0

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure if self.calls < 9 else closure())


class Later(Good):
    async def load(self):
        return super().load()


class NoFile(Good):
    def load(self):
        open("/nowhere/at/all")


class Looks(Probe):
    readings = None

    def __init__(self, every=4):
        super().__init__(every)

    def look(self, run, before):
        return self.readings


class LooksText(Looks):
    readings = "abc"


class LooksDict(Looks):
    readings = {"a": {"b": 1.0}}


class LooksTensor(Looks):
    readings = [Scalar("a/b", torch.ones(3))]


class LooksBins(Looks):
    readings = [Histogram("a/b", (), ())]


class LooksColumn(Looks):
    readings = [Scalar("step", 99.0)]


class LooksRun(Looks):
    readings = [Histogram("loss/test", (0.0, 1.0), (1,))]


class LooksTwice(Looks):
    readings = [Scalar("a/b", 1.0), Scalar("a/b", 2.0)]


class LooksBytes(Looks):
    readings = [Scalar(b"a/b", 1.0)]


class LooksFile(Looks):
    def look(self, run, before):
        yield Scalar("a/b", 1.0)
        open("/nowhere/at/all")


class LooksBefore(Looks):
    def before(self, run):
        raise ValueError("before\\nand after")


class LooksNever(Looks):
    def is_due(self, step, total_steps):
        return step >= 4 and 1 / 0


class LooksWell(Looks):
    readings = (Scalar(f"own/{name}", 1.0) for name in "ab")
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_parts", None)


def built(*overrides):
    cfg = composed([*SMALL, "allow=[own_parts]", *overrides])
    check.check(cfg)
    return build.build(cfg)


def refusal(group, name):
    with pytest.raises(UserError) as caught:
        built(f"{group}._target_=own_parts.{name}")
    message = str(caught.value)
    assert message.startswith(f"{group}._target_=own_parts.{name}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("group, name", [("data", "Good"), ("model", "Net"), ("norm", "Norm")])
def test_parts_that_keep_the_contract_are_taken(group, name):
    run = built(f"{group}._target_=own_parts.{name}")
    run.step()
    assert run.evaluate(run.dataset.valid)[0] > 0


@pytest.mark.parametrize(
    "name, words",
    [
        ("Nothing", "load() returns None; return a bnexp.data.dataset.Dataset"),
        ("Pair", "load() returns an object of type tuple"),
        ("OtherShape", "its in_shape is (1, 20, 20), but load() returns a dataset with (1, 28, 28)"),
        ("Nameless", "has no name; name must be a text"),
        ("Classless", "has no class_names; class_names must be a tuple of texts"),
        ("OneNumber", "has 28 as in_shape; in_shape must be the tuple (channels, height, width)"),
        ("Unloadable", "has no load"),
    ],
)
def test_a_source_says_what_it_holds_and_loads_a_dataset(name, words):
    assert words in refusal("data", name)


def test_a_source_need_not_take_corrupt_and_is_refused_where_it_is_asked_for():
    assert built("data._target_=own_parts.Good").dataset.name == "digits"
    with pytest.raises(UserError, match="data.corrupt=noise: own_parts.Good takes no such option"):
        built("data._target_=own_parts.Good", "data.corrupt=noise")


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "Tuple",
            "returns an object of type tuple; return one dense floating-point tensor of shape (16, 10)",
        ),
        ("TupleInEvaluation", "its forward returns an object of type tuple"),
        ("NoReturn", "its forward returns None"),
        ("TooFew", "returns a tensor of shape (16, 9) and type float32"),
        ("Classes", "returns a tensor of shape (16,) and type int64"),
        ("NeedsNumbers", "returns an object of type dict"),
        ("no_model", "returns None; return a torch.nn.modules.module.Module"),
    ],
)
def test_a_model_returns_one_logit_per_class(name, words):
    assert words in refusal("model", name)


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "Flat",
            "of shape (16,) and type float32; return one dense floating-point tensor of shape (16, 6)",
        ),
        ("Statistics", "returns an object of type tuple"),
        ("Silent", "returns None"),
        ("no_norm", "returns None; return a torch.nn.modules.module.Module"),
    ],
)
def test_a_norm_returns_a_tensor_of_the_shape_of_its_input(name, words):
    assert words in refusal("norm", name)


def test_a_schedule_returns_a_number():
    assert "returns None; return a number" in refusal("schedule", "no_factor")


def test_an_optimizer_and_a_probe_are_what_they_should_be():
    for words in (["optimizer._target_=own_parts.no_optimizer"], ["+probe.mine={_target_: own_parts.no_probe}"]):
        with pytest.raises(UserError, match="returns None; return a "):
            built(*words)


def test_the_command_ends_with_2_and_one_line_before_any_folder(bnexp, capfd, tmp_path):
    words = ("train", *SMALL, "allow=[own_parts]", "model._target_=own_parts.Tuple", "out=run")
    assert bnexp(*words) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_parts_of_bnexp_cost_no_forward_pass(monkeypatch):
    from bnexp.models.mlp import MLP

    def refuse(model, images):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(MLP, "forward", refuse)
    check.check(composed([*SMALL, "norm=library"]))


def test_hooks_of_the_check_do_not_stay_on_the_model():
    model = built("norm._target_=own_parts.Norm").model
    assert not any(module._forward_hooks for module in model.modules())


def command(group, name):
    target = f"+probe.mine={{_target_: own_parts.{name}}}" if group == "probe" else f"{group}._target_=own_parts.{name}"
    more = ["optimizer=sgd"] if group == "optimizer" else []
    more += ["data.limit=70", "drop_last=false"] if name.startswith("OneSize") else []
    return "train", *SMALL, "epochs=4", "log_every=2", "allow=[own_parts]", "quiet=true", "out=run", *more, target


LABELS = {"probe": "probe.mine._target_=own_parts."}


def ended(bnexp, capfd, group, name):
    """The one line with which the command ends, with exit code 2."""
    assert bnexp(*command(group, name)) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith(f"bnexp: error: {LABELS.get(group, f'{group}._target_=own_parts.')}{name}: ")
    return line


@pytest.mark.parametrize(
    "group, name, words",
    [
        ("model", "Late", "failed after step 8: KeyError: 'late' (HERE)"),
        ("model", "LateExit", "failed after step 8: SystemExit: 0 (HERE)"),
        ("model", "LateTuple", "failed after step 8: TypeError: cross_entropy_loss"),
        ("model", "Sparse", "failed after step 0: RuntimeError: Adam does not support sparse gradients"),
        ("norm", "LateNorm", "failed after step 7: TypeError: unsupported operand"),
        ("engine", "late_step", "failed after step 5: OSError: engine (HERE)"),
        ("engine", "no_reading", "failed after step 2: RuntimeError: "),
        ("optimizer", "LateOptimizer", "failed after step 8: TypeError: 'NoneType' object is not callable (HERE)"),
        ("probe", "Looks", "failed after step 4: TypeError: 'NoneType' object is not iterable"),
        ("probe", "LooksText", "failed after step 4: TypeError: an object of type str is no reading"),
        ("probe", "LooksDict", "failed after step 4: TypeError: an object of type str is no reading"),
        ("probe", "LooksTensor", "failed after step 4: "),
        ("probe", "LooksBins", "failed after step 4: IndexError: "),
        ("probe", "LooksColumn", "yields the tag step, which the run itself has"),
        ("probe", "LooksRun", "yields the tag loss/test, which the run itself has"),
        ("probe", "LooksTwice", "yields the tag a/b, which another reading of this step has"),
        ("probe", "LooksBytes", "failed after step 4: TypeError: the tag b'a/b' is no text"),
        ("probe", "LooksFile", "failed after step 4: FileNotFoundError: "),
        ("probe", "LooksBefore", "failed after step 3: ValueError: before (HERE)"),
        ("probe", "LooksNever", "failed after step 3: ZeroDivisionError: division by zero (HERE)"),
    ],
)
def test_a_part_that_fails_during_the_run_is_named_and_what_was_computed_stays(
    bnexp, capfd, tmp_path, group, name, words
):
    start, here, _ = words.partition("(HERE)")
    line = ended(bnexp, capfd, group, name)
    assert start in line and (not here or f"({tmp_path / 'own_parts.py'}:" in line)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed" and f"bnexp: error: {status['error']}\n" == line
    assert "Traceback" in status["traceback"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == (0 if name == "no_reading" else status["step"] // 2)


@pytest.mark.parametrize(
    "group, name, words",
    [
        ("model", "OneSize", "failed for 6 images in training mode: RuntimeError: 16 images are needed"),
        ("model", "OneSizeInEvaluation", "failed for 70 images in evaluation mode: RuntimeError: 16 images are needed"),
        ("model", "Leaves", "failed for 16 images in training mode: SystemExit: 0 ("),
        ("data", "LeavesAtLoad", "failed: SystemExit: 0"),
        ("model", "NoForward", 'is missing the required "forward" function'),
        ("model", "NoGradient", "no weight has a part in what forward returns"),
        ("norm", "Argumentless", "TypeError: Argumentless.reduces_over() takes 1 positional argument"),
        ("norm", "Undecided", "KeyError: 2 ("),
        ("model", "Parameterless", "has no parameter that takes a gradient"),
        ("data", "Later", "load() returns an object of type coroutine"),
        ("model", "Elsewhere", "its forward returns a tensor on meta, and cpu is expected"),
        ("model", "SparseLogits", "return one dense floating-point tensor"),
        ("model", "InPlace", "modified by an inplace operation"),
        ("model", "Uninitialized", "has no attribute '_"),
        ("norm", "text_norm", "it returns an object of type str; return a torch.nn.modules.module.Module"),
        ("norm", "class_norm", "it returns an object of type type"),
        ("data", "Unreadable", "failed: OSError: no disk ("),
        ("data", "Rotated", "load() returns a dataset with a fault: augment is 'rot'; choose one of none, flip"),
        (
            "norm",
            "Double",
            "float64; return one dense floating-point tensor of shape (16, 6), of the type of the input",
        ),
        ("norm", "Unused", "norm1.mix.weight gets no shape in a forward pass"),
        ("norm", "kept_norm", "keeps a module for the next model"),
        ("schedule", "late_factor", "failed: ZeroDivisionError: "),
        ("schedule", "late_nan", "the learning rate would be multiplied by nan at step 7"),
        ("schedule", "late_text", "at step 7 it returns an object of type str"),
        ("engine", "no_step", "returns None"),
        ("data", "NoFile", "failed: FileNotFoundError: "),
    ],
)
def test_a_part_that_would_fail_during_the_run_is_refused_before_it(bnexp, capfd, tmp_path, group, name, words):
    assert words in ended(bnexp, capfd, group, name)
    assert not (tmp_path / "run").exists()


def test_sparse_gradients_and_generators_of_readings_are_taken(bnexp, tmp_path):
    assert bnexp(*command("model", "Sparse"), "optimizer=sgd", "optimizer.fused=false") == 0
    assert bnexp(*command("probe", "LooksWell"), "steps=3", "out=looks") == 0
    assert "own/b" in (tmp_path / "looks" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("group, name", [("norm", "OfTheBatch"), ("norm", "OfTheWholeBatch"), ("norm", "Gated"),
                                         ("norm", "Moving"), ("model", "CentredModel")])  # fmt: skip
def test_a_result_that_depends_on_other_images_without_a_word_is_found_by_trying(group, name):
    target = f"{group}._target_=own_parts.{name}"
    run = built(target)
    assert [len(chunk) for chunk in run.chunks(Split(*[torch.zeros(513)] * 2), run.model)] == [257, 256]
    assert "shuffled chunks" in run.evaluation
    with pytest.raises(UserError, match=f"own_parts.{name}: evaluation on 1 valid image"):
        built(target, "data.valid=1")


@pytest.mark.parametrize("group, name", [("norm", "Norm"), ("norm", "Lazy"), ("model", "Net")])
def test_a_result_that_depends_on_no_other_images_is_left_in_stored_order(group, name):
    assert built(f"{group}._target_=own_parts.{name}").evaluation is None


def test_two_runs_do_not_train_a_module_that_a_part_keeps():
    first, second = (built("norm._target_=own_parts.Shared").model for _ in range(2))
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


def test_a_norm_that_needs_many_images_is_shown_the_run_s_batches(bnexp):
    words = (*SMALL, "threads=auto", "allow=[own_parts]", "norm._target_=own_parts.Whole")
    probes = "probe=[shapes,features,statistics,activations,gradients,landscape]"
    data = ["data.valid=32", "data.limit=32"]
    assert bnexp("train", *words, *data, "steps=2", probes, "out=run") == 0
    assert bnexp("summary", *words) == 0
    assert bnexp("inspect", "run", "allow=[own_parts]", "--images", "0") == 0


@pytest.mark.parametrize("name, num_parameters", [("Lazy", 6 + 6 * 7 + 12), ("Shared", 6 + 6 * 7)])
def test_a_norm_with_a_child_that_is_lazy_or_shared_is_one_row_of_the_summary(bnexp, capfd, name, num_parameters):
    assert bnexp("summary", *SMALL, "allow=[own_parts]", f"norm._target_=own_parts.{name}") == 0
    (row,) = [line.split() for line in capfd.readouterr().out.splitlines() if line.startswith("norm1")]
    assert row[:3] == ["norm1", "6", str(num_parameters)]
