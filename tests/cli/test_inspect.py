"""A run looked at again: the numbers are those of the run and of the formulas, and its folder stays as it is."""

import copy
import csv
import io
import json
import math
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.core.global_hydra import GlobalHydra
from PIL import Image as Picture
from rich.console import Console
from torch import nn

from bnexp.cli import inspect as command
from bnexp.cli.main import main
from bnexp.config import build
from bnexp.config.stored import stored_config
from bnexp.probes import statistics
from bnexp.probes.confusion import count_confusions
from bnexp.probes.features import UNIT, look_at_images, picture_output, to_grey
from bnexp.probes.layers import list_layers
from bnexp.probes.population import recompute_statistics, training_batches
from bnexp.probes.statistics import NORM_HEAD, compare_statistics, score_by_batch, shuffled_batches
from bnexp.report import readings as report
from bnexp.report.figures.features import draw_image
from bnexp.store import checkpoint
from bnexp.store.readings import Image, Table
from bnexp.store.run_folder import read_status

DATA = ("data.limit=96", "batch_size=32", "log_every=2")
TRAINED = {
    "lenet": ("model=lenet", "steps=6", *DATA),
    "none": ("model=lenet", "norm=none", "steps=4", *DATA),
    "group": ("model=mlp", "norm=group", "norm.groups=layer", "steps=4", *DATA),
    "renorm": ("model=mlp", "norm=renorm", "norm.warmup_steps=0", "steps=9", *DATA),
    "ghost": ("model=mlp", "norm=ghost", "norm.virtual_batch=8", "steps=4", *DATA),
    "mlp": ("model=mlp", "model.hidden=[8,8]", "norm=scratch", "norm.eps=0.1", "optimizer.lr=0.03", "steps=12", *DATA),
    "untracked": ("model=mlp", "norm.track_running_stats=false", "steps=3", *DATA),
    "diverged": ("model=mlp", "norm=none", "optimizer=sgd", "optimizer.lr=1e30", "steps=4", "log_every=1",
                 "checkpoint_every=1", "data.limit=96", "batch_size=32"),
}  # fmt: skip
KEPT = ["running", "recomputed", "batch"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """``originals(name) -> folder`` of a run of TRAINED, trained when first asked for."""
    base, made = tmp_path_factory.mktemp("trained"), {}

    def call(name: str) -> Path:
        if name not in made:
            with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
                patch.setenv("HYDRA_FULL_ERROR", "1")
                patch.setattr(sys, "argv", ["bnexp"])
                GlobalHydra.instance().clear()
                assert main(["train", "quiet=true", "threads=1", f"out={base / name}", *TRAINED[name]]) == 0
                GlobalHydra.instance().clear()
            made[name] = base / name
        return made[name]

    return call


@pytest.fixture
def folder(originals, tmp_path):
    """``folder(name) -> path``: a copy of a trained run under tmp_path, to be looked at and damaged."""
    alone = shutil.ignore_patterns("checkpoint.previous.pt")  # so that there is no other to take
    return lambda name="lenet": Path(shutil.copytree(originals(name), tmp_path / name, ignore=alone))


@pytest.fixture
def inspected(bnexp, capsys):
    """``inspected(folder, *arguments) -> (what is printed, inspection.json)``; one image unless asked for others."""

    def call(path, *arguments):
        capsys.readouterr()
        images = () if "--images" in arguments else ("--images", "0")  # a picture takes longer than the rest
        assert bnexp("inspect", str(path), *arguments, *images) == 0
        out, err = capsys.readouterr()
        assert err == ""
        where = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else path / "inspect"
        return out, json.loads((where / "inspection.json").read_text())

    return call


@pytest.fixture
def refused(bnexp, capsys, tmp_path):
    """``refused(*arguments) -> message``: exit code 2, one line, nothing printed and nothing made or changed."""

    def call(*arguments):
        before = snapshot(tmp_path), sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        code = bnexp("inspect", *map(str, arguments))
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.startswith("bnexp: error: ") and len(err.splitlines()) == 1, err
        assert "Traceback" not in err and len(err) < 500
        assert (snapshot(tmp_path), sorted(tmp_path.rglob("*"))) == before
        return err

    return call


def snapshot(path: Path) -> dict:
    files = sorted(each for each in path.rglob("*") if "inspect" not in each.relative_to(path).parts)
    return {each: (each.stat().st_mtime_ns, each.read_bytes()) if each.is_file() else None for each in files}


def rebuilt(path: Path):
    """The run of a folder, as it was after its last step."""
    run = build.build(stored_config(path))
    run.load_state_dict(checkpoint.load(path, run.device))
    return run


# ---------------------------------------------------------------- the numbers are the run's


@pytest.mark.parametrize("name", ["lenet", "none", "group", "renorm", "ghost"])
def test_the_score_with_running_statistics_is_what_the_run_recorded_whatever_the_norm(name, folder, inspected):
    out, found = inspected(path := folder(name))
    metrics = read_status(path)["metrics"]
    assert found["scores"]["running"]["accuracy"] == pytest.approx(metrics["accuracy/test"], abs=1e-12)
    assert found["scores"]["running"]["loss"] == pytest.approx(metrics["loss/test"], abs=1e-12)
    assert f"{metrics['loss/test']:.4f}" in out and f"{metrics['accuracy/test']:.2%}" in out
    assert list(found["scores"]) == (["running"] if name in ("none", "group") else KEPT)


def test_the_confusion_matrix_counts_every_image_once_and_its_diagonal_is_the_accuracy(folder, inspected):
    out, found = inspected(path := folder())
    run = rebuilt(path)
    counts = np.array(found["confusion"])
    assert counts.sum() == len(run.dataset.test) == found["images"] == 96
    assert counts.trace() / 96 == pytest.approx(read_status(path)["metrics"]["accuracy/test"], abs=1e-12)
    run.model.eval()
    with torch.no_grad():
        predicted = run.model(run.dataset.prepare(run.dataset.test.images)).argmax(1)
    by_hand = np.zeros((10, 10), int)
    for label, each in zip(run.dataset.test.labels.tolist(), predicted.tolist(), strict=True):
        by_hand[label, each] += 1
    assert (counts == by_hand).all() and 0 < counts.trace() < 96
    recall = by_hand.diagonal() / by_hand.sum(1)
    assert list(found["recall"].values()) == pytest.approx(recall.tolist(), abs=1e-15)
    assert all(f"{share:.1%}" in out for share in recall)


def test_the_csv_holds_the_matrix_under_its_class_names(folder, inspected):
    _, found = inspected(path := folder())
    (_, *names), *rows = csv.reader((path / "inspect/confusion.csv").read_text().splitlines())
    assert names == [row[0] for row in rows] == [str(digit) for digit in range(10)]
    assert [[int(count) for count in row[1:]] for row in rows] == found["confusion"]


def normalized(x, weight, bias, mean, var):
    return weight * (x - mean) / (var + 0.1).sqrt() + bias


def by_hand(run, x, statistics):
    """Logits of the MLP in float64; ``statistics(i, x)`` gives mean and variance for the i-th norm."""
    model = run.model.double()
    x = run.dataset.prepare(x).double().flatten(1)
    for i in (1, 2):
        norm = getattr(model, f"norm{i}")
        x = getattr(model, f"dense{i}")(x)
        x = normalized(x, norm.weight, norm.bias, *statistics(i, x)).relu()
    return model.classifier(x)


def scored(logits, labels):
    accuracy = (logits.argmax(1) == labels).double().mean()
    return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": float(accuracy)}


@torch.no_grad()
def test_the_score_with_recomputed_statistics_is_that_of_a_computation_by_hand(folder, inspected):
    _, found = inspected(path := folder("mlp"))
    run = rebuilt(path)
    # As many training images as batches of 32 hold: here all of them, in the order of a generator with seed 0.
    images, kept = run.dataset.train.images, {}
    batches = images[torch.randperm(96, generator=torch.Generator().manual_seed(0))].split(32)
    assert len(images) == 96 == found["training_images"]
    for i in (1, 2):  # the second norm sees what the batch statistics of the first make of the images
        inputs = []
        for batch in batches:
            by_hand(run, batch, lambda j, x, i=i, inputs=inputs: (
                inputs.append(x) if i == j else None, (x.mean(0), x.var(0, unbiased=False)))[1])  # fmt: skip
        kept[i] = torch.cat(inputs).mean(0), torch.cat(inputs).var(0)
    test = run.dataset.test
    expected = scored(by_hand(run, test.images, lambda i, x: kept[i]), test.labels)
    assert found["scores"]["recomputed"] == pytest.approx(expected, rel=1e-5)  # float32 against float64
    for i, (mean, var) in kept.items():
        norm = found["norms"][f"norm{i}"]
        assert norm["population_mean"] == pytest.approx([float(mean.min()), float(mean.max())], rel=1e-4)
        assert norm["population_var"] == pytest.approx([float(var.min()), float(var.max())], rel=1e-4)
    assert found["scores"]["running"] != pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_the_score_with_batch_statistics_is_that_of_a_computation_by_hand(folder, inspected):
    _, found = inspected(path := folder("mlp"))
    run = rebuilt(path)
    test, logits = run.dataset.test, torch.empty(96, 10, dtype=torch.float64)
    for picked in shuffled_batches(96, 32):
        logits[picked] = by_hand(run, test.images[picked], lambda i, x: (x.mean(0), x.var(0, unbiased=False)))
    expected = scored(logits, test.labels)
    assert found["scores"]["batch"] == pytest.approx(expected, rel=1e-5)  # float32 against float64
    assert found["scores"]["running"] != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("num_images, batch_size", [(96, 32), (100, 32), (33, 32), (5, 32), (1, 4), (7, 1)])
def test_every_image_is_evaluated_once_and_in_a_full_batch(num_images, batch_size):
    batches = shuffled_batches(num_images, batch_size)
    assert batches.shape[1] == batch_size and batches.numel() < num_images + batch_size
    assert sorted(batches.flatten()[:num_images].tolist()) == list(range(num_images))
    assert set(batches.flatten().tolist()) <= set(range(num_images))
    assert torch.equal(batches, shuffled_batches(num_images, batch_size))


def test_batches_do_not_hold_one_class_each_where_the_files_are_sorted():
    labels = torch.arange(10).repeat_interleave(64)
    assert min(len(labels[picked].unique()) for picked in shuffled_batches(640, 64)) >= 8


@torch.no_grad()
def test_each_batch_finds_the_running_statistics_of_the_run_and_only_norms_are_in_training_mode(folder):
    run = rebuilt(folder("renorm"))  # whose training mode corrects by its running statistics
    run.model.classifier = nn.Sequential(nn.Dropout(0.5), run.model.classifier)
    split, batches = run.dataset.test, shuffled_batches(96, 32)
    found = score_by_batch(run, split, run.model, batches)
    assert run.model.norm1.num_batches_tracked == 9
    logits = torch.empty(96, 10, dtype=torch.float64)
    for picked in batches.flip(0):
        fresh = copy.deepcopy(run.model).eval()
        fresh.norm1.train()
        fresh.norm2.train()
        logits[picked] = fresh(run.dataset.prepare(split.images[picked])).double()
    expected = scored(logits, split.labels)
    assert found == (pytest.approx(expected["loss"], rel=1e-12), expected["accuracy"])  # sums in another order


@torch.no_grad()
def test_looking_leaves_the_run_as_it_is(folder):
    run = rebuilt(folder("renorm"))
    before, random = copy.deepcopy(run.state_dict()["model"]), torch.random.get_rng_state()
    list(command.look_at_run(run, "test", [0], ["norm1"]))
    assert all(torch.equal(before[key], each) for key, each in run.model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert not any(module._forward_hooks for module in run.model.modules())


def test_the_statistics_of_a_norm_are_those_of_the_checkpoint(folder, inspected):
    out, found = inspected(path := folder())
    weights = torch.load(path / "checkpoint.pt", weights_only=True)["model"]
    assert list(found["norms"]) == ["norm1", "norm2", "norm3", "norm4"]
    for name, norm in found["norms"].items():
        for key, stored in {"gamma": "weight", "beta": "bias", "running_mean": "running_mean"}.items():
            assert norm[key] == [float(end) for end in weights[f"{name}.{stored}"].aminmax()]
        assert norm["channels"] == len(weights[f"{name}.weight"])
        low, high = norm["running_var"]
        assert f"{low:.3g} to {high:.3g}" in out


def test_gaps_and_unscaled_channels_are_those_of_the_probe(folder, inspected):
    path = folder()
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    state["model"]["norm2.weight"][3:5] = 0
    state["model"]["norm1.running_mean"] += 100
    checkpoint.save(state, path)
    out, found = inspected(path)
    assert [norm["unscaled"] for norm in found["norms"].values()] == [0, 2, 0, 0]
    assert found["norms"]["norm1"]["mean_gap"] > 50 > 1 > found["norms"]["norm2"]["mean_gap"]
    run = rebuilt(path)
    population = copy.deepcopy(run.model)
    recompute_statistics(population, training_batches(run, 10_000), run.forward)
    for name, norm in found["norms"].items():
        probe = compare_statistics(run.model.get_submodule(name), population.get_submodule(name))
        assert all(norm[key] == float(probe[key]) for key in ("mean_gap", "variance_gap", "unscaled"))


def test_dead_units_are_counted_over_all_test_images_without_a_norm_too(folder, inspected):
    path = folder("none")
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    state["model"]["norm1.bias"][:2] = -1e6
    checkpoint.save(state, path)
    out, found = inspected(path)
    run = rebuilt(path)
    outputs = run.model.norm1(run.model.conv1(run.dataset.prepare(run.dataset.test.images)))
    expected = int((outputs.amax((0, 2, 3)) == 0).sum())
    assert found["norms"]["norm1"]["dead_units"] == expected >= 2
    assert f"output is the same for all {len(outputs):,} test images" in " ".join(out.split())


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("none", "There is no norm in this model"),
        ("group", "Its norms (GroupNorm over C) normalize one image at a time"),
        ("untracked", "normalize up to 512 evaluated images together by their own statistics"),
    ],
)
def test_a_model_without_running_statistics_has_one_score_and_a_reason(name, sentence, folder, inspected):
    out, found = inspected(folder(name))
    assert sentence in " ".join(out.split())
    assert list(found["scores"]) == ["running"] and found["why_one_score"] in " ".join(out.split())
    assert "population" not in out and "recomputed" not in out


