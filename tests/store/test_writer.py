"""A run's folder: what stands in its files, that TensorBoard reads the same numbers, and that nobody shares it."""

import io
import json
import math
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image as Picture
from tensorboard.backend.event_processing import data_provider, event_accumulator, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups, metadata

from bnexp.config.compose import composed
from bnexp.errors import UserError
from bnexp.report.records import RunRecord, read_runs
from bnexp.store.readings import Histogram, Image, Scalar, Table
from bnexp.store.run_folder import claim, claim_new, read_status
from bnexp.store.writer import NullWriter, Writer
from bnexp.train.loop import RUN_TAGS

SMALL = ("data.limit=128", "batch_size=32", "model=mlp")
CLOCKED = ("seconds", "time/step", "throughput/images_per_s")


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def unclocked(folder):
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in lines_of(folder)]


def events_of(folder, **options):
    everything = dict.fromkeys(("scalars", "tensors", "histograms", "images"), 0)
    events = event_accumulator.EventAccumulator(str(folder), size_guidance=everything, **options)
    return events.Reload()


def float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


# ---------------------------------------------------------------- metrics.jsonl and status.json


def test_metrics_hold_one_object_per_reading_step_and_nothing_else(train):
    folder = train(*SMALL, "epochs=2", "log_every=3", "eval_train=true")  # 4 steps an epoch
    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n") and "\n\n" not in text and "NaN" not in text
    lines = lines_of(folder)
    trained = {"loss/train", "accuracy/train", "time/step", "throughput/images_per_s", "optimizer/lr"}
    valid = {"loss/valid", "accuracy/valid", "loss/train_eval", "accuracy/train_eval"}
    test = {"loss/test", "accuracy/test"}
    assert {line["step"]: set(line) - {"step", "epoch", "seconds"} for line in lines} == {
        3: trained, 4: valid, 6: trained, 8: trained | valid | test,
    }  # fmt: skip
    assert {tag for line in lines for tag in line} <= RUN_TAGS  # which no probe may use
    assert [line["step"] for line in lines] == [3, 4, 6, 8]
    assert [line["epoch"] for line in lines] == [0.75, 1.0, 1.5, 2.0]
    assert all(list(line)[:3] == ["step", "epoch", "seconds"] for line in lines)
    seconds = [line["seconds"] for line in lines]
    assert seconds[0] > 0 and seconds == sorted(seconds)
    for line in lines:
        assert all(type(value) in (int, float) for value in line.values())
        assert all(0 <= value <= 1 for tag, value in line.items() if tag.startswith("accuracy/"))
        assert all(value > 0 for tag, value in line.items() if tag.startswith("loss/"))


def test_the_status_says_how_a_run_ended_and_what_it_last_measured(train):
    began = time.time()
    folder = train(*SMALL, "epochs=2", "log_every=3", "seed=4")
    status, lines = read_status(folder), lines_of(folder)
    assert status["status"] == "finished"
    assert (status["step"], status["epoch"]) == (8, 2.0)
    assert lines[-1]["seconds"] <= status["seconds"] < time.time() - began
    last = {tag: value for line in lines for tag, value in line.items() if "/" in tag}
    assert status["metrics"] == last
    assert status["device"] == "cpu"
    assert {"python", "bnexp", "torch", "hydra-core"} <= set(status["versions"])
    assert status["git_commit"] is None or len(status["git_commit"].removesuffix("-dirty")) == 40
    assert {"model=mlp", "epochs=2", "seed=4"} <= set(status["overrides"])
    assert not {"error", "traceback", "diverged_step"} & set(status)


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    writer = Writer(tmp_path)
    writer.write(1, 0.5, 0.1, [Scalar("loss/train", math.nan), Scalar("loss/valid", math.inf), Scalar("x/y", 1.0)])
    writer.close(success=True)
    assert lines_of(tmp_path) == [
        {"step": 1, "epoch": 0.5, "seconds": 0.1, "loss/train": None, "loss/valid": None, "x/y": 1.0}
    ]


