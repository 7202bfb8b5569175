"""Means, differences and ratios over seeds, each with its 95% interval.

An undefined quantity is ``None``, never NaN and never a warning:

==========================  ===============================================================
no value (n = 0)            everything is None
a value is not finite       everything is None: leaving it out would hide that it happened
one value (n = 1)           the mean is that value; no interval, no p
no spread (zero variance)   the mean; no interval, no p: the noise is unknown
==========================  ===============================================================

Intervals and p-values are Student's (1908), which assume that the mean over seeds is about normal. The t distribution
comes from scipy.special, because scipy.stats takes twice as long to import.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
ROUNDING_SHARE = 1e-12  # a spread below this share of the values is float rounding: 0.96 - 0.95 is not 0.95 - 0.94


@dataclass(frozen=True)
class Mean:
    """The mean of ``n`` values, arithmetic or geometric, its 95% interval, and the standard deviation of the values."""

    n: int
    mean: float | None
    low: float | None
    high: float | None
    sd: float | None = None


@dataclass(frozen=True)
class Difference:
    """A difference of two means, its 95% interval and the two-sided p of the t-test.

    ``n`` is the number of pairs or, if unpaired, the smaller of the two numbers of values. ``error`` is the standard
    error of the difference and ``freedom`` its degrees of freedom; both are None where there is no interval.
    """

    n: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    error: float | None = None
    freedom: float | None = None

    def interval(self, confidence: float) -> tuple[float | None, float | None]:
        """Both ends of the interval with another confidence than 95%."""
        return _t_test(self.difference, self.error, self.freedom, confidence)[:2]


def mean(values: Sequence[float], is_share: bool = False) -> Mean:
    """Return the mean of ``values`` with its interval, mean -+ t s / sqrt(n), which for shares stays within 0 to 1."""
    centre, error = _mean_and_error(values)
    low, high, _ = _t_test(centre, error, len(values) - 1)
    if is_share and low is not None and high is not None:
        low, high = max(low, 0.0), min(high, 1.0)
    return Mean(len(values), centre, low, high, None if error is None else error * math.sqrt(len(values)))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Return the mean of ``values[i] - baseline[i]`` with the paired t-test; unequal lengths are a `ValueError`."""
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    centre, error = _mean_and_error(differences, [*values, *baseline])
    return _difference(len(differences), centre, error, len(differences) - 1)


def unpaired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Return mean(values) - mean(baseline) with Welch's t-test (1947), which lets the two variances differ."""
    n = min(len(values), len(baseline))
    means, errors = zip(_mean_and_error(values), _mean_and_error(baseline), strict=True)
    if None in means or not math.isfinite(means[0] - means[1]):
        return Difference(n)
    if None in errors or not any(errors):
        return Difference(n, means[0] - means[1])
    error = math.hypot(*errors)
    shares = [(each / error) ** 2 for each in errors]
    freedom = 1 / (shares[0] ** 2 / (len(values) - 1) + shares[1] ** 2 / (len(baseline) - 1))
    return _difference(n, means[0] - means[1], error, freedom)


def prediction_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Between what one more value lies with 95%: mean -+ t s sqrt(1 + 1/n) (Student's, for normal values)."""
    centre, error = _mean_and_error(values)
    n = len(values)
    return _t_test(centre, error and error * math.sqrt(n + 1), n - 1)[:2]


def _difference(n: int, centre: float | None, error: float | None, freedom: float) -> Difference:
    if centre is None or not error:
        return Difference(n, centre)
    return Difference(n, centre, *_t_test(centre, error, freedom), error, freedom)


def geometric_mean(ratios: Sequence[float], confidence: float = CONFIDENCE) -> Mean:
    """Return exp(mean(log r) -+ t s / sqrt(n)) over the ``ratios`` r; all None unless each is > 0."""
    if not all(ratio > 0 for ratio in ratios):  # also NaN
        return Mean(len(ratios), None, None, None)
    logs = [math.log(ratio) for ratio in ratios]
    centre, error = _mean_and_error(logs, [1.0])
    return Mean(len(logs), *map(_exp, (centre, *_t_test(centre, error, len(logs) - 1, confidence)[:2])))


def _mean_and_error(values: Sequence[float], inputs: Sequence[float] = ()) -> tuple[float | None, float | None]:
    """The mean and its standard error, which is 0 where the spread is within rounding of ``values`` and ``inputs``."""
    n = len(values)
    if n == 0 or not all(map(math.isfinite, values)):
        return None, None
    centre = float(statistics.mean(values))  # statistics and math.dist do not overflow on values of 1e200
    deviation = math.dist(values, [centre] * n) / math.sqrt(n - 1) if n > 1 else math.inf
    if not math.isfinite(deviation):
        return centre, None
    magnitude = max(map(abs, [*values, *inputs]))
    return centre, deviation / math.sqrt(n) if deviation > ROUNDING_SHARE * magnitude else 0.0


def _t_test(
    centre: float | None, error: float | None, freedom: float | None, confidence: float = CONFIDENCE
) -> tuple[float | None, float | None, float | None]:
    """Both ends of the interval around ``centre`` and p, given its standard error and degrees of freedom."""
    if centre is None or not error or freedom is None:
        return None, None, None
    from scipy.special import stdtr, stdtrit

    half = float(stdtrit(freedom, 0.5 + confidence / 2)) * error
    p = 2 * float(stdtr(freedom, -abs(centre / error)))
    low, high = centre - half, centre + half
    return (low, high, p) if math.isfinite(low) and math.isfinite(high) else (None, None, p)


def _exp(value: float | None) -> float | None:
    return math.exp(value) if value is not None and abs(value) < 700 else None  # e^709 is the largest float
