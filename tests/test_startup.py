"""What stands between a command and its first step: what is imported, read and made, and how often in a sweep."""

import gc
import json
import os
import subprocess
import sys
from functools import wraps

import pytest
import torch
from omegaconf import OmegaConf

from bnexp.cli.sweep import worker
from bnexp.cli.sweep.jobs import SWEEP
from bnexp.config.compose import composed
from bnexp.data import digits
from bnexp.data.digits import Digits
from bnexp.optim import without_compiler
from bnexp.startup import quick_imports

# What a run has no use for, and takes from 0.1 s to several to import.
HEAVY = {"IPython", "PIL", "joblib", "matplotlib", "pandas", "scipy", "sklearn", "submitit", "sympy", "tensorflow",
         "torch._dynamo", "torch._inductor", "torchvision"}  # fmt: skip
FIRST_STEP = """
import gc, json, os, sys, time
from bnexp.cli import main, train
from bnexp.startup import quick_imports

def patched(cfg, overrides):
    with quick_imports():
        from bnexp.train.run import Run
    step = Run.step
    def stepped(run):
        step(run)
        seconds = time.process_time()
        print(json.dumps([sorted(sys.modules), gc.isenabled(), gc.get_freeze_count(), seconds]), flush=True)
        os._exit(0)
    Run.step = stepped
    return train_one(cfg, overrides)

train_one, train.train_one = train.train_one, patched
main.main(["train", *sys.argv[1:]])
"""


def child(code: str, *arguments: str, **environment: str) -> list:
    """What a fresh interpreter prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A folder of packages that are not installed everywhere; the working directory is another empty one."""
    for name in ("tensorflow", "pandas"):
        (tmp_path / f"site/{name}").mkdir(parents=True)
        (tmp_path / f"site/{name}/__init__.py").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])


def test_the_first_step_needs_little_more_than_torch_and_nothing_that_only_others_need(beside):
    modules, is_collecting, num_frozen, seconds = child(FIRST_STEP, "drop_last=false", "quiet=true", PYTHONPATH=beside)
    assert HEAVY & set(modules) == set()
    assert is_collecting and num_frozen > 100_000, "the import is kept from the search for garbage, and nothing after"
    alone = child("import json, time, torch; print(json.dumps(time.process_time()))")
    # Processor time, which others on the machine hardly lengthen: 1.3 times torch's import as this is written, and 3
    # times with scikit-learn and torch's compiler.
    assert seconds < 2 * alone


@pytest.mark.parametrize("norm", ["norm=renorm", "norm=ghost norm.virtual_batch=8"])
def test_checks_that_show_the_norms_a_batch_need_no_more_either(beside, norm):
    overrides = (*norm.split(), "drop_last=false", "batch_size=24", "data.limit=64", "optimizer=sgd", "quiet=true")
    modules, *_ = child(FIRST_STEP, *overrides, PYTHONPATH=beside)
    assert HEAVY & set(modules) == set()


# ---------------------------------------------------------------- optimizers

TWINS = """
import json, sys
import torch
from bnexp.optim import without_compiler

def train(kind, options, steps, state=None):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]
    optimizer = kind(weights, **options)
    if state is not None:
        optimizer.load_state_dict(state[1])
        for p, value in zip(weights, state[0]):
            p.data = value.clone()
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p ** 2).sum() for p in weights).backward()
        optimizer.step()
    return [p.detach().clone() for p in weights], optimizer.state_dict()

def flat(weights, state):
    values = [value for each in state["state"].values() for value in each.values()]
    return [torch.as_tensor(value) for value in weights + values], str(state["param_groups"])

asked = json.loads(sys.argv[1])
found = {}
for name, options in asked:
    kind = without_compiler(getattr(torch.optim, name))
    found[name] = train(kind, options, 3, train(kind, options, 3))
assert "torch._dynamo" not in sys.modules, "the compiler was imported"
for name, options in asked:
    kind = getattr(torch.optim, name)
    theirs = train(kind, options, 3, train(kind, options, 3))
    assert "torch._dynamo" in sys.modules, "torch does not import it any more: away with without_compiler"
    again = train(without_compiler(kind), options, 3, train(without_compiler(kind), options, 3))
    for ours in (found[name], again):
        (a, groups), (b, their_groups) = flat(*ours), flat(*theirs)
        assert groups == their_groups and len(a) == len(b) > 2, name
        assert all(torch.equal(x, y) for x, y in zip(a, b)), name
print(json.dumps("alike"))
"""
OPTIMIZERS = [
    ("Adam", {"fused": True}), ("AdamW", {"foreach": True}), ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("RMSprop", {}), ("Adagrad", {}), ("NAdam", {}), ("RAdam", {}), ("Adamax", {}), ("ASGD", {}), ("Rprop", {}),
    ("Adadelta", {}),
]  # fmt: skip


