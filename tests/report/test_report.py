"""Reports say what the run folders say: who counts, who is compared with whom, and what that is worth."""

import csv
import io
import json
import math
import time

import pytest
import yaml
from rich.console import Console

from bnexp.errors import UserError
from bnexp.report.question import Question
from bnexp.report.records import METRICS, read_runs
from bnexp.report.report import comparison_csv, comparison_json, comparison_markdown, make_report
from bnexp.report.tables import sweep_table
from bnexp.report.variants import into_variants
from bnexp.report.verdict import compare_records, looked_at

CLASSES = {"none": "Shift", "library": "BatchNorm", "scratch": "BatchNorm"}


def write_run(folder, norm="none", seed=0, *, status="finished", lr=0.1, readings=None, **more):
    """A run folder as `bnexp train` leaves it; ``readings`` is {tag: {step: value}}."""
    folder.mkdir(parents=True)
    options = {} if norm == "none" else {"eps": more.pop("eps", 1e-5)}
    config = {
        "model": {"_target_": "bnexp.models.lenet.LeNet", "_partial_": True},
        "norm": {"_target_": f"bnexp.norms.{norm}.{CLASSES[norm]}", "_partial_": True, **options},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": lr},
        "seed": seed,
        "epochs": 2,
        "out": str(folder),
        **more.pop("config", {}),
    }
    content = {"status": status, "step": 7, "seconds": 2.0, "started": more.pop("started", 0.0)}
    content["overrides"] = [f"norm={norm}", f"seed={seed}"]
    rows = {}
    for tag, points in (curves() if readings is None else readings).items():
        for step, value in points.items():
            rows.setdefault(step, {"step": step, "seconds": 1.0})[tag] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "status.json").write_text(json.dumps(content | more))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(rows[step]) + "\n" for step in sorted(rows)))
    return folder


def curves(accuracy=0.9, loss=0.3, valid=(0.5, 0.4, 0.3, 0.35)):
    """Four validations, the best of them the third, and a test."""
    readings = {"loss/train": {100 * i: value for i, value in enumerate(valid, 1)}}
    readings["loss/valid"] = dict(readings["loss/train"])
    readings["accuracy/valid"] = {step: 1 - value for step, value in readings["loss/valid"].items()}
    return readings | {"accuracy/test": {400: accuracy}, "loss/test": {400: loss}}


def compared(folder, **options):
    return compare_records(*read_runs([folder]), Question(**options))


def printed(renderable=None, width=120, **options):
    """What `report` (or a table) writes on a terminal of this width."""
    console = Console(file=io.StringIO(), width=width)
    if renderable is None:
        make_report(console=console, **options)
    else:
        console.print(renderable)
    return console.file.getvalue()


@pytest.fixture
def three(tmp_path):
    """Test accuracy of `library` above `none` by 1, 2 and 3 points in seeds 0, 1, 2."""
    for seed in range(3):
        write_run(tmp_path / f"none-s{seed}", seed=seed, readings=curves(0.90, 0.40 + seed / 100))
        write_run(
            tmp_path / f"library-s{seed}", "library", seed, started=1.0,
            readings=curves(0.91 + seed / 100, 0.10 + seed / 1000, valid=(0.4, 0.29, 0.2, 0.1)),
        )  # fmt: skip
    return tmp_path


# Reading


