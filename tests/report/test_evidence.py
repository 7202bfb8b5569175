"""Verdicts: corrected p-values, equivalence, power, failures, steps to a target, looks and plans."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from test_report import compared, curves, printed, write_run

from bnexp.errors import UserError
from bnexp.report import inference
from bnexp.report.plan import make_plan, seeds_needed
from bnexp.report.question import Question
from bnexp.report.records import read_runs
from bnexp.report.stats import Difference, paired_difference
from bnexp.report.steps import default_targets, speed_up

VALUES, BASE = [0.971, 0.968, 0.975, 0.970, 0.966], [0.944, 0.951, 0.949, 0.940, 0.947]


# Formulas


def test_holm_multiplies_the_smallest_by_their_number_and_never_descends():
    # Holm (1979): 0.01 x 3, then the larger of that and 0.02 x 2, then of that and 0.03.
    assert inference.holm([0.03, None, 0.01, 0.02]) == [
        pytest.approx(0.04),
        None,
        pytest.approx(0.03),
        pytest.approx(0.04),
    ]
    assert inference.holm([0.5, 0.9]) == [1.0, 1.0]
    assert inference.holm([]) == []


@pytest.mark.parametrize("margin", [0.01, 0.03, 0.05])
def test_equivalence_is_the_larger_of_two_one_sided_tests(margin):
    found = paired_difference(VALUES, BASE)
    gains = np.subtract(VALUES, BASE)
    both = [scipy_stats.ttest_1samp(gains, end, alternative=side).pvalue
            for end, side in ((margin, "less"), (-margin, "greater"))]  # fmt: skip
    assert inference.equivalence_p(found, margin) == pytest.approx(max(both), rel=1e-9)
    assert inference.equivalence_p(Difference(1, 0.1), margin) is None


@pytest.mark.parametrize(("n", "known"), [(3, 3.26), (5, 1.68), (10, 1.00)])
def test_the_difference_that_is_found_has_a_power_of_80_percent(n, known):
    found = inference.detectable(1 / math.sqrt(n), n - 1)
    assert found == pytest.approx(known, abs=0.005)
    quantile = scipy_stats.t.ppf(0.975, n - 1)
    assert scipy_stats.nct.sf(quantile, n - 1, found * math.sqrt(n)) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(("k", "n"), [(0, 5), (2, 5), (5, 5), (1, 20)])
def test_intervals_of_shares_are_scipys(k, n):
    for found, method in ((inference.clopper_pearson(k, n), "exact"), (inference.wilson(k, n), "wilson")):
        expected = scipy_stats.binomtest(k, n).proportion_ci(method=method)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_sign_test_is_the_exact_binomial_one():
    for first, second in ((5, 0), (6, 0), (1, 7), (3, 3)):
        expected = scipy_stats.binomtest(first, first + second).pvalue
        assert inference.sign_test(first, second) == pytest.approx(expected, rel=1e-12)
    assert inference.sign_test(0, 0) == 1.0


def test_flips_of_whole_seeds_are_those_of_scipy_and_keep_what_variants_share():
    row = np.array([0.3, 0.1, 0.4, 0.2, -0.1, 0.35, 0.25])

    def statistic(sample, axis):
        return np.abs(sample.mean(axis=axis)) / sample.std(axis=axis, ddof=1)

    settings = {"permutation_type": "samples", "n_resamples": math.inf, "alternative": "greater", "vectorized": True}
    expected = scipy_stats.permutation_test((row,), statistic, **settings)
    (found,) = inference.flip_signs([row])
    assert found == pytest.approx(expected.pvalue)
    assert inference.flip_signs([row, row]) == [found, found], "a copy adds nothing to be corrected for"
    weaker = inference.flip_signs([row, np.roll(row, 3) - 0.2])
    assert weaker[0] >= found and inference.flip_signs([row[:5]]) is None


def test_the_bound_of_looks_keeps_false_positives_at_five_percent():
    assert inference.bound_of_looks([7]) == pytest.approx(0.05, abs=0.004)  # 40,000 draws: standard error 0.001
    assert inference.bound_of_looks(range(3, 11)) == pytest.approx(0.012, abs=0.001)


def test_a_plan_asks_for_the_fewest_seeds_with_the_power():
    sd, difference = 1.4, 1.0
    n = seeds_needed(sd, difference, 0.05)
    power = [
        scipy_stats.nct.sf(scipy_stats.t.ppf(0.975, k - 1), k - 1, difference / sd * math.sqrt(k)) for k in (n - 1, n)
    ]
    assert power[0] < 0.8 <= power[1] + 1e-9
    plan = make_plan(5, sd, difference)
    low, high = (sd * math.sqrt(4 / scipy_stats.chi2.ppf(q, 4)) for q in (0.975, 0.025))
    assert (plan.low, plan.high) == pytest.approx((low, high), rel=1e-9)
    assert plan.fewest < plan.seeds < plan.most
    assert seeds_needed(100.0, 0.1, 0.05) == math.inf


# Verdicts


def write_pairs(folder, gains, norm="library", first=0, base=0.9, spread=0.001, **more):
    """Runs of none and of a norm, whose test accuracy is above none's by the gains, seed by seed."""
    for seed, gain in enumerate(gains, first):
        level = base + spread * seed
        if not (folder / f"none-{seed}").exists():
            write_run(folder / f"none-{seed}", seed=seed, readings=curves(level))
        write_run(folder / f"{norm}-{seed}", norm, seed, started=1, readings=curves(level + gain), **more)


