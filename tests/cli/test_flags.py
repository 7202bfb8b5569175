"""The flags of the commands that compose a config: each works where it makes sense, and is refused elsewhere."""

import itertools
import pwd
from pathlib import Path

import pytest

from bnexp.store.run_folder import read_status

TINY = ("model=mlp", "data.limit=64", "batch_size=16", "steps=1", "threads=1", "quiet=true")


@pytest.fixture
def mine(tmp_path):
    """A folder of the user's own yamls: a norm and a main config."""
    (tmp_path / "own conf/norm").mkdir(parents=True)
    loose = "_target_: bnexp.norms.scratch.BatchNorm\n_partial_: true\neps: 0.1\n"
    (tmp_path / "own conf/norm/loose.yaml").write_text(loose)
    (tmp_path / "own conf/mine.yaml").write_text("defaults: [train, override norm: loose, _self_]\nbatch_size: 8\n")
    return "own conf"


def test_a_norm_of_ones_own_is_trained(mine, bnexp, tmp_path):
    assert bnexp("train", "--config-dir", mine, *TINY, "norm=loose", "out=run") == 0
    assert "eps: 0.1" in (tmp_path / "run/config.yaml").read_text()
    assert bnexp("rerun", "run", "--config-dir", mine, "seed=1", "out=again") == 0
    assert bnexp("rerun", "run", "seed=2", "out=without") == 0
    assert "eps: 0.1" in (tmp_path / "without/config.yaml").read_text()


def test_a_main_config_of_ones_own_is_taken(mine, bnexp, tmp_path):
    assert bnexp("train", "--config-dir", mine, "--config-name", "mine", *TINY[:2], *TINY[3:], "out=run") == 0
    text = (tmp_path / "run/config.yaml").read_text()
    assert "eps: 0.1" in text and "batch_size: 8" in text


@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]], ids=len)
def test_a_sweep_takes_it_too_and_has_table_and_resume(mine, launcher, bnexp, capsys):
    sweep = ("train", "-m", "--config-dir", mine, *TINY[:-1], "norm=loose,none", "seed=0,1", "out=sweep", *launcher)
    assert bnexp(*sweep) == 0
    assert "loose" in capsys.readouterr().out
    assert {read_status(Path("sweep") / name)["status"] for name in ("loose-s0", "none-s1")} == {"finished"}
    before = {path: path.stat().st_mtime_ns for path in Path("sweep").glob("*/metrics.jsonl")}
    assert bnexp(*sweep) == 0, "and goes on where it was"
    assert len(before) == 4 and all(path.stat().st_mtime_ns == at for path, at in before.items())


def test_compare_summary_and_study_take_it(mine, bnexp, capsys, tmp_path):
    assert bnexp("compare", "--config-dir", mine, *TINY, "norm=loose,none", "out=compared") == 0
    assert (tmp_path / "compared/comparison.json").exists()
    assert bnexp("summary", "--config-dir", mine, "model=mlp", "norm=loose") == 0
    (tmp_path / "own.yaml").write_text(
        "title: t\nsource: s\ntakes: 1 s\nsettings: [model=mlp, data.limit=64, batch_size=16, steps=1]\n"
        "variants: {a: norm=loose, b: norm=none}\nexpect: [{says: x, of: a, tag: loss/test, above: 0}]\n"
    )
    assert bnexp("study", "own.yaml", "--config-dir", mine, "quiet=true", "out=studied") == 0


def test_bnexp_yaml_here_names_the_folder_of_entries(mine, bnexp, capsys, tmp_path):
    (tmp_path / "bnexp.yaml").write_text(f"config_dir: {mine}\n")
    assert bnexp("train", *TINY, "norm=loose", "out=run") == 0
    assert bnexp("resume", "run", "--config-dir", mine) == 2 and "nothing is left to do" in capsys.readouterr().err
    assert bnexp("train", "--config-dir", ".", *TINY, "norm=loose", "out=other") == 2, "the flag wins"
    for line in (["compare", "norm=loose,none"], ["train", "-m", "norm=loose,none"], ["rerun", "run"], ["summary"]):
        settings = ["model=mlp", "norm=loose"] if line == ["summary"] else [*TINY, f"out={line[0]}"]
        assert bnexp(*line, *(settings if line != ["rerun", "run"] else ["norm=loose", "seed=3"])) == 0