def test_a_folder_holds_the_five_files_and_nothing_left_over(train):
    names = sorted(path.name for path in train(*SMALL, "steps=2").iterdir() if not path.name.startswith(".lock"))
    assert len(names) == 5
    assert names[:2] == ["checkpoint.pt", "config.yaml"]
    assert names[2].startswith("events.out.tfevents.")
    assert names[3:] == ["metrics.jsonl", "status.json"]


# ---------------------------------------------------------------- histograms, images and tables

BINS = Histogram("activation/norm1", (-1.0, 0.0, 2.0, 2.5), (3, 0, 5))
PICTURE = Image("features/conv1", torch.arange(12, dtype=torch.uint8).view(3, 4) * 20)
TABLE = Table("shapes", ("layer", "output"), (("conv1", "6x24x24"), ("a|b", "120")))


def probes_of(folder):
    return [json.loads(line) for line in (folder / "probes.jsonl").read_text().splitlines()]


def write_all(folder, *steps, readings=(BINS, PICTURE, TABLE), start=0):
    writer = Writer(folder, step=start)
    for step in steps:
        metrics = writer.write(step, step / 4, float(step), [Scalar("loss/train", step / 10), *readings])
        assert metrics == {"loss/train": step / 10}
    writer.close(success=True)


def test_histograms_and_tables_have_a_line_each_and_images_none(tmp_path):
    write_all(tmp_path, 1, 2)
    bins = {"tag": "activation/norm1", "edges": [-1.0, 0.0, 2.0, 2.5], "counts": [3, 0, 5]}
    table = {"tag": "shapes", "head": ["layer", "output"], "rows": [["conv1", "6x24x24"], ["a|b", "120"]]}
    assert probes_of(tmp_path) == [{"step": step} | each for step in (1, 2) for each in (bins, table)]
    assert [set(line) for line in lines_of(tmp_path)] == [{"step", "epoch", "seconds", "loss/train"}] * 2
    assert NullWriter().write(1, 0.0, 0.0, [Scalar("loss/train", 1.0), BINS, PICTURE, TABLE]) == {"loss/train": 1.0}


def test_there_is_no_file_for_what_is_not_there(tmp_path):
    write_all(tmp_path, 1, readings=())
    write_all(tmp_path, 2, readings=(PICTURE,), start=1)
    assert not (tmp_path / "probes.jsonl").exists()
    (record,) = [RunRecord(tmp_path, {}, {"status": "finished"}, {})]
    assert record.histograms == {}


def test_scalars_are_written_as_if_nothing_else_were_there(tmp_path):
    for name, readings in (("bare", ()), ("full", (BINS, PICTURE, TABLE))):
        (tmp_path / name).mkdir()
        write_all(tmp_path / name, 1, 2, readings=readings)
    assert (tmp_path / "bare/metrics.jsonl").read_bytes() == (tmp_path / "full/metrics.jsonl").read_bytes()
    bare, full = (events_of(tmp_path / name).Scalars("loss/train") for name in ("bare", "full"))
    assert [(event.step, event.value) for event in bare] == [(event.step, event.value) for event in full]


@pytest.mark.parametrize("goes_on, kept", [(2, [1, 2]), (1, [1]), (0, [])])
def test_a_writer_that_goes_on_drops_later_histograms_and_half_a_line(goes_on, kept, tmp_path):
    write_all(tmp_path, 1, 2, 3, readings=(BINS,))
    with open(tmp_path / "probes.jsonl", "a") as file:
        file.write('{"step": 4, "ta')
    write_all(tmp_path, 5, readings=(BINS,), start=goes_on)
    assert [line["step"] for line in probes_of(tmp_path)] == [*kept, 5]
    assert [line["step"] for line in lines_of(tmp_path)] == [*kept, 5]
    seen = [event.step for event in events_of(tmp_path).Histograms("activation/norm1")]
    assert seen == [*kept, 5]


