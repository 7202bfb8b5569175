"""Runs are paired by seed only if they saw the same batches; what is said and computed where they did not."""

import csv
import io
import json
import math

import pytest
import yaml
from scipy.stats import ttest_ind, ttest_rel
from test_report import compared, curves, printed, write_run

from bnexp.report.expectations import Expectation, judge
from bnexp.report.records import read_runs
from bnexp.report.tables import sweep_table
from bnexp.report.verdict import compare_records

DIGITS = {"_target_": "bnexp.data.digits.Digits", "size": 28, "valid": 0.1, "limit": None, "augment": "none"}
MNIST = DIGITS | {"_target_": "bnexp.data.mnist.MNIST", "root": None, "size": None, "valid": 5000}
BATCHES = {"data": DIGITS, "batch_size": 64, "drop_last": True, "classes_per_batch": None}
ONE, OTHER = [0.90, 0.91, 0.93], [0.95, 0.94, 0.97]  # test accuracies of seeds 0, 1, 2


@pytest.fixture
def write(tmp_path):
    """Write two variants of three seeds: ``none`` on BATCHES, ``library`` on those with ``changes``."""

    def write_both(changes, device="cpu"):
        for seed, (one, other) in enumerate(zip(ONE, OTHER, strict=True)):
            write_run(tmp_path / f"a{seed}", seed=seed, device="cpu", config=BATCHES, readings=curves(one))
            write_run(
                tmp_path / f"b{seed}", "library", seed, started=1.0, device=device,
                config=BATCHES | changes, readings=curves(other),
            )  # fmt: skip
        return tmp_path

    return write_both


def data(**options):
    return {"data": DIGITS | options}


UNLIKE = [
    (data(size=32), "data.size (28, 32)"),
    (data(valid=0.2), "data.valid (0.1, 0.2)"),
    (data(test=0.2), "data.test (-, 0.2)"),
    (data(limit=100), "data.limit (-, 100)"),
    (data(augment="flip"), "data.augment (none, flip)"),
    ({"batch_size": 2}, "batch_size (64, 2)"),
    ({"drop_last": False}, "drop_last (true, false)"),
    ({"classes_per_batch": 2}, "classes_per_batch (-, 2)"),
    ({"epochs": 3}, "epochs (2, 3)"),
    ({"steps": 100}, "steps (-, 100)"),
]


def test_runs_of_one_seed_on_the_same_batches_are_paired(write):
    comparison = compared(write({"log_every": 7, "precision": "bf16"}))
    (against,) = comparison.against.values()
    expected = ttest_rel(OTHER, ONE)
    assert (against.design, against.unlike) == ("paired", {})
    assert against.differences["accuracy/test"].p == pytest.approx(float(expected.pvalue), rel=1e-9)
    assert "over 3 paired seeds" in comparison.sentences[0]
    assert not any("batches" in note for note in comparison.notes)


