"""``bnexp train -m``: which jobs a command line makes, that all of them get done, once, and how it ends."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from bnexp.cli.main import main
from bnexp.cli.sweep import worker
from bnexp.cli.sweep.grid import Job, read_grid
from bnexp.config.compose import composed, session
from bnexp.store import settings
from bnexp.store.run_folder import read_status
from bnexp.train.run import Run

SMALL = ("model=mlp", "model.hidden=[8]", "data.size=8", "data.limit=100", "batch_size=20", "threads=1",
         "steps=30", "log_every=5", "checkpoint_every=3")  # fmt: skip
SWEEP = (*SMALL, "norm=none,scratch", "seed=0,1")
NAMES = ["none-s0", "none-s1", "scratch-s0", "scratch-s1"]


def grid(*arguments):
    with session():
        return read_grid(arguments)


def numbers(folder: Path) -> dict[str, list[dict]]:
    """Every run's metrics.jsonl without what the clock decides; JSON keeps every bit of a float."""
    rows = {path.parent.name: map(json.loads, path.read_text().splitlines()) for path in folder.glob("*/metrics.jsonl")}
    clocks = ("seconds", "time/step", "throughput/images_per_s")
    return {name: [{k: v for k, v in row.items() if k not in clocks} for row in each] for name, each in rows.items()}


def snapshot(folder: Path) -> dict[str, tuple]:
    """Content and time of every file; an empty lock file is opened anew by whoever looks whether it is held."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def statuses(folder: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["status"] for path in folder.glob("*/status.json")}


def writers(run: Path) -> list[str]:
    """The process of every start of a run: TensorBoard's files are one per start, with the process in the name."""
    return [path.name.rpartition(".")[2] for path in run.glob("events*")]


