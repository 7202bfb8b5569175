"""Tuning: which seeds choose and which are judged, and what a number of tried values is expected to give."""

import csv
import io
import itertools
import json
import statistics

import numpy as np
import pytest
from test_report import compared, curves, printed, write_run

from bnexp.errors import UserError
from bnexp.report.figures.tuning import draw_tuning
from bnexp.report.question import Question
from bnexp.report.report import comparison_csv
from bnexp.report.tuning import expected_best


def write_rates(folder, rates, norm="none"):
    """Runs at learning rates {rate: [(validation accuracy, test accuracy) of seeds 0, 1, ...]}; None diverged."""
    for rate, accuracies in rates.items():
        for seed, each in enumerate(accuracies):
            more = {"status": "diverged", "majority": {"test": [0.1, 1000]}}
            if each is not None:
                more = {"readings": curves(each[1], valid=(1 - each[0],))}
            write_run(folder / f"{norm}-{rate}-{seed}", norm, seed, lr=rate, started=float(norm != "none"), **more)


# Each seed has its own best rate: 0.1 for seeds 0 and 1, 0.5 for seeds 2 and 3.
RATES = {0.1: [(0.8, 0.70), (0.8, 0.71), (0.2, 0.72), (0.2, 0.74)],
         0.5: [(0.6, 0.80), (0.6, 0.81), (0.9, 0.82), (0.9, 0.83)]}  # fmt: skip


def test_the_expected_best_is_the_mean_over_all_draws():
    values = [0.1, 0.4, 0.45, 0.9]
    for k, found in enumerate(expected_best(values), 1):
        draws = [max(draw) for draw in itertools.product(values, repeat=k)]
        assert found == pytest.approx(statistics.fmean(draws), rel=1e-12)
    assert expected_best([0.3]) == [0.3]


def test_some_seeds_choose_and_only_the_others_are_judged(tmp_path):
    write_rates(tmp_path, RATES)
    write_rates(tmp_path, RATES, "library")
    assert set(compared(tmp_path, best_over="lr").chosen.values()) == {0.5}, "all seeds: 0.55 against 0.75"
    for choose_on, rate, judged in ((2, 0.1, [2, 3]), (3, 0.5, [3])):
        content = json.loads(
            printed(paths=[tmp_path], question=Question(best_over="lr", choose_on=choose_on), format="json")
        )
        assert (content["choose_on"], content["chosen_on"], content["judged_on"]) == (
            choose_on, list(range(choose_on)), judged,
        )  # fmt: skip
        assert set(content["chosen"].values()) == {rate}
        none, library = content["variants"]
        assert none["seeds"] == library["seeds"] == judged and library["paired"]["accuracy/test"]["n"] == len(judged)
        tests = [RATES[rate][seed][1] for seed in judged]
        assert none["metrics"]["accuracy/test"]["mean"] == pytest.approx(statistics.fmean(tests))
    notes = compared(tmp_path, best_over="lr", choose_on=2).notes
    assert "best over optimizer.lr: chosen on seeds 0, 1, judged on seeds 2, 3." in notes
    assert not any("flatters" in note for note in notes)
    assert any(
        "the seeds that chose a value also judge it" in note for note in compared(tmp_path, best_over="lr").notes
    )


def test_seeds_that_cannot_choose_or_judge_are_refused(tmp_path, bnexp, capsys):
    write_rates(tmp_path / "runs", RATES)
    for options, words in (
        ({"choose_on": 2}, "nothing is to be chosen; name the setting too"),
        ({"choose_on": 0, "best_over": "lr"}, "choose_on=0: .*; give 1 or more"),
        ({"choose_on": -1, "best_over": "lr"}, "give 1 or more"),
        ({"choose_on": 4, "best_over": "lr"}, "choose_on=4: .* the runs have 4; give a smaller number"),
    ):
        with pytest.raises(UserError, match=words):
            compared(tmp_path / "runs", **options)
    assert bnexp("report", "runs", "--best-over", "lr", "--choose-on", "4") == 2
    assert "choose_on=4" in capsys.readouterr().err
    write_run(tmp_path / "runs" / "late", "library", 3)
    with pytest.raises(UserError, match="library.* has no run of seeds 0, 1 to choose by"):
        compared(tmp_path / "runs", best_over="lr", choose_on=2)
    write_run(tmp_path / "runs" / "early", "library", 0)
    write_run(tmp_path / "runs" / "later", "library", 4)
    with pytest.raises(UserError, match="library.* has no run of seed 4 to judge by"):
        for path in (tmp_path / "runs").glob("late*"):
            path.joinpath("config.yaml").write_text((path / "config.yaml").read_text().replace("lr: 0.1", "lr: 0.2"))
        compared(tmp_path / "runs", best_over="lr", choose_on=4)


