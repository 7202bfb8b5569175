"""The figure of the landscape probe: how loss and gradient change along the gradient, at equal loss.

After Santurkar et al. (2018, arXiv:1805.11604), figure 4, but against the loss instead of the step.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bnexp.report.figures import style
from bnexp.report.records import RunRecord
from bnexp.report.variants import Variant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "How loss and gradient change along the gradient, at equal loss"
LANDSCAPE = {
    "loss_range": ("range of the loss", "max L − min L, nats"),
    "gradient_change": ("change of the gradient", "max |g′ − g|"),
    "smoothness": ("effective smoothness", "max |g′ − g| / |w′ − w|"),
    "gradient_change_relative": ("relative change of the gradient", "max |g′ − g| / |g|"),
}
WORDS = (
    "L is the loss of one fixed batch of training images, g its gradient at the weights w, and g′ the gradient at w′, "
    "which lies some steps from w against g. A point is one reading. A line joins medians over readings at about the "
    "same loss, which falls to the right. Compare at equal loss; only the relative change of the gradient does not "
    "depend on the scale of the weights."
)
LOSS_BINS, FEWEST = 10, 3  # bins of the loss, and the readings in a bin that make a median
FARTHEST = 1000  # readings above this many times the median are not drawn
MOST_CLOUDS = 4  # variants whose points are drawn; the points of more would hide each other


def landscape_points(runs: Sequence[RunRecord], name: str) -> np.ndarray:
    """The loss and the value of every reading, shape (n, 2)."""
    curves = [(run.curve("landscape/loss"), run.curve(f"landscape/{name}")) for run in runs]
    points = [(loss, values[step]) for losses, values in curves for step, loss in losses.items() if step in values]
    return np.array(points).reshape(-1, 2)


def drawable_points(points: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The ``points`` that logarithmic axes can show: positive, finite and at most `FARTHEST` times the median."""
    positive = {i: each[((each > 0) & np.isfinite(each)).all(1)] for i, each in points.items()}
    every = np.concatenate([*positive.values(), np.empty((0, 2))])
    most = FARTHEST * np.median(every, axis=0) if len(every) else np.ones(2)
    return {i: each[(each <= most).all(1)] for i, each in positive.items()}


def binned_medians(points: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The median loss and the median value in every bin of the loss with enough points, shape (n, 2)."""
    bins = [points[(low <= points[:, 0]) & (points[:, 0] < high)] for low, high in itertools.pairwise(bounds)]
    return np.array([np.median(inside, axis=0) for inside in bins if len(inside) >= FEWEST]).reshape(-1, 2)


def draw_landscape(
    variants: Sequence[Variant], observed: Mapping[int, tuple[str, list[RunRecord]]], looks: Sequence[style.Look]
) -> "Figure | None":
    """A figure of four panels with a line per variant; None if no reading can be drawn."""
    every = {name: {i: landscape_points(runs, name) for i, (_, runs) in observed.items()} for name in LANDSCAPE}
    points = {name: drawable_points(each) for name, each in every.items()}
    shown = [i for i in observed if any(len(each[i]) for each in points.values())]
    if not shown:
        return None
    losses = np.concatenate([each[i][:, 0] for each in points.values() for i in shown])
    num_bins = max(3, min(LOSS_BINS, min(len(points["loss_range"][i]) for i in shown) // (2 * FEWEST)))
    bounds = np.geomspace(losses.min() / 1.02, losses.max() * 1.02, num_bins + 1)
    num_left = sum(len(each[i]) for each in every.values() for i in each) - len(losses)
    figure = style.new_figure(6.6)
    panels = figure.subplots(2, 2, sharex=True).flat
    panels[0].set(xscale="log", xlim=(bounds[-1], bounds[0]))
    for axes, (name, (title, formula)) in zip(panels, LANDSCAPE.items(), strict=True):
        axes.set(title=title, ylabel=formula, yscale="log")
        for i in shown:
            medians = binned_medians(points[name][i], bounds)
            if len(shown) <= MOST_CLOUDS or not len(medians):
                mark = {"marker": looks[i]["marker"], "color": looks[i]["color"]}
                axes.scatter(*points[name][i].T, s=8, linewidth=0, alpha=0.4, **mark)
            axes.plot(*medians.T, zorder=3, **looks[i])
        style.set_log_ticks(axes.yaxis)
    style.set_log_ticks(axes.xaxis)
    for axes in figure.axes[2:]:
        axes.set_xlabel("L, nats")
    style.add_legend(figure, [observed[i][0] for i in shown], [looks[i] for i in shown], TITLE)
    words = f" Points not shown, because they are 0, not finite or beyond {FARTHEST} times the median: {num_left}."
    style.finish_figure(figure, variants, WORDS + words * bool(num_left))
    return figure