def test_runs_that_are_over_are_read_and_the_others_are_named_with_their_reason(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", status="diverged", seed=1)
    write_run(tmp_path / "c", status="running", seed=2)
    write_run(tmp_path / "d", status="interrupted", seed=3)
    write_run(tmp_path / "e", status="failed", seed=4, error="ValueError: too\nsmall")
    records, problems = read_runs([tmp_path])
    assert [(run.path.name, run.seed, run.diverged) for run in records] == [("a", 0, False), ("b", 1, True)]
    found = {each.path.name: (each.status, each.reason) for each in problems}
    assert found == {
        "c": ("dead", f"died at step 7; bnexp resume {tmp_path / 'c'} continues it"),
        "d": ("interrupted", "interrupted at step 7"),
        "e": ("failed", "ValueError: too small"),
    }
    assert problems[2].overrides == ("norm=none", "seed=4")


def test_curves_are_steps_and_values_by_tag(tmp_path):
    (run,), _ = read_runs([write_run(tmp_path / "a")])
    assert run.curves["loss/valid"] == ([100, 200, 300, 400], [0.5, 0.4, 0.3, 0.35])
    assert run.curves["accuracy/test"] == ([400], [0.9])


def test_a_last_line_cut_short_is_dropped(tmp_path):
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 500, "loss/va')
    (run,), problems = read_runs([folder])
    assert run.curves["loss/valid"][0] == [100, 200, 300, 400]
    assert not problems


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metrics.jsonl", '{"step": 1, "lo\n{"step": 2, "loss/valid": 1}\n{"step": 3}\n', ""),
        ("metrics.jsonl", "", "no reading"),
        ("metrics.jsonl", "[1, 2]\n", ""),
        ("metrics.jsonl", None, "metrics.jsonl is missing"),
        ("config.yaml", "a: [1", "config.yaml"),
        ("config.yaml", "- 1\n", "no settings"),
        ("config.yaml", None, "config.yaml is missing"),
        ("status.json", '{"status": "fin', ""),
        ("status.json", "[]", ""),
        ("status.json", "{}", "status"),
        ("status.json", None, "status.json is missing"),
    ],
)
def test_a_damaged_run_is_left_out_by_name(tmp_path, name, content, reason):
    whole, broken = write_run(tmp_path / "whole"), write_run(tmp_path / "broken", seed=1)
    (broken / name).unlink() if content is None else (broken / name).write_text(content)
    records, problems = read_runs([tmp_path])
    assert [run.path for run in records] == [whole]
    assert [(each.path, each.status) for each in problems] == [(broken, "damaged")]
    assert reason in problems[0].reason
    assert f"left out, damaged: {broken}" in printed(paths=[tmp_path], width=500)


def test_a_value_that_was_not_finite_is_neither_skipped_nor_printed_as_nan(tmp_path):
    readings = curves()
    readings["loss/valid"][400] = None  # how the writer keeps NaN
    write_run(tmp_path / "a", readings=readings)
    write_run(tmp_path / "b", "library", eps=1e-5)
    (run, _), _ = read_runs([tmp_path])
    assert math.isnan(run.curves["loss/valid"][1][-1])
    comparison = compared(tmp_path)
    assert comparison.means["none"]["loss/valid/final"].mean is None
    assert comparison.means["none"]["loss/valid/best"].mean == 0.3
    text = printed(paths=[tmp_path])
    assert "not finite" in text
    assert "nan" not in text.lower() + comparison_json(comparison).lower() + comparison_csv(comparison).lower()


def test_a_folder_that_is_none_or_holds_no_run_is_an_error_that_names_it(tmp_path):
    (tmp_path / "empty" / ".hydra").mkdir(parents=True)
    (tmp_path / "empty" / ".hydra" / "config.yaml").write_text("a: 1")
    with pytest.raises(UserError, match=r"missing: no such folder; give"):
        read_runs([tmp_path / "missing"])
    with pytest.raises(UserError, match=r"empty: no run in it .*; give"):
        read_runs([tmp_path / "empty"])


def test_nothing_finished_is_an_error_that_says_what_there_is(tmp_path):
    write_run(tmp_path / "a", status="failed", error="ValueError: no")
    with pytest.raises(UserError, match=r"no finished run.*failed: ValueError: no"):
        compared(tmp_path)