def test_values_that_the_judging_seeds_did_not_run_may_lose(tmp_path):
    write_rates(tmp_path, {0.1: RATES[0.1], 0.5: RATES[0.5][:2]})
    comparison = compared(tmp_path, best_over="lr", choose_on=2)
    assert list(comparison.chosen.values()) == [0.1] and comparison.means["none lr=0.1"]["accuracy/test"].n == 2


def test_a_curve_shows_the_test_at_the_value_that_validation_chooses_in_each_seed(tmp_path):
    write_rates(tmp_path, RATES)
    write_rates(tmp_path, {0.1: [(0.6, 0.9), (0.7, 0.8)], 0.5: [None, (0.6, 0.5)]}, "library")
    comparison = compared(tmp_path, best_over="lr")
    none, library = (comparison.tried(variant).curve for variant in comparison.variants)
    # k = 1: the mean of both values; k = 2: a quarter of the worse and three quarters of the better by validation.
    worse, better = [0.80, 0.81, 0.72, 0.74], [0.70, 0.71, 0.82, 0.83]
    assert none[0].mean == pytest.approx(np.mean([worse, better])) and none[0].n == 4
    assert none[1].mean == pytest.approx(np.mean(0.25 * np.array(worse) + 0.75 * np.array(better)))
    # The diverged run counts as the largest class's share, 0.1.
    assert library[1].mean == pytest.approx(np.mean([0.25 * 0.1 + 0.75 * 0.9, 0.25 * 0.5 + 0.75 * 0.8]))
    assert (library[0].low, library[0].high) == (0.0, 1.0), "no share is below 0 or above 1"
    losses = compared(tmp_path, best_over="lr", primary="loss/test")
    assert [each.mean for each in losses.tried(losses.variants[1]).curve] == [None, None]
    figure = draw_tuning([losses.tried(losses.variants[1])], losses.question)
    assert figure.axes[0].texts[0].get_text() == "no seed has a finite result at every value"
    assert "so a loss has no curve" in " ".join(figure.get_supxlabel().split())


def test_the_figure_draws_the_numbers_of_the_json_and_leaves_with_them(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    write_rates(runs, RATES)
    write_rates(runs, {0.1: RATES[0.1]}, "library")
    printed(paths=[runs], out=out, question=Question(best_over="lr"))
    content = json.loads((out / "comparison.json").read_text())
    assert (out / "tuning.svg").is_file() and "](tuning.png)" in (out / "comparison.md").read_text()
    comparison = compared(runs, best_over="lr")
    figure = draw_tuning(list(map(comparison.tried, comparison.variants)), comparison.question)
    lines = [*csv.DictReader(io.StringIO(comparison_csv(comparison)))]
    table = (out / "comparison.md").read_text().partition("expected best of k")[2].splitlines()
    for line, variant in zip(figure.axes[0].lines, content["variants"], strict=True):
        named = [row for row in lines if (row["variant"], row["metric"][:7]) == (variant["label"], "tuning/")]
        assert [float(row["mean"]) for row in named] == [each["mean"] for each in variant["tuning"]]
        cells = next(row for row in table if row.startswith(f"| {variant['label']} |")).split("|")[2:-1]
        shown = [f"{100 * each['mean']:.2f}" for each in variant["tuning"]]
        assert [cell.split()[0] for cell in cells if cell.strip() != "-"] == shown
        assert list(line.get_ydata()) == [each["mean"] for each in variant["tuning"]]
        assert list(line.get_xdata()) == list(range(1, len(variant["tuning"]) + 1))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["none, 2 values", "library, 1 value"]
    assert "4 seeds each" in figure.get_supxlabel() and "lr" not in figure.get_supxlabel()
    printed(paths=[runs], out=out)
    assert not (out / "tuning.png").exists() and not (out / "tuning.svg").exists()
    assert json.loads((out / "comparison.json").read_text())["variants"][0]["tuning"] == []
