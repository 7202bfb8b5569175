"""A stranger's folder cannot harm whoever looks at it: every command ends, in words, and writes where it was told."""

import csv
import io
import json
import os
import pickle
import re
import shutil
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from watch import OBEYED, watching, within

from bnexp.cli.main import main
from bnexp.store import checkpoint
from bnexp.store.untrusted import MOST_LINE, MOST_YAML, as_file_name, printable, read_yaml

TINY = ("model=mlp", "model.hidden=[4]", "data.limit=64", "batch_size=16", "threads=1", "quiet=true", "log_every=1")
SWEPT = ("norm=none,library", "seed=0,1", "steps=2")
TRAIN = (*TINY, "eval_every=2", "probe=[activations]", "probe.activations.every=2")
RESUME, REPORT, RERUN = ("resume", "run"), ("report", "run"), ("rerun", "run", "quiet=true", "out=outputs/again")
INSPECT = ("inspect", "run", "--out", "outputs/inspected")
OUT = (*REPORT, "--out", "outputs/report")
SECRET = "swordfish"
ESCAPE = "\x1b[2J\x1b]0;pwned\x07"  # clears the screen and renames the window
MARKUP = "[/] [red]x[/red] |a|b| <b>![x](http://evil/)</b> `c` \n# d"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a run that is ``finished``, one that is ``stopped`` at step 4 of 6, and ``sweep``, of four runs."""
    folder = tmp_path_factory.mktemp("runs")
    commands = (("train", *TRAIN, "steps=4", "out=finished"), ("train", "-m", *TINY, *SWEPT, "out=sweep"))
    for command in commands:
        GlobalHydra.instance().clear()
        with chdir(folder):
            assert main(list(command)) == 0
    GlobalHydra.instance().clear()
    shutil.copytree(folder / "finished", folder / "stopped")
    status = json.loads((folder / "stopped/status.json").read_text())
    (folder / "stopped/status.json").write_text(json.dumps(status | {"status": "interrupted"}))
    config = (folder / "stopped/config.yaml").read_text()
    (folder / "stopped/config.yaml").write_text(config.replace("\nsteps: 4", "\nsteps: 6"))
    return folder


@pytest.fixture
def run(runs, tmp_path) -> Callable[[str], Path]:
    """``run(name)`` is a fresh copy of what :func:`runs` made under that name, in run/; outside lives a canary."""

    def copy(name: str) -> Path:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(runs / name, tmp_path / "run", symlinks=True)
        return tmp_path / "run"

    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/canary").write_text("alive")
    return copy


@pytest.fixture
def attack(bnexp, tmp_path, capfd, monkeypatch):
    """``attack(*arguments) -> (exit code, stdout, stderr)``: a command that must come to a decent end."""
    monkeypatch.setenv("SECRET", SECRET)

    def call(*arguments: str, asks_for_help: bool = False) -> tuple[int, str, str]:
        capfd.readouterr()
        decoded = Path(os.environ["XDG_CACHE_HOME"], "bnexp")
        with watching(tmp_path / "run", tmp_path / "outputs", decoded) as strays, within(20):
            code = bnexp(*arguments)
        out, err = capfd.readouterr()
        assert not strays
        assert code in (0, 1, 2, 3)
        assert "raceback" not in err + out
        assert not OBEYED.search(out + err), ascii(out + err)
        assert SECRET not in out + err
        if code == 2 and not asks_for_help:
            lines = [line for line in err.splitlines() if not line.lower().startswith("bnexp: warning: ")]
            assert len(lines) == 1 and lines[0].startswith("bnexp: error: ") and out == "", (out, err)
        return code, out, err

    yield call
    if (tmp_path / "outside").exists():
        assert [each.name for each in (tmp_path / "outside").iterdir()] == ["canary"]
        assert (tmp_path / "outside/canary").read_text() == "alive"


def refused(answer: tuple[int, str, str], *words: str) -> None:
    """Assert that it was bad input, and that the message says so."""
    code, _, err = answer
    assert code == 2 and [word for word in words if word not in err] == [], answer


# ---------------------------------------------------------------- config.yaml


def config(key: str, value: str) -> Callable[[str], str]:
    """The config with another value, as it stands in YAML."""

    def change(text: str) -> str:
        changed = re.sub(rf"^( *){key}:.*", lambda found: f"{found[1]}{key}: {value}", text, count=1, flags=re.M)
        assert changed != text
        return changed

    return change


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{','.join(9 * [f'*{chr(ord(b) - 1)}'])}]\n" for b in "bcdefgh")
CONFIGS = {
    "empty": (lambda _: "", "no settings"),
    "a list": (lambda _: "[1, 2]", "no settings"),
    "binary": (lambda _: "\0\1\2" * 99, "config.yaml"),
    "cut short": (lambda text: text + "x: {", "config.yaml"),
    "two documents": (lambda text: f"{text}---\nseed: 1\n", "config.yaml"),
    "a key twice": (lambda text: f"{text}seed: 5\n", "seed stands twice"),
    "a billion laughs": (lambda text: text + LAUGHS, "refers to another place"),
    "a loop": (lambda text: f"{text}x: &x [*x]\n", "refers to another place"),
    "10 MB of nesting": (lambda _: "probe: " + "[" * 5_000_000 + "]" * 5_000_000, f"{MOST_YAML:,} bytes"),
    "nesting": (lambda _: "probe: " + "[" * 40_000, "nest"),
    "nested tables": (lambda _: "{a: " * 20_000, "nest"),
    "nested lists": (lambda _: "- " * 40_000, "nest"),
    "10 MB of text": (lambda text: f"{text}x: {'a' * 10_000_000}\n", f"{MOST_YAML:,} bytes"),
    "an object": (lambda text: f"{text}x: !!python/object/apply:os.system [touch outside/bad]\n", "is not allowed"),
    "the environment": (config("seed", "${oc.env:SECRET}"), "seed: holds ${"),
    "the environment in text": (config("device", '"${oc.env:SECRET}"'), "device: holds ${"),
    "a target from the environment": (config("_target_", "${oc.env:SECRET}"), "_target_: holds ${"),
    "a resolver": (config("device", '"${hydra:runtime.cwd}"'), "holds ${"),
    "itself": (config("device", "${device}"), "holds ${"),
    "an escape": (config("device", '"\\e[2J"'), "control characters (\\x1b[2J)"),
    "an escape as a name": (lambda text: text + '"\\e[2J": 1\n', "control characters"),
    "a number as a name": (lambda text: f"{text}5: 6\n", "5 cannot be the name"),
    "a huge number": (config("seed", "9" * 5000), "digits"),
    "a huge number in hexadecimal": (config("seed", "0x" + "f" * 5000), "64 bits"),
    "a huge number in base 60": (config("seed", "1" + ":1" * 20_000), "64 bits"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_no_run_wrote_is_refused_by_name(name, run, attack):
    change, words = CONFIGS[name]
    for folder, command in (("stopped", RESUME), ("finished", REPORT)):
        path = run(folder) / "config.yaml"
        path.write_text(change(path.read_text()))
        refused(attack(*command), "run", "config.yaml", words)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("_target_", "os.system", "_target_=os.system: configs may name classes of bnexp"),
        ("_target_", "torch.hub.load", "_target_=torch.hub.load: not a part that model= takes"),
        ("_target_", "bnexp.cli.main.main", "_target_=bnexp.cli.main.main: not a part that model= takes"),
        ("_target_", "17", "_target_=17"),
        ("seed", "one", "run/config.yaml: seed=one: a whole number is expected"),
        ("batch_size", "null", "run/config.yaml: batch_size=None: a whole number is expected"),
        ("drop_last", "perhaps", "run/config.yaml: drop_last=perhaps: true or false is expected"),
        ("keep", "[last]", "run/config.yaml: keep=['last']: text is expected"),
        ("lr", "fast", "optimizer.lr=fast: a number is expected"),
        ("hidden", "{a: 1}", "model.hidden"),
        ("threads", "'100000000'", "threads=100000000"),
        ("threads", '"²"', "threads=²"),
        ("probe", "hello", "probe"),
        ("batch_size", "9999999999999999", "batch_size=9999999999999999"),
    ],
)
def test_a_config_is_as_strict_in_a_folder_as_on_the_command_line(key, value, words, run, attack):
    path = run("stopped") / "config.yaml"
    text = re.sub(rf"^( *){key}:.*\n( *- .*\n|  .*\n)*" if key in ("hidden", "probe") else rf"^( *){key}:.*\n",
                  rf"\g<1>{key}: {value}\n", path.read_text(), count=1, flags=re.M)  # fmt: skip
    path.write_text(f"{text}allow: [os]\n" if "allow:" not in text else text.replace("allow: []", "allow: [os]"))
    for command in (RESUME, RERUN, INSPECT):
        refused(attack(*command), words)
    setting = {"_target_": "model._target_", "lr": "optimizer.lr", "hidden": "model.hidden"}.get(key, key)
    refused(attack("train", *TRAIN, f"{setting}={value}", "allow=[os]", "out=outputs/typed"), setting)


@pytest.mark.parametrize("width", [10**15, 10**18])
def test_what_cannot_fit_into_memory_is_said_to_be_too_large(width, run, attack):
    path = run("stopped") / "config.yaml"
    path.write_text(path.read_text().replace("  - 4\n", f"  - {width}\n"))
    code, _, err = attack(*RERUN)
    assert code == 1 and "too large for the memory here" in err


@pytest.mark.parametrize("model", ["model=densenet", "model=resnet model.widths=[4]"])
def test_no_model_is_built_for_ever(model, attack):
    refused(attack("train", *model.split(), "model.blocks=[1000000000]"), "1,000,000,000", "give fewer")


# ---------------------------------------------------------------- what lies where a run's files should


def make_sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**30)


THINGS = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a loop": lambda path: path.symlink_to(path.name),
    "a link outside": lambda path: path.symlink_to("../outside/canary"),
    "a link to what is not yet": lambda path: path.symlink_to("../outside/new"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "1 GB of nothing": make_sparse,
}
FILES = ("config.yaml", "status.json", "metrics.jsonl", "probes.jsonl", ".lock", "checkpoint.pt", ".status.json.new",
         ".checkpoint.pt.new")  # fmt: skip


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", FILES)
def test_nothing_is_waited_for_and_nothing_is_written_through_a_link(name, thing, run, attack):
    for folder, command in (("stopped", RESUME), ("finished", REPORT)):
        path = run(folder) / name
        path.unlink(missing_ok=True)
        THINGS[thing](path)
        began = time.perf_counter()
        code, out, err = attack(*command)
        assert time.perf_counter() - began < 15
        if command is RESUME and thing != "1 GB of nothing":
            refused((code, out, err), "run")
        if command is REPORT and thing in ("a pipe", "a device") and name in FILES[:3]:
            refused((code, out, err), f"{name}: not a regular file, but a pipe or a device")


def test_the_same_command_again_does_not_follow_a_link_either(run, attack):
    path = run("stopped") / "metrics.jsonl"
    path.unlink()
    path.symlink_to("../outside/canary")
    command = ("train", *TRAIN, "steps=6", "out=run", "resume=true")
    refused(attack(*command), "run/metrics.jsonl: a link")


def test_an_inspection_does_not_follow_a_link_out_of_the_folder(run, attack):
    run("finished").joinpath("inspect").symlink_to("../outside")
    refused(attack("inspect", "run"), "run/inspect: a link", "--out DIR")


def test_a_pipe_for_a_checkpoint_is_not_waited_for(run, attack):
    path = run("finished") / "checkpoint.pt"
    path.unlink()
    os.mkfifo(path)
    refused(attack(*INSPECT), "run/checkpoint.pt: not a checkpoint that can be read (not a file)")


# ---------------------------------------------------------------- status.json


STATUSES = {
    "no JSON": (lambda s: "{", 2),
    "a list": (lambda s: "[]", 2),
    "nested": (lambda s: '{"a":' * 100_000, 2),
    "nested, and whole": (lambda s: json.dumps(s)[:-1] + ', "x": ' + "[" * 60 + "]" * 60 + "}", 2),
    "20 MB": (lambda s: json.dumps(s | {"x": "x" * 20_000_000}), 2),
    "of no status": (lambda s: json.dumps(s | {"status": [1]}), 2),
    "metrics a list": (lambda s: json.dumps(s | {"metrics": [1]}), 2),
    "overrides a number": (lambda s: json.dumps(s | {"overrides": 5}), 2),
    "a step in words": (lambda s: json.dumps(s | {"step": "many"}), 2),
    "seconds in words": (lambda s: json.dumps(s | {"seconds": "many"}), 2),
    "more seconds than a float holds": (lambda s: json.dumps(s | {"seconds": 10**400}), 2),
    "a number of 5,000 digits": (lambda s: json.dumps(s)[:-1] + f', "x": {"9" * 5000}' + "}", 2),
    "not a number": (lambda s: json.dumps(s | {"status": "running", "host": "x", "heartbeat": float("nan")}), None),
    "an escape": (lambda s: json.dumps(s | {"status": ESCAPE, "error": ESCAPE, "overrides": [ESCAPE]}), None),
    "markup": (lambda s: json.dumps(s | {"status": "failed", "error": "[/] [red]", "overrides": ["[/]"]}), None),
    "an escape for a host": (lambda s: json.dumps(s | {"status": "running", "host": ESCAPE, "heartbeat": 1.0}), None),
    "half a character": (lambda s: json.dumps(s | {"overrides": ["norm=\ud800"], "error": "\ud800"}), None),
}  # fmt: skip


@pytest.mark.parametrize("name", STATUSES)
def test_a_status_that_no_run_wrote_is_an_error_or_shown_as_it_is(name, run, attack):
    change, code = STATUSES[name]
    for folder, command in (("stopped", RESUME), ("finished", REPORT)):
        path = run(folder) / "status.json"
        path.write_text(change(json.loads(path.read_text())))
        found = attack(*command)
        assert code in (found[0], None), found


# ---------------------------------------------------------------- metrics.jsonl and probes.jsonl


def line(step=2, **values) -> str:
    return json.dumps({"step": step, "epoch": 1.0, "seconds": 1.0} | values)


READINGS = {
    "broken in the middle": (f"{line(1)}\n{{oops\n{line(2)}\n", "line 2 is not JSON"),
    "no JSON at all": ("\0" * 999 + "\n\n", "line 1 is not JSON"),
    "lists": ("[1]\n[2]\n", "not a JSON object with a step"),
    "no step": ('{"loss/valid": 1}\n', "not a JSON object with a step"),
    "a step in words": ('{"step": "a"}\n', "not a JSON object with a step"),
    "a negative step": ('{"step": -5}\n', "not a JSON object with a step"),
    "a step that is true": ('{"step": true}\n', "not a JSON object with a step"),
    "a step of 400 digits": (f'{{"step": {"9" * 400}}}\n', "not a JSON object with a step"),
    "a huge integer": (f'{{"step": 1, "loss/valid": {"9" * 400}}}\n', "not a number that can be used"),
    "an integer of 5,000 digits": (f'{{"step": 1, "loss/valid": {"9" * 5000}}}\n{line(2)}\n', "line 1 is not JSON"),
    "words": (line(**{"accuracy/valid": "low"}), '"low" is not a number'),
    "nested": ('{"step": 1, "x": ' + "[" * 100_000 + f"\n{line(2)}\n", "line 1 is not JSON"),
    "a line without end": ("x" * (MOST_LINE + 1), f"longer than {MOST_LINE:,} bytes"),
    "NaN and infinity": (line(**{"loss/valid": float("nan"), "accuracy/valid": float("inf")}), None),
    "1e999": ('{"step": 1, "loss/valid": 1e999, "loss/train": -1e999}', None),
    "the largest numbers": ("\n".join(line(i, **{"loss/valid": (-1) ** i * 1.7e308, "accuracy/valid": 1e308})
                                      for i in range(4)), None),
    "the largest steps": (f"{line(2**53 - 2, **{'loss/valid': 1})}\n{line(2**53 - 1, **{'loss/valid': 1})}", None),
    "an escape for a layer": (line(**{f"activation/{ESCAPE}/p{n}": n / 100 for n in (15, 50, 85)}), None),
    "a layer of 100,000 letters": (line(**{f"activation/{'x' * 100_000}/p{n}": n / 100 for n in (15, 50, 85)}), None),
}  # fmt: skip


@pytest.mark.parametrize("name", READINGS)
def test_readings_that_no_run_wrote_are_named_or_shown(name, run, attack):
    text, words = READINGS[name]
    for folder, command in (("stopped", RESUME), ("finished", OUT if words is None else REPORT)):
        path = run(folder) / "metrics.jsonl"
        path.write_text(text)
        config = path.with_name("config.yaml")
        config.write_text(config.read_text().replace("keep: last", "keep: best"))  # which has them read
        code, out, err = attack(*command)
        if command is RESUME or words is None:
            assert code == 0, err
        else:
            refused((code, out, err), "metrics.jsonl", words)


HISTOGRAMS = [
    {"edges": [1]}, {"edges": "abc"}, {"edges": None}, {"edges": {"a": 1}}, {"edges": [2, 1, 0]},
    {"edges": [0, 1, None]}, {"edges": [0], "counts": []}, {"counts": [10**400, 1]}, {"counts": [-5, 1]},
    {"counts": [0, 0]}, {"counts": 7},
]  # fmt: skip


def test_histograms_that_no_probe_wrote_are_named(run, attack):
    path = run("finished") / "probes.jsonl"
    whole = {"step": 4, "tag": "activation/norm1", "edges": [0, 1, 2], "counts": [1, 2]}
    for change in HISTOGRAMS:
        path.write_text(json.dumps(whole | change))
        refused(attack(*OUT), "run/probes.jsonl: unreadable")
    path.write_text(json.dumps(whole | {"tag": f"activation/{ESCAPE}", "edges": [-1e308, 0, 1e308]}))
    assert attack(*OUT)[0] == 0


# ---------------------------------------------------------------- names


NAMES = (ESCAPE, MARKUP, "\ud800", "\u202egnp.exe", "../../../outside/evil", "/etc/evil", "x" * 99_999)


@pytest.mark.parametrize("name", NAMES)
def test_names_from_a_folder_break_no_table(name, run, attack, tmp_path):
    run("sweep")
    shutil.rmtree(tmp_path / "run/library-s1")
    for path in (tmp_path / "run").glob("library-*/status.json"):
        status = json.loads(path.read_text())
        path.write_text(json.dumps(status | {"overrides": [f"norm={name}", "seed=0"]}))
    (tmp_path / "run/none-s1").rename(tmp_path / "run" / name[:50].replace("/", "|").replace("\ud800", "\udcff"))
    assert attack(*OUT)[0] == 0
    files = {path.suffix: path.read_text() for path in (tmp_path / "outputs/report").glob("comparison.[jms]*")}
    labels = [each["label"] for each in json.loads(files[".json"])["variants"]]
    assert labels[0] == "none" and not any(OBEYED.search(label) or len(label) > 200 for label in labels)
    ElementTree.fromstring(files[".svg"])
    for table in files[".md"].split("\n## ")[1:]:
        rows = [row for row in table.splitlines() if row.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, rows
    assert not re.search(r"(?<!\\)(\]\(http|<b>|`c)", files[".md"])
    table = list(csv.DictReader(io.StringIO(attack(*REPORT, "--csv")[1])))
    assert {row["variant"] for row in table} == set(labels) and all(None not in row for row in table)


def test_the_bands_of_a_comparison_stay_in_its_folder_whatever_a_variant_is_called(run, attack, tmp_path, runs):
    shutil.copytree(runs / "finished", run("sweep") / "guest")
    path = tmp_path / "run/guest/status.json"
    for name in ("../../outside/evil", "/tmp/evil", ".."):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"overrides": [f"norm={name}"]}))
        assert attack("compare", *TINY, *SWEPT, "out=run")[0] == 0
    assert not list((tmp_path / "outside").glob("events*"))


@pytest.mark.parametrize("name", ["a\nb", ESCAPE, "x" * 300, "/dev/null/x"])
def test_a_folder_that_cannot_be_named_so_is_refused_before_any_work(name, attack, monkeypatch):
    monkeypatch.setattr("bnexp.config.build.build", lambda *_: 1 / 0)
    refused(attack("train", *TINY, f'out="{name}"'), "folder")
    refused(attack("train", "-m", *TINY, *SWEPT, f'out="{name}"'), "folder")


@pytest.mark.parametrize("word", ["out=\udcff", "\udcff", "out=a\0b"])
@pytest.mark.parametrize("command", ["train", "report", "resume", "rerun", "inspect", "study", "summary", "compare"])
def test_arguments_that_are_no_text_are_refused(word, command, attack):
    refused(attack(command, word), "control characters" if "\0" in word else "not UTF-8 text")


def test_folders_in_each_other_are_not_looked_into_for_ever(attack, tmp_path):
    (tmp_path / "run" / "/".join(60 * "d")).mkdir(parents=True)
    for command in ("report", "inspect"):
        refused(attack(command, "run"), "more than 50 levels of folders")


# ---------------------------------------------------------------- checkpoints


class Evil:
    def __reduce__(self):
        return os.system, ("touch outside/pwned",)


def sealed(state: object, path: Path) -> None:
    """A checkpoint with the sum that ours have, which a stranger can compute too."""
    torch.save(state, path)
    with open(path, "r+b") as file:
        checkpoint.seal(file)


@pytest.mark.parametrize("command", [RESUME, INSPECT, ("train", *TRAIN, "steps=6", "out=run", "resume=true")])
@pytest.mark.parametrize("kind", ["whole", "inside", "plain pickle", "torchscript"])
def test_a_checkpoint_that_carries_code_executes_none_of_it(kind, command, run, attack):
    path = run("stopped") / "checkpoint.pt"
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    else:
        whole = torch.load(path, weights_only=True)
        sealed(Evil() if kind == "whole" else whole | {"model": whole["model"] | {"extra": Evil()}}, path)
    code, _, err = attack(*command)
    assert code == 2 and "run/checkpoint.pt: not a checkpoint that can be read" in err
    assert kind not in ("whole", "inside") or "system, which is code; none was run" in err


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_not_unpacked(run, attack):
    path = run("stopped") / "checkpoint.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("archive/data/0", "w") as entry:
        for _ in range(256):
            entry.write(bytes(2**20))
    with open(path, "r+b") as file:
        checkpoint.seal(file)
    refused(attack(*RESUME), "more than its size")


@pytest.mark.parametrize("key, value", [("optimizer", {}), ("optimizer", "x"), ("batches", 5), ("meter", None),
                                        ("num_steps", 10**30), ("num_steps", -5), ("scaler", 7)])  # fmt: skip
def test_a_checkpoint_with_other_things_in_it_is_refused_by_name(key, value, run, attack):
    path = run("stopped") / "checkpoint.pt"
    sealed(torch.load(path, weights_only=True) | {key: value}, path)
    code, _, err = attack(*RESUME)
    assert code == 0 if key == "scaler" else code == 2 and "run/checkpoint.pt: not" in err


# ---------------------------------------------------------------- sweeps and studies


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"jobs": [1]}', '{"jobs": {"a": 1}}', '{"a":' * 9999, None])
def test_a_sweep_that_nobody_began_is_refused(content, run, attack):
    path = run("sweep") / "sweep.json"
    if content is None:
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_text(content)
    refused(attack("train", "-m", *TINY, *SWEPT, "out=run"), "out=run: holds no sweep that can go on")


@pytest.mark.parametrize("name", ["library-s1", "bands"])
def test_a_sweep_does_not_go_on_through_a_link(name, run, attack):
    shutil.rmtree(run("sweep") / name, ignore_errors=True)
    Path("run", name).symlink_to("../outside")
    for command in (("train", "-m"), ("compare",)):
        refused(attack(*command, *TINY, *SWEPT, "out=run"), f"run/{name}: a link")


def test_what_is_written_beside_runs_does_not_follow_a_link_either(run, attack, tmp_path):
    folder = run("sweep")
    for name in (f".comparison.md.{os.getpid()}", "comparison.json", "comparison.png"):
        (folder / name).symlink_to("../outside/canary")
    attack(*REPORT, "--out", "run")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(STUDY))
    (tmp_path / "outputs/own").mkdir(parents=True)
    (tmp_path / "outputs/own/.study.json.new").symlink_to("../../outside/canary")
    assert attack("study", "own.yaml", "out=outputs/own")[0] == 0


def test_a_guest_among_the_runs_of_a_study_breaks_none_of_its_tables(attack, tmp_path, runs):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(STUDY | {"epochs": True}))
    assert attack("study", "own.yaml", "out=outputs/own", "quiet=false")[0] == 0
    guest = shutil.copytree(runs / "finished", tmp_path / "outputs/own/guest")
    status = json.loads((guest / "status.json").read_text())
    (guest / "status.json").write_text(json.dumps(status | {"overrides": [f"norm={ESCAPE}[/]"]}))
    readings = {"loss/train": 1, "accuracy/train": 1, "loss/valid": 1}
    (guest / "metrics.jsonl").write_text('{"step": 1}\n' + line(**readings))
    assert attack("study", "own.yaml", "out=outputs/own", "quiet=false")[0] == 0


STUDY = {
    "title": "t", "source": "s", "takes": "1 s", "settings": [*TINY, "steps=2"],
    "variants": {"a": "norm=none", "b": "norm=library"},
    "expect": [{"says": "x", "of": "b", "tag": "loss/valid", "above": -9}],
}  # fmt: skip
EXPECTED = STUDY["expect"][0]
STUDIES = {
    "laughs": (f"title: t\n{LAUGHS}", "refers to another place"),
    "nesting": ("title: " + "[" * 50_000, "nest"),
    "the environment": ({"settings": ["seed=${oc.env:SECRET}"]}, "holds ${"),
    "where to write": ({"settings": ["out=../outside/x"]}, "not allowed in a study"),
    "where to write, another way": ({"variants": {"a": ["++out=../outside/x"]}}, "not allowed in a study"),
    "whom to trust": ({"settings": ["allow=[os]"]}, "not allowed in a study"),
    "what Hydra starts": ({"settings": ["+hydra.callbacks.x._target_=os.system"]}, "not allowed in a study"),
    "what Hydra starts, in a form": ({"forms": {"quick": {"settings": ["hydra/launcher=x"]}}}, "not allowed in a"),
    "what Hydra starts, swept": ({"sweep": {"hydra.launcher.x": [1]}}, "not allowed in a study"),
    "a role outside": ({"variants": {"../../outside/x": "norm=none"}}, "cannot name a folder"),
    "a role that is a folder's parent": ({"variants": {"..": "norm=none"}}, "cannot name a folder"),
    "a role of markup": ({"variants": {"[/]": "norm=none"}}, "cannot name a folder"),
    "an escape": ({"title": ESCAPE}, "control characters"),
    "a number for a variant": ({"variants": {"a": 5}}, "not a setting"),
    "no list of expectations": ({"expect": "x"}, "expect"),
    "a limit in words": ({"expect": [EXPECTED | {"above": "high"}]}, "above cannot be high"),
    "half a range": ({"expect": [EXPECTED | {"where": {"loss/train": [1]}}]}, "where cannot be"),
    "a target": ({"variants": {"a": "model._target_=os.system", "b": []}}, "configs may name"),
    "seeds without end": ({"seeds": 10**12}, "more than 10,000 values"),
    "runs without end": ({"sweep": {"optimizer.lr": list(range(5000))}}, "more than 10,000"),
    "a range without end": ({"settings": ["seed=shuffle(range(0,99999999999))"]}, "more than 10,000 values"),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_a_strangers_study_says_neither_where_to_write_nor_what_to_run(name, attack, run, tmp_path):
    content, words = STUDIES[name]
    text = content if isinstance(content, str) else yaml.safe_dump(STUDY | content, sort_keys=False)
    (tmp_path / "own.yaml").write_text(text)
    refused(attack("study", "own.yaml"), words)


def test_markup_in_a_study_is_printed_as_it_is(attack, tmp_path):
    content = STUDY | {"title": "[/] t", "epochs": True, "expect": [EXPECTED | {"says": "[red]x[/red] [/]"}]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    code, out, err = attack("study", "own.yaml", "quiet=false")
    assert code == 0 and "[/] t" in out and "[red]x[/red] [/]" in out, err


# ---------------------------------------------------------------- images


def png(width: int, height: int, depth: int = 1) -> bytes:
    """A PNG of one colour that is a thousandth of its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width * depth + 7) // 8)
    pixels = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def image(mode: str, format: str, size: tuple[int, int] = (40, 30), **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, format, **options)
    return file.getvalue()


