"""The figure of tuning: the primary metric that a variant is expected to reach against the number of values tried."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bnexp.report.figures import style
from bnexp.report.question import Question
from bnexp.report.tuning import Tried

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TUNING = "What tuning is worth: expected result against the number of values tried"
TUNING_WORDS = (
    "Of k values drawn with replacement from those tried, validation chooses the best; shown is its expected {metric} "
    "(Dodge et al. 2019). Lines are means over seeds, each of which chooses for itself, bands their 95% intervals."
)


def draw_tuning(tried: Sequence[Tried], question: Question) -> "Figure":
    """One panel with a line per variant."""
    from matplotlib.ticker import PercentFormatter

    metric, variants = question.metric, [each.variant for each in tried]
    looks = style.variant_looks(variants)
    with style.figure_style():
        figure = style.new_figure(4.2)
        axes = figure.subplots()
        axes.set(title=f"expected {metric.title}", xlabel=f"values of {question.best_over} tried, k")
        for each, look in zip(tried, looks, strict=True):
            points = [[at_k.mean, *(at_k.mean if end is None else end for end in (at_k.low, at_k.high))]
                      for at_k in each.curve]  # fmt: skip
            means, lows, highs = np.array(points, float).reshape(-1, 3).T  # None becomes NaN
            ks = np.arange(1, len(means) + 1)
            axes.plot(ks, means, zorder=3, **look)
            axes.fill_between(ks, lows, highs, color=look["color"], alpha=0.17, linewidth=0)
        axes.locator_params("x", integer=True)
        if metric.is_accuracy:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        if not any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
            style.write_inside(axes, "no seed has a finite result at every value")
        labels = [f"{each.variant.label}, {each.num_values} value{'s' * (each.num_values > 1)}" for each in tried]
        style.add_legend(figure, labels, looks)
        words = TUNING_WORDS.format(metric=metric.title)
        if any(variant.diverged for variant in variants):
            words += " A diverged run counts as chance" + ("." if metric.is_accuracy else ", so a loss has no curve.")
        style.finish_figure(figure, variants, words)
    return figure