@pytest.mark.parametrize(("changes", "named"), UNLIKE)
def test_runs_on_other_batches_are_compared_unpaired_and_the_report_says_why(write, changes, named):
    comparison = compared(write(changes))
    (against,) = comparison.against.values()
    expected = ttest_ind(OTHER, ONE, equal_var=False)
    interval = expected.confidence_interval(0.95)
    found = against.differences["accuracy/test"]
    assert against.design == "unpaired"
    assert found.p == pytest.approx(float(expected.pvalue), rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert next(iter(comparison.speedups.values())).n == 0  # a step is paired with a step
    assert ", unpaired, 3 against 3 runs: " in comparison.sentences[0]
    assert " paired seeds" not in comparison.sentences[0] and "It reaches" not in comparison.sentences[0]
    (note,) = [note for note in comparison.notes if "same seeds, other batches" in note]
    assert named in note and "not paired" in note


def test_runs_of_older_versions_on_a_cpu_and_on_a_gpu_drew_other_batches(write):
    comparison = compared(write({}, device="cuda:0"))
    assert comparison.against["library"].design == "unpaired"
    assert any("device (cpu, cuda)" in note for note in comparison.notes)


ON = {
    "cpu": {"device": "cpu", "device_type": "cpu", "device_name": "EPYC", "matmul_precision": "float32"},
    "cuda": {"device": "cuda:1", "device_type": "cuda", "device_name": "H100", "matmul_precision": "TF32"},
}


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_runs_on_a_cpu_and_on_a_gpu_are_paired_unless_their_device_augments(write, augment):
    folder = write({})
    for name in ("a0", "a1", "a2", "b0", "b1", "b2"):
        config = yaml.safe_load((folder / name / "config.yaml").read_text())
        (folder / name / "config.yaml").write_text(yaml.safe_dump(config | data(augment=augment)))
        told(folder, (name,), **ON["cpu" if name[0] == "a" else "cuda"])
    comparison = compared(folder)
    assert comparison.against["library"].design == ("paired" if augment == "none" else "unpaired")
    assert any("other batches (device (cpu, cuda))" in note for note in comparison.notes) == (augment != "none")
    assert any("not computed alike (device_type (cpu, cuda), device_name (EPYC, H100))" in note
               for note in comparison.notes)  # fmt: skip
    shown = " ".join(printed(paths=[folder], width=300).split())
    assert "computed on cpu (EPYC), matrix products in float32; and on cuda (H100), matrix products in TF32" in shown


def test_the_device_of_a_variant_is_the_one_that_auto_became_whichever_of_its_kind(write):
    folder = write({})
    for path in folder.glob("b*/config.yaml"):
        path.write_text(path.read_text().replace("norms.library.BatchNorm", "norms.none.Shift") + "device: auto\n")
    for path in folder.glob("a*/config.yaml"):
        path.write_text(path.read_text() + "device: auto\n")
    told(folder, ("a0", "a1", "a2"), **ON["cpu"])
    told(folder, ("b0",), **ON["cuda"])
    told(folder, ("b1", "b2"), **ON["cuda"], overrides=[])
    told(folder, ("b2",), device="cuda:0")
    comparison = compared(folder)
    found = [(variant.parts.get("device"), len(variant.runs)) for variant in comparison.variants]
    assert found == [("cpu", 3), ("cuda", 3)] and not comparison.left_out


def test_the_epochs_say_nothing_where_both_sides_have_their_steps(write):
    for path in write({"steps": 100, "epochs": 3}).glob("a*/config.yaml"):
        path.write_text(path.read_text() + "steps: 100\n")
    (against,) = compared(path.parents[1]).against.values()
    assert against.design == "paired"


def told(folder, names, **status):
    for name in names:
        path = folder / name / "status.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | status))


@pytest.mark.parametrize(
    ("here", "there", "named"),
    [
        ({"versions": {"torch": "2.11.0"}}, {"versions": {"torch": "2.14.1"}}, "torch (2.11.0, 2.14.1)"),
        ({"git_commit": "aaa"}, {"git_commit": "bbb"}, "git_commit (aaa, bbb)"),
        ({"threads": 1}, {"threads": 2}, "threads (1, 2)"),
        ({"deterministic": False}, {"deterministic": True}, "deterministic (false, true)"),
        ({"threads": 1}, {"threads": 1}, None),
        ({}, {"versions": {"torch": "2.14.1"}}, None),  # older runs do not say
    ],
)
def test_what_else_computed_the_two_sides_is_told_where_it_differs(write, here, there, named):
    folder = write({})
    told(folder, ("a0", "a1", "a2"), **here)
    told(folder, ("b0", "b1", "b2"), **there)
    comparison = compared(folder)
    assert comparison.against["library"].design == "paired"
    notes = [note for note in comparison.notes if "not computed alike" in note]
    assert [named in note for note in notes] == [True] * bool(named)
    told(folder, ("b1",), versions=["a stranger's"])
    compared(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"data": MNIST}, "data (digits, mnist)"), (data(root="/photos"), "data.root (-, /photos)")],
)
def test_runs_on_other_images_are_not_compared(write, changes, named):
    folder = write(changes)
    comparison = compared(folder)
    (against,) = comparison.against.values()
    assert against.design == "other data"
    assert {found.difference for found in against.differences.values()} == {None}
    assert "saw different images, so they are not compared" in comparison.sentences[0]
    assert " p " not in comparison.sentences[0]
    assert any("saw different images" in note and named in note for note in comparison.notes)
    means = [means["accuracy/test"].mean for means in comparison.means.values()]
    assert means == pytest.approx([sum(ONE) / 3, sum(OTHER) / 3])  # the means are still there
    text = printed(paths=[folder])
    assert "other data" in text and "Steps to" not in text


def photos(root):
    return {"data": DIGITS | {"_target_": "bnexp.data.folder.Folder", "root": root}}


def saw(folder, names, images):
    for name in names:
        path = folder / name / "status.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"images": images}))


def test_one_path_that_held_other_images_is_other_data(write, tmp_path):
    """A relative data.root from two directories, or a folder in which files have changed."""
    for seed in range(3):
        write_run(tmp_path / f"c{seed}", "scratch", seed, started=2.0, device="cpu", config=BATCHES | photos("photos"),
                  readings=curves(0.5))  # fmt: skip
    folder = write(photos("photos"))
    saw(folder, ("b0", "b1", "b2"), "0" * 12)
    saw(folder, ("c0", "c1", "c2"), "1" * 12)
    comparison = compare_records(*read_runs([folder / name for name in ("b0", "b1", "b2", "c0", "c1", "c2")]))
    (against,) = comparison.against.values()
    assert against.design == "other data"
    assert against.unlike == {"data.images": ("0" * 12, "1" * 12)}