# ---------------------------------------------------------------- the folder stays as it is


def test_the_own_files_of_the_run_stay_as_they_are_and_the_rest_is_below_inspect(folder, inspected):
    before = snapshot(path := folder())
    out, _ = inspected(path, "--images", "4,0")
    assert snapshot(path) == before
    written = {each.name for each in (path / "inspect").iterdir()}
    assert written == {"inspection.json", "confusion.csv", "image-4.png", "image-0.png"}
    assert f"written to {path}/inspect: inspection.json, confusion.csv, image-4.png, image-0.png" in out


def test_out_names_another_folder_and_nothing_is_written_to_the_run(folder, tmp_path):
    before = sorted((path := folder()).rglob("*"))
    assert main(["inspect", str(path), "--out", str(tmp_path / "new/below")]) == 0
    assert sorted(path.rglob("*")) == before
    assert len(list((tmp_path / "new/below").glob("image-[012].png"))) == 3, "the first three unless asked for others"


def test_the_same_run_is_found_to_be_the_same_twice(folder, inspected):
    path = folder()
    first = inspected(path)[1], {each.name: each.read_bytes() for each in (path / "inspect").iterdir()}
    assert (inspected(path)[1], {each.name: each.read_bytes() for each in (path / "inspect").iterdir()}) == first


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", None, "no json", "[]"])
def test_a_run_of_any_status_that_has_a_checkpoint_can_be_looked_at(status, folder, inspected):
    path = folder("none")
    file = path / "status.json"
    content = json.loads(file.read_text()) | {"status": status, "step": 7}
    if status is None:
        file.unlink()
    else:
        file.write_text(status if status in ("no json", "[]") else json.dumps(content))
    out, found = inspected(path)
    known = status in ("running", "interrupted", "failed")
    words = f"{status} at step 7, weights of step 4" if known else "of unknown status at step 4"
    assert " ".join(out.split()).startswith(f"{path}: {words}")
    assert found["status"] == (status if known else None) and found["step"] == 4


