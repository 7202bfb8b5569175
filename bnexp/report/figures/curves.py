"""The figure of a comparison: training and validation loss and accuracy against steps.

A line is the mean over seeds, its band the 95% t-interval. A diverged run is a thin line that ends in a cross.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bnexp.report import stats
from bnexp.report.figures import style
from bnexp.report.variants import Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {
    "loss/train": "training loss", "loss/valid": "validation loss",
    "accuracy/train": "training accuracy", "accuracy/valid": "validation accuracy",
}  # fmt: skip
MOST_POINTS = 100  # of a line; more readings are averaged in windows, as their noise would hide the curve
HUGE = 1e30  # larger values are drawn here, because matplotlib overflows on logarithmic axes
EXPLODED = 30.0  # losses are cut off at this many times the lowest of the variants' highest losses


class Limits(NamedTuple):
    """The limits and the scale of a y axis, and the value above which a loss is cut off."""

    low: float
    high: float
    scale: str = "linear"
    cut: float | None = None


def curve_tags(variants: Sequence[Variant]) -> list[str]:
    """The tags of the four panels; training is drawn as evaluated on the whole set where every run has that."""
    runs = [run for variant in variants for run in variant.all_runs]
    evaluated = {tag: tag.replace("/train", "/train_eval") for tag in PANELS}
    return [evaluated[tag] if runs and all(evaluated[tag] in run.curves for run in runs) else tag for tag in PANELS]


def mean_curve(variant: Variant, tag: str, most: int | None = None) -> np.ndarray:
    """Rows of steps, means over the finished runs and both ends of their intervals, shape (4, n).

    The n steps are those that all runs have; of more than ``most`` readings, neighbours are first averaged within each
    run. Without an interval both ends are the mean. A mean that is not finite is NaN.
    """
    curves = [run.curve(tag) for run in variant.runs if tag in run.curves]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    width = max(1, -(-len(steps) // most)) if most else 1
    windows = [steps[i : i + width] for i in range(0, len(steps), width)]
    points = []
    for window in windows:
        values = [sum(map(each.get, window)) / len(window) for each in curves]
        result = stats.mean(values, is_share=tag.startswith("accuracy/"))
        low, high = (result.mean if end is None else end for end in (result.low, result.high))
        points.append((window[-1], result.mean, low, high))
    return np.clip(np.array(points, float).reshape(-1, 4).T, -HUGE, HUGE)  # None becomes NaN


def diverged_curves(variant: Variant, tag: str) -> list[np.ndarray]:
    """The finite readings of every diverged run that has some: arrays of shape (2, n) of steps and values."""
    curves = [np.array(run.curves[tag], float) for run in variant.diverged if tag in run.curves]
    finite = [np.clip(curve[:, np.isfinite(curve[1])], -HUGE, HUGE) for curve in curves]
    return [curve for curve in finite if curve.size]


def y_limits(is_loss: bool, curves: Sequence[np.ndarray], diverged: Sequence[list[np.ndarray]]) -> Limits | None:
    """Limits at which the line of every variant can be read; None without readings.

    A loss that explodes is cut off. Bands widen the limits by at most a quarter, because the band of two seeds is 13
    times as wide as their spread.
    """
    lines = [[y for y in curve[1] if math.isfinite(y)] or [y for _, ys in lost for y in ys]
             for curve, lost in zip(curves, diverged, strict=True)]  # fmt: skip
    lines = [line for line in lines if line]
    if not lines:
        return None
    low, high, cut = min(map(min, lines)), max(map(max, lines)), None
    bound = EXPLODED * min(map(max, lines))
    if is_loss and 0 < bound < high:
        high = cut = bound
    if is_loss and low > 0 and high / low > EXPLODED:
        return Limits(low / 1.3, high * 1.3, "log", cut)
    span = (high - low) or abs(high) or 1.0
    ends = [y for curve in curves for y in curve[2:].flat if math.isfinite(y)]
    bottom = max(min([low, *ends]), low - span / 4) - span / 20
    top = min(max([high, *ends]), high + span / 4) + span / 20
    return Limits(bottom, top, "linear", cut) if is_loss else Limits(max(bottom, -0.01), min(top, 1.01))


def draw_curves(variants: Sequence[Variant]) -> "Figure":
    """A figure of four panels with a line per variant, the baseline first."""
    looks, words = style.variant_looks(variants), ""
    if any(len(variant.runs) > 1 for variant in variants):
        words += "Lines are means over seeds, bands their 95% intervals. "
    if any(variant.diverged for variant in variants):
        words += "A thin line that ends in a cross is a diverged run; means leave it out."
    labels = [each.label + f" ({len(each.diverged)} diverged)" * bool(each.diverged) for each in variants]
    with style.figure_style():
        figure = style.new_figure(6.4)
        panels = list(figure.subplots(2, 2, sharex=True).flat)
        for axes, tag in zip(panels, curve_tags(variants), strict=True):
            _draw_panel(axes, tag, variants, looks)
        last = max((max(line.get_xdata(), default=0) for axes in panels for line in axes.lines), default=0)
        scale_steps(panels[0], last or 1, most=6)
        style.add_legend(figure, labels, looks)
        style.finish_figure(figure, variants, words)
    return figure


def _draw_panel(axes: "Axes", tag: str, variants: Sequence[Variant], looks: Sequence[dict]) -> None:
    from matplotlib.ticker import PercentFormatter

    is_loss = tag.startswith("loss")
    curves = [mean_curve(variant, tag, MOST_POINTS) for variant in variants]
    diverged = [diverged_curves(variant, tag) for variant in variants]
    limits = y_limits(is_loss, curves, diverged)
    axes.set_title(PANELS.get(tag) or f"{PANELS[tag.replace('_eval', '')]}, evaluated")
    if limits is None:
        style.write_inside(axes, "no readings")
        return
    if limits.cut is not None:
        axes.set_title(f"{axes.get_title('left')} (cut at {limits.cut:.3g})")
    axes.set(yscale=limits.scale, ylim=(limits.low, limits.high))
    if limits.scale == "log":
        style.set_log_ticks(axes.yaxis)
    if not is_loss:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    for (steps, means, lows, highs), lost, look in zip(curves, diverged, looks, strict=True):
        every = max(1, len(steps) // 8) if len(steps) > 25 else 1
        axes.plot(steps, means, markevery=every, zorder=3, **look)
        alpha = 0.17 if len(variants) <= 4 else 0.08
        axes.fill_between(steps, lows, highs, color=look["color"], alpha=alpha, linewidth=0)
        for steps, values in lost:
            end = 1 + next((i for i, y in enumerate(values) if y > limits.high), len(values))
            steps, values = steps[:end], np.minimum(values[:end], limits.high)  # the line ends at the top of the panel
            axes.plot(steps, values, color=look["color"], linestyle=look["linestyle"], linewidth=0.9, alpha=0.8)
            cross = {"color": look["color"], "markersize": 7, "markeredgewidth": 2}
            axes.plot(steps[-1:], values[-1:], "x", zorder=4, clip_on=False, **cross)


def scale_steps(axes: "Axes", last: int, most: int) -> None:
    """Set the shared axis of steps to run from 0 to ``last``, labelled with up to ``most`` round numbers."""
    axes.set_xlim(0, 1.02 * last)
    axes.locator_params("x", nbins=min(most, 6), steps=[1, 2, 4, 5, 10], integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    for each in axes.figure.axes:
        if each.get_subplotspec().is_last_row():
            each.set_xlabel("steps")
