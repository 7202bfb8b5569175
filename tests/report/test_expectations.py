"""What a study expects is read from the right runs, paired by seed, and fails when it should."""

import math
from pathlib import Path

import pytest

from bnexp.errors import UserError
from bnexp.report.expectations import Expectation, judge
from bnexp.report.records import RunRecord


def record(seed, curves, status="finished", **settings):
    """A run with ``curves`` {tag: {step: value}}."""
    config = {"seed": seed, "norm": {"_target_": "bnexp.norms.none.Shift"}, **settings}
    columns = {tag: (list(points), list(points.values())) for tag, points in curves.items()}
    return RunRecord(Path(f"run-s{seed}"), config, {"status": status}, columns)


def accuracies(*values, **settings):
    """One run per value, seeds counted from 0, with that final test accuracy."""
    return [record(seed, {"accuracy/test": {10: value}}, **settings) for seed, value in enumerate(values)]


def expect(**given):
    given = {"says": "so", "of": "a", "tag": "accuracy/test", "seeds": "each"} | given
    return Expectation(**given)


def test_a_number_is_held_against_its_limits_in_each_seed():
    runs = {"a": accuracies(0.91, 0.95, 0.93)}
    assert judge(expect(above=0.9), runs).holds
    assert not judge(expect(above=0.92), runs).holds, "one seed is below"
    assert judge(expect(above=0.92, seeds="mean"), runs).holds
    assert not judge(expect(above=0.9, below=0.94), runs).holds
    assert not judge(expect(above=0.91), runs).holds, "a number on the limit is outside"


def test_the_other_role_can_have_another_tag_even_in_the_same_run():
    runs = {"a": [record(seed, {"x": {1: 5.0 + seed}, "y": {1: 2.0 * seed + 1}}) for seed in range(3)]}
    found = judge(expect(tag="x", minus="a", other_tag="y", above=1.9), runs)
    assert found.numbers == (4, 3, 2) and found.holds
    assert judge(expect(tag="x", over="a", other_tag="y", above=0), runs).numbers == (5, 2, 7 / 5)
    with pytest.raises(UserError, match="other_tag without minus or over is never read"):
        expect(tag="x", other_tag="y", above=0).check(["a"])


def test_an_interval_must_lie_within_the_limits_as_a_whole():
    runs = {"a": accuracies(0.91, 0.95, 0.93)}  # mean 0.93, t(2) = 4.303, interval 0.8803 to 0.9797
    assert judge(expect(above=0.88, seeds="interval"), runs).holds
    assert not judge(expect(above=0.881, seeds="interval"), runs).holds
    assert not judge(expect(above=0.5, seeds="interval"), {"a": accuracies(0.9)}).holds, "one seed has no interval"


def test_the_interval_is_the_usual_condition_and_equivalence_is_both_limits_at_five_percent():
    runs = {"a": accuracies(0.91, 0.95, 0.93)}
    assert Expectation(says="so", of="a", tag="accuracy/test", above=0).seeds == "interval"
    # The 90% interval: t(2) = 2.920 times the standard error 0.02 / sqrt(3).
    half = 2.920 * 0.02 / math.sqrt(3)
    assert judge(expect(above=0.93 - half - 1e-4, below=0.93 + half + 1e-4, seeds="equivalent"), runs).holds
    assert not judge(expect(above=0.93 - half + 1e-4, below=1, seeds="equivalent"), runs).holds
    same = {"a": accuracies(0.9, 0.9)}
    assert judge(expect(above=0.8, seeds="interval"), same).holds, "without spread the interval is the number"


def test_a_new_seed_is_predicted():
    low, high = judge(expect(above=0), {"a": accuracies(0.91, 0.95, 0.93)}).new_seed
    assert (low + high) / 2 == pytest.approx(0.93)
    assert (high - low) / 2 == pytest.approx(4.303 * 0.02 * math.sqrt(4 / 3), rel=1e-3)
    assert judge(expect(above=0), {"a": accuracies(0.9)}).new_seed == (None, None)


def test_differences_and_ratios_are_paired_by_seed():
    runs = {"a": accuracies(0.9, 0.8), "b": list(reversed(accuracies(0.5, 0.7)))}
    finding = judge(expect(minus="b", above=0), runs)
    assert finding.numbers == pytest.approx((0.4, 0.1))
    assert judge(expect(over="b", above=0), runs).numbers == pytest.approx((1.8, 8 / 7))


def test_another_curve_of_the_other_role_may_be_subtracted():
    curves = {"accuracy/valid_recomputed": {10: 0.9}, "accuracy/valid_running": {10: 0.7}}
    runs = {"a": [record(0, curves)], "b": [record(0, curves)]}
    given = {"tag": "accuracy/valid_recomputed", "minus": "b", "above": 0}
    assert judge(expect(**given), runs).numbers == (0.0,)
    assert judge(expect(**given, other_tag="accuracy/valid_running"), runs).numbers == pytest.approx((0.2,))