@pytest.mark.parametrize(
    "text, told",
    [
        ("config_dir: nowhere", "bnexp.yaml: config_dir: nowhere: no such folder"),
        ("config_dir: [a]", "bnexp.yaml: holds config_dir; one line is expected, config_dir: FOLDER"),
        ("norm: loose", "bnexp.yaml: holds norm; one line is expected"),
        ("config_dir: own conf\nseed: 1", "bnexp.yaml: holds config_dir, seed; one line is expected"),
        ("", "bnexp.yaml: cannot be read"),
        ("{", "bnexp.yaml: cannot be read"),
        ("config_dir: 12", "bnexp.yaml: config_dir: 12: no such folder"),
    ],
)
def test_a_bnexp_yaml_that_names_no_folder_is_refused(text, told, mine, bnexp, capsys, tmp_path):
    (tmp_path / "bnexp.yaml").write_text(text)
    assert bnexp("train", *TINY, "out=run") == 2
    err = capsys.readouterr().err
    assert told in err and len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "norm=loose"], "norm=loose: there is no such norm"),
        (["train", "--config-dir", "nowhere"], "--config-dir nowhere: no such folder"),
        (["train", "--config-dir", "own conf", "norm=lose"], "did you mean loose?"),
        (["train", "--config-name", "none_such"], "none_such"),
        (["train", "-m", "--cfg", "job", "seed=0,1"], "--cfg and --info show one config"),
        (["compare", "--cfg", "job", "norm=none,library"], "--cfg and --info show one config"),
        (["study", "mnist_lab", "--info", "defaults"], "--cfg and --info show one config"),
        (["rerun", "run", "--cfg", "job"], "--cfg and --info show one config"),
        (["resume", "run", "--cfg", "job"], "--cfg and --info show one config"),
        (["resume", "run", "-m"], "resume: unrecognized arguments: -m"),
        (["compare", "-m", "norm=none,library"], "several values need no flag"),
        (["train", "--resolve"], "belong to --cfg"),
        (["train", "--cfg", "nothing"], "--cfg"),
        (["train", "--info", "defaults", "lrr=3"], "lrr: there is no such setting"),
        (["train", "--info", "all", "norm=foo"], "norm=foo: there is no such norm"),
        (["train", "--info", "norm=none,library"], "--info"),
        (["train", "--info", "searchpath", "a,b"], "a,b: not a setting"),
        (["inspect", "run", "--config-dir", "x"], "--config-dir x (the config of a run is complete)"),
        (["train", "--no-such-flag"], "--no-such-flag"),
        (["train", "--experimental-rerun", "x"], "can hold code"),
        (["train", "hydra/sweeper=optuna"], "bnexp makes the jobs of a sweep itself"),
        (["train", "-m", "hydra/sweeper=optuna", "seed=0,1"], "bnexp makes the jobs of a sweep itself"),
        (["train", "-m", "hydra.job.chdir=true", "seed=0,1"], "name one with out=DIR"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_refused_before_any_work(arguments, words, mine, bnexp, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert bnexp(*arguments) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_config_that_moves_jobs_to_another_folder_is_refused(mine, bnexp, capsys, tmp_path):
    (tmp_path / "own conf/moves.yaml").write_text("defaults: [train, _self_]\nhydra: {job: {chdir: true}}\n")
    assert bnexp("train", "-m", "-cd", mine, "-cn", "moves", *TINY, "seed=0,1") == 2
    assert "hydra.job.chdir=True: bnexp makes the folders of its runs" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "summary"])
def test_the_config_can_be_looked_at(command, bnexp, capsys, tmp_path):
    assert bnexp(command, "--cfg", "job", "--package", "norm", "norm=group") == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["# @package norm", "_target_: bnexp.norms.group.GroupNorm"]
    assert bnexp(command, "--info", "defaults") == 0
    assert "norm/library" in capsys.readouterr().out
    assert bnexp(command, "--cfg", "job", "--resolve", "optimizer.lr=${seed}", "seed=3") == 0
    assert "lr: 3" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["report", "inspect"])