def test_the_p_of_several_variants_are_corrected_and_their_intervals_wider(tmp_path):
    gains = [0.011, 0.009, 0.013, 0.007, 0.010, 0.002]
    write_pairs(tmp_path, gains)
    alone = compared(tmp_path).evidence["library"]
    write_pairs(tmp_path, [0.0, 0.002, -0.003, 0.001, 0.003, -0.001], "scratch")
    comparison = compared(tmp_path)
    both, found = comparison.evidence["library"], comparison.against["library"].differences["accuracy/test"]
    assert (alone.p, alone.low) == (found.p, found.low)
    assert both.p == pytest.approx(2 * found.p) and both.low < alone.low and both.p_flips >= alone.p_flips
    assert (both.low, both.high) == found.interval(1 - 0.05 / 2)
    assert (both.word, comparison.evidence["scratch"].word) == ("better", "equivalent")
    assert "is equivalent within 0.5 points (simultaneous 95% interval" in comparison.sentences[1]
    assert all("at one learning rate, tuned for neither." in sentence for sentence in comparison.sentences)
    assert any("the p of 2 variants are corrected together (Holm)" in note for note in comparison.notes)
    assert comparison.evidence["library"].wins == 6 and "6 of 6 [61%, 100%]" in printed(paths=[tmp_path])
    assert compared(tmp_path, margin=0.1).evidence["scratch"].word == "undecided"


def test_two_seeds_are_never_better_and_four_are_warned_of(tmp_path):
    write_pairs(tmp_path, [0.0300, 0.0301])
    comparison = compared(tmp_path)
    assert comparison.evidence["library"].p < 0.01 and comparison.evidence["library"].word == "undecided"
    assert "Fewer than 3 seeds: nothing is called better or worse." in comparison.notes
    write_pairs(tmp_path, [0.0302, 0.0304], first=2)
    comparison = compared(tmp_path)
    assert comparison.evidence["library"].word == "better"
    assert any(note.startswith("Fewer than 5 seeds") for note in comparison.notes)


