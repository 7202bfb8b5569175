"""How many seeds a comparison needs: from the spread over the seeds that have finished, for a wanted power."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from bnexp.errors import UserError
from bnexp.report import inference
from bnexp.report.question import Question
from bnexp.report.records import read_runs
from bnexp.report.tables import new_table
from bnexp.report.verdict import compare_records

MOST_SEEDS = 1000


@dataclass(frozen=True)
class SeedPlan:
    """For a variant: the pairs so far, the standard deviation of their differences, and the seeds that are needed.

    ``low`` and ``high`` are the 95% interval of ``sd``, and ``fewest`` and ``most`` the seeds at these two; a number
    above 1000 is math.inf. ``detectable`` is the difference that the n pairs find.
    """

    n: int
    sd: float
    low: float
    high: float
    detectable: float
    seeds: float
    fewest: float
    most: float


def make_plan(n: int, sd: float, difference: float, num_variants: int = 1) -> SeedPlan:
    """The plan for a two-sided paired t-test at 5% over ``num_variants`` (Bonferroni) with a power of 80%.

    The interval of a standard deviation is that of chi-squared with n - 1 degrees of freedom.
    """
    from scipy.special import chdtri

    alpha, freedom = inference.ALPHA / num_variants, n - 1
    low, high = (sd * math.sqrt(freedom / float(chdtri(freedom, p))) for p in (0.025, 0.975))
    counts = [seeds_needed(each, difference, alpha) for each in (sd, low, high)]
    return SeedPlan(n, sd, low, high, inference.detectable(sd / math.sqrt(n), freedom, alpha), *counts)


def seeds_needed(sd: float, difference: float, alpha: float) -> float:
    """The fewest seeds, 3 or more, with which the power is 80%; math.inf above 1000."""
    low, high = inference.FEWEST_SEEDS - 1, MOST_SEEDS + 1  # too few, and enough
    while high - low > 1:
        n = (low + high) // 2
        is_enough = inference.detectable(sd / math.sqrt(n), n - 1, alpha) <= difference
        low, high = (low, n) if is_enough else (n, high)
    return high if high <= MOST_SEEDS else math.inf


def print_plan(paths: Iterable[Path], question: Question, difference: float) -> None:
    """Print the plan for each variant in the runs at or below ``paths``; `UserError` where none can be made.

    ``difference``, in points of accuracy or nats, is the one that is to be found.
    """
    if not 0 < difference < math.inf:
        raise UserError(f"difference={difference:g}: cannot be found; give a number above 0")
    comparison = compare_records(*read_runs(paths), question)
    metric, base = comparison.question.metric, comparison.baseline.label
    if not comparison.against:
        raise UserError(f"plan: one variant only, {base}; give runs of at least two, and of two seeds")
    scale = 100 if metric.is_accuracy else 1
    unit = "points" if metric.is_accuracy else "nats"
    head = ["", "n", f"sd, {unit}", "found now", f"seeds for {difference:g}", "95% interval"]
    caption = (
        f"sd: of the differences from {base} over the n paired seeds, with its 95% interval; found now: the difference "
        f"that n seeds find; seeds for {difference:g}: those that find it, from sd and from the ends of its interval; "
        "all with a power of 80% at 5%, two-sided, corrected for the number of variants"
    )
    table = new_table(f"Seeds to find a difference in {metric.title}", *head, caption=caption)
    for label, against in comparison.against.items():
        found = against.differences[metric.key]
        if against.design != "paired" or found.n < 2:
            why = "they saw different images" if against.design == "other data" else "they saw different batches"
            why = "it takes two seeds in which both finished" if against.design == "paired" else why
            raise UserError(f"plan: {label} and {base} have {found.n} pair{'s' * (found.n != 1)} of runs: {why}")
        if not found.error:
            raise UserError(f"plan: {label} and {base} differ alike in every seed, so there is no spread to plan with")
        plan = make_plan(found.n, scale * found.error * math.sqrt(found.n), difference, len(comparison.against))
        counts = ["> 1000" if each == math.inf else f"{each:g}" for each in (plan.seeds, plan.fewest, plan.most)]
        spread = f"{plan.sd:.3g} [{plan.low:.3g}, {plan.high:.3g}]"
        table.add_row(escape(label), str(plan.n), spread, f"{plan.detectable:.3g}", counts[0], " to ".join(counts[1:]))
    Console().print(table)
