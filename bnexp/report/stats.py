"""What several seeds say together: means, paired differences and ratios, each with its 95% interval.

Pure functions of numbers. Where a quantity is undefined it is ``None``, never NaN and never a warning:

==========================  =================================================================
no value (n = 0)            everything is None
a value is not finite       everything is None: leaving it out would pretend it never happened
one value (n = 1)           the centre is that value; no interval, no p
no spread (zero variance)   the centre; no interval, no p: nothing was learned about the noise
==========================  =================================================================

Intervals and p-values take the mean over seeds to be about normal (Student 1908).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
ROUNDING = 1e-12  # a spread below this share of the values is float rounding: 0.96 - 0.95 is not 0.95 - 0.94


@dataclass(frozen=True)
class Mean:
    """The mean of ``n`` values and its 95% interval, mean -+ t s / sqrt(n)."""

    n: int
    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Paired:
    """The mean of ``n`` paired differences, its 95% interval and the two-sided p of the paired t-test."""

    n: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval exists and lies on one side of zero, which is the same as p < 0.05."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Ratio:
    """The geometric mean of ``n`` ratios and its 95% interval, both formed on the logarithms."""

    n: int
    ratio: float | None
    low: float | None
    high: float | None


def mean(values: Sequence[float]) -> Mean:
    """Return the mean of ``values`` with its t-interval."""
    centre, error = _centre_and_error(values)
    return Mean(len(values), centre, *_interval(centre, error, len(values)))


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Return the mean of ``values[i] - baseline[i]``, with interval and p; unequal lengths are refused."""
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    centre, error = _centre_and_error(differences, [*values, *baseline])
    low, high = _interval(centre, error, len(differences))
    if centre is None or error is None:
        return Paired(len(differences), centre, low, high, None)
    from scipy.special import stdtr

    p = 2 * float(stdtr(len(differences) - 1, -abs(centre / error)))
    return Paired(len(differences), centre, low, high, p)


def geometric_mean(ratios: Sequence[float]) -> Ratio:
    """Return exp(mean(log r) -+ t s / sqrt(n)) over the ``ratios`` r; all None unless each is > 0."""
    if not all(ratio > 0 for ratio in ratios):  # also NaN
        return Ratio(len(ratios), None, None, None)
    logs = [math.log(ratio) for ratio in ratios]
    centre, error = _centre_and_error(logs, [1.0, *logs])
    low, high = _interval(centre, error, len(logs))
    return Ratio(len(logs), _exp(centre), _exp(low), _exp(high))


def _centre_and_error(
    values: Sequence[float], scale_of: Sequence[float] | None = None
) -> tuple[float | None, float | None]:
    """Mean and standard error; no error where the spread is undefined or within rounding of ``scale_of``."""
    n = len(values)
    if n == 0 or not all(map(math.isfinite, values)):
        return None, None
    # Exact scaling by a power of two, so that the squares of a loss of 1e200 do not overflow.
    exponent = math.frexp(max(map(abs, values)))[1]
    scaled = [math.ldexp(value, -exponent) for value in values]
    centre = math.fsum(scaled) / n
    if n == 1:
        return values[0], None
    deviation = math.sqrt(math.fsum((value - centre) ** 2 for value in scaled) / (n - 1))
    magnitude = max(map(abs, scale_of if scale_of is not None else values))
    centre, error = math.ldexp(centre, exponent), math.ldexp(deviation / math.sqrt(n), exponent)
    return centre, error if error * math.sqrt(n) > ROUNDING * magnitude else None


def _interval(centre: float | None, error: float | None, n: int) -> tuple[float | None, float | None]:
    if centre is None or error is None:
        return None, None
    from scipy.special import stdtrit  # imports in a third of the time of scipy.stats

    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * error
    low, high = centre - half, centre + half
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)


def _exp(value: float | None) -> float | None:
    return math.exp(value) if value is not None and abs(value) < 700 else None  # e^709 is the largest float