@pytest.mark.parametrize(("lost", "word"), [(2, "better where both finish"), (0, "better")])
def test_a_variant_that_diverges_is_not_better_than_one_that_never_does(tmp_path, lost, word):
    write_pairs(tmp_path, [0.01, 0.011, 0.012])
    for seed in range(3, 3 + lost):
        write_run(tmp_path / f"none-{seed}", seed=seed, readings=curves(0.9))
        write_run(tmp_path / f"lost-{seed}", "library", seed, status="diverged", started=1, readings={})
    comparison = compared(tmp_path)
    assert comparison.evidence["library"].word == word
    assert ("library fails in 2 of 5 seeds" in comparison.sentences[0]) == bool(lost)
    if lost:
        failures = comparison.failures["library"]
        assert (failures.k, failures.n, failures.p) == (2, 5, 0.5)
        assert any("interval 5% to 85%; McNemar's exact p = 0.5" in note for note in comparison.notes)
        turned = compared(tmp_path, baseline="norm=library")
        assert turned.evidence["none"].word == "worse where both finish"
        assert "library fails in 2 of 5 seeds" in turned.sentences[0], "the baseline's failures are said too"


def test_one_failure_among_many_gains_does_not_turn_the_sign(tmp_path):
    write_pairs(tmp_path, [0.3, 0.31, 0.32, 0.33], base=0.5)
    write_run(tmp_path / "none-9", seed=9, readings=curves(0.5))
    more = {"status": "diverged", "majority": {"test": [0.1, 1000]}}
    write_run(tmp_path / "lost", "library", 9, started=1, readings={}, **more)
    assert compared(tmp_path).evidence["library"].word == "better"


def test_a_run_at_chance_has_failed_and_two_of_them_learned_nothing(tmp_path):
    majority = {"majority": {"test": [0.2, 100]}}  # two standard errors: 0.08
    for seed in range(3):
        write_run(tmp_path / f"a{seed}", seed=seed, readings=curves(0.27), **majority)
        write_run(tmp_path / f"b{seed}", "library", seed, started=1, readings=curves(0.2 + seed / 100), **majority)
        write_run(tmp_path / f"c{seed}", "scratch", seed, started=2, readings=curves(0.29), **majority)
    comparison = compared(tmp_path)
    assert [comparison.failures[label].k for label in ("none", "library", "scratch")] == [3, 3, 0]
    assert comparison.evidence["library"].word == "nothing was learned"
    assert comparison.sentences[0].startswith("library against none: nothing was learned by either.")
    assert comparison.evidence["scratch"].word != "nothing was learned"
    assert "the same" not in comparison.sentences[0]


@pytest.mark.parametrize("lost, word", [("library", "fails in every seed"), ("none", "baseline fails in every seed")])
def test_a_side_that_diverges_in_every_seed_is_named(lost, word, tmp_path):
    for seed, norm in itertools.product(range(3), ("none", "library")):
        more = {"status": "diverged", "readings": {}} if norm == lost else {"readings": curves()}
        write_run(tmp_path / f"{norm}{seed}", norm, seed, **more)
    comparison = compared(tmp_path)
    assert comparison.evidence["library"].word == word
    assert f"{lost} fails in 3 of 3 seeds" in comparison.sentences[0]


def test_runs_on_other_images_have_not_learned_nothing(tmp_path):
    for seed, norm in itertools.product(range(3), ("none", "library")):
        more = {"config": {"data": {"_target_": f"bnexp.data.{norm}.Data"}}, "status": "diverged", "readings": {}}
        write_run(tmp_path / f"{norm}{seed}", norm, seed, **more)
    comparison = compared(tmp_path)
    (evidence,) = comparison.evidence.values()
    assert "saw different images" in comparison.sentences[0] and evidence.word == "undecided"


def test_tuning_with_unequal_numbers_of_values_withholds_the_verdict(tmp_path):
    for norm, rates in (("none", (0.1,)), ("library", (0.1, 0.5))):
        for rate, seed in itertools.product(rates, range(3)):
            level = 0.8 + seed / 1000 + (norm == "library") * (0.1 + rate / 100 + (seed == 1) / 5000)
            write_run(tmp_path / f"{norm}-{rate}-{seed}", norm, seed, lr=rate, readings=curves(level))
    comparison = compared(tmp_path, best_over="lr")
    (evidence,) = comparison.evidence.values()
    assert evidence.p < 0.01 and evidence.word == "undecided"
    assert any("2 against 1 values were tried" in note for note in comparison.notes)
    assert "tuned for neither" not in comparison.sentences[0]