def test_optimizers_that_do_without_the_compiler_do_what_torchs_do_to_the_bit():
    assert child(TWINS, json.dumps(OPTIMIZERS)) == "alike"


def test_an_optimizer_that_torch_did_not_mark_is_left_alone():
    class Own(torch.optim.SGD):
        @wraps(torch.optim.SGD.zero_grad)
        def zero_grad(self, set_to_none=True):
            raise NotImplementedError

    for kind in (torch.optim.LBFGS, Own, lambda groups: None):
        assert without_compiler(kind) is kind
    quick = without_compiler(torch.optim.SGD)
    assert issubclass(quick, torch.optim.SGD) and quick is not torch.optim.SGD and quick.__name__ == "SGD"
    assert quick is without_compiler(torch.optim.SGD), "made once, because torch puts its hooks on the class"


def test_a_hook_and_a_profile_see_one_step_per_step():
    weight = torch.nn.Parameter(torch.ones(2))
    torch.optim.Rprop([weight])  # by now torch has put its hooks on that class
    optimizer, seen = without_compiler(torch.optim.Rprop)([weight]), []
    assert type(optimizer) is not torch.optim.Rprop
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    weight.sum().backward()
    optimizer.step()
    assert seen == [1]


# ---------------------------------------------------------------- data


def test_digits_are_read_by_scikit_learn_where_its_file_is_elsewhere(monkeypatch):
    ours = Digits(valid=0).load()
    monkeypatch.setattr(digits, "FILE", "nowhere.csv.gz")
    theirs = Digits(valid=0).load()
    assert torch.equal(ours.train.images, theirs.train.images) and torch.equal(ours.train.labels, theirs.train.labels)


def test_a_sweep_loads_a_dataset_once_and_never_holds_two(bnexp, monkeypatch):
    load, seen = Digits.load, []

    def counted(source):
        assert worker.LAST == {}, "another dataset is still held"
        seen.append(source.in_shape[1])
        return load(source)

    monkeypatch.setattr(Digits, "load", counted)
    sweep = ("data.size=8,9", "optimizer.lr=0.1,0.01", "model=mlp", "model.hidden=[4]", "steps=1", "threads=1")
    assert bnexp("train", "-m", *sweep, "data.limit=64", "quiet=true", "out=sweep") == 0
    assert seen == [9, 8, 9], "the splits are checked first, and the first job takes the data loaded last"
    assert worker.LAST == {}, "nothing is held after the sweep"


# ---------------------------------------------------------------- threads of jobs side by side


@pytest.fixture
def one_of_four(tmp_path):
    """``one_of_four(*overrides) -> config`` of a job of a sweep of four."""
    (tmp_path / SWEEP).write_text(json.dumps({"jobs": dict.fromkeys("abcd", {})}))
    return lambda *overrides: composed(["device=cpu", f"out={tmp_path}/a", *overrides])


@pytest.mark.parametrize(
    ("launcher", "overrides", "threads"),
    [
        ({"n_jobs": 2}, ["model=resnet", "batch_size=256"], "8"),
        ({"n_jobs": 2}, ["model=mlp"], "1"),  # too little work for two
        ({"n_jobs": -1}, ["model=resnet", "batch_size=256"], "4"),  # no more than four jobs, whatever the cores
        ({"n_jobs": -14}, ["model=resnet", "batch_size=256"], "5"),  # all cores but 13
        ({"n_jobs": 16}, ["model=resnet", "batch_size=256"], "4"),
        ({}, ["model=resnet", "batch_size=256"], "1"),  # who knows how many there are beside it
        ({}, ["model=resnet", "threads=3"], "3"),
    ],
)
def test_jobs_side_by_side_share_the_cores(one_of_four, monkeypatch, launcher, overrides, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    cfg = one_of_four(*overrides)
    worker.share_machine(cfg, OmegaConf.create({"launcher": launcher, "job": {"num": 0}}))
    assert cfg.threads == threads


# ---------------------------------------------------------------- garbage


def test_imports_after_torchs_leave_the_search_for_garbage_alone():
    before = gc.get_freeze_count()
    with quick_imports():
        assert gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == before
