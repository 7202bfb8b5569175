"""Intervals and p-values equal closed forms, printed tables and scipy; undefined cases say None."""

import math

import pytest
from scipy import stats as scipy_stats

from bnexp.report.stats import Difference, Mean, geometric_mean, mean, paired_difference, unpaired_difference

TIGHT = 1e-12  # both sides compute in double precision; a few roundings apart
VARIANT = [0.971, 0.968, 0.975, 0.970, 0.966]
BASELINE = [0.944, 0.951, 0.949, 0.940, 0.947]


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042)])
def test_half_width_is_the_printed_students_t_times_the_standard_error(n, quantile):
    values = [float(i) for i in range(n)]
    error = math.sqrt((n + 1) / 12)  # variance of 0..n-1 is n (n + 1) / 12
    result = mean(values)
    assert result.n == n
    assert result.mean == pytest.approx((n - 1) / 2, rel=TIGHT)
    # The table prints three decimals.
    assert (result.high - result.mean) / error == pytest.approx(quantile, abs=5.1e-4)
    assert result.mean - result.low == pytest.approx(result.high - result.mean, rel=TIGHT)


def test_mean_and_interval_equal_scipys():
    result, expected = mean(VARIANT), scipy_stats.ttest_1samp(VARIANT, 0.0)
    interval = expected.confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=TIGHT)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_paired_difference_equals_scipys_paired_t_test(n):
    result, expected = paired_difference(VARIANT[:n], BASELINE[:n]), scipy_stats.ttest_rel(VARIANT[:n], BASELINE[:n])
    interval = expected.confidence_interval(0.95)
    assert result.n == n
    assert result.p == pytest.approx(float(expected.pvalue), rel=1e-9)  # tails differ in their last digits
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 5), (5, 3)])
def test_unpaired_difference_equals_scipys_welch_test(n, m):
    result = unpaired_difference(VARIANT[:n], BASELINE[:m])
    expected = scipy_stats.ttest_ind(VARIANT[:n], BASELINE[:m], equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert result.n == min(n, m)
    assert result.difference == pytest.approx(sum(VARIANT[:n]) / n - sum(BASELINE[:m]) / m, rel=TIGHT)
    assert result.p == pytest.approx(float(expected.pvalue), rel=1e-9)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_unpaired_difference_without_enough_values_has_no_interval_and_no_p():
    assert unpaired_difference([], [1.0, 2.0]) == Difference(0)
    assert unpaired_difference([3.0], [1.0, 2.0]) == Difference(1, 1.5)
    assert unpaired_difference([3.0, 3.0], [1.0, 1.0]) == Difference(2, 2.0)
    assert unpaired_difference([1.0, math.nan], [1.0, 2.0]) == Difference(2)
    one_sided = unpaired_difference([3.0, 3.0], [1.0, 2.0])  # the noise of one side is known
    assert one_sided.p == pytest.approx(float(scipy_stats.ttest_1samp([1.0, 2.0], 3.0).pvalue), rel=1e-9)


def test_difference_is_the_values_less_the_baseline():
    assert paired_difference([3.0, 5.0], [1.0, 1.0]).difference == 3.0
    assert paired_difference([1.0, 1.0], [3.0, 5.0]).difference == -3.0


def test_two_pairs_have_the_closed_form_p_of_cauchy():
    # One degree of freedom: p = 1 - 2/pi atan(t); differences 1 and 3 give mean 2, error 1, t = 2.
    assert paired_difference([1.0, 3.0], [0.0, 0.0]).p == pytest.approx(1 - 2 / math.pi * math.atan(2.0), rel=TIGHT)


def test_pairing_removes_what_the_seeds_share():
    seeds = [0.0, 10.0, 20.0, 30.0]
    shifted = [1.0, 11.1, 20.9, 31.0]
    assert paired_difference(shifted, seeds).low > 0
    assert mean(shifted).high - mean(shifted).low > 10


@pytest.mark.parametrize("shift", [-0.03, 0.0, 0.02, 0.0232, 0.0234, 0.03])
def test_interval_excludes_zero_exactly_when_p_is_below_five_percent(shift):
    result = paired_difference([value - shift for value in VARIANT], BASELINE)
    assert (result.low > 0 or result.high < 0) == (result.p < 0.05)


def test_the_interval_can_have_another_confidence():
    interval = scipy_stats.ttest_rel(VARIANT, BASELINE).confidence_interval(0.99)
    assert paired_difference(VARIANT, BASELINE).interval(0.99) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert paired_difference([1.0], [0.0]).interval(0.99) == (None, None)


def test_the_interval_of_shares_stays_within_0_and_1():
    wide = mean([0.9, 1.0, 1.0])
    assert wide.high > 1 and mean([0.9, 1.0, 1.0], is_share=True) == Mean(3, wide.mean, wide.low, 1.0, wide.sd)
    assert mean([0.0, 0.1], is_share=True).low == 0.0


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        paired_difference([1.0], [1.0, 2.0])


def test_geometric_mean_is_the_exponential_of_the_mean_logarithm():
    result = geometric_mean([2.0, 8.0])
    half = 12.706204736 * math.log(2)  # logs ln 2 and 3 ln 2: standard error ln 2
    assert result.mean == pytest.approx(4.0, rel=TIGHT)
    assert (result.low, result.high) == pytest.approx((4 * math.exp(-half), 4 * math.exp(half)), rel=1e-8)


def test_geometric_mean_of_inverses_is_the_inverse():
    ratios = [1.5, 2.5, 4.0]
    there, back = geometric_mean(ratios), geometric_mean([1 / r for r in ratios])
    assert back.mean == pytest.approx(1 / there.mean, rel=TIGHT)
    assert (back.low, back.high) == pytest.approx((1 / there.high, 1 / there.low), rel=TIGHT)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_leaves_everything_undefined(bad):
    assert mean([1.0, bad, 2.0]) == Mean(3, None, None, None)
    assert paired_difference([1.0, bad], [0.0, 0.5]) == Difference(2, None, None, None, None)
    assert paired_difference([0.0, 0.5], [1.0, bad]) == Difference(2, None, None, None, None)
    assert geometric_mean([1.0, bad]) == Mean(2, None, None, None)


def test_nothing_has_no_mean():
    assert mean([]) == Mean(0, None, None, None)
    assert paired_difference([], []) == Difference(0, None, None, None, None)
    assert geometric_mean([]) == Mean(0, None, None, None)


def test_one_value_has_a_centre_and_no_interval_and_no_p():
    assert mean([0.1]) == Mean(1, 0.1, None, None)
    assert paired_difference([3.0], [1.0]) == Difference(1, 2.0, None, None, None)
    assert geometric_mean([2.0]) == Mean(1, pytest.approx(2.0), None, None)


def test_values_without_spread_have_no_interval_and_no_p():
    assert mean([0.5, 0.5, 0.5]) == Mean(3, 0.5, None, None, 0.0)
    assert geometric_mean([2.0, 2.0]) == Mean(2, pytest.approx(2.0), None, None)
    assert 0.3 - 0.2 != 0.2 - 0.1  # rounding is no spread
    same = paired_difference([0.3, 0.2, 0.9], [0.2, 0.1, 0.8])
    assert same == Difference(3, pytest.approx(0.1), None, None, None)


def test_differences_between_equal_runs_are_zero_without_p():
    assert paired_difference(VARIANT, VARIANT) == Difference(5, 0.0, None, None, None)


@pytest.mark.parametrize("ratios", [[0.0, 1.0], [-1.0, 2.0]])
def test_ratios_that_are_not_positive_have_no_geometric_mean(ratios):
    assert geometric_mean(ratios) == Mean(2, None, None, None)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_huge_and_tiny_values_neither_overflow_nor_vanish(scale):
    plain, scaled = mean([1.0, 2.0, 4.0]), mean([scale, 2 * scale, 4 * scale])
    assert scaled.mean == pytest.approx(plain.mean * scale, rel=TIGHT)
    assert scaled.high == pytest.approx(plain.high * scale, rel=TIGHT)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_huge_and_tiny_differences_keep_their_p(scale):
    scaled, base = ([scale * value for value in values] for values in (VARIANT, BASELINE))
    assert paired_difference(scaled, base).p == pytest.approx(paired_difference(VARIANT, BASELINE).p, rel=1e-9)
    assert unpaired_difference(scaled, base).p == pytest.approx(unpaired_difference(VARIANT, BASELINE).p, rel=1e-9)


def test_a_difference_too_large_for_a_float_is_undefined():
    assert unpaired_difference([1.7e308, 1.6e308], [-1.7e308, 0.0]) == Difference(2)
    assert paired_difference([1.7e308, 1.0], [-1.7e308, 0.0]) == Difference(2)


def test_an_interval_too_wide_for_a_float_is_undefined():
    assert mean([1.7e308, -1.7e308]) == Mean(2, 0.0, None, None)
    assert geometric_mean([1e-300, 1e300]).low is None
