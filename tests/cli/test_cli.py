"""The front door: what commands print and return, and what is said to somebody who mistypes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bnexp import __doc__ as about
from bnexp.cli.help import COMMANDS
from bnexp.config import start
from bnexp.config.choices import GROUPS, choices, conf_dir
from bnexp.store.run_folder import read_status

TINY = ("steps=1", "data.limit=64", "batch_size=32", "model=mlp", "threads=1")


@pytest.fixture
def refused(bnexp, capsys, tmp_path):
    """``refused(*arguments) -> message``: exit code 2, one line on stderr, and nothing made."""

    def call(*arguments):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        code = bnexp(*arguments)
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1, err
        assert err.startswith("bnexp: error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return call


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, given, remedies",
    [
        (["trian"], "trian: not a command", ["did you mean train?", "summary"]),
        (["model=lenet"], "model=lenet: not a command", ["train"]),
        (["train", "model=resnett"], "model=resnett", ["did you mean resnet?", "densenet, lenet, mlp, own, resnet"]),
        (["train", "norm=libary"], "norm=libary", ["did you mean library?", "none", "scratch"]),
        (["train", "data=mnsit"], "data=mnsit", ["did you mean mnist?"]),
        (["train", "norm=none,library"], "norm=none,library", ["-m", "key=[a,b]"]),
        (["train", "lrr=3"], "lrr", ["did you mean optimizer.lr?", "train --help"]),
        (["train", "optimizer.lrr=3"], "optimizer.lrr", ["did you mean optimizer.lr?"]),
        (["train", "optimiser=adam"], "optimiser", ["did you mean optimizer?"]),
        (["train", "optimizer.lr=abc"], "optimizer.lr=abc", ["a number is expected"]),
        (["train", "data.limit=1e3"], "data.limit=1000.0: not a whole number", ["1 or more"]),
        (["train", "-m", "data.limit=64,1e3"], "data.limit=1000.0: not a whole number", ["1 or more"]),
        (["train", "+optimizer.lr.x=1"], "optimizer.lr.x: nothing is inside optimizer.lr", ["write optimizer.lr=..."]),
        (["train", "probe=[shapes]", "++probe.shapes.layers.x=1"], "nothing is inside probe.shapes.layers", ["number"]),
        (["train", "sweep_order=x"], "sweep_order=x: not known", ["product or zip"]),
        (["train", "epochs=0"], "epochs=0", ["1 or more"]),
        (["train", "epochs=many"], "epochs=many", ["whole number"]),
        (["train", "epochs=1.5"], "epochs=1.5", ["whole number"]),
        (["train", "batch_size=0"], "batch_size=0", ["1 or more"]),
        (["train", "batch_size=5000"], "batch_size=5000", ["only 1293", "batch_size=1293 or less", "drop_last=false"]),
        (["train", "quiet=maybe"], "quiet=maybe: true or false is expected", []),
        (["train", "allow=os"], "allow=os: a list of texts, written allow=[a,b], is expected", []),
        (["train", "keep=[last]"], "keep=[last]: text is expected", []),
        (["train", "batch_size=null"], "batch_size=null: a whole number is expected", []),
        (["train", "batch_size=[1,2]"], "batch_size=[1,2]: a whole number is expected", []),
        (["train", "model=lenet", "norm=7"], "norm=7: a name is expected", ["none", "scratch"]),
        (["train", "probe=null"], "probe", ["activations"]),
        (["train", "steps"], "steps", ["name=value"]),
        (["train", "=3"], "3", [""]),
        (["train", "model.hidden=[1,2"], "model.hidden=[1,2", ["a list is expected"]),
        (["train", "--resolve"], "--resolve", ["--cfg"]),
        (["train", "data=mnist", "data.root=file"], "data.root=file", ["a file", "folder"]),
        (["train", "data=folder", "data.root=photos"], "photos", ["train"]),
        (["train", "data=folder"], "data.root", ["data.root=photos/"]),
        (["train", "study=mnist_lab"], "study", ["bnexp study NAME"]),
        (["train", "probe=[nothing]"], "probe=nothing", ["activations", "landscape"]),
        (["train", "model=lenet", "data.size=8"], "8x8", ["data.size=16"]),
        (["train", "out=file"], "out=file", ["is a file; choose a folder"]),
        (["train", "out=file/run"], "out=file/run", ["choose a folder"]),
        (["train", "out=taken"], "out=taken", ["already holds a run", "choose another folder"]),
        (["train", "out=/proc/run"], "out=/proc/run", ["choose another folder"]),
        (["summary", "model=resnett"], "model=resnett", ["did you mean resnet?"]),
        (["summary", "model=lenet", "data.size=8"], "8x8", ["data.size=16"]),
        (["summary", "lrr=3"], "lrr", ["did you mean"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_answered_by_what_was_given_and_a_remedy(arguments, given, remedies, refused, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/config.yaml").touch()
    message = refused(*arguments)
    assert [words for words in [given, *remedies] if words not in message] == [], message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_cuda_device_that_is_not_there(device, refused):
    message = refused("train", f"device={device}")
    assert f"device={device}" in message and "device=cpu or device=auto" in message


def test_a_folder_that_cannot_be_written(refused, tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("bnexp.store.run_folder.os.access", lambda path, mode: False)  # root may write everywhere
    assert "locked cannot be written to; choose another folder" in refused("train", "out=locked/run")


def test_an_image_that_is_none_is_named(refused, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / f"photos/train/{name}").mkdir(parents=True)
        (tmp_path / f"photos/train/{name}/1.png").write_text("no image")
    assert "photos/train/cat/1.png" in refused("train", "data=folder", "data.root=photos")


# ---------------------------------------------------------------- help and version


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command_and_all_that_the_groups_offer(arguments, bnexp, capsys):
    assert bnexp(*arguments) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for command, text in COMMANDS.items():
        assert lines[command].endswith(text)
    for group in GROUPS:
        offered = lines[f"{group}="].partition("=")[2].replace("|", " ").split()
        assert offered == sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
        assert len(offered) >= 3
    assert max(map(len, out.splitlines())) <= 120
    assert len([line for line in out.splitlines() if line.startswith("  bnexp ")]) >= 5, "examples"


def test_every_example_of_the_help_names_what_exists(bnexp, capsys):
    bnexp("--help")
    examples = [line.split("   ")[0].split() for line in capsys.readouterr().out.splitlines() if line[:8] == "  bnexp "]
    examples = [line for line in ("  ".join(words).split() for words in examples) if line]
    for _, command, *overrides in examples:
        assert command in COMMANDS
        for override in overrides:
            group, _, value = override.partition("=")
            assert group not in GROUPS or set(value.split(",")) <= set(choices(group))


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, flag, bnexp, capsys):
    assert bnexp(command, flag) == 0
    said = capsys.readouterr()
    assert re.search(rf"bnexp {command}\b", said.out.splitlines()[0])
    assert not said.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "resume: which run? Give the folder of an interrupted one"),
        (["run", "epochs=3"], "epochs=3: resume keeps the settings of the run and takes only"),
        (["run", "other"], "other: not a setting; write it as name=value"),
        (["nowhere"], "nowhere: no such folder; give that of a run"),
        (["."], ".: holds no run, there is no config.yaml in it"),
    ],
)
def test_what_cannot_be_resumed_is_refused(arguments, complaint, bnexp, capsys):
    assert bnexp("resume", *arguments) == 2
    assert capsys.readouterr().err.startswith(f"bnexp: error: {complaint}")


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "probes.jsonl", "checkpoint.pt", "checkpoint.damaged.pt", "best.pt", "events.out.tfevents.1"],
)
def test_what_is_left_of_a_run_is_not_overwritten_either(name, bnexp, capsys, tmp_path):
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / name).write_text("mine")
    assert bnexp("train", "model=mlp", "steps=1", "out=left") == 2
    complaint = f"out=left: already holds {name}, which is never overwritten; choose another folder"
    assert capsys.readouterr().err == f"bnexp: error: {complaint}\n"
    assert [each.name for each in (tmp_path / "left").iterdir()] == [name]


def test_the_version_is_that_of_the_package(bnexp, capsys):
    assert bnexp("--version") == 0
    assert re.fullmatch(r"bnexp \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_the_help_of_train_is_hydras_under_our_name(bnexp, capsys):
    assert bnexp("train", "--help") == 0
    out = capsys.readouterr().out
    assert "bnexp train" in out
    for setting in ("batch_size: 64", "log_every: 20", "drop_last: true", "model: ", "norm: "):
        assert setting in out


def test_the_config_can_be_looked_at_without_training(bnexp, capsys, tmp_path):
    assert bnexp("train", "--cfg", "job", "norm=scratch") == 0
    assert "_target_: bnexp.norms.scratch.BatchNorm" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what a run prints


def test_quiet_prints_the_folder_and_nothing_else(bnexp, capfd, tmp_path):
    assert bnexp("train", *TINY, "quiet=true") == 0
    out, err = capfd.readouterr()
    assert err == ""
    (line,) = out.splitlines()
    assert read_status(tmp_path / line)["status"] == "finished"


def test_a_run_prints_a_plain_line_per_epoch_and_the_folder_last(bnexp, capfd, tmp_path):
    arguments = ("data.limit=64", "batch_size=32", "model=mlp", "threads=1", "epochs=3", "out=here", "seed=7")
    assert bnexp("train", *arguments, "norm=none") == 0
    out, err = capfd.readouterr()
    assert err == ""
    *epochs, last = out.splitlines()
    assert last == "here"
    assert [re.search(r"epoch (\d)/3 ", line)[1] for line in epochs] == ["1", "2", "3"]
    metrics = read_status(tmp_path / "here")["metrics"]
    assert all(line.startswith("mlp-none-s7 ") for line in epochs)
    assert f"valid {metrics['loss/valid']:.4f} {metrics['accuracy/valid']:.2%}" in epochs[-1]
    assert f"test {metrics['loss/test']:.4f}" in epochs[-1] and "images/s" in epochs[-1]
    assert "\x1b" not in out, "no colours in a pipe"


def test_on_a_terminal_there_is_a_bar_and_a_closing_table(bnexp, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stdout for a terminal
    monkeypatch.setenv("COLUMNS", "160")
    assert bnexp("train", "data.limit=64", "batch_size=32", "model=mlp", "threads=1", "epochs=40", "out=here") == 0
    out = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capfd.readouterr().out)
    assert "epoch 40/40" in out and "images/s" in out and "100%" in out
    assert re.search(r"test\s.*\d\.\d{4}\s.*%", out)
    assert out.splitlines()[-1] == "here"


def test_an_out_folder_that_exists_and_is_empty_is_fine(bnexp, tmp_path):
    (tmp_path / "empty").mkdir()
    assert bnexp("train", *TINY, "quiet=true", "out=empty") == 0
    assert bnexp("train", *TINY, "quiet=true", "out=new/below/it") == 0
    assert read_status(tmp_path / "new/below/it")["status"] == "finished"


def test_the_module_runs_like_the_command_and_a_full_stdout_of_a_fresh_process_is_clean(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "bnexp", "train", *TINY, "norm=none", "out=here"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "here"


def test_what_running_statistics_cannot_do_is_said_before_training_and_once(bnexp, capfd, monkeypatch):
    monkeypatch.setattr(start, "PRINTED", set())
    few = ("data.limit=64", "batch_size=32", "model=mlp", "threads=1", "steps=2", "norm=library")
    told = "after the planned 2 steps the running statistics still hold 81% of their initial value"
    assert bnexp("train", *few, "out=one") == 0
    assert capfd.readouterr().err.count(told) == 1
    assert bnexp("train", *few, "out=quiet", "quiet=true") == 0
    assert told not in capfd.readouterr().err
    monkeypatch.setattr(start, "PRINTED", set())
    assert bnexp("compare", *few, "model.activation=tanh,relu", "seed=0,1", "out=four") == 0
    assert capfd.readouterr().err.count(told) == 1


# ---------------------------------------------------------------- summary


def test_summary_shows_where_norms_sit_at_any_size(bnexp, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert bnexp("summary", "model=resnet", "data.size=224") == 0
    out = capsys.readouterr().out
    assert "64, 112, 112" in out or "64x112x112" in out
    assert "BatchNorm over N, H, W" in out


def test_summary_reads_no_data(bnexp, capsys, tmp_path):
    assert bnexp("summary", "data=cifar10", "data.root=nowhere", "norm=none") == 0
    out = capsys.readouterr().out
    assert "conv1" in out and "BatchNorm" not in out
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- completion


@pytest.fixture
def complete(bnexp, capsys, monkeypatch):
    """``complete(line) -> words`` that bash would offer where the line ends."""

    def call(line, after=""):
        monkeypatch.setenv("COMP_LINE", line + after)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        assert bnexp("completion", "query") == 0
        return capsys.readouterr().out.split()

    return call


def test_commands_are_completed(complete):
    assert set(COMMANDS) <= set(complete("bnexp "))
    assert complete("bnexp tr") == ["train"]
    assert complete("bnexp --v") == ["--version"]
    assert complete("bnexp xyz") == []
    assert complete("bnexp tr", after="ain model=lenet") == ["train"], "only what stands before the cursor counts"


@pytest.mark.parametrize("command", ["train", "summary"])
def test_groups_and_values_are_completed_by_hydra(command, complete):
    assert set(complete(f"bnexp {command} mod")) == {"model=", "model."}
    assert complete(f"bnexp {command} model=") == [f"model={name}" for name in choices("model")]
    assert complete(f"bnexp {command} norm=scratch model=r") == ["model=resnet"]
    assert "norm=scratch" in complete(f"bnexp {command} model=lenet norm=s")
    assert complete(f"bnexp {command} optimizer.l") == ["optimizer.lr="]


def test_the_completion_script_is_bash(bnexp, capsys):
    assert bnexp("completion") == 0
    script = capsys.readouterr().out
    assert "complete -o default -F _bnexp bnexp" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_package_says_what_it_is_for():
    assert about and "batch normalization" in about
    assert Path(conf_dir() / "train.yaml").is_file()