def start(*arguments: str, cwd: Path, program: Sequence[str] = ("-m", "bnexp")) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *program, *arguments], cwd=cwd, env=environment, **pipes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The numbers of SWEEP, run by one process from start to end."""
    folder = tmp_path_factory.mktemp("undisturbed") / "sweep"
    assert main(["train", "-m", *SWEEP, "quiet=true", f"out={folder}"]) == 0
    return numbers(folder)


def table(text: str) -> str:
    """The end table without its last column, the seconds."""
    return re.sub(r" +[\d.]+ *$", "", text[text.index("Sweep") : text.index("mean and 95%")], flags=re.MULTILINE)


# ---------------------------------------------------------------- what the jobs are


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["norm=none,scratch", "seed=0,1"], "none-s0 none-s1 scratch-s0 scratch-s1"),
        (["seed=range(3)"], "s0 s1 s2"),
        (["norm=choice(none,library)", "model=mlp"], "none library"),
        (["norm=glob(*a*)"], "library scratch"),
        (["optimizer.lr=1e-2,0.5", "model=mlp,lenet"], "lr0.01-mlp lr0.01-lenet lr0.5-mlp lr0.5-lenet"),
        (["norm=none,scratch", "optimizer.lr=1,2", "sweep_order=zip"], "none-lr1 scratch-lr2"),
        (["norm=none,scratch", "data.size=8,9", "seed=0,1", "sweep_order=zip"],
         "none-size8-s0 none-size8-s1 scratch-size9-s0 scratch-size9-s1"),
        (["seed=0,1", "sweep_order=zip"], "s0 s1"),
        (["model.hidden=[8],[8,4]"], "hidden8 hidden8_4"),
        (["optimizer.lr=0.1,0.10,0.100"], "lr0.1 lr0.1-1 lr0.1-2"),
        (["+model.x=a_2,'a 2',a_2-1,'a,2'"], "xa_2 xa_2-1 xa_2-1-1 xa_2-2"),
        (["norm=none,scratch", "norm=none", "seed=0", "seed=1,2"], "s1 s2"),
        (["norm._target_=own.norms.MyNorm,bnexp.norms.none.Shift"], "mynorm none"),
        (["norm=own", "norm.path=own.norms.MyNorm,own.norms.Other"], "mynorm other"),
        (["norm=library,own", "norm.path=own.MyNorm", "seed=0,1"], "library-s0 library-s1 mynorm-s0 mynorm-s1"),
        (["model=torchvision", "model.name=resnet18,densenet121"], "resnet18 densenet121"),
        (["norm=none"], "run"),
    ],
)  # fmt: skip
def test_lists_of_values_become_jobs_with_short_names_of_their_own(arguments, names):
    assert " ".join(point.name for point in grid(*arguments).points) == names


def test_every_job_gets_the_fixed_overrides_and_its_own_values():
    made = grid("batch_size=4", "seed=0,1", "out=x", "hydra/launcher=basic", "+optimizer.a=1,2")
    assert made.swept == ("seed", "optimizer.a") and made.out == "x" and made.hydra == ("hydra/launcher=basic",)
    assert made.points[1].overrides == ("batch_size=4", "seed=0", "+optimizer.a=2")
    assert [point.variant for point in made.points] == ["a1", "a2", "a1", "a2"]
    job = Job(*made.points[0], Path("it is/s0-a1"), None)
    assert job.arguments[-1] == "out='it is/s0-a1'"


def test_an_option_that_names_code_is_for_the_entries_that_have_it():
    made = grid("norm=library,own", "norm.path=own.MyNorm", "norm.args.eps=1")
    assert [point.overrides for point in made.points] == [
        ("norm=library",),
        ("norm.path=own.MyNorm", "++norm.args.eps=1", "norm=own"),
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["seed=range(0)"], "seed=range(0): an empty list"),
        (["norm=glob(zz*)"], "norm=glob(zz*): an empty list"),
        (["optimizer.lr=interval(0,1)"], "not a list of values; write optimizer.lr=a,b"),
        (["norm=none,library,scratch", "data.size=8,9", "sweep_order=zip"], "norm has 3, data.size has 2"),
        (["seed=0,1", "sweep_order=random"], "choose product or zip"),
        (["out=a,b"], "out=a,b: belongs to the sweep as a whole"),
        (["out='${seed}'", "seed=0,1"], "a sweep's folder cannot have quotes"),
        (['out="it\'s"', "seed=0,1"], "a sweep's folder cannot have quotes"),
        (["seed=0,1", "hydra/launcher=nonsense"], "hydra/launcher=nonsense: there is no such hydra/launcher"),
        (["batch_size=20,0"], "batch_size0: batch_size=0: has to be a whole number"),
        (["norm=none,nonsense"], "norm=nonsense: there is no such norm"),
        (["norm=scratch,none", "norm.eps=1"], "none: norm.eps: there is no such setting in the chosen entries"),
    ],
)
def test_one_bad_job_is_refused_before_any_work(bnexp, capsys, arguments, message):
    assert bnexp("train", "-m", *SMALL, "out=sweep", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(Path().iterdir())


@pytest.mark.parametrize("command", [("train", "-m"), ("train", "-m", "replicas=2"), ("compare", "optimizer.lr=0.1,1")])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["norm.track_running_stats=false", "data.valid=1"], "s0: norm.track_running_stats=false: evaluation on 1 "),
        (["batch_size=101"], "s0: batch_size=101: only 100 training images"),
        (["norm=ghost", "norm.virtual_batch=20", "drop_last=false", "data.limit=90"], "s0: norm.virtual_batch=20: "),
    ],
)
def test_splits_that_no_job_can_use_are_refused_before_any_work(bnexp, capsys, command, arguments, message):
    assert bnexp(*command, *SMALL, "out=sweep", "seed=0,1", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().iterdir())


# ---------------------------------------------------------------- how it ends


@pytest.mark.usefixtures("size17_fails")
def test_a_failing_job_stops_no_other_and_is_listed_with_its_reason_and_its_traceback(bnexp, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # so that no line is broken
    fixed = [each for each in SMALL if not each.startswith("model")]
    assert bnexp("train", "-m", *fixed, "model=lenet", "data.size=17,16", "seed=0,1", "out=sweep") == 1
    assert statuses(Path("sweep")) == {"size17-s0": "failed", "size17-s1": "failed"} | dict.fromkeys(
        ["size16-s0", "size16-s1"], "finished"
    )
    out = capsys.readouterr().out
    for seed in (0, 1):
        (line,) = [each for each in out.splitlines() if f"data.size=17 seed={seed}" in each]
        assert line.startswith("failed: ")
        assert "RuntimeError: out of luck" in line and f"(sweep/size17-s{seed}/status.json)" in line
        assert "Traceback" in read_status(Path(f"sweep/size17-s{seed}"))["traceback"]
    assert out.count("Sweep") == 1 and out.endswith("\nsweep\n")


def test_the_end_table_holds_a_row_per_variant_with_mean_and_interval_over_seeds(bnexp, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert bnexp("train", "-m", *SWEEP, "out=sweep") == 0
    out = capsys.readouterr().out
    assert max(map(len, table(out).splitlines())) <= 80
    values = [numbers(Path("sweep"))[f"none-s{seed}"][-1]["accuracy/test"] for seed in (0, 1)]
    mean = 100 * sum(values) / 2
    half = 12.7062 * 100 * abs(values[0] - values[1]) / 2  # t(0.975; 1) times the standard error of two values
    n, shown, interval = re.search(r"none +(\d) +([\d.]+).*\n +±([\d.]+)", table(out)).groups()
    assert (n, shown) == ("2", f"{mean:.2f}")
    assert float(interval) == pytest.approx(half, abs=0.006)  # two digits are shown
    assert bnexp("train", "-m", *SWEEP, "out=sweep", "quiet=true") == 0
    assert capsys.readouterr().out == "sweep\n"


def test_a_folder_may_be_called_almost_anything(bnexp):
    assert bnexp("train", "-m", *SMALL, "steps=1", "seed=0,1", "quiet=true", "out='a, b = [c] (d)'") == 0
    (folder,) = Path().iterdir()
    assert folder.name == "a, b = [c] (d)"
    assert statuses(folder) == {"s0": "finished", "s1": "finished"}


def test_divergence_is_a_result_and_not_a_failure(bnexp, capsys):
    assert bnexp("train", "-m", *SMALL, "norm=none", "optimizer.lr=0.01,1e30", "optimizer=sgd", "out=sweep") == 0
    assert statuses(Path("sweep")) == {"lr0.01": "finished", "lr1e+30": "diverged"}
    out = capsys.readouterr().out
    assert "div." in out and re.search(r"lr=1e\+30 +0 +1/1 ", out) and "failed" not in out
    before = snapshot(Path("sweep"))
    assert bnexp("train", "-m", *SMALL, "norm=none", "optimizer.lr=0.01,1e30", "optimizer=sgd", "out=sweep") == 0
    assert snapshot(Path("sweep")) == before, "a diverged run was run again"


# ---------------------------------------------------------------- the same command again


def test_what_is_finished_is_left_alone_and_shown_again(bnexp, capsys, undisturbed):
    assert bnexp("train", "-m", *SWEEP, "out=sweep") == 0
    first, before = capsys.readouterr().out, snapshot(Path("sweep"))
    assert numbers(Path("sweep")) == undisturbed
    assert bnexp("train", "-m", *SWEEP, "out=sweep", "threads=2", "quiet=false") == 0
    assert snapshot(Path("sweep")) == before
    assert table(capsys.readouterr().out) == table(first)


def step_that(act, monkeypatch, at: int, seed: int):
    """Make the runs of one seed do ``act()`` instead of the step after step ``at``."""
    original = Run.step

    def step(run):
        if run.num_steps == at and run.batches._orders.initial_seed() == seed:
            act()
        original(run)

    monkeypatch.setattr(Run, "step", step)


def test_what_failed_is_tried_once_per_start_and_goes_on_from_its_checkpoint(bnexp, undisturbed):
    tries = []

    def fail():
        tries.append(1)
        if len(tries) > 9:
            raise KeyboardInterrupt  # an endless loop, broken off
        raise RuntimeError("out of luck")

    with pytest.MonkeyPatch.context() as patch:
        step_that(fail, patch, at=13, seed=1)
        for start_number in (1, 2):
            assert bnexp("train", "-m", *SWEEP, "quiet=true", "out=sweep") == 1
            assert len(tries) == 2 * start_number, "both runs of seed 1, once each"
    failed = read_status(Path("sweep/none-s1"))
    assert failed["error"] == "RuntimeError: out of luck" and "in fail" in failed["traceback"]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        step_that(lambda: seen.append("before the checkpoint"), patch, at=11, seed=1)
        step_that(lambda: seen.append("after"), patch, at=12, seed=1)
        assert bnexp("train", "-m", *SWEEP, "quiet=true", "out=sweep") == 0
    assert seen == ["after", "after"]
    assert numbers(Path("sweep")) == undisturbed


def test_a_disk_that_takes_nothing_more_fails_the_job_and_ends_the_sweep(bnexp, capsys, monkeypatch):
    from bnexp.store import run_folder

    original, tries = run_folder.write_json, []

    def write_json(path, content):
        if path.parent.name == "none-s1":
            tries.append(path)
            raise OSError(28, "No space left on device") if len(tries) < 9 else KeyboardInterrupt  # an endless loop
        original(path, content)

    monkeypatch.setattr("bnexp.store.run_folder.write_json", write_json)
    assert bnexp("train", "-m", *SWEEP, "quiet=true", "out=sweep") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert statuses(Path("sweep")) == {name: "finished" for name in NAMES if name != "none-s1"}


@pytest.mark.parametrize(
    "first, second, message",
    [
        (["seed=0,1"], ["seed=0,1", "batch_size=10"], "batch_size is 20 there and 10 here"),
        (["seed=0,1"], ["seed=0,1,2"], "s2 only here"),
        (["seed=0,1"], ["seed=0"], "s0 only there"),
        (["+optimizer.momentum=0.9"], [], "optimizer.momentum is 0.9 there and missing here"),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused_saying_what_differs(bnexp, capsys, first, second, message):
    fixed = (*SMALL, "steps=1", "optimizer=other", "optimizer._target_=torch.optim.RMSprop", "out=sweep")
    assert bnexp("train", "-m", *fixed, *first) == 0
    before = snapshot(Path("sweep"))
    assert bnexp("train", "-m", *fixed, *second) == 2
    assert message in capsys.readouterr().err
    assert snapshot(Path("sweep")) == before


def test_a_sweep_from_before_a_setting_existed_goes_on_with_the_settings_default(bnexp, capsys):
    sweep = ("train", "-m", *SMALL, "steps=1", "seed=0,1", "quiet=true", "out=sweep")
    assert bnexp(*sweep) == 0
    stored = json.loads(Path("sweep/sweep.json").read_text())
    for job in stored["jobs"].values():
        del job["engine"], job["keep"]
    Path("sweep/sweep.json").write_text(json.dumps(stored))
    assert bnexp(*sweep) == 0
    assert bnexp(*sweep, "keep=all") == 2
    assert "keep is last there and all here" in capsys.readouterr().err


def test_a_single_run_or_a_file_is_no_place_for_a_sweep(train, bnexp, capsys):
    run = train(*SMALL, "steps=1")
    Path("file").touch()
    before = snapshot(Path())
    assert bnexp("train", "-m", *SMALL, "seed=0,1", f"out={run.name}") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert bnexp("train", "-m", *SMALL, "seed=0,1", "out=file") == 2
    assert "is a file" in capsys.readouterr().err
    assert snapshot(Path()) == before


@pytest.mark.parametrize("command", [["train", "-m"], ["compare"]], ids=["sweep", "compare"])
@pytest.mark.parametrize("theirs", ["bands/notes", "comparison.md", "run/status.json", "norm-none/thesis.pdf"])
def test_no_sweep_is_begun_where_something_else_would_be_replaced_or_counted(theirs, command, bnexp, capsys):
    Path("place", theirs).parent.mkdir(parents=True)
    Path("place", theirs).write_text("mine")
    before = snapshot(Path())
    assert bnexp(*command, *SMALL, "norm=none,library", "steps=1", "out=place") == 2
    complaint = f"out=place: holds {theirs.partition('/')[0]} already; choose a new folder, or an empty one"
    assert capsys.readouterr().err == f"bnexp: error: {complaint}\n"
    assert bnexp(*command, *SMALL, "norm=none,library", "steps=1", "out=") == 2
    assert "out=: names no folder" in capsys.readouterr().err
    assert snapshot(Path()) == before


def test_a_log_may_lie_where_a_sweep_is_begun(bnexp):
    Path("sweep").mkdir()
    Path("sweep/log.txt").write_text("mine")
    assert bnexp("train", "-m", *SMALL, "steps=1", "seed=0,1", "out=sweep") == 0
    assert Path("sweep/log.txt").read_text() == "mine"


# ---------------------------------------------------------------- several at once


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_launcher_runs_jobs_side_by_side_and_takes_up_what_was_interrupted(bnexp, tmp_path, undisturbed, launcher):
    package = f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher"
    pytest.importorskip(package, reason=f"the {launcher} launcher of Hydra is not installed")
    sweep = [each for each in SWEEP if not each.startswith("threads=")]  # which is for the launcher to decide
    sweep += ["norm=none", "out=sweep", "quiet=true"]
    with pytest.MonkeyPatch.context() as patch:
        step_that(lambda: os.kill(os.getpid(), signal.SIGINT), patch, at=16, seed=0)
        assert bnexp("train", "-m", *sweep) == 130
    options = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    process = start("train", "-m", *sweep, f"hydra/launcher={launcher}", *options, cwd=tmp_path)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert numbers(Path("sweep")) == {name: undisturbed[f"none-{name}"] for name in ("s0", "s1")}
    processes = {str(os.getpid()), *writers(Path("sweep/s0")), *writers(Path("sweep/s1"))}
    assert len(processes) == 3, "each in a process of its own"
    assert "threads: '1'" in Path("sweep/s1/config.yaml").read_text()
    before = snapshot(Path("sweep"))
    assert bnexp("train", "-m", *sweep, f"hydra/launcher={launcher}", *options) == 0
    assert snapshot(Path("sweep")) == before


def test_jobs_on_two_gpus_take_turns_and_stay_one_variant(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices, variants = [], []
    for num in range(3):
        cfg = composed([*SMALL, "device=auto", "threads=1"])
        worker.share_machine(cfg, OmegaConf.create({"job": {"num": num}, "launcher": {}}))
        devices.append(cfg.device)
        variants.append(settings.numbers(OmegaConf.to_container(cfg)))
    assert devices == ["cuda:0", "cuda:1", "cuda:0"]
    assert variants[0] == variants[1] == variants[2] and variants[0]["device"] == "cuda"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_the_job_before_is_freed_before_the_next(device, monkeypatch):
    """A run refers to itself, so that only Python's collector frees it; torch's allocator does not call that."""

    class Itself:
        def __init__(self):
            self.own = self.__init__

    monkeypatch.setattr(worker.parts, "find_device", lambda name: torch.device(device))
    gc.disable()
    try:
        last = weakref.ref(Itself())
        worker.cached_datasets(composed(SMALL))
        assert (last() is None) == (device == "cuda")
    finally:
        gc.enable()


def test_a_plus_before_a_key_changes_neither_what_it_is_nor_a_folders_name(bnexp):
    made = grid("seed=0,1", "++batch_size=2,3", "++sweep_order=zip", "++out=e7", "++hydra.verbose=true")
    assert (made.out, made.hydra, made.swept) == ("e7", ("++hydra.verbose=true",), ("seed", "batch_size"))
    assert [each.name for each in grid("++seed=0,1").points] == ["s0", "s1"]
    assert grid("++seed=0,1", "norm=none").points[0].overrides == ("norm=none", "++seed=0")
    assert grid("++seed=0,1", "seed=3").swept == ()
    assert bnexp("train", "-m", *SMALL, "seed=0,1", "++sweep_order=bogus") == 2