def test_runs_on_two_sets_of_images_under_one_path_are_two_variants(write):
    folder = write({"norm": {"_target_": "bnexp.norms.library.BatchNorm"}})
    saw(folder, ("b0", "b1"), "0" * 12)
    saw(folder, ("b2",), "1" * 12)
    labels = [variant.label for variant in compared(folder).variants]
    assert len(labels) == 3 and any("images=111111111111" in label for label in labels)


def test_the_same_images_under_another_path_are_paired(write):
    folder = write(photos("./photos"))
    for seed, accuracy in enumerate(ONE):
        write_run(folder / f"c{seed}", "scratch", seed, device="cpu", config=BATCHES | photos("/home/me/photos"),
                  readings=curves(accuracy))  # fmt: skip
    names = ("c0", "c1", "c2", "b0", "b1", "b2")

    def against():
        (found,) = compare_records(*read_runs([folder / name for name in names])).against.values()
        return found

    assert against().design == "other data", "which runs of older versions, without fingerprints, are taken to be"
    saw(folder, names, "0" * 12)
    assert (against().design, against().unlike) == ("paired", {})


def test_json_csv_and_tables_say_unpaired(write):
    folder = write({"batch_size": 2})
    label = compared(folder).variants[1].label
    _, variant = json.loads(printed(paths=[folder], format="json"))["variants"]
    assert variant["paired"] is None
    assert set(variant["unpaired"]["loss/test"]) == {"n", "difference", "low", "high", "p", "error", "freedom"}
    rows = list(csv.DictReader(io.StringIO(printed(paths=[folder], format="csv"))))
    row = next(row for row in rows if (row["variant"], row["metric"]) == (label, "accuracy/test"))
    assert (row["design"], row["num_pairs"]) == ("unpaired", "")
    assert float(row["p"]) == variant["unpaired"]["accuracy/test"]["p"]
    for text in (printed(paths=[folder], width=160), printed(paths=[folder], format="markdown")):
        assert "+4.00* [+0.54, +7.46]" in text
        assert "* unpaired, p by Welch's t-test" in " ".join(text.split())


def test_csv_of_paired_runs_counts_pairs(write):
    folder = write({})
    rows = list(csv.DictReader(io.StringIO(printed(paths=[folder], format="csv"))))
    assert "Welch" not in printed(paths=[folder])
    designs = [(row["design"], row["num_pairs"]) for row in rows if row["metric"] == "loss/test"]
    assert designs == [("", ""), ("paired", "3")]


def test_an_unpaired_variant_with_one_run_has_no_interval(write):
    folder = write({"batch_size": 2})
    records, _ = read_runs([folder])
    comparison = compare_records([run for run in records if run.path.name not in ("b1", "b2")])
    (against,) = comparison.against.values()
    assert against.differences["accuracy/test"].p is None
    assert "unpaired, 1 against 3 runs, which is not enough evidence: " in comparison.sentences[0]


# Expectations of studies


def roles(folder):
    records, _ = read_runs([folder])
    return {role: [run for run in records if run.path.name.startswith(role)] for role in "ab"}


def expect(**given):
    return Expectation(**{"says": "so", "of": "b", "tag": "accuracy/test", "seeds": "each"} | given)


def test_an_expectation_on_the_same_batches_pairs_seed_by_seed(write):
    found = judge(expect(minus="a", above=0), roles(write({})))
    assert found.numbers == pytest.approx([b - a for a, b in zip(ONE, OTHER, strict=True)])


@pytest.mark.parametrize("changes", [{"batch_size": 2}, {"classes_per_batch": 2}, data(limit=100), {"data": MNIST}])
def test_an_expectation_on_other_batches_is_held_against_the_mean_of_the_other_role(write, changes):
    runs, base = roles(write(changes)), sum(ONE) / 3
    found = judge(expect(minus="a", above=0.02), runs)
    assert found.numbers == pytest.approx([value - base for value in OTHER])
    assert found.holds
    assert judge(expect(over="a", above=1), runs).numbers == pytest.approx([value / base for value in OTHER])


