"""What may be concluded from differences over seeds: corrected p-values, equivalence, failures, power and looks.

Special functions come from scipy.special and numpy is imported late, because both are slow to import.
"""

import itertools
import math
from collections.abc import Sequence

from bnexp.report.stats import CONFIDENCE, Difference

ALPHA = 1 - CONFIDENCE
FEWEST_SEEDS = 3  # seeds below which nothing is called better
POWER = 0.8  # the share of repetitions in which a difference that exists is to be found
FEWEST_FLIPPED = 6  # with fewer seeds, flips of signs give no p below 5%
MOST_EXACT = 14  # seeds of which all flips are counted, not drawn
DRAWN, SIMULATED = 20_000, 40_000


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """The p-values corrected for their number (Holm 1979); a test that could not be made stays None."""
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[i] = largest
    return corrected


def equivalence_p(found: Difference, margin: float) -> float | None:
    """The p of two one-sided t-tests that the difference lies within ``margin`` (Schuirmann 1987)."""
    if found.difference is None or not found.error or found.freedom is None:
        return None
    from scipy.special import stdtr

    return float(stdtr(found.freedom, (abs(found.difference) - margin) / found.error))


def detectable(error: float, freedom: float, alpha: float = ALPHA) -> float:
    """The difference that a two-sided t-test with this standard error finds with a power of 80%.

    By the noncentral t distribution (Cohen 1988, chapter 2): 3.26 standard deviations of the differences with 3 seeds,
    1.68 with 5, 1.00 with 10.
    """
    from scipy.special import nctdtrinc, stdtrit

    return error * float(nctdtrinc(freedom, 1 - POWER, stdtrit(freedom, 1 - alpha / 2)))


def clopper_pearson(k: int, n: int) -> tuple[float, float]:
    """The exact 95% interval of a share of which k of n were seen (Clopper & Pearson 1934)."""
    from scipy.special import betaincinv

    low = float(betaincinv(k, n - k + 1, ALPHA / 2)) if k else 0.0
    return low, float(betaincinv(k + 1, n - k, 1 - ALPHA / 2)) if k < n else 1.0


def wilson(k: float, n: int) -> tuple[float, float]:
    """The 95% score interval of a share of which k of n were seen (Wilson 1927)."""
    z = 1.959963984540054
    centre, width = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, centre - width), min(1.0, centre + width)


def sign_test(first: int, second: int) -> float:
    """The exact two-sided p that two events are equally likely, of which these numbers were seen.

    With seeds in which only one side fails this is McNemar's exact test (McNemar 1947).
    """
    from scipy.special import bdtr

    n = first + second
    return min(1.0, 2 * float(bdtr(min(first, second), n, 0.5))) if n else 1.0


def flip_signs(differences: Sequence[Sequence[float]]) -> list[float] | None:
    """The p of each row of ``differences``, (variants, seeds), corrected by flips of the signs of whole seeds.

    The statistic is the largest |t| over the variants (Westfall & Young 1993, max-T), so what a seed does to all
    variants is kept. None with fewer than six seeds, or where a row has no spread.
    """
    import numpy as np

    rows = np.asarray(differences, float)
    n = rows.shape[1]
    if n < FEWEST_FLIPPED or not np.isfinite(rows).all() or not rows.std(axis=1).all():
        return None
    if n <= MOST_EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), (DRAWN, n))
        signs[0] = 1.0  # the data as they are
    means = signs @ rows.T / n
    squares = (rows**2).sum(axis=1) - n * means**2  # a flip keeps the sum of squares
    t = np.abs(means) / np.sqrt(np.maximum(squares, 1e-300))
    return [float(share) for share in (t.max(axis=1)[:, None] >= t[0] * (1 - 1e-9)).mean(axis=0)]


def bound_of_looks(looks: Sequence[int]) -> float:
    """The p-value below which the last look is significant, if each look at ``looks`` seeds might have been.

    One bound for all looks keeps false positives at 5% (Pocock 1977); it is simulated with normal differences.
    """
    import numpy as np
    from scipy.special import stdtr

    counts = sorted(set(looks))
    drawn = np.random.default_rng(0).standard_normal((SIMULATED, max(counts)))
    smallest = np.ones(SIMULATED)
    for n in counts:
        t = drawn[:, :n].mean(axis=1) / (drawn[:, :n].std(axis=1, ddof=1) / math.sqrt(n))
        smallest = np.minimum(smallest, 2 * stdtr(n - 1, -np.abs(t)))
    return float(np.quantile(smallest, ALPHA))