def test_a_tilde_in_a_path_is_the_home_folder(command, bnexp, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert bnexp(command, "~/runs") == 2
    assert f"{tmp_path}/home/runs: no such folder" in capsys.readouterr().err
    assert bnexp("train", *TINY, "out=~/runs") == 0
    assert bnexp(command, "~/runs", "--out=~/out") == 0
    assert any((tmp_path / "home/out").iterdir()) and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "line",
    [
        "train out=~nobodyhere/x",
        "train -m seed=0,1 out=~nobodyhere/x",
        "train --config-dir ~nobodyhere/x",
        "rerun ~nobodyhere/x",
        "resume ~nobodyhere/x",
        "study ~nobodyhere/x.yaml",
        "bench out=~nobodyhere/x",
        "report . --out ~nobodyhere/x",
        "inspect . --out ~nobodyhere/x",
    ],
)
def test_the_home_of_an_unknown_user_is_refused(line, bnexp, tmp_path, capsys):
    assert bnexp(*line.split()) == 2
    err = capsys.readouterr().err
    assert "~nobodyhere/x" in err and "there is no user nobodyhere" in err
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_does_not_take_a_folder_called_tilde_for_the_home(bnexp, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert bnexp("train", "-m", *TINY, "seed=0,1", "out='./~/x'") == 0
    assert (tmp_path / "~/x/s1/status.json").exists() and not (tmp_path / "home").exists()


@pytest.mark.parametrize("many", [(), ("-m", "norm=none,library")], ids=len)
def test_a_setting_taken_out_is_refused_before_any_folder(many, bnexp, tmp_path, capsys):
    assert bnexp("train", *many, *TINY, "~batch_size") == 2
    assert "~batch_size: a setting of every run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


JOBS, FOLDERS = "bnexp makes the jobs of a sweep itself", "bnexp makes the folders of its runs"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["hydra.job={chdir:true}"], FOLDERS),
        (["hydra={job:{chdir:true}}"], FOLDERS),
        (["++hydra.job={chdir:true}"], FOLDERS),
        (["-m", "hydra.sweep={dir:foo}"], FOLDERS),
        (["-m", "++hydra.job={chdir:true}"], FOLDERS),
        (["-m", "hydra.sweeper._target_=os.system"], JOBS),
        (["-m", "hydra.sweeper={params:{seed:3}}"], JOBS),
        (["-m", "+hydra/sweeper=optuna"], JOBS),
        (["++hydra/sweeper="], JOBS),
        (["~hydra/sweeper"], JOBS),
        (["~hydra.mode"], JOBS),
        (["~hydra.job.chdir"], FOLDERS),
        (["-m", "hydra.sweeper.max_batch_size=1"], JOBS),
        (["+hydra.sweeper.params.seed=5"], JOBS),
        (["-m", "+hydra.sweeper.params.seed=0,1"], "hydra.sweeper.params.seed=0,1: " + JOBS),
        (["hydra.mode=MULTIRUN"], JOBS),
        (["-m", "hydra.mode=RUN"], JOBS),
        (["-m", "hydra.launcher._target_=x"], "choose one with hydra/launcher=NAME"),
        (["-m", "hydra.launcher=null"], "choose one with hydra/launcher=NAME"),
        (["-m", "~hydra/launcher"], "choose one with hydra/launcher=NAME"),
        (["-m", "hydra={launcher:null}"], "choose one with hydra/launcher=NAME"),
        (["-m", "hydra.verbose=true,false"], "holds for a sweep as a whole"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_bnexp_does_itself_is_not_left_to_hydra_however_it_is_written(arguments, words, bnexp, capsys, tmp_path):
    assert bnexp("train", *TINY, *arguments, *["seed=0,1"] * ("-m" in arguments)) == 2
    assert words in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "hydra, words",
    [
        ("sweeper: {params: {seed: '0,1'}}", JOBS),
        ("mode: MULTIRUN", JOBS),
        ("run: {dir: x}", FOLDERS),
        ("launcher: {_target_: os.system}", "hydra/launcher=NAME"),
    ],
    ids=str,
)
def test_a_main_config_leaves_it_to_bnexp_too(hydra, words, mine, bnexp, capsys, tmp_path):
    (tmp_path / "own conf/odd.yaml").write_text(f"defaults: [train, _self_]\nhydra: {{{hydra}}}\n")
    (tmp_path / "own conf/exp").mkdir()
    (tmp_path / "own conf/exp/odd.yaml").write_text(f"# @package _global_\nhydra: {{{hydra}}}\n")
    for odd in (["-cn", "odd"], ["+exp=odd"], ["-m", "seed=0,1", "+exp=odd"]):
        assert bnexp("train", "-cd", mine, *odd, *TINY) == 2
        assert words in capsys.readouterr().err and [each.name for each in tmp_path.iterdir()] == [mine]