def test_the_interval_of_an_expectation_on_other_batches_is_welchs(write):
    runs = roles(write({"batch_size": 2}))
    interval = ttest_ind(OTHER, ONE, equal_var=False).confidence_interval(0.95)
    found = judge(expect(minus="a", above=0.0, seeds="interval"), runs)
    assert (found.mean.low, found.mean.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.holds == (interval.low > 0)
    assert "not paired" in judge(expect(over="a", above=1, seeds="interval"), runs).problem


def test_roles_on_other_batches_need_no_common_seeds_but_common_settings(write):
    runs = roles(write({"batch_size": 2}))
    fewer = judge(expect(minus="a", above=0), runs | {"b": runs["b"][:2]})
    assert len(fewer.numbers) == 2 and math.isfinite(fewer.mean.mean)
    several = runs["a"][:2] + runs["b"][2:]  # two batch sizes in one role
    assert "do not have the same settings" in judge(expect(minus="a", above=0), runs | {"a": several}).problem


# How runs were evaluated


def test_runs_that_were_evaluated_with_batch_statistics_are_named(write):
    folder = write({})
    said = "batch statistics over shuffled chunks of 512"
    for name in ("b0", "b1", "b2"):
        path = folder / name / "status.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluation": said}))
    assert [note for note in compared(folder).notes if "512" in note] == [f"library: evaluated with {said}."]
    assert f"library: evaluated with {said}." in printed(paths=[folder], width=200)
    assert f"library: evaluated with {said}." in printed(sweep_table(*read_runs([folder])), width=200)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluation": ["\x1b[31m"]}))  # a stranger's
    assert "\x1b" not in printed(paths=[folder])


# The seed draws the split too: vary=[seed,split]

SPLIT = ("threads=1", "device=cpu", "model=mlp", "model.hidden=[8]", "data.size=8", "steps=4", "vary=[seed,split]",
         "quiet=true")  # fmt: skip


def test_runs_whose_seeds_draw_the_split_are_one_variant_and_paired(bnexp, tmp_path):
    assert bnexp("compare", *SPLIT, "norm=none,library", "seed=0,1", "out=drawn") == 0
    records, _ = read_runs([tmp_path / "drawn"])
    images = {run.path.name: run.images for run in records}
    assert images["none-s0"] == images["library-s0"] != images["none-s1"] == images["library-s1"]
    comparison = compare_records(records)
    assert [len(variant.runs) for variant in comparison.variants] == [2, 2]
    assert comparison.against["library"].design == "paired"
    assert bnexp("train", "-m", *SPLIT, "vary=[seed]", "norm=library", "seed=0,1", "out=fixed") == 0
    fixed, _ = read_runs([tmp_path / "drawn", tmp_path / "fixed"])
    against = list(compare_records(fixed).against.values())
    assert [each.design for each in against] == ["paired", "unpaired"] and list(against[1].unlike) == ["vary"]
    (fixed_images,) = {run.images for run in fixed if "fixed" in run.path.parts}
    assert fixed_images == images["none-s0"], "seed 0 draws the split that all seeds share otherwise"
    folder = tmp_path / "drawn"
    saw(folder, ("library-s0",), "0" * 12)  # split in another way
    (against,) = compared(folder).against.values()
    assert (against.design, list(against.unlike)) == ("unpaired", ["split"])
    told(folder, ("library-s0", "library-s1"), origin="1" * 12)  # other images
    (against,) = compared(folder).against.values()
    assert (against.design, list(against.unlike)) == ("other data", ["data.images"])
    told(folder, ("library-s1",), origin="2" * 12)
    assert len(compared(folder).variants) == 3


def test_folded_runs_each_see_the_split_of_their_own_seed(bnexp, tmp_path):
    words = (*SPLIT, "norm=library", "seed=0,1", "optimizer=sgd", "optimizer.lr=0.1")
    assert bnexp("train", "-m", *words, "out=alone") == 0
    assert bnexp("train", "-m", *words, "replicas=2", "out=fold") == 0
    alone, fold = (read_runs([tmp_path / name])[0] for name in ("alone", "fold"))
    for one, other in zip(alone, fold, strict=True):
        assert one.images == other.images
        for tag in ("loss/train", "loss/valid"):
            assert other.curve(tag) == pytest.approx(one.curve(tag), abs=1e-5), "sums are taken in another order"


def test_runs_of_before_vary_are_of_the_variant_that_does_not_name_it(write):
    folder = write({"vary": ["seed"]})
    (against,) = compared(folder).against.values()
    assert (against.design, against.unlike) == ("paired", {}) and "vary" not in against.differs


def test_failures_on_other_batches_are_not_tested_in_pairs(write):
    failures = compared(write({"batch_size": 2})).failures
    assert {each.p for each in failures.values()} == {None}
    assert {each.n for each in failures.values()} == {3}