def animation() -> bytes:
    return image("P", "GIF", save_all=True, append_images=[Image.new("P", (40, 30), i) for i in range(5)])


BAD_IMAGES = {
    "a bomb": lambda: png(30_000, 30_000),
    "a smaller bomb": lambda: png(9_600, 9_600),
    "truncated": lambda: image("RGB", "PNG", (300, 300))[:300],
    "text": lambda: b"hello",
    "empty": lambda: b"",
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a program": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(outside/x) (w) file closefile\n%%EOF\n",
    "text that unpacks to 200 MB": lambda: png(9, 9)[:33] + compressed_text() + png(9, 9)[33:],
}
GOOD_IMAGES = {
    "CMYK": lambda: image("CMYK", "JPEG"),
    "16 bits": lambda: image("I;16", "PNG"),
    "1 bit": lambda: image("1", "PNG"),
    "a palette with transparency": lambda: image("P", "PNG", transparency=bytes(range(256))),
    "animated": animation,
    "turned": lambda: image("RGB", "JPEG", exif=turned()),
    "wrongly named": lambda: image("RGB", "WEBP"),
    "1 pixel high": lambda: image("RGB", "PNG", (9000, 1)),
}


def compressed_text() -> bytes:
    content = b"a\0\0" + zlib.compress(bytes(200_000_000))
    return struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PHOTOS = "out=outputs/x"