def test_what_cannot_be_judged_is_refused_in_words(tmp_path):
    write_pairs(tmp_path, [0.01, 0.02, 0.03])
    for options, words in (
        ({"primary": "accuracy/tset"}, r"accuracy/tset: cannot be judged \(did you mean accuracy/test\?\)"),
        ({"primary": "accuracy/valid/best"}, "cannot be judged"),
        ({"margin": 0.0}, "margin=0.0: no difference lies within it"),
        ({"margin": math.nan}, "margin=nan"),
        ({"target": 1.01}, "target=1.01: an accuracy above 0 and up to 1"),
        ({"primary": "accuracy/test/at_best"}, "no finished run has measured it; choose one of accuracy/test, loss"),
    ):
        with pytest.raises(UserError, match=words):
            compared(tmp_path, **options)


def test_settings_of_the_runs_are_used_unless_others_are_given(tmp_path):
    write_pairs(tmp_path, [0.01, 0.02, 0.03], config={"primary": "loss/test", "margin": 2.0})
    assert compared(tmp_path).question.primary == "accuracy/test", "the runs do not agree"
    for path in tmp_path.glob("none*/config.yaml"):
        path.write_text(path.read_text() + "primary: loss/test\nmargin: 2.0\n")
    question = compared(tmp_path).question
    assert (question.primary, question.margin) == ("loss/test", 2.0)
    assert compared(tmp_path, margin=0.25).question.margin == 0.25


