"""From config to objects: every yaml builds, every wrong option is named, and a config runs nothing but parts."""

import math
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_models import MODELS, NORMS
from torch import nn

from bnexp.config import build, check, parts
from bnexp.config.choices import GROUPS, choices, conf_dir
from bnexp.config.compose import composed
from bnexp.errors import UserError
from bnexp.optim import make_optimizer, parameter_groups, set_learning_rate

SMALL = ("data.limit=64", "batch_size=16", "threads=1", "device=cpu")


def checked(*overrides):
    cfg = composed([*SMALL, *overrides])
    check.check(cfg)
    return cfg


def refusal(*overrides):
    """The message with which ``check`` or ``build`` refuses a config."""
    with pytest.raises(UserError) as caught:
        build.build(checked(*overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- every yaml builds


def test_the_groups_are_the_folders_of_conf():
    assert set(GROUPS) <= {path.name for path in conf_dir().iterdir() if path.is_dir()}


# Narrower than their defaults, because interpreted Triton kernels are slow.
SHRUNK = {
    "resnet": ["model.widths=[4,6]", "model.blocks=[1,1]"],
    "densenet": ["model.growth=4", "model.blocks=[1,1]", "model.stem_width=4"],
}
BLOCKS = {"ghost": ["norm.virtual_batch=2"]}  # which divide the small batches here


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_with_every_norm_maps_images_to_one_logit_per_class(model, norm):
    cfg = checked(f"model={model}", f"norm={norm}", "data.size=16", *SHRUNK.get(model, ()), *BLOCKS.get(norm, ()))
    source = parts.part(cfg, "data")()
    logits = parts.make_model(cfg, source)(torch.randn(2, *source.in_shape))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert logits.std(0).min() > 0, "the logits depend on the image"


# Those of libraries have to open their files to know what they hold.
@pytest.mark.parametrize("data", [each for each in choices("data") if each not in ("torchvision", "huggingface")])
def test_every_source_says_what_it_holds_without_reading_it(data, tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)  # the folder source finds its classes by their folders
    (tmp_path / "train/dog").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / f"train/{name}/1.png").touch()  # no image: reading it would be an error
    extra = [f"data.root={tmp_path}", "data.channels=1"] if data == "folder" else []
    extra += ["data.root=/nonexistent"] if data in ("mnist", "fashion_mnist", "cifar10") else []
    source = parts.part(checked(f"data={data}", *extra), "data")()
    channels, height, width = source.in_shape
    assert channels in (1, 3)
    assert height == width
    assert len(set(source.class_names)) == len(source.class_names) >= 2


@pytest.mark.parametrize("optimizer", choices("optimizer"))
def test_every_optimizer_moves_every_parameter(optimizer):
    extra = ["optimizer._target_=torch.optim.RMSprop"] if optimizer == "other" else []
    run = build.build(checked("model=mlp", f"optimizer={optimizer}", *extra))
    before = [p.clone() for p in run.model.parameters()]
    for _ in range(2):  # the first classifier step of a zero bias may be tiny, never two
        run.step()
    assert all((old != new).any() for old, new in zip(before, run.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"])
def test_any_torch_optimizer_can_be_named(name):
    run = build.build(checked("model=mlp", "optimizer=other", f"optimizer._target_=torch.optim.{name}"))
    run.step()
    assert isinstance(run.optimizer, getattr(torch.optim, name))


@pytest.mark.parametrize("name, fused", [("adam", True), ("adamw", True), ("sgd", True), ("other", None)])
def test_the_fused_implementation_is_used_where_torch_has_one(name, fused):
    extra = ["optimizer._target_=torch.optim.RMSprop"] if name == "other" else []
    optimizer = build.build(checked("model=mlp", f"optimizer={name}", *extra)).optimizer
    assert optimizer.defaults.get("fused") is fused


# ---------------------------------------------------------------- schedules, from their closed forms


def cosine(done, final):
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


SCHEDULES = [  # overrides, total_steps, {step: factor}
    (["schedule=constant"], 100, {0: 1, 50: 1, 99: 1}),
    (["schedule=constant", "schedule.warmup_steps=4"], 100, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 4: 1, 99: 1}),
    (["schedule=cosine"], 100, {0: 1, 25: cosine(0.25, 0), 50: 0.5, 75: cosine(0.75, 0), 99: cosine(0.99, 0)}),
    (["schedule=cosine", "schedule.final=0.1"], 100, {0: 1, 50: 0.55, 99: cosine(0.99, 0.1)}),
    (["schedule=cosine", "schedule.warmup_steps=20"], 100, {0: 0.05, 10: 0.55, 19: 1, 20: 1, 60: 0.5}),
    (["schedule=step"], 100, {0: 1, 49: 1, 50: 0.1, 74: 0.1, 75: 0.01, 99: 0.01}),
    (["schedule=step", "schedule.gamma=0.5", "schedule.milestones=[0.3]"], 10, {2: 1, 3: 0.5, 9: 0.5}),
    (["schedule=step", "schedule.warmup_steps=2"], 10, {0: 0.5, 1: 1, 5: 0.1}),
    (["schedule=onecycle"], 100, {0: 0.04, 15: 0.52, 30: 1, 99: 4e-6}),
    (["schedule=onecycle", "schedule.warmup_steps=10", "schedule.final=0.2"], 31, {0: 0.04, 5: 0.52, 10: 1, 20: 0.6}),
]


@pytest.mark.parametrize("overrides, total_steps, factors", SCHEDULES, ids=lambda value: str(value)[:60])
def test_a_schedule_follows_its_formula(overrides, total_steps, factors):
    schedule = parts.part(checked(*overrides), "schedule")
    assert {step: schedule(step, total_steps) for step in factors} == pytest.approx(factors, rel=1e-12)


def test_every_schedule_is_in_the_table_above():
    assert {overrides[0] for overrides, *_ in SCHEDULES} == {f"schedule={name}" for name in choices("schedule")}


@pytest.mark.parametrize("schedule", choices("schedule"))
@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_a_schedule_survives_the_shortest_runs(schedule, total_steps):
    factor = parts.part(checked(f"schedule={schedule}"), "schedule")
    assert all(0 <= factor(step, total_steps) <= 1 for step in range(total_steps))


def test_a_run_multiplies_its_learning_rate_by_the_schedule():
    run = build.build(checked("model=mlp", "optimizer.lr=0.5", "schedule=cosine", "steps=4"))
    seen = []
    for _ in range(4):
        run.step()
        seen.append([group["lr"] for group in run.optimizer.param_groups])
    assert seen == [pytest.approx([0.5 * cosine(step / 4, 0)] * 2) for step in range(4)]


def test_every_group_keeps_its_own_base_rate():
    optimizer = make_optimizer(lambda groups: torch.optim.SGD([groups[0] | {"lr": 0.1}, groups[1]], lr=1.0), mlp())
    for factor in (0.5, 0.25):  # not multiplied onto each other
        set_learning_rate(optimizer, factor)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.25]


# ---------------------------------------------------------------- parameter groups


def mlp():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1, bias=False))


