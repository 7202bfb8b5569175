"""Figures of what probes saw: pre-activations over steps, their last histograms, the loss along the gradient.

In figures of pre-activations a row is a layer and a column a variant. The panels of a row share their axis, so that
variants can be compared.
"""

import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bnexp.report.figures import style
from bnexp.report.figures.curves import EXPLODED, HUGE, scale_steps
from bnexp.report.records import RunRecord
from bnexp.report.variants import Variant
from bnexp.store.settings import flatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Observed = dict[int, tuple[str, list[RunRecord]]]  # label and runs with readings, by the variant's index

TITLES = {
    "activations": "Pre-activations over steps: median, 15th and 85th percentile",
    "histograms": "Histograms of the pre-activations at the last reading",
    "landscape": "How loss and gradient change along the gradient, at equal loss",
}
LANDSCAPE = {
    "loss_range": ("range of the loss", "max L − min L, nats"),
    "gradient_change": ("change of the gradient", "max |g′ − g|"),
    "smoothness": ("effective smoothness", "max |g′ − g| / |w′ − w|"),
    "gradient_change_relative": ("relative change of the gradient", "max |g′ − g| / |g|"),
}
HISTOGRAMS_WORDS = (
    "{units}, seeds pooled. The panels of a row share their axis, but each has its own height. Saturated are inputs "
    "at which tanh or sigmoid has less than 5% of its steepest slope, or at which relu is 0."
)
LANDSCAPE_WORDS = (
    "L is the loss of one fixed batch of training images, g its gradient at the weights w, and g′ the gradient at w′, "
    "some steps from w against g. A point is one reading; a line joins medians over readings at about the same loss, "
    "which falls to the right. Compare at equal loss; only the relative change of the gradient does not depend on the "
    "scale of the weights."
)
MOST_LAYERS, MOST_COLUMNS, MOST_CLOUDS = 8, 6, 4  # points of more variants hide each other
NATURAL = 1.0  # the size of pre-activations at which activations bend; smaller ones need no axis of their own
BINS = 48  # of a histogram as drawn, over the values that it covers
TAIL = 0.001  # the share of values that may lie beyond either end of a histogram as drawn
LOSS_BINS, FEWEST = 10, 3  # bins of the loss that have a median each; points that make one
BEYOND = 1000  # times the median, or the narrowest histogram: what is further out is not drawn


def draw_probes(variants: Sequence[Variant]) -> "tuple[dict[str, Figure], list[str]]":
    """Figures of the probes' readings by name, and a note on every figure that one reading a run cannot fill."""
    runs = [run for variant in variants for run in variant.runs + variant.diverged]
    figures, notes = {}, []
    for name, prefix, draw in (
        ("activations", "activation/", _draw_activations),
        ("histograms", None, _draw_histograms),
        ("landscape", "landscape/", _draw_landscape),
    ):
        tags = [(run, tag) for run in runs for tag in run.curves if prefix and tag.startswith(prefix)]
        if max((len(run.curves[tag][0]) for run, tag in tags), default=0) == 1:
            notes.append(f"No {name}.png: one reading a run is no curve; a smaller probe.{name}.every gives more.")
            continue
        with style.figure_style():
            figure = draw(variants)
        if figure is not None:
            figures[name] = figure
    return figures, notes


def _observed(variants: Sequence[Variant], prefix: str) -> Observed:
    """The variants with readings under ``prefix``, and those runs: the finished ones, or else those that diverged."""
    observed: Observed = {}
    for i, variant in enumerate(variants):
        runs, diverged = (
            [run for run in each if any(tag.startswith(prefix) for tag in run.curves)]
            for each in (variant.runs, variant.diverged)
        )
        if runs or diverged:
            observed[i] = (variant.label if runs else f"{variant.label} (diverged)", runs or diverged)
    return observed


def _by_step(run: RunRecord, tag: str) -> dict[int, float]:
    return dict(zip(*run.curves.get(tag, ((), ())), strict=True))


def activation_layers(run: RunRecord) -> list[str]:
    """The layers with readings, in order and each once."""
    tags = [tag for tag in run.curves if tag.startswith("activation/")]
    return list(dict.fromkeys(tag.partition("/")[2].rpartition("/")[0] for tag in tags))


def percentile_curves(run: RunRecord, layer: str) -> np.ndarray:
    """Steps and the values of p15, p50 and p85, of shape (4, n), at the n steps at which all are finite."""
    curves = [_by_step(run, f"activation/{layer}/{name}") for name in ("p15", "p50", "p85")]
    rows = [[step, *(curve.get(step, math.nan) for curve in curves)] for step in curves[1]]
    return np.clip([row for row in rows if np.isfinite(row).all()], -HUGE, HUGE).reshape(-1, 4).T