@pytest.mark.parametrize("word", ["hydra.job.chdir=null", "hydra.job={chdir:null}"])
def test_the_jobs_of_a_sweep_stay_in_its_folder(word, bnexp, tmp_path):
    assert bnexp("train", "-m", *TINY, word, "seed=0,1", "out=many") == 0
    assert {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("status.json")} == {
        "many/s0",
        "many/s1",
    }


def test_a_sweep_takes_its_folder_and_order_from_a_main_config(mine, bnexp, tmp_path):
    (tmp_path / "own conf/placed.yaml").write_text("defaults: [train, _self_]\nout: 1e5\nsweep_order: zip\n")
    words = ("-cd", mine, "-cn", "placed", *TINY)
    assert bnexp("train", "-m", *words, "norm=none,library", "log_every=5,6") == 0
    assert bnexp("compare", *words, "norm=none,library", "out=compared") == 0
    runs = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("status.json")}
    assert runs == {"1e5/none-log_every5", "1e5/library-log_every6", "compared/none", "compared/library"}


def test_a_group_whose_name_begins_like_hydras_is_the_users(mine, bnexp, tmp_path):
    (tmp_path / "own conf/hydrafoo").mkdir()
    (tmp_path / "own conf/hydrafoo/fast.yaml").write_text("# @package _global_\nlog_every: 7\n")
    words = ("-cd", mine, *TINY, "+hydrafoo=fast")
    assert bnexp("train", *words, "out=one") == bnexp("train", "-m", *words, "seed=0,1", "out=many") == 0
    assert bnexp("rerun", "one", "-cd", mine, "out=again") == 0
    for run in ("one", "many/s0", "again"):
        assert "log_every: 7" in (tmp_path / run / "config.yaml").read_text()
        assert "+hydrafoo=fast" in read_status(tmp_path / run)["overrides"]


def test_what_hydra_does_by_itself_is_no_fault_of_a_main_config(mine, bnexp, tmp_path):
    parts = "schema, model: mlp, norm: none, data: digits, optimizer: sgd, schedule: constant, engine: eager, probe: []"
    parts += ", override hydra/hydra_logging: none, override hydra/job_logging: none, _self_"
    lines = "".join(f"  - {each}\n" for each in parts.split(", "))
    (tmp_path / "own conf/alone.yaml").write_text(f"defaults:\n{lines}")
    assert bnexp("train", "-cd", mine, "-cn", "alone", *TINY[1:], "hydra.job.chdir=false", "out=run") == 0


LINES = ("train", "train -m seed=0,1", "compare norm=none,library", "train resume=true", "bench")


@pytest.mark.parametrize("out, line, file", [
    *itertools.product(["~", "."], LINES, [".config/x"]),
    *itertools.product(["~/", "~somebody"], ["train"], [".bashrc", "notes.txt", "thesis/1.tex", ".lock"]),
])  # fmt: skip
def test_no_run_is_begun_among_the_files_of_a_home(out, line, file, bnexp, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    if out == "~somebody":
        monkeypatch.setenv("HOME", "/nowhere")
        somebody = pwd.getpwuid(0).__class__(("somebody", "x", 1, 1, "", str(tmp_path), "/bin/sh"))
        monkeypatch.setattr(pwd, "getpwall", lambda: [somebody])
        monkeypatch.setattr(pwd, "getpwnam", lambda name: somebody)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    words = line.split() if line == "bench" else [*line.split(), *TINY]
    assert bnexp(*words, f"out={out}") == 2
    told = f"holds {file.partition('/')[0]} already; choose a new folder, or an empty one"
    assert told in capsys.readouterr().err
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [tmp_path / file]


def test_a_run_in_an_empty_home_and_one_among_logs_are_begun(bnexp, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.txt").write_text("mine")
    (tmp_path / "home").mkdir()
    for out in ("~", "run"):
        assert bnexp("train", *TINY, f"out={out}") == 0
    assert read_status(tmp_path / "home")["status"] == read_status(tmp_path / "run")["status"] == "finished"