@pytest.fixture
def photos(tmp_path):
    """``photos(content, name, of)`` makes photos/ with one more image in the class ``of``; an error if it has a bug."""

    def make(content: bytes | Callable, name: bytes = b"0.png", of: bytes = b"cat") -> tuple[str, ...]:
        train = os.fsencode(tmp_path / "photos/train")
        for each in (of, b"dog"):
            os.makedirs(os.path.join(train, each), exist_ok=True)
            for i in range(4):
                Path(os.fsdecode(os.path.join(train, each, b"%d.jpg" % i))).write_bytes(image("RGB", "JPEG"))
        path = Path(os.fsdecode(os.path.join(train, of, name)))
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        return ("train", *TINY, "data=folder", "data.root=photos", "data.size=8", "batch_size=4", "steps=1", PHOTOS)

    return make


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_cannot_be_shown_is_named(name, photos, attack):
    command = photos(BAD_IMAGES[name]())
    for more in ((), ("data.channels=3",)):  # without it, the header is looked at before
        why = "cannot identify image file" if name == "a program" else ""  # and not that something else could run it
        refused(attack(*command, *more), "photos/train/cat/0.png: cannot be decoded as an image", why)


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_every_kind_of_picture_is_a_picture(name, photos, attack):
    assert attack(*photos(GOOD_IMAGES[name]()))[0] == 0