def test_norm_parameters_and_biases_have_a_decay_of_their_own():
    model = mlp()
    weights, others = parameter_groups(model, 0.1, 0.2)
    assert weights["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.2
    assert weights["params"] == [model[0].weight, model[2].weight]
    assert others["params"] == [model[0].bias, model[1].weight, model[1].bias]


def test_frozen_parameters_are_left_out_and_so_is_an_empty_group():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[0].weight.requires_grad_(False)
    (group,) = parameter_groups(model, 0.1, 0.2)
    assert group["params"] == [model[1].weight]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("decay, norm_decay", [(0.5, 0.0), (0.0, 0.5)])
def test_the_decays_of_a_config_reach_the_parameters_they_are_for(optimizer, decay, norm_decay):
    overrides = (f"optimizer.weight_decay={decay}", f"optimizer.norm_weight_decay={norm_decay}", "model.bias=true")
    run = build.build(checked(f"optimizer={optimizer}", *overrides))
    decayed = {id(p): g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    assert len(decayed) == len(list(run.model.parameters()))
    for name, parameter in run.model.named_parameters():
        is_matrix = name.endswith("weight") and "norm" not in name
        assert decayed[id(parameter)] == (decay if is_matrix else norm_decay), name


def test_norms_and_biases_are_not_decayed_by_default():
    groups = build.build(checked("optimizer=adamw")).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]


@pytest.mark.parametrize("key", ["weight_decay", "norm_weight_decay"])
def test_a_negative_decay_is_refused(key):
    assert f"optimizer.{key}=-0.1" in refusal(f"optimizer.{key}=-0.1")


# ---------------------------------------------------------------- the same start for all


def initial_state(norm, seed=3, model="resnet"):
    cfg = checked(f"model={model}", f"norm={norm}", f"seed={seed}", "data.size=16", *BLOCKS.get(norm, ()))
    torch.manual_seed(int.from_bytes(os.urandom(4)))  # whatever the process drew before
    model = parts.make_model(cfg, parts.part(cfg, "data")())
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("model", MODELS)
def test_the_seed_gives_the_same_weights_whatever_the_norm(model):
    states = [initial_state(norm, model=model) for norm in NORMS]
    assert len(states) >= 3
    for other in states[1:]:
        assert list(other) == list(states[0])
        assert all(torch.equal(other[name], states[0][name]) for name in other)


def test_another_seed_gives_other_weights_and_building_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    cfg = checked("seed=1")
    build.build(cfg)
    assert torch.equal(before, torch.random.get_rng_state())
    one, two = initial_state("library", seed=1), initial_state("library", seed=2)
    assert all(not torch.equal(one[name], two[name]) for name in one)


def test_the_seed_gives_the_same_batches_whatever_the_norm_and_the_model():
    runs = [build.build(checked(f"norm={norm}", f"model={model}", "data.augment=crop_flip"))
            for norm, model in (("none", "lenet"), ("library", "lenet"), ("scratch", "mlp"))]  # fmt: skip
    for _ in range(9):  # two epochs of four steps and one
        (x, y), *others = [run.batches.next() for run in runs]
        assert all(torch.equal(x, each[0]) and torch.equal(y, each[1]) for each in others)


# ---------------------------------------------------------------- wrong names and types


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["+model.colour=red"], ["model.colour=red", "LeNet", "activation, bias"]),
        (["model.bias=5"], ["model.bias=5: true or false is expected"]),
        (["model=mlp", "model.hidden=3"], ["model.hidden=3: a list of whole numbers is expected"]),
        (["model=mlp", "model.hidden=[3,a]"], ['model.hidden=[3, "a"]: a list of whole numbers is']),
        (["model=resnet", "model.stem=vgg"], ["vgg", "imagenet", "cifar"]),
        (["model.activation=elu"], ["elu", "relu, sigmoid, tanh"]),
        (["+norm.groups=4"], ["norm.groups=4", "eps"]),
        (["norm.eps=tiny"], ["norm.eps=tiny: a number is expected"]),
        (["norm.affine=null"], ["norm.affine=null: true or false is expected"]),
        (["norm=scratch", "norm.running_var=odd"], ["odd", "biased"]),
        (["+data.colour=1"], ["data.colour=1", "size"]),
        (["data.augment=spin"], ["data.augment=spin", "crop_flip"]),
        (["data.valid=2.5"], ["data.valid=2.5"]),
        (["+optimizer.beta=0.9"], ["optimizer.beta=0.9", "betas"]),
        (["optimizer.lr=abc"], ["optimizer.lr=abc: a number is expected"]),
        (["optimizer.lr=true"], ["optimizer.lr=true: a number is expected"]),
        (["optimizer.lr=-1"], ["-1"]),
        (["optimizer.betas=[0.9]"], ["optimizer.betas=[0.9]: a list of 2 numbers is expected"]),
        (["optimizer=sgd", "optimizer.nesterov=true"], ["optimizer.nesterov=true", "give optimizer.momentum=0.9"]),
        (["optimizer=other"], ["optimizer._target_", "has to be given"]),
        (["+schedule.gamma=0.1"], ["schedule.gamma=0.1", "warmup_steps"]),
        (["schedule.warmup_steps=1.5"], ["schedule.warmup_steps=1.5: a whole number is expected"]),
        (["schedule=step", "schedule.milestones=[a]"], ['schedule.milestones=["a"]: a list of numbers is expected']),
        (["schedule.warmup_steps=-5"], ["schedule.warmup_steps=-5"]),
        (["schedule=step", "schedule.gamma=-1"], ["gamma", "-1"]),
        (["~norm"], ["norm: has to be given"]),
        (["+model={0:1}"], ["model={0:1}", "a name is expected"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_option_is_an_error_that_names_it(overrides, words):
    message = refusal(*overrides)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["batch_size=0"], "batch_size=0: has to be a whole number, 1 or more"),
        (["epochs=0"], "epochs=0"),
        (["steps=0"], "steps=0"),
        (["log_every=0"], "log_every=0"),
        (["eval_every=-1"], "eval_every=-1"),
        (["checkpoint_every=0"], "checkpoint_every=0"),
        (["seed=-1"], "seed=-1"),
        (["seed=9223372036854775808"], "seed=9223372036854775808"),
        (["threads=0"], "threads=0"),
        (["threads=many"], "threads=many"),
        (["precision=fp8"], "precision=fp8: not known; choose one of fp32, tf32, bf16, fp16"),
        (["device=tpu"], "device=tpu"),
        (["device=cpu:0"], "device=cpu:0"),
        (["device=cuda:x"], "device=cuda:x"),
        (["data.size=8"], "16x16 (data.size=16)"),
        (["batch_size=65"], "batch_size=65"),
        (["batch_size=1"], "batch_size=1: a batch of one image"),
        (["batch_size=63", "drop_last=false"], "drop_last=true"),  # 64 = 63 + 1
        (["data.limit=16", "data.valid=2000"], "data.valid=2000"),
        (["out="], "out="),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_no_run_can_have_is_refused_before_anything_is_trained(overrides, words):
    assert words in refusal(*overrides)


GHOST = ("model=mlp", "norm=ghost", "drop_last=false")


@pytest.mark.parametrize(
    "overrides, remedies",
    [
        ([*GHOST, "norm.virtual_batch=16", "data.limit=70"],
         "set norm.virtual_batch to a common divisor of 16 and 6 (2), or use drop_last=true"),
        ([*GHOST, "norm.virtual_batch=16", "data.limit=71"], "; use drop_last=true"),
        ([*GHOST, "norm.virtual_batch=8", "data.limit=20", "batch_size=64"],
         "set norm.virtual_batch to a common divisor of 64 and 20 (2, 4), or use a multiple of 8 training images"),
        (["drop_last=false", "data.limit=1", "batch_size=1"], "; use batch_size=2 or more and data.limit=2 or more ("),
        (["drop_last=false", "data.limit=1"], "; use 2 training images or more, there is only 1: data.limit=2 say ("),
        (["drop_last=false", "batch_size=63"], "; use drop_last=true or a batch_size that leaves no single image ("),
    ],
)  # fmt: skip
def test_a_last_batch_that_a_norm_cannot_take_is_refused_with_what_works(overrides, remedies):
    message = refusal(*overrides)
    assert remedies in message and message.count("drop_last=true") == remedies.count("drop_last=true")


def test_a_batch_of_one_image_is_fine_where_nothing_is_averaged():
    run = build.build(checked("norm=none", "batch_size=1"))
    run.step()
    assert run.batches.steps_per_epoch == 64


def test_epochs_do_not_matter_when_steps_are_given():
    assert build.build(checked("epochs=0", "steps=3")).total_steps == 3
    assert build.build(checked("epochs=3")).total_steps == 3 * 64 // 16


# ---------------------------------------------------------------- a config names parts and nothing else


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.hub.load",
        "torch.load",
        "torch.os.system",
        "torch.utils.cpp_extension.load_inline",
        "torchvision.datasets.MNIST",
        "bnexp.norms.os.system",
        "bnexp.data.mnist.os.system",
        "bnexp.store.run_folder.subprocess.run",
        "bnexp.cli.main.main",
        "bnexp.cli.train.train",
        "bnexp.store.checkpoint.save",
        "bnexp.store.run_folder.write_json",
        "bnexp.config.build.find_target",
        "bnexp.__main__.main",
        "bnexp.data.mnist.download",
        "bnexp",
        "system",
        "",
        ".os.system",
        "5",
    ],
)
def test_a_config_cannot_name_anything_but_a_part(group, target):
    message = refusal(f"{group}=other" if group == "optimizer" else "seed=0", f"{group}._target_='{target}'")
    assert message.startswith(f"{group}._target_={target}:")