def test_tensorboard_shows_histograms_images_and_tables(tmp_path):
    colour = Image("features/rgb", torch.arange(18, dtype=torch.uint8).view(2, 3, 3))
    write_all(tmp_path, 7, readings=(BINS, PICTURE, TABLE, colour))
    events = events_of(tmp_path)
    (event,) = events.Histograms("activation/norm1")
    value = event.histogram_value
    assert event.step == 7
    assert (value.min, value.max, value.num) == (-1.0, 2.5, 8)
    assert (list(value.bucket_limit), list(value.bucket)) == ([0.0, 2.0, 2.5], [3, 0, 5])
    # as if all lay in the middle of their bins, at -0.5 and 2.25
    assert (value.sum, value.sum_squares) == (3 * -0.5 + 5 * 2.25, 3 * 0.25 + 5 * 2.25**2)
    assert "activation/norm1" in events.Tags()["distributions"]
    for image in (PICTURE, colour):
        (event,) = events.Images(image.tag)
        shown = Picture.open(io.BytesIO(event.encoded_image_string))
        assert shown.format == "PNG" and (event.height, event.width) == image.pixels.shape[:2] == shown.size[::-1]
        assert list(shown.tobytes()) == image.pixels.flatten().tolist()
    (event,) = events.Tensors("shapes/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text == "| layer | output |\n| --- | --- |\n| conv1 | 6x24x24 |\n| a\\|b | 120 |"


def test_histograms_are_read_back_when_they_are_asked_for(train):
    folder = train(*SMALL, "steps=4", "log_every=2", "probe=[activations,shapes]", "probe.activations.every=2")
    ((record,), _) = read_runs([folder])
    path = folder / "probes.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 5, "tag": "activ')  # by a process that was killed in the middle of a line
    assert "histograms" not in vars(record), "reports without need for them do not read them"
    assert {tag: [step for step, *_ in looks] for tag, looks in record.histograms.items()} == {
        "activation/norm1": [2, 4], "activation/norm2": [2, 4],
    }  # fmt: skip
    assert record.histograms is record.histograms
    for looks in record.histograms.values():
        for _, edges, counts in looks:
            assert len(edges) == len(counts) + 1 == 65 and edges == sorted(edges) and sum(counts) > 0
    path.write_text('{"step"\n{"step": 5}\n{"step": 6}\n')
    ((record,), _) = read_runs([folder])
    with pytest.raises(UserError, match="probes.jsonl: unreadable"):
        record.histograms  # noqa: B018 (reading is what is tested)


# ---------------------------------------------------------------- going on after a reading


def test_a_writer_that_goes_on_drops_what_came_after_its_step_and_half_a_line(tmp_path):
    writer = Writer(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, step / 4, float(step), [Scalar("loss/train", step / 10)])
    writer.close(success=False)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "epo')
    writer = Writer(tmp_path, step=2)
    writer.write(3, 0.75, 3.5, [Scalar("loss/train", 0.7)])
    writer.close(success=True)
    assert [(line["step"], line["loss/train"]) for line in lines_of(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 0.7)]
    seen = [(event.step, event.value) for event in events_of(tmp_path).Scalars("loss/train")]
    assert seen == [(1, float32(0.1)), (2, float32(0.2)), (3, float32(0.7))]


# ---------------------------------------------------------------- config.yaml and rerun


def test_the_config_is_resolved_and_complete(train):
    folder = train(*SMALL, "steps=2", "norm=scratch", "seed=3", "optimizer.lr=0.5")
    text = (folder / "config.yaml").read_text()
    assert "${" not in text and "???" not in text
    stored, default = yaml.safe_load(text), composed([])
    assert set(stored) == set(default)
    assert stored["norm"]["_target_"] == "bnexp.norms.scratch.BatchNorm"
    assert (stored["seed"], stored["steps"], stored["optimizer"]["lr"], stored["data"]["limit"]) == (3, 2, 0.5, 128)
    assert stored["log_every"] == default.log_every


@pytest.fixture
def rerun(bnexp, capsys, tmp_path):
    """``rerun(folder, *overrides) -> the new folder``."""

    def call(folder, *overrides):
        capsys.readouterr()
        assert bnexp("rerun", str(folder), *overrides) == 0
        return tmp_path / capsys.readouterr().out.splitlines()[-1]

    return call


def test_a_rerun_gives_the_same_metrics_bit_for_bit_in_a_folder_of_its_own(train, rerun):
    others = ("seed=2", "norm=scratch", "data.augment=crop_flip", "precision=bf16")
    folder = train(*SMALL, "epochs=2", "log_every=3", *others)
    again = rerun(folder)
    assert again != folder
    assert unclocked(again) == unclocked(folder)
    kept = [{k: v for k, v in yaml.safe_load((each / "config.yaml").read_text()).items() if k not in ("out", "quiet")}
            for each in (folder, again)]  # fmt: skip
    assert kept[0] == kept[1]


def test_a_rerun_takes_other_values_and_other_entries(train, rerun):
    folder = train(*SMALL, "steps=4", "log_every=2", "norm=scratch", "seed=2")
    again = rerun(folder, "norm=none", "optimizer.lr=0.5", "out=elsewhere", "data.limit=96")
    assert again.name == "elsewhere"
    stored = yaml.safe_load((again / "config.yaml").read_text())
    assert stored["norm"] == {"_target_": "bnexp.norms.none.Shift", "_partial_": True}
    assert (stored["optimizer"]["lr"], stored["data"]["limit"], stored["seed"]) == (0.5, 96, 2)
    words = ["norm=none", "optimizer.lr=0.5", "out=elsewhere", "data.limit=96"]
    assert read_status(again)["overrides"] == [*(w for w in read_status(folder)["overrides"] if w[:4] != "out="
                                                 and w != "quiet=true"), *words]  # fmt: skip
    assert lines_of(again)[0]["optimizer/lr"] == 0.5


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run-1", "lrr=3"], "lrr: there is no such setting (did you mean optimizer.lr?)"),
        (["run-1", "model.colour=1"], "model.colour: there is no such setting"),
        (["run-1", "model=resnett"], "resnet"),
        (["run-1", "seed=0,1"], "seed=0,1: rerun takes one config"),
        (["run-1", "epochs=many"], "epochs"),
        (["run-1", "out=run-1"], "already holds a run"),
        (["nowhere"], "nowhere: no such folder; give that of a run"),
        ([], "which run?"),
        (["seed=1"], "which run?"),
    ],
    ids=" ".join,
)
def test_a_rerun_that_cannot_be_is_refused(arguments, words, train, bnexp, capsys, tmp_path):
    train(*SMALL, "steps=1")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert bnexp("rerun", *arguments) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_with_an_equals_sign_in_its_name_is_a_folder(bnexp, capsys):
    folder = Path("lr=0.1")
    assert bnexp("train", *SMALL, "steps=1", "out='lr=0.1'") == 0
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("drop_last: true", "drop_last: perhaps"))
    capsys.readouterr()
    for command in ("rerun", "resume"):
        assert bnexp(command, "lr=0.1") == 2
        complaint = "lr=0.1/config.yaml: drop_last=perhaps: true or false is expected"
        assert capsys.readouterr().err == f"bnexp: error: {complaint}\n"
    (folder / "config.yaml").write_text(config)
    assert bnexp("rerun", "lr=0.1", "seed=1", "out=again") == 0