NO_IMAGE = {"a folder": "a folder without images", "1 GB of nothing": "cannot be decoded as an image"} | dict.fromkeys(
    ("a pipe", "a loop", "a link to what is not yet", "a device"), "a pipe, a device, or a link to a folder or nothing"
)


@pytest.mark.parametrize("thing", NO_IMAGE)
def test_what_is_no_file_is_no_image(thing, photos, attack):
    assert NO_IMAGE.keys() == THINGS.keys() - {"a link outside"}
    refused(attack(*photos(THINGS[thing])), "photos/train/cat/0.png: ", NO_IMAGE[thing])


@pytest.mark.parametrize("of", [b"a\nb", b"\x1b[2J", b"\xff", "\u202e".encode()])
def test_a_class_that_cannot_be_printed_is_refused(of, photos, attack):
    refused(attack(*photos(image("RGB", "PNG"), of=of)), "not UTF-8" if of == b"\xff" else "control characters")


@pytest.mark.parametrize("of", ["漢字", "[red]x", "a|b", "=1+1", "x" * 255, " "])
def test_a_class_may_be_called_anything_else(of, photos, attack, tmp_path):
    command = photos(image("RGB", "PNG"), of=of.encode())
    assert attack(*command)[0] == 0
    if of == "[red]x":
        code, out, _ = attack("inspect", "outputs/x")
        assert code == 0 and "true class [red]x" in out, _