@pytest.mark.parametrize(
    "overrides",
    [
        ["+model.extra={_target_: os.system, command: exit}"],
        ["+norm.extra=[{_target_: os.system}]"],
        ["+data.extra={a: {b: [{_target_: os.system}]}}"],
        ["model.activation={_target_: os.system, command: exit}"],
        ["+model._args_=[1]"],
        ["+optimizer._recursive_=false"],
    ],
    ids=" ".join,
)
def test_nothing_hides_inside_an_entry(overrides):
    assert "an entry names one _target_ and plain options" in refusal(*overrides)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the user's, with a norm that says when it is imported and one taken from elsewhere."""
    marker = tmp_path / "imported"
    (tmp_path / "strangers_norms.py").write_text(
        "import pathlib\nimport torch\nfrom os import system\nfrom torch import nn\n"
        f"pathlib.Path({str(marker)!r}).touch()\n\n"
        "class Twice(nn.Module):\n"
        "    def __init__(self, num_features, factor=2.0, activation='identity'):\n"
        "        super().__init__()\n"
        "        self.factor, self.noise = factor, torch.randn(9)\n\n"
        "    def forward(self, x, residual=None):\n"
        "        return x * self.factor\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield marker
    import sys

    sys.modules.pop("strangers_norms", None)


def test_a_package_is_neither_used_nor_imported_before_the_user_trusts_it(package: Path):
    named = ["norm=none", "norm._target_=strangers_norms.Twice"]
    assert "add allow=[strangers_norms]" in refusal(*named)
    assert not package.exists()
    run = build.build(checked(*named, "allow=[strangers_norms]", "+norm.factor=3"))
    assert run.model.norm1.factor == 3
    run.step()


def test_trust_in_a_package_does_not_reach_what_it_imports(package):
    message = refusal("norm=none", "norm._target_=strangers_norms.system", "allow=[strangers_norms]")
    assert "strangers_norms.system: not a part that norm= takes" in message


def test_a_norm_that_draws_random_numbers_does_not_move_the_weights(package):
    named = ("norm=none", "norm._target_=strangers_norms.Twice", "allow=[strangers_norms]")
    one, two = (build.build(checked(*each)).model for each in (named, ("norm=none",)))
    assert one.norm1.noise.std() > 0
    assert all(torch.equal(getattr(one, name).weight, getattr(two, name).weight) for name in ("conv1", "conv2"))


@pytest.mark.parametrize(
    "overrides",
    [["norm._target_=torch.nn.BatchNorm2d"], ["model._target_=torchvision.models.resnet18"]],
    ids=" ".join,
)
def test_what_cannot_be_called_as_the_group_is_called_is_an_error_and_no_traceback(overrides):
    extra = ["~model.bias", "~model.activation"] if "model" in overrides[0] else []
    assert "cannot be called as a" in refusal(*overrides, *extra)


@pytest.mark.parametrize(
    ("overrides", "threads"),
    [
        (["model=mlp"], 1),
        (["model=lenet"], 1),
        (["model=lenet", "batch_size=256"], 2),  # 256 * (281,640 + 50 * 10,498) / 11 layers, 8 million a thread
        (["model=densenet", "batch_size=16"], 1),  # more work, in 48 layers
        (["model=resnet"], 6),
        (["model=resnet", "batch_size=256"], 8),  # all there are
        (["model=resnet", "threads=3"], 3),
    ],
)
def test_a_run_gets_as_many_threads_as_its_work_keeps_busy(monkeypatch, overrides, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8))
    cfg = composed(overrides)
    source = parts.part(cfg, "data")()
    model = parts.make_model(cfg, source)
    assert build.count_threads(cfg, model, source.in_shape, torch.device("cpu")) == threads


