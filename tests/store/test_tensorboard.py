"""What TensorBoard's own backend says about a comparison's folder, asked over HTTP as its pages ask it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
from test_sweep import SWEEP, numbers, step_that

from bnexp.cli.main import main

NAMES = [f"{norm}-s{seed}" for norm in ("none", "library") for seed in range(3)]
TAGS = ("loss/train", "loss/valid", "accuracy/train", "accuracy/valid")
FINAL = 1e-6  # relative: events hold 32 bits of a number, which is 6e-8, and means of them differ by a few of those


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A comparison that died at step 21 and went on from the checkpoints of step 18, so that its events lie in two
    files and those of step 20 in both."""
    folder = tmp_path_factory.mktemp("tensorboard") / "compare"
    arguments = ["compare", *SWEEP, "norm=none,library", "seed=range(3)", "quiet=true", f"out={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        once = iter([signal.SIGINT])

        def die():
            patch.setattr("bnexp.store.checkpoint.save", lambda state, folder: None)
            for number in once:
                os.kill(os.getpid(), number)

        step_that(die, patch, at=20, seed=0)
        assert main(arguments) == 130
    assert main(arguments) == 0
    assert {len(list(path.glob("events*"))) for path in folder.glob("*-s?")} == {2}
    return folder


@pytest.fixture(scope="module")
def ask(folder):
    """``ask(path, body=None)``: what TensorBoard answers to a GET, or to a POST of ``body``."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0"]
    # The default loader wants a helper program that is not installed everywhere.
    process = subprocess.Popen([*command, "--load_fast", "false"], stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stderr.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+/", line)))

        def call(path: str, body: dict | None = None):
            data = None if body is None else json.dumps(body).encode()
            request = Request(f"{url}data/{path}", data, {"Content-Type": "application/json"})
            with urlopen(request, timeout=30) as answer:
                return json.load(answer)

        deadline = time.monotonic() + 60
        while len(call("plugin/scalars/tags")) < len(NAMES) + 2 or not call("plugin/custom_scalars/layout"):
            assert time.monotonic() < deadline, "TensorBoard does not find the runs"
            time.sleep(0.1)
        yield call
    finally:
        process.terminate()
        process.communicate()


def curve(ask, run: str, tag: str) -> dict[int, float]:
    rows = ask(f"plugin/scalars/scalars?run={quote(run)}&tag={quote(tag)}")
    assert len({step for _, step, _ in rows}) == len(rows), "a step is drawn twice"
    return {step: value for _, step, value in rows}


def test_the_runs_are_listed_by_their_names_and_nothing_else_is(ask):
    assert sorted(ask("runs")) == sorted([*NAMES, "bands", "bands/none", "bands/library"])


def test_every_run_draws_the_numbers_of_its_metrics_file(ask, folder):
    tags, rows = ask("plugin/scalars/tags"), numbers(folder)
    for name in NAMES:
        assert {*TAGS, "loss/test", "accuracy/test", "time/step", "throughput/images_per_s"} <= set(tags[name])
        for tag in (*TAGS, "loss/test"):
            expected = {row["step"]: row[tag] for row in rows[name] if tag in row}
            assert curve(ask, name, tag) == pytest.approx(expected, rel=FINAL)


def test_the_layout_draws_every_band_as_a_margin_chart(ask):
    layout = ask("plugin/custom_scalars/layout")
    charts = {chart["title"]: chart["margin"]["series"] for each in layout["category"] for chart in each["chart"]}
    assert charts == {tag: [{"value": f"{tag}/mean", "lower": f"{tag}/lower", "upper": f"{tag}/upper"}] for tag in TAGS}
    assert [each["title"] for each in layout["category"]] == ["loss", "accuracy"]


@pytest.mark.parametrize("variant", ["none", "library"])
def test_a_band_is_the_mean_over_seeds_and_its_interval(ask, folder, variant):
    rows = numbers(folder)
    for tag in TAGS:
        mean, lower, upper = (curve(ask, f"bands/{variant}", f"{tag}/{name}") for name in ("mean", "lower", "upper"))
        values = {row["step"]: [] for row in rows[f"{variant}-s0"] if tag in row}
        for seed in range(3):
            for row in rows[f"{variant}-s{seed}"]:
                values[row["step"]].append(row[tag])
        assert mean == pytest.approx({step: sum(each) / 3 for step, each in values.items()}, rel=FINAL)
        for step, each in values.items():
            spread = (sum((value - sum(each) / 3) ** 2 for value in each) / 2) ** 0.5
            half = 4.302653 * spread / 3**0.5  # t(0.975; 2)
            # of the value, because it is the value that is rounded to 32 bits
            ends = [mean[step] - half, mean[step] + half]
            ends = [min(max(end, 0), 1) for end in ends] if tag.startswith("accuracy") else ends
            assert [lower[step], upper[step]] == pytest.approx(ends, rel=FINAL, abs=FINAL * max(each))


def test_hparams_has_one_row_per_variant_with_its_seeds_averaged(ask, folder):
    experiment = ask("plugin/hparams/experiment", {"experimentName": ""})
    metrics = [info["name"] for info in experiment["metricInfos"]]
    statuses = [f"STATUS_{name}" for name in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    request = {
        "experimentName": "", "allowedStatuses": statuses, "aggregationType": "AGGREGATION_AVG",
        "colParams": [{"metric": name} for name in metrics], "startIndex": 0, "sliceSize": 100,
    }  # fmt: skip
    answer = ask("plugin/hparams/session_groups", request)
    assert answer["totalSize"] == 2
    groups = {group["hparams"]["norm"]: group for group in answer["sessionGroups"]}
    assert set(groups) == {"none", "library"}
    rows = numbers(folder)
    for norm, group in groups.items():
        assert sorted(session["name"] for session in group["sessions"]) == [f"{norm}-s{seed}" for seed in range(3)]
        assert {session["status"] for session in group["sessions"]} == {"STATUS_SUCCESS"}
        shown = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
        for tag in (*TAGS, "accuracy/test", "loss/test"):
            expected = sum(rows[f"{norm}-s{seed}"][-1][tag] for seed in range(3)) / 3
            assert shown[tag] == pytest.approx(expected, rel=FINAL)


def test_hparams_puts_first_what_differs_and_knows_the_options_of_every_variant(ask):
    infos = ask("plugin/hparams/experiment", {"experimentName": ""})["hparamInfos"]
    assert [info["name"] for info in infos if info["differs"]] == ["norm"] == [infos[0]["name"]]
    names = {info["name"] for info in infos}
    assert "norm.eps" in names, "an option that only the second variant has"
    assert not {"seed", "out", "quiet"} & names