@pytest.mark.parametrize("content", ["[1, 2]", "{", "model: 5", "a: b: c", "", "\x00"])
def test_a_config_that_is_none_is_refused_by_a_sentence(content, bnexp, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(content)
    assert bnexp("rerun", "run") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_strangers_config_runs_nothing_of_his(train, bnexp, capsys, tmp_path):
    """His ``allow`` counts for nothing, and no part of bnexp that does things can be named as data."""
    folder = train(*SMALL, "steps=1")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    marker = tmp_path / "executed"
    for group, node in (
        ("norm", {"_target_": "subprocess.run", "args": ["touch", str(marker)]}),
        ("data", {"_target_": "bnexp.cli.main.main", "arguments": ["train", "out=executed", "steps=1"]}),
    ):
        evil = tmp_path / f"evil-{group}"
        evil.mkdir()
        (evil / "config.yaml").write_text(yaml.safe_dump(config | {group: node, "allow": ["subprocess"]}))
        assert bnexp("rerun", str(evil)) == 2
        assert f"{group}._target_={node['_target_']}" in capsys.readouterr().err
    assert not marker.exists()


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_reads_the_numbers_that_metrics_hold(train):
    folder = train(*SMALL, "epochs=2", "log_every=3", "eval_train=true")
    events = events_of(folder)
    written = {}
    for line in lines_of(folder):
        for tag in (tag for tag in line if "/" in tag):
            written.setdefault(tag, []).append((line["step"], float32(line[tag])))
    assert set(events.Tags()["scalars"]) == set(written)
    for tag, points in written.items():
        assert [(event.step, event.value) for event in events.Scalars(tag)] == points
    walls = [event.wall_time for event in events.Scalars("loss/train")]
    assert walls == sorted(walls) and abs(walls[-1] - time.time()) < 600


def test_tensorboard_shows_the_config_as_text(train):
    folder = train(*SMALL, "steps=1", "seed=5")
    (event,) = events_of(folder).Tensors("config/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert (folder / "config.yaml").read_text() in text
    assert text.startswith("```yaml\n") and text.endswith("```")


def session_groups(folder):
    """The session groups that TensorBoard's HParams page lists for a folder of runs."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(TBContext(data_provider=provider))
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=100, allowed_statuses=statuses, aggregation_type=api_pb2.AGGREGATION_AVG,
        col_params=[api_pb2.ColParams(metric=api_pb2.MetricName(group="", tag="accuracy/valid"))],
    )  # fmt: skip
    experiment = context.experiment_from_metadata(
        RequestContext(), "", True, context.hparams_metadata(RequestContext(), ""), []
    )
    handler = list_session_groups.Handler(RequestContext(), context, "", request)
    return experiment, handler.run().session_groups


def test_hparams_group_the_seeds_of_a_variant_in_the_runs_themselves(train, tmp_path):
    overrides = (*SMALL, "steps=4", "log_every=2")
    for norm in ("library", "none"):
        for seed in (0, 1):
            train(*overrides, f"norm={norm}", f"seed={seed}", f"out=runs/{norm}-{seed}")
    train(*overrides, "optimizer.lr=0.5", "out=runs/library-fast")
    experiment, groups = session_groups(tmp_path / "runs")
    sessions = {group.name: sorted(session.name for session in group.sessions) for group in groups}
    assert sorted(sessions.values()) == [["library-0", "library-1"], ["library-fast"], ["none-0", "none-1"]]
    for group in groups:
        norms = {name.rpartition("-")[0] for name in sessions[group.name]}
        assert {group.hparams["norm"].string_value} == norms
        assert all(session.status == api_pb2.STATUS_SUCCESS for session in group.sessions)
        values = [read_status(tmp_path / "runs" / name)["metrics"]["accuracy/valid"] for name in sessions[group.name]]
        shown = {metric.name.tag: metric.value for metric in group.metric_values}
        assert shown["accuracy/valid"] == pytest.approx(sum(values) / len(values), rel=1e-6)
    shown = {info.name for info in experiment.hparam_infos}
    assert {"norm", "model", "optimizer.lr", "batch_size"} <= shown
    assert not {"seed", "out", "quiet"} & shown
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_dir() and path.parent.name != "runs"]


def test_a_diverged_run_is_a_success_for_hparams_and_a_failed_one_is_not(tmp_path):
    for name, success in (("good", True), ("bad", False)):
        (tmp_path / name).mkdir()
        writer = Writer(tmp_path / name)
        writer.describe("a: 1", {"norm": "none", "eps": 0.1, "affine": True, "n": 3}, "group")
        writer.close(success=success)
        writer.close(success=success)  # once is enough, twice does no harm
    for name, status in (("good", api_pb2.STATUS_SUCCESS), ("bad", api_pb2.STATUS_FAILURE)):
        data = events_of(tmp_path / name).PluginTagToContent("hparams")
        assert metadata.parse_session_end_info_plugin_data(data[metadata.SESSION_END_INFO_TAG]).status == status
        start = metadata.parse_session_start_info_plugin_data(data[metadata.SESSION_START_INFO_TAG])
        assert start.group_name == "group"
        assert start.hparams["eps"].number_value == 0.1 and start.hparams["affine"].bool_value is True


# ---------------------------------------------------------------- nobody shares a folder

CLAIM = """
import sys, time
from pathlib import Path
from bnexp.errors import UserError
from bnexp.store.run_folder import claim, claim_new
me, kind = sys.argv[1:]
Path(f"ready-{me}").touch()
while not Path("go").exists():
    pass
try:
    print(claim(Path("out"), me) if kind == "same" else claim_new(Path("outputs/day"), "lenet", me))
except UserError as error:
    sys.exit(f"{error}")
"""


def at_once(kind, tmp_path, num=8):
    """What ``num`` processes print that all claim a folder at the same moment; they import no torch."""
    processes = [
        subprocess.Popen([sys.executable, "-c", CLAIM, str(i), kind], cwd=tmp_path, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(num)
    ]  # fmt: skip
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready-{i}").exists() for i in range(num)) and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    return [(process.communicate(timeout=60), process.returncode) for process in processes]


def test_of_eight_who_want_the_same_folder_exactly_one_gets_it(tmp_path):
    results = at_once("same", tmp_path)
    winners = [i for i, (_, code) in enumerate(results) if code == 0]
    assert len(winners) == 1
    assert (tmp_path / "out/config.yaml").read_text() == str(winners[0])
    for (_, err), code in results:
        assert code == 0 or ("out=out" in err and "choose another" in err)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.yaml"]


def test_of_two_who_both_found_a_folder_free_the_second_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("bnexp.store.run_folder.check_free", lambda path: None)  # both looked before either wrote
    claim(tmp_path / "out", "first")
    with pytest.raises(UserError, match="choose another"):
        claim(tmp_path / "out", "second")
    assert (tmp_path / "out/config.yaml").read_text() == "first"


def test_eight_who_leave_it_to_us_get_eight_folders(tmp_path):
    results = at_once("new", tmp_path)
    folders = [out.strip() for (out, _), _ in results]
    assert sorted(folders) == sorted(["outputs/day/lenet", *(f"outputs/day/lenet-{i}" for i in range(2, 9))])
    for i, folder in enumerate(folders):
        assert (tmp_path / folder / "config.yaml").read_text() == str(i)


def test_a_new_folder_is_named_after_its_run_and_its_day(bnexp, capsys):
    folders = []
    for _ in range(2):
        assert bnexp("train", *SMALL, "steps=1", "quiet=true", "threads=1", "norm=none", "seed=3") == 0
        folders.append(Path(capsys.readouterr().out.strip()))
    assert [folder.name for folder in folders] == ["mlp-none-s3", "mlp-none-s3-2"]
    assert {folder.parent for folder in folders} <= {Path("outputs") / day for day in days()}


def days():
    """Today, and yesterday for a test that runs at midnight."""
    return [time.strftime("%Y-%m-%d", time.localtime(time.time() - age)) for age in (0, 86400)]


@pytest.mark.parametrize("block", [Path.touch, lambda path: path.symlink_to("nowhere")], ids=["file", "broken_link"])
def test_a_run_that_cannot_make_a_folder_says_so(block, tmp_path, monkeypatch):
    block(tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="outputs/day/run: cannot be made .* out=DIR"):
        claim_new(Path("outputs/day"), "run", "config")