@pytest.mark.parametrize("vary", ["[]", "[split]", "[seed,weights]", "[split,seed]", "[seed,seed]"])
def test_vary_takes_the_two_words_it_knows(vary):
    assert f"vary={vary}: not known; give [seed], or [seed,split]" in refusal(f"vary={vary}")


def test_the_seed_cannot_draw_validation_images_that_lie_in_a_folder(tmp_path):
    for split in ("train", "valid"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("L", (8, 8), i).save(tmp_path / split / name / f"{i}.png")
    words = ("data=folder", f"data.root={tmp_path}", "data.size=8", "batch_size=2", "vary=[seed,split]", "model=mlp")
    with pytest.raises(UserError, match="data.folder.Folder sets no validation images aside, so none can be drawn"):
        build.build(checked(*words))
    with pytest.raises(UserError, match="sets no validation images aside"):
        build.build(checked("data=digits", "data.valid=0", "vary=[seed,split]", "model=mlp"))


@pytest.mark.parametrize("words, shift", [([], True), (["model.bias=true"], False),
                                          (["model.bias=true", "+norm.bias=true"], True)])  # fmt: skip
def test_a_channel_without_a_norm_has_one_shift(words, shift):
    cfg = composed(["model=resnet", "norm=none", "data.size=16", *words])
    model = parts.make_model(cfg, parts.part(cfg, "data")())
    for block in (model, model.stage1.block1):
        assert (block.norm1.bias is not None) == shift
        assert (block.conv1.bias is not None) == ("model.bias=true" in words)