@pytest.mark.parametrize("name", [b"a\nb.png", b"\x1b[2J.png", b"\xff.png", b"x" * 251 + b".png"])
def test_an_image_may_be_called_anything(name, photos, attack):
    assert attack(*photos(image("RGB", "PNG"), name))[0] == 0
    refused(attack(*photos(b"none", name), "out=outputs/y"), "cannot be decoded as an image")


# ---------------------------------------------------------------- what the tools of all this do


def test_text_for_a_terminal_holds_nothing_that_it_would_obey():
    assert printable("a\x1b[2J\x9b1m\nb\u202ec\ud800 é漢") == r"a\x1b[2J\x9b1m\nb\u202ec\ud800 é漢"
    assert printable("x" * 50, 10) == "x" * 9 + "…"
    assert as_file_name("../a/b\x1b") == "__a_b_x1b"
    assert as_file_name("..") != ".." and len(as_file_name("é" * 300).encode()) <= 255


def test_yaml_is_read_as_omegaconf_reads_it(tmp_path):
    values = ("1e-3", "1.0e-05", "1e5", "-.inf", "2020-01-01", "0x10", "'1e-3'", "1_000", "1:30", "null", "yes", "[a]")
    text = "".join(f"key{i}: {value}\n" for i, value in enumerate(values))
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml") == OmegaConf.to_container(OmegaConf.create(text))