def test_seeds_that_have_no_partner_are_no_evidence():
    finding = judge(expect(minus="b", above=0), {"a": accuracies(0.9, 0.8), "b": accuracies(0.5)})
    assert not finding.holds
    assert "do not have the same seeds" in finding.problem


def test_no_run_and_no_reading_fail_and_say_so():
    assert "has finished or diverged" in judge(expect(above=0), {"a": []}).problem
    assert "too few readings of loss/test" in judge(expect(tag="loss/test", above=0), {"a": accuracies(0.9)}).problem
    assert "too few readings" in judge(expect(take="drift", above=-1), {"a": accuracies(0.9)}).problem


def test_division_by_nothing_does_not_hold_a_limit_from_above():
    finding = judge(expect(over="b", below=5), {"a": accuracies(0.5), "b": accuracies(0.0)})
    assert finding.numbers == (math.inf,)
    assert not finding.holds


CURVE = {0: 5.0, 10: 1.0, 20: 4.0, 30: 2.0}


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ({}, 2.0),
        ({"take": "first"}, 5.0),
        ({"take": "mean"}, 3.0),
        ({"take": "median"}, 3.0),
        ({"take": "min"}, 1.0),
        ({"take": "max"}, 5.0),
        ({"take": "drift"}, 8 / 3),  # |1-5|, |4-5|, |2-5|
        ({"take": "spread"}, math.sqrt(10 / 3)),
        ({"at": 10}, 1.0),
        ({"at": 19}, 1.0),
        ({"after": 10, "take": "mean"}, 3.0),
        ({"where": {"loss/train": [0.4, 1.0]}, "take": "max"}, 4.0),
    ],
)
def test_a_curve_becomes_a_number(given, number):
    run = record(0, {"x/y": CURVE, "loss/train": {5: 0.9, 15: 0.5, 25: 0.2}})
    assert judge(expect(tag="x/y", above=0, **given), {"a": [run]}).numbers == pytest.approx((number,))


def test_of_several_runs_per_seed_each_counts_and_only_picks():
    runs = {"a": accuracies(0.1, 0.1, optimizer={"lr": 1}) + accuracies(0.2, 0.1, optimizer={"lr": 10})}
    assert len(judge(expect(below=0.15), runs).numbers) == 4
    assert not judge(expect(below=0.15), runs).holds
    assert judge(expect(below=0.15, only={"optimizer.lr": 1}), runs).holds
    assert not judge(expect(below=0.15, only={"optimizer.lr": 3}), runs).holds, "there is no such run"


def test_runs_of_several_settings_are_paired_within_the_setting():
    a = accuracies(0.5, optimizer={"lr": 1}) + accuracies(0.9, optimizer={"lr": 10})
    b = accuracies(0.8, optimizer={"lr": 10}) + accuracies(0.1, optimizer={"lr": 1})
    assert sorted(judge(expect(minus="b", above=0), {"a": a, "b": b}).numbers) == pytest.approx([0.1, 0.4])


def rated(seed, rate, accuracy, status="finished"):
    return record(seed, {"accuracy/valid": {1: accuracy}}, status, optimizer={"lr": rate})


def test_the_best_setting_is_found_for_each_seed_and_never_among_the_diverged():
    a = [rated(0, 1, 0.8), rated(0, 3, 0.9), rated(1, 1, 0.9), rated(1, 3, 0.8), rated(0, 9, 0.99, "diverged")]
    b = [rated(0, 1, 0.9), rated(0, 3, 0.1), rated(1, 1, 0.9), rated(1, 3, 0.1)]
    finding = judge(expect(tag=None, best="optimizer.lr", over="b", above=0), {"a": a, "b": b})
    assert finding.numbers == (3.0, 1.0)
    lost = judge(expect(tag=None, best="optimizer.lr", above=0), {"a": [rated(0, 1, 0.5, "diverged")]})
    assert "diverged" in lost.problem


def test_a_diverged_run_has_no_last_value_but_a_largest():
    runs = {"a": [record(0, {"accuracy/test": {1: 0.1}}, "diverged")]}
    assert "diverged" in judge(expect(below=0.2), runs).problem
    assert judge(expect(below=0.2, take="max"), runs).holds


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"of": "c", "above": 0}, "c is no variant here; there are a, b"),
        ({"minus": "c", "above": 0}, "c is no variant"),
        ({"above": 0, "best": "optimizer.lr"}, "either a tag or best"),
        ({"above": 0, "take": "middle"}, "take=middle is not known"),
        ({"above": 0, "seeds": "most"}, "seeds=most is not known"),
        ({"above": 0, "minus": "b", "over": "b"}, "exclude each other"),
        ({"above": 0, "other_tag": "loss/test"}, "without minus or over is never read"),
        ({}, "cannot fail"),
    ],
)
def test_what_cannot_be_meant_is_refused(given, complaint):
    with pytest.raises(UserError, match=complaint):
        expect(**given).check(["a", "b"])