def test_looks_at_more_and_more_seeds_are_counted_and_lower_the_bound(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    write_pairs(runs, [0.01, 0.02, 0.03])
    for _ in range(2):  # the same runs are one look
        assert "Look " not in printed(paths=[runs], out=out, width=400)
    write_pairs(runs, [0.01, 0.02], first=3)
    text = printed(paths=[runs], out=out, width=400)
    assert "Look 2 at these variants, after 3 seeds" in text and "p < 0.03 keeps false positives at 5%" in text
    assert json.loads((out / "comparison.json").read_text())["looks"] == [3, 5]
    printed(paths=[runs], out=out, question=Question(primary="loss/test"))
    assert json.loads((out / "comparison.json").read_text())["looks"] == [5], "another question"


# Steps to a target


def raced(folder, *sides):
    """The speed-up of library over none, whose runs read these validation accuracies at steps 10, 20, ..."""
    for name, runs in zip(("none", "library"), sides, strict=True):
        for seed, values in enumerate(runs):
            readings = {
                "accuracy/valid": {10 * i: value for i, value in enumerate(values, 1)},
                "accuracy/test": {99: 0.5},
            }
            write_run(folder / f"{name}-{seed}", name, seed, readings=readings)
    records, _ = read_runs([folder])
    base = [run for run in records if run.path.name.startswith("none")]
    other = [run for run in records if run.path.name.startswith("library")]
    return speed_up(list(zip(other, base, strict=True)), default_targets(base)), default_targets(base)


SLOW = [0.1, 0.3, 0.5, 0.7, 0.9]


def test_the_target_of_a_seed_is_set_by_the_other_seeds(tmp_path):
    speed, targets = raced(tmp_path, [SLOW, [*SLOW[:-1], 0.8], [*SLOW[:-1], 0.7]], [SLOW] * 3)
    assert list(targets.values()) == pytest.approx([0.75, 0.8, 0.85])
    assert (speed.n, speed.reached, speed.base_reached) == (3, 3, 2)


def test_with_all_steps_known_the_ratio_has_an_interval(tmp_path):
    fast = [[0.1, 0.9, 0.9, 0.9, 0.9], [0.1, 0.9, 0.9, 0.9, 0.9], [0.1, 0.1, 0.9, 0.9, 0.9]]
    speed, _ = raced(tmp_path, [SLOW] * 3, fast)
    logs = np.log([5 / 2, 5 / 2, 5 / 3])
    interval = scipy_stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert speed.ratio == pytest.approx(math.exp(logs.mean()))
    assert (speed.low, speed.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert (speed.bound, speed.p, speed.evidence) == ("", None, "faster")
    assert (
        "It reaches 90.0% validation accuracy 2.2 times sooner (95% interval 1.2 to 3.9)"
        in compared(tmp_path).sentences[0]
    )


def test_faster_follows_the_ratio_and_not_the_count_of_seeds(tmp_path):
    base, fast, slow = ([0.1] * n + [0.9] * (25 - n) for n in (19, 4, 20))
    speed, _ = raced(tmp_path, [base] * 10, [fast] * 5 + [slow] * 5)
    assert (speed.sooner, speed.later, speed.evidence) == (5, 5, "faster") and speed.low > 1


def test_a_target_that_is_met_at_the_first_reading_gives_a_bound(tmp_path):
    speed, _ = raced(tmp_path, [SLOW] * 6, [[0.95] * 5] * 6)
    assert (speed.ratio, speed.bound, speed.low, speed.evidence) == (pytest.approx(5), ">=", None, "faster")
    assert speed.p == pytest.approx(2 / 2**6)
    assert "at least 5 times sooner (p = 0.031, sign test)" in compared(tmp_path).sentences[0]
    assert ">= 5.00" in printed(paths=[tmp_path])


def test_a_target_that_is_not_reached_gives_a_bound_for_either_side(tmp_path):
    speed, _ = raced(tmp_path, [SLOW] * 3, [[0.1] * 5] * 3)
    assert (speed.reached, speed.base_reached, speed.bound, speed.later) == (0, 3, "<=", 3)
    assert (
        "does not reach 90.0% validation accuracy in any of 3 seeds, none does in 3" in compared(tmp_path).sentences[0]
    )
    text = compared(tmp_path, target=0.99).sentences[0]
    assert "does not reach 99.0% validation accuracy in any of 3 seeds, and neither does none" in text


def test_the_same_step_is_said_in_a_whole_sentence_and_one_seed_has_no_target(tmp_path):
    speed, _ = raced(tmp_path / "same", [SLOW] * 3, [SLOW] * 3)
    assert (speed.ratio, speed.evidence) == (1, "undecided")
    assert (
        "It reaches 90.0% validation accuracy at the same step as none in every seed."
        in (compared(tmp_path / "same").sentences[0])
    )
    raced(tmp_path / "some", [SLOW, SLOW[:-1], SLOW], [SLOW, SLOW[:-1], SLOW])
    assert (
        "in 2 of 3 seeds (none in 2) at the same step as none." in compared(tmp_path / "some", target=0.9).sentences[0]
    )
    speed, targets = raced(tmp_path / "one", [SLOW], [SLOW])
    assert targets == {} and speed.n == 0
    assert "It " not in compared(tmp_path / "one").sentences[0]
    assert "It reaches 50.0% validation accuracy at the same" in compared(tmp_path / "one", target=0.5).sentences[0]


# bnexp plan


def test_plan_prints_seeds_and_refuses_what_it_cannot_plan_with(tmp_path, bnexp, capsys):
    write_pairs(tmp_path / "runs", [0.010, 0.012, 0.014, 0.009])
    assert bnexp("plan", str(tmp_path / "runs"), "difference=0.2") == 0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("library"))
    sd = 100 * np.std([0.010, 0.012, 0.014, 0.009], ddof=1)
    assert row[:3] == ["library", "4", f"{sd:.3g}"] and str(seeds_needed(sd, 0.2, 0.05)) in row
    write_run(tmp_path / "other" / "a", seed=0)
    write_run(tmp_path / "other" / "b", "library", seed=0)
    for arguments, words in (
        (["runs", "difference=0"], "difference=0: cannot be found"),
        (["runs", "difference=x"], "difference=x: a number is expected"),
        (["runs", "diference=1"], "did you mean difference?"),
        (["other"], "it takes two seeds in which both finished"),
        (["other/a"], "one variant only"),
        (["nowhere"], "no such folder"),
        ([], "of which runs?"),
    ):
        paths = [str(tmp_path / each) if "=" not in each else each for each in arguments]
        assert bnexp("plan", *paths) == 2
        assert words in capsys.readouterr().err