def test_links_are_not_followed_so_that_a_loop_of_them_is_harmless(tmp_path):
    write_run(tmp_path / "sweep" / "a")
    (tmp_path / "sweep" / "up").symlink_to(tmp_path)
    (tmp_path / "sweep" / "b").symlink_to(tmp_path / "sweep" / "a")
    assert [run.path.name for run in read_runs([tmp_path])[0]] == ["a"]


def test_overlapping_paths_count_a_run_once_and_keep_the_order_given(tmp_path):
    for i, name in enumerate(("s10", "s9", "first")):
        write_run(tmp_path / "sweep" / name, seed=i, started=float(name == "s10"))
    (tmp_path / "latest").symlink_to(tmp_path / "sweep" / "s9")
    records, _ = read_runs([tmp_path / "sweep" / "s9", tmp_path, tmp_path / "latest"])
    assert [run.path.name for run in records] == ["s9", "first", "s10"]


def test_two_hundred_runs_of_a_thousand_lines_are_read_in_five_seconds(tmp_path):
    rows = [{"step": i, "seconds": i / 7, "loss/train": 1 / i, "accuracy/train": 0.5} for i in range(1, 1001)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for seed in range(200):
        folder = write_run(tmp_path / str(seed), seed=seed)
        (folder / "metrics.jsonl").write_text(lines)
    began = time.perf_counter()
    records, _ = read_runs([tmp_path])
    assert time.perf_counter() - began < 5
    assert len(records[7].curves["loss/train"][0]) == 1000


# Variants


def labels(folder):
    return [each.label for each in into_variants(read_runs([folder])[0])[0]]


def test_variants_are_named_by_what_sets_them_apart(tmp_path):
    write_run(tmp_path / "1", "none", started=1)
    write_run(tmp_path / "2", "library", started=2)
    assert labels(tmp_path) == ["none", "library"]
    write_run(tmp_path / "3", "library", lr=0.5, started=3)
    assert labels(tmp_path) == ["none lr=0.1", "library lr=0.1", "library lr=0.5"]
    write_run(tmp_path / "4", "library", eps=1e-3, started=4)  # `none` has no eps, so it does not name one
    assert labels(tmp_path)[0] == "none lr=0.1"
    assert labels(tmp_path)[3] == "library lr=0.1 eps=0.001"


def test_names_come_from_the_overrides_or_else_from_the_target(tmp_path):
    write_run(tmp_path / "1", "none", overrides=[], started=1)
    write_run(tmp_path / "2", "library", overrides=["+norm=tf_slim", "seed=0"], eps=1e-3, started=2)
    write_run(tmp_path / "3", "library", overrides=["lr=1"], started=3)
    assert labels(tmp_path) == ["none", "tf_slim", "library"]
    adam = {"optimizer": {"_target_": "torch.optim.Adam", "lr": 0.1}}
    write_run(tmp_path / "4", "none", overrides=[], config=adam, started=4)
    assert labels(tmp_path)[3] == "none adam"


def test_code_of_ones_own_is_named_by_its_class(tmp_path):
    for n, path in enumerate(("own.norms.MyNorm", "own.Other"), start=1):
        norm = {"norm": {"_target_": path, "path": path}}
        write_run(tmp_path / str(n), config=norm, overrides=["norm=own", f"norm.path={path}"], started=n)
    assert labels(tmp_path) == ["mynorm", "other"]
    write_run(tmp_path / "3", "library", started=3)
    assert labels(tmp_path) == ["mynorm", "other", "library"]


def test_seed_and_housekeeping_do_not_make_a_variant(tmp_path):
    write_run(tmp_path / "1", seed=0, config={"threads": "auto", "quiet": False, "log_every": 50})
    write_run(tmp_path / "2", seed=1, config={"threads": "1", "quiet": True, "log_every": 10})
    assert labels(tmp_path) == ["none"]
    write_run(tmp_path / "3", seed=1, config={"epochs": 3}, started=1)
    assert labels(tmp_path) == ["epochs=2", "epochs=3"]


def test_of_a_seed_run_twice_the_later_counts_and_the_earlier_is_named(tmp_path):
    old = write_run(tmp_path / "z-old", started=1, readings=curves(0.5))
    new = write_run(tmp_path / "a-new", started=2, readings=curves(0.7))
    comparison = compare_records(*read_runs([new, old]))
    assert comparison.means["none"]["accuracy/test"].mean == 0.7
    assert [(each.path, each.status) for each in comparison.left_out] == [(old, "superseded")]
    assert str(new) in comparison.left_out[0].reason


# Verdict


def test_differences_are_paired_by_seed_and_have_their_closed_form(three):
    paired = compared(three).against["library"].differences["accuracy/test"]
    # Differences 1, 2, 3 points: mean 2, standard error 1/sqrt(3), t = sqrt(12); with two degrees of freedom
    # p = 1 - t / sqrt(t^2 + 2), and the table's t quantile is 4.303.
    assert paired.n == 3
    assert paired.difference == pytest.approx(0.02)
    assert paired.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert paired.high - paired.difference == pytest.approx(4.303 * 0.01 / math.sqrt(3), rel=2e-4)


def test_an_interval_across_zero_is_undecided_and_one_beside_it_is_better_or_worse(three):
    comparison = compared(three)
    assert comparison.evidence["library"].word == "undecided"
    (sentence,) = comparison.sentences
    assert sentence.startswith("library against none, over 3 paired seeds: not enough evidence of a diff")
    assert "3 seeds find a difference of 3.26 points in 4 of 5 cases" in sentence
    by_loss = compared(three, primary="loss/test")
    assert by_loss.evidence["library"].word == "better"  # lower
    assert "test loss is lower by 0.3090 (95% interval -0.33" in by_loss.sentences[0]
    assert by_loss.sentences[0].count("at one learning rate, tuned for neither") == 1
    assert compared(three, primary="loss/test", baseline="norm=library").evidence["none"].word == "worse"


def test_best_and_final_values_are_told_apart(tmp_path):
    write_run(tmp_path / "a")
    means = compared(tmp_path).means["none"]
    found = {key: mean.mean for key, mean in means.items()}
    assert found["loss/valid/best"] == 0.3
    assert found["loss/valid/final"] == found["loss/train/final"] == 0.35
    assert found["accuracy/valid/best"] == 0.7
    assert found["accuracy/valid/final"] == 0.65


def test_one_seed_has_no_interval_and_no_p(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", "library", started=1, readings=curves(0.99))
    comparison = compared(tmp_path)
    assert all(each.p is None and each.low is None for each in comparison.against["library"].differences.values())
    assert comparison.evidence["library"].word == "undecided"
    assert "in one seed, which is not enough evidence" in comparison.sentences[0]
    assert "library: one seed, so no interval and no p." in comparison.notes
    assert "±" not in printed(paths=[tmp_path]) and " p =" not in comparison.sentences[0]


def test_diverged_runs_are_left_out_of_the_means_and_said(three):
    write_run(three / "d", "library", 3, status="diverged", started=9, readings=curves(0.1, 9.0))
    write_run(three / "e", "none", 3, readings=curves(0.9, 0.4))
    comparison = compared(three)
    assert comparison.means["library"]["accuracy/test"].n == 3
    assert comparison.against["library"].differences["accuracy/test"].n == 3
    assert any("library fails in 1 of 4 seeds, 1 of them diverged (95% Clopper-Pearson interval 1% to 81%; McNemar's "
               "exact p = 1 against none)." in note for note in comparison.notes)  # fmt: skip
    assert comparison.sentences[0].endswith("library fails in 1 of 4 seeds, 1 of them diverged.")
    assert "1/4" in printed(paths=[three])


def test_a_variant_that_always_diverged_has_its_row(three):
    for seed in range(2):
        write_run(three / f"d{seed}", "scratch", seed, status="diverged", started=9, readings={})
    comparison = compared(three)
    assert [each.label for each in comparison.variants] == ["none", "library", "scratch"]
    assert comparison.means["scratch"]["loss/test"].n == 0
    assert "no difference can be given, because no seed finished in both" in comparison.sentences[1]
    assert "2/2" in printed(paths=[three])


def test_seeds_without_a_partner_are_said(three):
    write_run(three / "more", "library", 7, started=9)
    comparison = compared(three)
    assert comparison.against["library"].differences["accuracy/test"].n == 3
    assert comparison.means["library"]["accuracy/test"].n == 4
    assert any("library: none has no run of seed 7," in note for note in comparison.notes)


def test_more_than_one_difference_is_said_with_what_differs(tmp_path):
    write_run(tmp_path / "a", started=1)
    write_run(tmp_path / "b", "library", started=2)
    assert not [note for note in compared(tmp_path).notes if "differs" in note]
    write_run(tmp_path / "c", "library", lr=0.5, started=3)
    comparison = compared(tmp_path)
    assert [note for note in comparison.notes if "differs" in note] == [
        "library lr=0.5 differs from none lr=0.1 in more than one setting: "
        "norm (none, library), optimizer.lr (0.1, 0.5)."
    ]
    differs = comparison.against["library lr=0.5"].differs
    assert differs == {"norm": ("none", "library"), "optimizer.lr": (0.1, 0.5)}


@pytest.mark.parametrize("wanted", ["norm=library", "library", "library lr=0.1", "norm=library,lr=1e-1"])
def test_the_baseline_is_none_or_the_one_named(three, wanted):
    write_run(three / "x", "none", 0, lr=0.5, started=-1)
    assert compared(three, baseline=wanted).baseline.label.startswith("library")
    assert compared(three).baseline.label == "none lr=0.5"  # the first of those without a norm


def test_without_norm_none_the_baseline_is_the_variant_started_first(tmp_path):
    write_run(tmp_path / "a", "library", started=2)
    write_run(tmp_path / "b", "scratch", started=1)
    assert compared(tmp_path).baseline.label == "scratch"


def test_a_baseline_that_is_no_variant_is_an_error_that_lists_them(three):
    with pytest.raises(UserError, match=r"baseline=norm=group: .* `none`, `library`; name one"):
        compared(three, baseline="norm=group")


def test_a_baseline_that_fits_several_is_the_first_and_said(three):
    write_run(three / "x", "none", 0, lr=0.5, started=9)
    comparison = compared(three, baseline="norm=none")
    assert comparison.baseline.label == "none lr=0.1"
    assert any("fits 2 variants" in note for note in comparison.notes)


def test_one_variant_alone_is_shown_without_a_verdict(tmp_path):
    write_run(tmp_path / "a")
    assert compared(tmp_path).sentences == ["One variant only, none: nothing to compare it with."]
    assert "90.00" in printed(paths=[tmp_path])


def sweep_rates(folder, rates, norm="none", seeds=2):
    """Runs at learning rates {rate: (validation accuracy, test accuracy)}; the loss misleads."""
    for rate, (valid, test) in rates.items():
        for seed in range(seeds):
            readings = curves(test, valid=(1 - valid,)) | {"loss/valid": {100: 1 / rate}}
            write_run(folder / f"{norm}-{rate}-{seed}", norm, seed, lr=rate, readings=readings)


def test_best_over_picks_by_validation_and_compares_on_test(tmp_path):
    sweep_rates(tmp_path, {0.01: (0.5, 0.9), 0.1: (0.8, 0.6), 1.0: (0.7, 0.95)})
    sweep_rates(tmp_path, {0.01: (0.5, 0.5), 1.0: (0.9, 0.7)}, "library")
    comparison = compared(tmp_path, best_over="lr")
    assert comparison.question.best_over == "optimizer.lr"
    assert comparison.chosen == {"none lr=0.1": 0.1, "library lr=1.0": 1.0}
    assert comparison.means["none lr=0.1"]["accuracy/test"].mean == 0.6
    assert comparison.against["library lr=1.0"].differences["accuracy/test"].difference == pytest.approx(0.1)
    assert list(comparison.against["library lr=1.0"].differs) == ["norm"]
    text = " ".join(comparison.notes)
    assert "none is shown at optimizer.lr=0.1, the best of 0.01, 0.1, 1.0 by mean best validation accuracy" in text
    assert text.count("a larger one may be better") == 1  # library's is the largest tried


def test_best_over_falls_back_to_the_loss(tmp_path):
    for rate, loss in ((0.1, 0.3), (0.5, 0.2)):
        write_run(tmp_path / str(rate), lr=rate, readings={"loss/valid": {1: loss}})
    assert compared(tmp_path, best_over="optimizer.lr").chosen == {"none lr=0.5": 0.5}


def test_best_over_prefers_a_value_at_which_fewer_seeds_diverge(tmp_path):
    sweep_rates(tmp_path, {0.1: (0.6, 0.6), 1.0: (0.9, 0.9)})
    status = tmp_path / "none-1.0-1" / "status.json"
    status.write_text(status.read_text().replace("finished", "diverged"))
    assert compared(tmp_path, best_over="lr").chosen == {"none lr=0.1": 0.1}


def test_best_over_an_unknown_key_is_an_error_that_suggests(three):
    with pytest.raises(UserError, match=r"optimizer\.lrr: .* choose among .*optimizer\.lr\b"):
        compared(three, best_over="optimizer.lrr")


def test_best_over_an_unknown_key_proposes_the_settings_that_vary(tmp_path):
    sweep_rates(tmp_path, {0.1: (0.6, 0.6), 1.0: (0.9, 0.9)})
    sweep_rates(tmp_path, {0.1: (0.6, 0.6), 1.0: (0.9, 0.9)}, "library")  # has norm.eps, always the same one
    with pytest.raises(UserError, match=r"optimizer\.momentum: .*; choose among optimizer\.lr$"):
        compared(tmp_path, best_over="optimizer.momentum")


DIGITS = {"_target_": "bnexp.data.digits.Digits", "valid": 0.1, "limit": None, "augment": "none"}


@pytest.mark.parametrize("key", ["valid", "limit", "data._target_", "test", "root", "eval_every"])
def test_best_over_refuses_settings_at_whose_values_the_numbers_mean_different_things(tmp_path, key):
    for i, more in enumerate(({}, {"valid": 0.3, "limit": 9, "_target_": "mine.Data", "test": 0.1, "root": "photos"})):
        config = {"data": DIGITS | more, "eval_every": 10 * i + 10}
        write_run(tmp_path / str(i), config=config, readings=curves(0.9))
    with pytest.raises(UserError, match=f"best over .*{key}: its values have other "):
        compared(tmp_path, best_over=key)


def test_best_over_picks_a_way_to_show_the_same_images(tmp_path):
    for augment, accuracy in (("none", 0.1), ("flip", 0.2)):
        write_run(
            tmp_path / augment, config={"data": DIGITS | {"augment": augment}}, readings=curves(valid=(1 - accuracy,))
        )
    assert list(compared(tmp_path, best_over="augment").chosen.values()) == ["flip"]


def test_best_over_proposes_only_settings_whose_values_can_be_ranked(tmp_path):
    for i, config in enumerate(({"drop_last": True, "eval_every": 5}, {"drop_last": False, "eval_every": 9})):
        write_run(tmp_path / str(i), config=config, readings=curves(valid=(0.2 + i / 10,)))
    with pytest.raises(UserError, match="momentum: no setting of these runs; choose among drop_last$"):
        compared(tmp_path, best_over="momentum")
    assert "value tried" not in " ".join(compared(tmp_path, best_over="drop_last").notes), (
        "true is no larger than false"
    )


def test_best_over_a_setting_that_does_not_vary_names_the_one_that_does(tmp_path):
    sweep_rates(tmp_path, {0.1: (0.6, 0.6), 1.0: (0.9, 0.9)})
    notes = compared(tmp_path, best_over="epochs").notes
    assert any("each variant has one value of it" in note and "varies is optimizer.lr." in note for note in notes)


# What is printed and written


def test_json_holds_variants_means_differences_speedups_and_who_was_left_out(three):
    write_run(three / "bad", "scratch", status="failed", error="[boom]")
    lost = write_run(three / "lost", "library", 9, status="diverged", started=9)
    content = json.loads(printed(paths=[three], format="json"))
    assert content == json.loads(comparison_json(compared(three)))
    assert content["baseline"] == "none"
    none, library = content["variants"]
    assert (library["label"], library["n"], library["seeds"]) == ("library", 3, [0, 1, 2])
    assert library["overrides"] == ["norm=library"]
    assert (library["num_diverged"], len(library["runs"]), library["runs"][-1]) == (1, 4, str(lost))
    assert library["metrics"]["accuracy/test"]["mean"] == pytest.approx(0.92)
    assert set(library["paired"]["loss/test"]) == {"n", "difference", "low", "high", "p", "error", "freedom"}
    assert library["speedup"]["ratio"] == pytest.approx(1.5)
    assert library["evidence"]["word"] == "undecided" and library["failures"]["k"] == 1
    assert none["paired"] is none["evidence"] is None and content["primary"] == "accuracy/test"
    left_out = content["left_out"]
    assert [(each["path"], each["reason"]) for each in left_out] == [(str(three / "bad"), "[boom]")]


def test_csv_holds_the_numbers_of_the_json(three):
    rows = list(csv.DictReader(io.StringIO(printed(paths=[three], format="csv"))))
    by_key = {(row["variant"], row["metric"]): row for row in rows}
    paired = compared(three).against["library"].differences["loss/test"]
    row = by_key["library", "loss/test"]
    assert (float(row["difference"]), float(row["p"])) == (paired.difference, paired.p)
    assert (float(row["difference_low"]), row["evidence"]) == (paired.low, "")
    judged, seen = by_key["library", "accuracy/test"], compared(three).evidence["library"]
    assert (judged["evidence"], float(judged["evidence_p"]), float(judged["evidence_low"])) == (
        "undecided", seen.p, seen.low,
    )  # fmt: skip
    assert float(by_key["library", "speedup"]["mean"]) == pytest.approx(1.5)
    assert by_key["none", "loss/test"]["difference"] == ""
    assert len(rows) == 2 * len(METRICS) + 1


def test_markdown_is_one_table_row_per_variant_and_metric(three):
    text = printed(paths=[three], format="markdown", width=40)
    assert (
        "| library | 3 | 92.00 ±2.48 | 1.00 | +2.00 [-0.48, +4.48] | 0.074 | 3 of 3 [44%, 100%] | - | undecided |"
        in text
    )
    assert compared(three).sentences[0] in text
    assert "![" not in text and "](a.png)" in comparison_markdown(compared(three), figure="a.png")


def test_files_are_written_whole_and_the_figures_path_is_printed(three, tmp_path):
    out = tmp_path / "new" / "comparison"
    text = printed(paths=[three], out=out, width=40)
    assert sorted(each.suffix for each in out.iterdir()) == [".json", ".md", ".png", ".svg"]
    assert f"figure: {out / 'comparison.png'}\n" in text
    assert (out / "comparison.json").read_text() == comparison_json(looked_at(compared(three), []))
    assert "](comparison.png)" in (out / "comparison.md").read_text()
    assert len(read_runs([tmp_path])[0]) == 6  # the comparison's folder is no run


def test_a_folder_that_cannot_be_written_is_an_error(three):
    (three / "file").write_text("")
    with pytest.raises(UserError, match=r"out=.*file: cannot be written"):
        printed(paths=[three], out=three / "file")


def test_an_unknown_format_is_an_error_that_lists_the_known(three):
    with pytest.raises(UserError, match="format=xml: .* json, csv, markdown"):
        printed(paths=[three], format="xml")


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_name_and_no_number_of_the_tables_is_cut(three, width):
    write_run(three / "d", "library", 3, status="diverged", started=9)
    text = printed(paths=[three], width=width)
    for cell in ("library", "92.00", "±2.48", "[-0.48,", "+4.48]", "[-0.3314, -0.2866]", "0.074", "0.00028"):
        assert cell in text
    assert ("92.00 ±2.48" in text) == (width > 80) and "undecided" in text
    table = printed(sweep_table(*read_runs([three])), width=width)
    for cell in ("library", "92.00", "±2.48", "0.1010", "±0.0025"):
        assert cell in table
    assert "…" not in text + table


def test_an_interval_that_ends_at_100_percent_is_shown_by_its_ends(tmp_path):
    for seed, accuracy in enumerate((0.9, 1.0, 1.0)):
        write_run(tmp_path / str(seed), seed=seed, readings=curves(accuracy))
        write_run(tmp_path / f"b{seed}", "library", seed, readings=curves(accuracy - seed / 9))
    text = printed(paths=[tmp_path], width=200)
    assert "96.67 [82.32, 100.00]" in text and "96.67 ±" not in text


def test_a_sweeps_table_breaks_long_names_before_numbers(tmp_path):
    sweep_rates(tmp_path, {0.1: (0.6, 0.6), 300000000.0: (0.9, 0.9)})
    write_run(tmp_path / "d", "library", status="diverged", lr=300000000.0)
    text = printed(sweep_table(*read_runs([tmp_path])), width=80)
    assert "…" not in text
    for number in ("60.00", "90.00", "0.3000", "10.0000"):
        assert number in text


def test_brackets_in_names_and_reasons_are_printed_as_they_are(tmp_path):
    for i, name in enumerate(("[red]a[/red]", "[/]")):
        write_run(tmp_path / str(i), config={"name": name, "sizes": [i]}, started=i)
    write_run(tmp_path / "x", status="failed", error="[red]boom[/red]")
    assert "from name=[/] sizes=[1], with" in printed(
        paths=[tmp_path], question=Question("name=[/] sizes=[1]"), width=400
    )
    for text in (printed(paths=[tmp_path]), printed(sweep_table(*read_runs([tmp_path])), width=400)):
        assert "name=[red]a[/red] sizes=[0]  " in text
        assert "name=[/] sizes=[1]  " in text
    assert "([red]boom[/red])" in printed(paths=[tmp_path], width=400)
    assert "[red]boom[/red]" in printed(sweep_table(*read_runs([tmp_path])), width=400)


def test_a_sweeps_table_shows_variants_then_failures_with_reason_and_place(three):
    write_run(three / "bad", "scratch", 1, status="failed", error="ValueError: too small")
    write_run(three / "lost", "library", 3, status="diverged", started=9)
    text = printed(sweep_table(*read_runs([three])), width=400)
    library = next(line.split() for line in text.splitlines() if line.strip().startswith("library"))
    assert library[:5] == ["library", "3", "1/4", "92.00", "±2.48"]
    assert library[-1] == "2.0"  # seconds
    assert f"failed: norm=scratch seed=1: ValueError: too small ({three / 'bad' / 'status.json'})" in text


def test_a_sweep_in_which_all_failed_still_lists_why(tmp_path):
    write_run(tmp_path / "a", status="failed", error="ValueError: no")
    assert "norm=none seed=0: ValueError: no" in printed(sweep_table(*read_runs([tmp_path])), width=400)