def test_a_diverged_run_is_said_to_be_one_and_its_json_is_strict(folder, inspected):
    out, found = inspected(path := folder("diverged"))
    status = read_status(path)
    words = " ".join(out.split())  # wherever the lines break
    assert f"diverged at step {status['step']}" in words and f"from step {status['diverged_step']} on" in words
    assert found["scores"]["running"]["loss"] is None
    assert "not finite" in out and "nan" not in out
    assert (path / "inspect/image-0.png").is_file()


def test_without_test_images_validation_images_are_looked_at_and_it_is_said(folder, inspected, bnexp, train):
    for name in "ab":
        for i in range(6):
            file = Path(f"photos/train/{name}/{i}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Picture.fromarray(np.random.default_rng(i).integers(0, 255, (9, 13, 3), np.uint8)).save(file)
    options = ("data=folder", "data.root=photos", "data.size=8", "data.valid=5", "batch_size=3", "steps=2", "model=mlp")
    path = train(*options)
    out, found = inspected(path)
    assert "There are no test images, so the validation images are used instead." in out
    assert (found["split"], found["images"]) == ("validation", 5)
    metrics = read_status(path)["metrics"]
    assert found["scores"]["running"]["accuracy"] == pytest.approx(metrics["accuracy/valid"], abs=1e-12)
    Path("photos").rename("moved")  # and the data may be elsewhere by now
    assert inspected(path, "data.root=moved")[1]["scores"] == found["scores"]


# ---------------------------------------------------------------- tables, in 80 columns


SCORES = {"running": (0.5, 0.9), "recomputed": (0.5, 0.9), "batch": (0.5, 0.9)}


def printed(counts, classes, scores=SCORES, norms=(), width=80, **console):
    """What is printed of a confusion matrix and of the other tables, before the images."""
    rows = [tuple(norm.get(column) for column in NORM_HEAD) for norm in norms]
    matrix = tuple((name, *row) for name, row in zip(classes, counts, strict=True))
    readings = {
        "norms": Table("norms", NORM_HEAD, tuple(rows)),
        "scores": Table("scores", ("statistics", "loss", "accuracy"), tuple((k, *v) for k, v in scores.items())),
        "confusion": Table("confusion", ("true", *classes), matrix),
    }
    about = {"split": "test", "images": sum(map(sum, counts)), "training_images": 50, "batch_size": 10,
             "why_one_score": None}  # fmt: skip
    console = Console(file=io.StringIO(), width=width, **console)
    for each in report.show_findings(about, readings, width):
        console.print(each, markup=False)
    return console.file.getvalue()


FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def test_a_matrix_of_10_classes_and_10000_images_fits_80_columns_uncut():
    counts = np.full((10, 10), 1000 // 90 + 1)
    np.fill_diagonal(counts, 1000)
    lines = printed(counts.tolist(), FASHION).splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if re.search(r"\d\d\.\d%$", line) and "1000" in line]
    assert [row[-11:-1].count("12") for row in rows] == [9] * 10
    (head,) = [line for line in lines if line.rstrip().endswith("recall")]
    assert head.split()[:3] == ["T-shi", "Trous", "Pullo"]


def test_names_that_would_look_alike_are_numbered():
    text = printed(np.eye(10, dtype=int).tolist(), ["shirt, red", "shirt, blue", *FASHION[2:]])
    (head,) = [line for line in text.splitlines() if line.rstrip().endswith("recall")]
    assert head.split()[:3] == ["0", "1", "Pullo"]


def test_more_classes_than_fit_are_listed_by_recall_lowest_first():
    counts = np.eye(40, dtype=int) * 10
    counts[7, 7], counts[7, 8] = 4, 6
    counts[39] = 0
    text = printed(counts.tolist(), [f"class {i}" for i in range(40)])
    assert "lowest of 39 classes" in text and "confusion.csv" in text
    assert re.search(r"recall\s+─+\s+class 7\s+10\s+40.0%", text)
    assert "Most frequent confusions: class 7 taken for class 8 (6 of 10)." in " ".join(text.split())


def test_confusions_come_in_words_the_most_frequent_first():
    text = printed([[5, 3, 0], [1, 9, 0], [0, 7, 2]], ["[bold]cat", "dog", "ox"])
    words = "ox taken for dog (7 of 9), [bold]cat taken for dog (3 of 8), dog taken for [bold]cat (1 of 10)."
    assert f"Most frequent confusions: {words}" in " ".join(text.split())
    perfect = printed([[5, 0], [0, 9]], ["cat", "dog"])
    assert "All 14 test images are classified correctly." in perfect


def test_a_class_without_images_has_no_recall():
    text = printed([[5, 0], [0, 0]], ["cat", "dog"])
    assert re.search(r"dog +\. +\. +-$", text, re.M)


def test_statistics_that_are_not_finite_are_called_so():
    norm = {"layer": "norm1", "channels": 3, "running_mean": (0.0, 1.0), "running_var": (math.nan, math.nan),
            "population_mean": (0.0, math.inf), "population_var": (1.0, 2.0), "mean_gap": math.nan,
            "variance_gap": 0.1}  # fmt: skip
    text = printed([[5, 0], [0, 9]], ["cat", "dog"], norms=[norm])
    assert text.count("not finite") == 3
    assert "nan" not in text and "inf" not in text


def test_the_limits_named_below_the_table_of_norms_are_those_of_the_probe():
    scale, variance = statistics.SMALL_SCALE, statistics.SMALL_VARIANCE
    assert f"|gamma| < {scale:g} or a population variance < {variance:g}" in report.GAP_CAPTION


@pytest.mark.parametrize("loss, accuracy, warns", [(2.0, 0.5, True), (2.0, 0.97, False), (0.1, 0.5, False)])
def test_running_statistics_that_do_harm_are_named(loss, accuracy, warns):
    scores = {"running": (loss, accuracy), "recomputed": (0.5, 0.98), "batch": (0.6, 0.97)}
    text = " ".join(printed([[50, 0], [2, 48]], ["cat", "dog"], scores).split())
    assert ("the running statistics lag behind the weights" in text) is warns
    assert ("With running statistics 48 more images are wrong" in text) is warns


def test_the_matrix_is_green_where_it_is_right_red_where_it_is_wrong_and_plain_in_a_pipe():
    colours = printed([[5, 3], [0, 9]], ["cat", "dog"], force_terminal=True, color_system="truecolor")
    (row,) = [line for line in colours.splitlines() if line.startswith("cat")]
    background = {count: re.findall(rf"48;2;(\d+);(\d+);(\d+)m +{count}\x1b", row)[0] for count in (5, 3)}
    assert int(background[5][0]) < int(background[5][1]) and int(background[3][0]) > int(background[3][1])
    assert "\x1b" not in printed([[5, 3], [0, 9]], ["cat", "dog"])


# ---------------------------------------------------------------- feature maps


def looked(run, indices, layers=None):
    """What is found of single test images, by tag."""
    layers = layers or command.choose_layers(list_layers(run.model, run.dataset.in_shape))
    return {each.tag: each for each in look_at_images(run, run.dataset.test, indices, layers)}


@torch.no_grad()
def test_a_picture_holds_the_maps_of_every_layer_of_its_image(folder):
    run = rebuilt(folder())
    found = looked(run, [2, 5])
    model, test = run.model.eval(), run.dataset.test
    assert [row[0] for row in found["predictions"].rows] == [2, 5]
    for index, row in zip((2, 5), found["predictions"].rows, strict=True):
        image = test.images[index : index + 1]
        x = model.conv1(run.dataset.prepare(image))
        expected = {"conv1": x, "norm1": model.norm1(x)}
        expected["conv2"] = model.conv2(model.pool1(expected["norm1"]))
        outputs = {each["layer"]: each for each in found["outputs"].records() if each["image"] == index}
        assert list(outputs) == ["conv1", "norm1", "pool1", "conv2", "norm2", "pool2"]
        # Alone or beside others, an image gives the same maps but for the last bits of sums: a grey may be the next.
        for name, maps in expected.items():
            pixels = found[f"image-{index}/{name}"].pixels
            assert (pixels.int() - picture_output(maps[0])[0]).abs().max() <= 1
            spans = [outputs[name][end] for end in ("lowest", "highest")]
            assert spans == pytest.approx([float(end) for end in maps.aminmax()], rel=1e-4, abs=1e-6)
            assert outputs[name]["shape"] == maps.shape[1:]
            liveliest = maps[0].flatten(1).std(1).argmax()
            picture = found[f"liveliest-{index}/{name}"].pixels
            assert (picture.int() - to_grey(maps[:1, liveliest, None])[0, 0]).abs().max() <= 1
        probabilities = model(run.dataset.prepare(image)).softmax(1)[0]
        assert row[3:] == pytest.approx(probabilities.tolist(), rel=1e-4)
        names = run.dataset.class_names
        assert row[1:3] == (names[int(test.labels[index])], names[int(probabilities.argmax())])
        assert torch.equal(found[f"image-{index}"].pixels, image[0, 0])
    assert not torch.equal(found["image-2/conv1"].pixels, found["image-5/conv1"].pixels)


@torch.no_grad()
def test_a_figure_shows_what_the_readings_hold(folder):
    found = looked(rebuilt(folder()), [2], ["conv1", "pool2", "classifier"])
    figure = draw_image(2, "test", found)
    shown = [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]
    tags = ("image-2", "image-2/conv1", "image-2/pool2", "image-2/classifier")
    expected = [found[tag].pixels.numpy() for tag in tags]
    assert all(map(np.array_equal, shown, expected)) and len(shown) == 4
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    for row in found["outputs"].rows:
        assert row[1] in texts and any(report.show_cell(row[-2:]) in text for text in texts)
    assert any("6 maps of 24x24" in text for text in texts) and any("10 units" in text for text in texts)
    bars = [bar.get_width() for bar in figure.axes[1].patches]
    assert bars == pytest.approx(found["predictions"].rows[0][3:])
    assert sum("true class" in text for text in texts) == 1 == sum("predicted" in text for text in texts)


@pytest.mark.parametrize("name", ["lenet", "untracked"])
def test_every_image_is_taken_for_what_the_matrix_says_whichever_are_shown_beside_it(name, folder):
    run = rebuilt(folder(name))
    rows = looked(run, list(range(95, -1, -1)), ["classifier"])["predictions"].rows
    counts = torch.zeros(10, 10, dtype=torch.int64)
    for _, true, predicted, *_ in rows:
        counts[int(true), int(predicted)] += 1
    assert torch.equal(counts, count_confusions(run, run.dataset.test, run.model.eval()))
    (alone,) = looked(run, [37], ["classifier"])["predictions"].rows
    assert alone == rows[95 - 37]


@torch.no_grad()
def test_images_are_found_beyond_the_first_evaluation_batch(folder, monkeypatch):
    monkeypatch.setattr("bnexp.train.run.EVALUATION_BATCH", 40)
    run = rebuilt(folder())
    found = looked(run, [95, 0, 40, 39])
    assert [row[0] for row in found["predictions"].rows] == [95, 0, 40, 39]
    for index, _, _, *shares in found["predictions"].rows:
        image = run.dataset.test.images[index]
        assert torch.equal(found[f"image-{index}"].pixels, image[0])
        logits = run.model.eval()(run.dataset.prepare(image[None]))
        assert shares == pytest.approx(logits.softmax(1)[0].tolist(), rel=1e-4)
        maps = run.model.conv1(run.dataset.prepare(image[None]))[0]
        assert (found[f"image-{index}/conv1"].pixels.int() - picture_output(maps)[0]).abs().max() <= 1


def test_a_picture_shows_maps_in_rows_of_8_and_units_as_squares_of_one_grey():
    maps = torch.arange(11 * 16.0).view(11, 4, 4).sin()
    picture, pictured = picture_output(maps)
    assert picture.shape == (2 * 66 + 2, 8 * 66 + 2) and pictured == 11
    ninth = picture[68:132, 2:66]
    assert torch.equal(ninth[::16, ::16], to_grey(maps[None])[0, 8])
    units, _ = picture_output(torch.tensor([-1.0, 0.0, 1.0]))
    assert units.shape == (UNIT, 40 * UNIT)
    squares = [0, 128, 255] + [240] * 37
    assert units[0, ::UNIT].tolist() == squares and units[-1, UNIT - 1 :: UNIT].tolist() == squares
    assert [picture_output(torch.zeros(shape))[1] for shape in ((64, 7, 7), (300,), (5, 1, 1))] == [16, 240, 5]


def test_layers_are_the_ones_asked_for_in_the_order_asked_for(folder, inspected):
    _, found = inspected(folder(), "--layers", "classifier, conv2", "--images", "1")
    (picture,) = found["pictures"]
    assert picture["layers"] == {"classifier": [10], "conv2": [16, 8, 8]}


def test_a_deep_model_is_shown_by_the_last_layer_of_every_size():
    from bnexp.models.mlp import MLP
    from bnexp.models.resnet import ResNet
    from bnexp.norms.library import BatchNorm

    shape = (1, 28, 28)
    chosen = command.choose_layers(list_layers(ResNet(shape, 10, BatchNorm).to("meta"), shape))
    assert chosen == ["norm1", "stage1.block2.norm2", "stage2.block2.norm2", "stage3.block2.norm2"]
    chosen = command.choose_layers(list_layers(MLP(shape, 10, BatchNorm).to("meta"), shape))
    assert chosen == ["dense1", "norm1", "dense2", "norm2", "classifier"]


def prediction_of(true, shares, classes=("cat", "dog")):
    """The readings of an image of 8x8 pixels, by tag."""
    row = (3, true, classes[int(np.argmax(shares))], *shares)
    outputs = Table("outputs", ("image", "layer", "shape", "pictured", "lowest", "highest"), ())
    predictions = Table("predictions", ("image", "true", "predicted", *classes), (row,))
    image = Image("image-3", torch.zeros(8, 8, dtype=torch.uint8))
    return {each.tag: each for each in (predictions, outputs, image)}


def test_the_title_is_red_where_the_model_is_wrong():
    readings = prediction_of("dog", [0.25, 0.75])
    sentence = report.show_prediction("test", readings["predictions"].rows[0])
    assert sentence == "test image 3: true class dog, predicted dog (75.0%)"
    right = draw_image(3, "test", readings)
    assert right.get_suptitle() == sentence
    wrong = draw_image(3, "test", prediction_of("cat", [0.25, 0.75]))
    assert right._suptitle.get_color() != wrong._suptitle.get_color()
    assert [text.get_text() for text in right.axes[1].texts] == ["25.0%", "75.0%  true class, predicted"]
    assert [text.get_text() for text in wrong.axes[1].texts] == ["25.0%  true class", "75.0%  predicted"]


def test_the_ten_most_probable_classes_have_a_bar_in_their_order():
    classes = [f"a class with a very long name, number {i}" for i in range(12)]
    shares = [0.0, 0.3, *[0.05] * 9, 0.25]
    axes = draw_image(3, "test", prediction_of(classes[11], shares, classes)).axes[1]
    assert [bar.get_width() for bar in axes.patches] == [0.3, *[0.05] * 8, 0.25]
    assert len(axes.get_yticklabels()) == 10


def test_probabilities_that_are_no_numbers_are_drawn_and_named():
    readings = prediction_of("cat", [math.nan, math.nan])
    assert "not finite" in draw_image(3, "test", readings).get_suptitle()
    assert [text.get_text() for text in draw_image(3, "test", readings).axes[1].texts][1] == "not finite"


def test_classes_may_have_the_names_of_columns():
    readings = prediction_of("true", [0.25, 0.5, 0.25], ("image", "true", "predicted"))
    assert [bar.get_width() for bar in draw_image(3, "test", readings).axes[1].patches] == [0.25, 0.5, 0.25]


@pytest.mark.parametrize(
    "console, shows",
    [
        ({"force_terminal": True, "color_system": "truecolor"}, True),
        ({"force_terminal": True, "color_system": "256"}, True),
        ({"force_terminal": True, "color_system": "standard"}, False),
        ({"force_terminal": True, "color_system": "truecolor", "no_color": True}, False),
        ({"force_terminal": False, "color_system": "truecolor"}, False),
        ({}, False),
    ],
)
def test_a_terminal_with_enough_colours_shows_small_pictures_and_nothing_else_does(console, shows, folder):
    console = Console(file=io.StringIO(), width=80, **console)
    report.show_images(console, "test", looked(rebuilt(folder()), [3]))
    text = console.file.getvalue()
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines() if "▀" in line]
    assert len(rows) == (report.TILE_SIDE // 2 if shows else 0)
    assert all(len(row) <= 80 and row.count("▀") == 6 * report.TILE_SIDE for row in rows)
    assert ("input        conv1        norm1" in text) is shows


@pytest.mark.parametrize("side", [6, 12, 120])
def test_a_small_picture_has_the_colours_of_the_image(side):
    image = np.zeros((side, side, 3), np.uint8)
    image[: side // 2, :, 0], image[side // 2 :, :, 2] = 255, 255  # red above blue
    text = report.half_blocks({"input": image}, 80)
    styles = [str(span.style) for span in text.spans if text.plain[span.start] == "▀"]
    assert len(styles) == 12 * 6
    assert set(styles[:36]) == {"rgb(255,0,0) on rgb(255,0,0)"} and set(styles[36:]) == {"rgb(0,0,255) on rgb(0,0,255)"}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["RUN", "--help"]),
        (["nowhere"], ["nowhere: no such folder", "config.yaml, status.json and checkpoint.pt"]),
        (["empty"], ["empty: holds no run", "config.yaml, status.json and checkpoint.pt"]),
        (["lenet/config.yaml"], ["a file", "the folder that it lies in, lenet"]),
        (["sweep"], ["sweep: holds 2 runs", "such as sweep/one"]),
        (["bare"], ["bare: has no checkpoint.pt yet", "bnexp resume bare"]),
        (["lenet", "--images", "0,96"], ["--images 96", "96 test images", "the last is 95"]),
        (["lenet", "--images", "96", "--out", "new/below"], ["--images 96"]),
        (["lenet", "--images", "one"], ["--images: one is not a list", "0,1,2"]),
        (["lenet", "--images", "0,-1"], ["--images: 0,-1 is not a list"]),
        (["lenet", "--images", "1.5"], ["--images: 1.5 is not a list"]),
        (["lenet", "--images", "²"], ["--images: ² is not a list"]),
        (["lenet", "--images="], ["--images"]),
        (["lenet", "--layers", "conv1,conv9"], ["--layers conv9", "conv1, norm1, pool1", "classifier"]),
        (["lenet", "--layers="], ["--layers", "conv1, norm1"]),
        (["lenet", "--out", "lenet/config.yaml"], ["--out lenet/config.yaml", "choose another"]),
        (["lenet", "--out", "lenet/config.yaml/x"], ["--out", "choose another"]),
        (["lenet", "--out", "/proc/x/y"], ["--out /proc/x/y", "choose another"]),
        (["lenet", "empty"], ["empty: not a setting"]),
        (["lenet", "--frob"], ["--frob", "--help"]),
        (["lenet", "seed=1"], ["seed=1", "inspect keeps the settings of the run and takes only device, data.root"]),
        (["lenet", "device=tpu"], ["device=tpu"]),
        (["lenet", "threads=1,2"], ["threads=1,2", "one value"]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else None,
)
def test_bad_input_is_answered_by_what_was_given_and_a_remedy(arguments, words, refused, folder, originals, tmp_path):
    path = folder()
    (tmp_path / "empty").mkdir()
    for name in ("sweep/two", "sweep/one", "bare"):
        shutil.copytree(path, tmp_path / name)
    (tmp_path / "bare/checkpoint.pt").unlink()
    message = refused(*arguments)
    assert [word for word in words if word not in message] == [], message


def test_help_says_what_there_is(bnexp, capsys):
    assert bnexp("inspect", "--help") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("RUN", "--images", "--layers", "--out"))