def test_a_fault_of_ours_is_one_line_and_its_traceback_a_file(bnexp, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("bnexp.cli.inspect.summary", lambda arguments: [][1])
    assert bnexp("summary") == 1
    out, err = capsys.readouterr()
    said = re.fullmatch(r"bnexp: error: IndexError: list index out of range; the traceback is in (\S+)\n", err)
    assert out == "" and "in <lambda>" in Path(said[1]).read_text()


def test_a_run_that_fails_says_where_its_traceback_lies(bnexp, capsys, monkeypatch):
    def fail(run):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr("bnexp.train.run.Run.step", fail)
    assert bnexp("train", *TINY, "steps=1", "out=run") == 1
    out, err = capsys.readouterr()
    assert out == "run\n" and "RuntimeError: out of luck" in err and "the traceback is in run/status.json" in err
    assert len(err.splitlines()) == 1 and "in fail" in json.loads(Path("run/status.json").read_text())["traceback"]


def test_what_the_system_refuses_is_one_line(bnexp, capsys, monkeypatch):
    def refuse(arguments):
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setattr("bnexp.cli.inspect.summary", refuse)
    assert bnexp("summary") == 1
    assert capsys.readouterr().err == "bnexp: error: there: Permission denied; check its permissions\n"


def test_no_pickle_is_taken_from_the_command_line(attack):
    refused(attack("train", "--experimental-rerun=job.pickle"), "can hold code")


def test_tensorboard_is_only_ever_pointed_at_this_machine():
    root = Path(__file__).resolve().parents[2]
    files = [root / "README.md", *(root / "bnexp").rglob("*.py"), *(root / "conf").rglob("*.yaml")]
    text = "\n".join(path.read_text() for path in files)
    assert "tensorboard --logdir" in text
    assert not re.search(r"bind.all|0\.0\.0\.0|--host(?![ =](localhost|127\.0\.0\.1))", text)
