"""Whatever the overrides, whatever a run's files: every command ends with 0, 1, 2 or 3, in words, and stays inside.

Hypothesis makes the inputs, in CI always the same few; ``pytest -m long`` tries many more, other ones every time.
"""

import json
import shutil
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_hostile import INSPECT, OUT, REPORT, RESUME, attack, run, runs  # noqa: F401 (fixtures)

from bnexp.config.choices import GROUPS, choices
from bnexp.config.compose import composed
from bnexp.errors import UserError
from bnexp.report.records import read_runs
from bnexp.store.settings import flatten

FUZZ = partial(
    settings, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


def few_or(few: int, many: int):
    """The test with so many examples: ``few`` that are always the same, or with ``-m long`` ``many``."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.long)])


def fuzz(count: int, **strategies):
    """Try the function that this decorates, at once."""

    def call(holds):
        FUZZ(max_examples=count, derandomize=count < 1000)(given(**strategies)(holds))()

    return call


# ---------------------------------------------------------------- overrides in Hydra's grammar

NUMBERS = st.integers() | st.integers(-(10**400), 10**400) | st.floats()
WORDS = st.sampled_from([
    "null", "true", "???", "none", "library", "lenet", "..", "/", "~", "*", "cpu", "inf", "nan", "1e400", "1_0", "0x1",
    "${seed}", "${oc.env:SECRET}", "${oc.env:NOPE}", "${oc.decode:x}", "${hydra:runtime.cwd}", "${x:1}", "${", "\\",
    "\x1b[2J", "[red]", "[/]", "é", "a b", "9" * 4301, "os.system", "torch.hub.load", "bnexp.cli.main.main", "\ud800",
    "\0",
])  # fmt: skip
RAW = st.text(st.characters(codec=None), max_size=20) | WORDS
QUOTED = RAW.map(lambda text: "'" + text.replace("'", "\\'") + "'") | RAW.map(json.dumps)
PLAIN = st.from_regex(r"[\w./:+*-]{0,9}", fullmatch=True) | WORDS | QUOTED | NUMBERS.map(str)
FUNCTIONS = ("choice", "range", "interval", "glob", "sort", "shuffle", "tag", "int", "float", "str", "bool", "json_str",
             "extend_list", "cast", "eval")  # fmt: skip


def nested(inner):
    """Lists, tables, functions and sweeps of values."""
    several = st.lists(inner, max_size=3).map(",".join)
    return (
        several
        | several.map("[{}]".format)
        | st.builds("{}({})".format, st.sampled_from(FUNCTIONS), several)
        | st.lists(st.builds("{}:{}".format, PLAIN, inner), max_size=3).map(lambda pairs: f"{{{','.join(pairs)}}}")
        | st.builds(lambda text, depth: "[" * depth + text + "]" * depth, inner, st.sampled_from([3, 30, 300]))
    )


VALUES = st.recursive(PLAIN, nested, max_leaves=4)


@pytest.fixture(scope="module")
def overrides():
    """Words of a command line: settings that there are and others, with every kind of value, and noise."""
    known = [*GROUPS, "probe", *flatten(OmegaConf.to_container(composed([])))]
    known += ["data.root", "out.x", "hydra", "a.b", "model@x", "model/lenet", "_"]
    entries = [f"{group}={name}" for group in (*GROUPS, "probe") for name in choices(group)]
    keys = st.builds("{}{}".format, st.sampled_from(["", "", "", "+", "++", "~", "~+"]), st.sampled_from(known))
    word = st.builds("{}={}".format, keys, VALUES) | st.sampled_from(entries) | keys | RAW
    return st.lists(word, min_size=1, max_size=3)


@pytest.fixture
def untrained(monkeypatch):
    """What could be trained is not."""

    def refuse(*arguments):
        raise UserError("far enough")

    monkeypatch.setattr("bnexp.cli.sweep.grid.MOST_JOBS", 6)
    monkeypatch.setattr("bnexp.config.build.build", refuse)
    monkeypatch.setattr("bnexp.data.mnist.download", refuse)
    monkeypatch.setattr("bnexp.data.cifar10.download", refuse)


@few_or(100, 6000)
def test_any_overrides_come_to_a_decent_end(count, overrides, attack, untrained, run, monkeypatch):  # noqa: F811
    run("finished")
    monkeypatch.setenv("SECRET", "none")  # whoever types a command may look at the environment
    commands = (["train"], ["summary"], ["rerun", "run"], ["train", "-m"], ["compare", "norm=none,library"], INSPECT)

    @fuzz(count, command=st.sampled_from(commands), words=overrides)
    def holds(command, words):
        asks = any(word.startswith("-") for word in words)  # which prints a lot, and not on stderr
        attack(*command, *words, "out=outputs/x", asks_for_help=asks)
        shutil.rmtree("outputs", ignore_errors=True)


# ---------------------------------------------------------------- the files of a run

LEAVES = st.none() | st.booleans() | NUMBERS | RAW | st.just("[" * 3000)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(RAW, inner), max_leaves=6)
TAGS = st.sampled_from(["step", "epoch", "seconds", "loss/train", "loss/valid", "accuracy/valid", "accuracy/test",
                        "activation/x/p15", "activation/x/p50", "edges", "counts", "tag"])  # fmt: skip
ROW = st.dictionaries(TAGS | RAW, JSON | NUMBERS | st.lists(NUMBERS), max_size=5)
STEPPED = st.builds(lambda row, step: {**row, "step": step}, ROW, st.integers(0, 9) | NUMBERS)
LINE = (ROW | STEPPED | JSON).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)
LINES = st.lists(LINE, max_size=5).map(b"\n".join)


@few_or(200, 20_000)
def test_any_readings_come_to_a_decent_end(count, attack, run):  # noqa: F811
    run("finished")

    @fuzz(count, metrics=LINES, probes=LINES)
    def holds(metrics, probes):
        for name, content in (("metrics.jsonl", metrics), ("probes.jsonl", probes)):
            with open(f"run/{name}", "wb") as file:
                file.write(content)
        attack(*REPORT, "--json")
        for each in read_runs(["run"])[0]:
            try:
                assert each.histograms is not None
            except UserError:
                continue


@few_or(10, 1000)
def test_any_readings_are_drawn_or_refused_and_gone_on_from(count, attack, run):  # noqa: F811
    @fuzz(count, metrics=LINES, probes=LINES)
    def holds(metrics, probes):
        for name, command in (("finished", OUT), ("stopped", RESUME)):
            folder = run(name)
            (folder / "metrics.jsonl").write_bytes(metrics)
            (folder / "probes.jsonl").write_bytes(probes)
            attack(*command)


FIELDS = ("status", "step", "metrics", "overrides", "seconds", "started", "heartbeat", "host", "pid", "error")
STATUS = st.dictionaries(st.sampled_from(FIELDS), JSON)


@few_or(100, 10_000)
def test_any_status_comes_to_a_decent_end(count, attack, run):  # noqa: F811
    path = run("finished") / "status.json"
    whole = json.loads(path.read_text())

    @fuzz(count, change=STATUS, noise=st.none() | LINE)
    def holds(change, noise):
        path.write_bytes(json.dumps(whole | change).encode() if noise is None else noise)
        attack(*REPORT)


SETTING = st.one_of(PLAIN, JSON.map(json.dumps), VALUES)


@few_or(100, 5000)
def test_any_config_comes_to_a_decent_end(count, attack, run, untrained):  # noqa: F811
    path = run("stopped") / "config.yaml"
    whole = path.read_text().splitlines()

    lines = st.integers(0, len(whole) - 1)

    @fuzz(count, at=lines, value=SETTING, noise=st.none() | st.binary(max_size=60), last=st.booleans())
    def holds(at, value, noise, last):
        lines = [*whole]
        lines[at] = f"{lines[at].partition(':')[0]}: {value}"
        text = "\n".join(lines[: at + 1] if last else lines).encode(errors="surrogatepass")
        path.write_bytes(text if noise is None else noise)
        for command in (REPORT, RESUME, ("rerun", "run", "out=outputs/x")):
            attack(*command)


@pytest.mark.long
def test_what_is_tried_gets_far_enough_to_mean_something(overrides):
    """Half of the words of a command line are grammar, and some of them pass."""
    found = []
    fuzz(500, words=overrides)(lambda words: found.append(words))
    passed = 0
    for words in found:
        try:
            composed(words)
            passed += 1
        except UserError:
            continue
    assert passed > len(found) / 20, (passed, len(found))