class Touch:
    """Unpickled by a careless reader, this makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("evidence"),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
@pytest.mark.parametrize("where", ["all of it", "a weight"])
def test_a_checkpoint_that_carries_code_executes_none(how, where, refused, folder, tmp_path):
    file = folder() / "checkpoint.pt"
    content = Touch() if where == "all of it" else {"model": {"conv1.weight": Touch()}, "num_steps": 1}
    if how == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    pickle.loads(pickle.dumps(content))
    assert (tmp_path / "evidence").exists(), "it does in careless hands"
    (tmp_path / "evidence").unlink()
    message = refused("lenet")
    assert "checkpoint.pt" in message and ("none was run" in message if how == "torch" else "no checkpoint" in message)
    assert not (tmp_path / "evidence").exists()


@pytest.mark.parametrize("damage", ["empty", "half", "text", "a byte", "a folder"])
def test_a_damaged_checkpoint_is_named(damage, refused, folder):
    file = folder() / "checkpoint.pt"
    whole = file.read_bytes()
    content = {"empty": b"", "half": whole[: len(whole) // 2], "text": b"hello world"}.get(damage)
    if damage == "a byte":  # within the weights, where torch itself does not notice
        content = bytearray(whole)
        content[len(whole) // 2] ^= 0x10
        file.write_bytes(content)
        torch.load(file, weights_only=True)
    file.unlink()
    file.mkdir() if damage == "a folder" else file.write_bytes(content)
    message = refused("lenet")
    assert "lenet/checkpoint.pt: not a checkpoint that can be read" in message


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: state["model"].pop("conv2.weight"), "conv2.weight is missing in it and 16x6x5x5 in the model"),
        (lambda state: state["model"].update({"conv1.weight": torch.ones(6, 3, 5)}), "conv1.weight is 6x3x5 in it"),
        (lambda state: state["model"].update(extra=torch.ones(2)), "extra is 2 in it and missing in the model"),
        (lambda state: state["model"].update({"conv1.weight": 5}), "conv1.weight is a int in it and 6x1x5x5"),
        (lambda state: state["model"].update({5: torch.ones(1)}), "5 is 1 in it and missing"),
        (lambda state: state.pop("model"), "it has no model or no num_steps"),
        (lambda state: state.update(num_steps="many"), "it has no model or no num_steps"),
        (lambda state: state.update(model=[1]), "it has no model or no num_steps"),
        (lambda state: state.clear(), "it has no model or no num_steps"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused_by_key(change, words, refused, folder):
    path = folder()
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    change(state)
    checkpoint.write(state, path / "checkpoint.pt")
    assert words in refused("lenet")


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), "text", None])
def test_a_checkpoint_that_is_no_dict_is_refused(content, refused, folder):
    torch.save(content, folder() / "checkpoint.pt")
    assert f"not the checkpoint of a run, but a {type(content).__name__}" in refused("lenet")


@pytest.mark.parametrize("group", ["model", "norm", "data", "optimizer", "schedule", "probe"])
@pytest.mark.parametrize("target", ["os.system", "mypkg.X", "builtins.eval"])
def test_a_config_that_names_what_is_not_ours_is_refused_by_name(group, target, refused, folder, tmp_path, monkeypatch):
    (tmp_path / "mypkg.py").write_text("import pathlib\npathlib.Path('evidence').touch()\nclass X: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = folder() / "config.yaml"
    config = build.OmegaConf.load(file)
    if group == "probe":
        config.probe = {"spy": {"_target_": target}}
    else:
        config[group]._target_ = target
    config.allow = ["os", "mypkg", "builtins"]  # whom the author trusted is no matter
    build.OmegaConf.save(config, file)
    message = refused("lenet")
    assert f"_target_={target}" in message
    assert "mypkg" not in sys.modules and not (tmp_path / "evidence").exists()


@pytest.mark.parametrize("text", ["", "[1, 2]", "model: [", "a: b", "\0\0", "- norm"])
def test_a_config_that_is_none_is_refused(text, refused, folder):
    (folder() / "config.yaml").write_text(text)
    refused("lenet")


def test_a_trusted_package_can_be_named_as_in_training(refused, inspected, folder, tmp_path, monkeypatch):
    (tmp_path / "trusted_norms.py").write_text("from bnexp.norms.none import Shift\nclass Mine(Shift): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = folder("none")
    config = (path / "config.yaml").read_text().replace("bnexp.norms.none.Shift", "trusted_norms.Mine")
    (path / "config.yaml").write_text(config)
    assert "add allow=[trusted_norms]" in refused("none")
    _, found = inspected(path, "allow=[trusted_norms]")
    assert found["scores"]["running"]["loss"] == read_status(path)["metrics"]["loss/test"]
    sys.modules.pop("trusted_norms")