def pool_histograms(runs: Sequence[RunRecord], layer: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Counts and edges of the runs' last histograms together, without their tails; None if no run has one.

    Values are taken as evenly spread within the bins in which they were counted.
    """
    last = [run.histograms[tag][-1] for run in runs if run.histograms.get(tag := f"activation/{layer}")]
    if not last:
        return None
    below = [np.cumsum([0, *counts]) for _, _, counts in last]
    ends = [np.interp([TAIL * each[-1], (1 - TAIL) * each[-1]], each, edges) for each, (_, edges, _) in
            zip(below, last, strict=True)]  # fmt: skip
    low, high = np.clip([np.min(ends), np.max(ends)], -HUGE, HUGE)
    bins = np.linspace(low, high, BINS + 1) if low < high else np.array([low - 0.5, low + 0.5])
    return sum(np.diff(np.interp(bins, edges, each)) for each, (_, edges, _) in zip(below, last, strict=True)), bins


def describe_saturation(runs: Sequence[RunRecord], layer: str) -> str:
    """The share of saturated inputs at the step of the last histogram, as a mean over seeds."""
    steps = [(run, run.histograms[tag][-1][0]) for run in runs if run.histograms.get(tag := f"activation/{layer}")]
    share = np.mean([_by_step(run, f"activation/{layer}/saturation").get(step, math.nan) for run, step in steps])
    return f"{share:.1%} saturated" if math.isfinite(share) else "not all finite"


def reach_of(low: float, high: float) -> float:
    """How far from 0 an interval reaches, at least `NATURAL`."""
    return max(abs(low), abs(high), NATURAL)


def _describe_units(runs: Iterable[RunRecord]) -> str:
    units = [flatten(run.config).get("probe.activations.unit") for run in runs]
    return "all units" if set(units) == {None} else f"unit {' or '.join(dict.fromkeys(map(str, units)))}"


def _draw_activations(variants: Sequence[Variant]) -> "Figure | None":
    """Percentiles as in Ioffe & Szegedy (2015, arXiv:1502.03167), figure 1b and c, of one seed.

    One, because a unit drifts up with one seed and down with another, which a mean would hide.
    """
    observed, looks = _observed(variants, "activation/"), style.variant_looks(variants)
    shared = set.intersection(*({run.seed for run in runs} for _, runs in observed.values())) if observed else set()
    chosen = {i: next((run for run in runs if run.seed in shared), runs[0]) for i, (_, runs) in observed.items()}
    curves = {
        i: {layer: percentile_curves(run, layer) for layer in activation_layers(run)} for i, run in chosen.items()
    }
    last = max((each[0, -1] for column in curves.values() for each in column.values() if each.size), default=None)
    if last is None:
        return None
    figure, grid, left_out = _make_grid("activations", observed, looks, curves, sharex=True, sharey="row")
    seeds = " and ".join(dict.fromkeys(str(run.seed) for run in chosen.values()))
    words = f"Shown is seed {seeds}, {_describe_units(chosen.values())}. The panels of a row share their axis."
    is_logarithmic = False
    for layer, row in grid.items():
        sizes = []
        for i, axes in row.items():
            steps, low, middle, high = curves[i].get(layer, np.empty((4, 0)))
            if not len(steps):
                style.write_inside(axes, "no readings")
                continue
            color, marker = looks[i]["color"], "o" if len(steps) <= 25 else None
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(steps, np.stack([low, high], 1), color=color, linewidth=1.0)
            axes.plot(steps, middle, color=color, linewidth=2.0, marker=marker)
            sizes.append(reach_of(low.min(), high.max()))
        if sizes and max(sizes) > EXPLODED * min(sizes):
            power, decades = math.floor(math.log10(min(sizes))), math.log10(max(sizes) / min(sizes))
            axes.set_yscale("symlog", linthresh=10.0**power, linscale=max(1, decades / 2))
            axes.yaxis.get_major_locator().set_params(numticks=5)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.minorticks_off()
            is_logarithmic = True
    if is_logarithmic:
        words += " An axis with powers of ten is logarithmic beyond the narrowest of its panels."
    scale_steps(axes, last, most=max(1, 15 // len(row) - 1))
    style.finish_figure(figure, variants, words + left_out)
    return figure


def _draw_histograms(variants: Sequence[Variant]) -> "Figure | None":
    """The last histogram of every layer, seeds pooled, and the share of inputs that saturate the activation."""
    observed, looks = _observed(variants, "activation/"), style.variant_looks(variants)
    if not any(run.histograms for _, runs in observed.values() for run in runs):
        return None
    layers = {i: activation_layers(runs[0]) for i, (_, runs) in observed.items()}
    figure, grid, left_out = _make_grid("histograms", observed, looks, layers, sharex="row")
    for layer, row in grid.items():
        pooled = {i: pool_histograms(observed[i][1], layer) for i in row}
        sizes = {i: reach_of(each[1][0], each[1][-1]) for i, each in pooled.items() if each}
        for i, axes in row.items():
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            if i not in sizes:
                style.write_inside(axes, "no readings")
                continue
            counts, bins = pooled[i]
            if sizes[i] > BEYOND * min(sizes.values()):
                style.write_inside(axes, f"from {bins[0]:.2g}\nto {bins[-1]:.2g}")
                continue
            axes.stairs(counts, bins, fill=True, color=looks[i]["color"], alpha=0.3, linewidth=0)
            axes.stairs(counts, bins, color=looks[i]["color"], linewidth=1.2)
            axes.set_ylim(0, 1.35 * counts.max() or 1)  # room for a line of text above
            axes.text(0, 0.97, describe_saturation(observed[i][1], layer), transform=axes.transAxes, va="top", size=9)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.locator_params("x", nbins=min(15 // len(row), 8), steps=[1, 2, 4, 5, 10])
    for axes in row.values():
        axes.set_xlabel("pre-activation")
    units = _describe_units(runs[0] for _, runs in observed.values()).capitalize()
    style.finish_figure(figure, variants, HISTOGRAMS_WORDS.format(units=units) + left_out)
    return figure


def _make_grid(
    name: str, observed: Observed, looks: Sequence[style.Look], layers: Mapping[int, Iterable[str]], **share: object
) -> "tuple[Figure, dict[str, dict[int, Axes]], str]":
    """A figure, its panels by layer and variant, as many as there is room for, and words on those left out."""
    columns, words = list(observed)[:MOST_COLUMNS], ""
    rows = every = list(dict.fromkeys(layer for i in columns for layer in layers[i]))
    if len(every) > MOST_LAYERS:
        rows = [every[round(k * (len(every) - 1) / (MOST_LAYERS - 1))] for k in range(MOST_LAYERS)]
        words += f" Shown are {MOST_LAYERS} of {len(every)} layers, the first and the last among them."
    if len(observed) > len(columns):
        words += f" Shown are the first {len(columns)} of {len(observed)} variants."
    heads = [_break_lines(observed[i][0], 72 // len(columns)) for i in columns]
    height = 1.1 + 0.18 * max(head.count("\n") for head in heads) + len(rows) * max(1.25, min(2.5, 5.5 / len(rows)))
    figure = style.new_figure(height)
    figure.suptitle(TITLES[name], x=0.01, ha="left", size=12.5, weight="bold")
    panels = figure.subplots(len(rows), len(columns), squeeze=False, **share)
    for axes, head, i in zip(panels[0], heads, columns, strict=True):
        axes.set_title(head, color=looks[i]["color"], size=10)
    for axes, layer in zip(panels[:, 0], rows, strict=True):
        axes.set_ylabel(_break_lines(layer, 18), rotation=0, ha="right", va="center", weight="bold", size=9.5)
    return figure, {layer: dict(zip(columns, row, strict=True)) for layer, row in zip(rows, panels, strict=True)}, words


def _break_lines(name: str, width: int) -> str:
    """``name`` in lines of ``width`` characters, broken at spaces and after dots where it can be."""
    spaced = re.sub(r"\.(?=[a-z_])", ". ", name)
    return textwrap.fill(spaced, width, max_lines=6, placeholder="…").replace(". ", ".")


def landscape_points(runs: Sequence[RunRecord], name: str) -> np.ndarray:
    """The loss and the value of every reading, of shape (n, 2)."""
    curves = [(_by_step(run, "landscape/loss"), _by_step(run, f"landscape/{name}")) for run in runs]
    points = [(loss, values[step]) for losses, values in curves for step, loss in losses.items() if step in values]
    return np.array(points).reshape(-1, 2)


def drawable_points(points: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Those ``points`` of every variant that logarithmic axes can show without hiding the others in a corner."""
    positive = {i: each[((each > 0) & np.isfinite(each)).all(1)] for i, each in points.items()}
    every = np.concatenate([*positive.values(), np.empty((0, 2))])
    most = BEYOND * np.median(every, axis=0) if len(every) else np.ones(2)
    return {i: each[(each <= most).all(1)] for i, each in positive.items()}


def binned_medians(points: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The median loss and the median value in every bin of the loss with enough points, of shape (n, 2)."""
    bins = [points[(low <= points[:, 0]) & (points[:, 0] < high)] for low, high in itertools.pairwise(bounds)]
    return np.array([np.median(inside, axis=0) for inside in bins if len(inside) >= FEWEST]).reshape(-1, 2)


def _draw_landscape(variants: Sequence[Variant]) -> "Figure | None":
    """Santurkar et al. (2018, arXiv:1805.11604), figure 4, against the loss instead of the step."""
    observed, looks = _observed(variants, "landscape/"), style.variant_looks(variants)
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
    style.add_legend(figure, [observed[i][0] for i in shown], [looks[i] for i in shown], TITLES["landscape"])
    words = f" Points not shown, as they are 0, not finite or beyond {BEYOND} times the median: {num_left}."
    style.finish_figure(figure, variants, LANDSCAPE_WORDS + words * bool(num_left))
    return figure
