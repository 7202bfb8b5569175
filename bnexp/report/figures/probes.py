"""Figures of what probes read: pre-activations over steps, their last histograms, the landscape of the loss.

In figures of pre-activations a row is a layer and a column a variant. The panels of a row share their axis, so that
variants can be compared.
"""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bnexp.report.figures import landscape, style
from bnexp.report.figures.curves import EXPLODED, HUGE, scale_steps
from bnexp.report.records import RunRecord
from bnexp.report.variants import Variant
from bnexp.store.settings import flatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Observed = dict[int, tuple[str, list[RunRecord]]]  # by the variant's index: its label and its runs with readings

TITLES = {
    "activations": "Pre-activations over steps: median, 15th and 85th percentile",
    "histograms": "Histograms of the pre-activations at the last reading",
    "landscape": landscape.TITLE,
}
HISTOGRAMS_WORDS = (
    "{units}, seeds pooled. The panels of a row share their axis, but each has its own height. An input is saturated "
    "if tanh or sigmoid has less than 5% of its steepest slope there, or if relu is 0 there."
)
MOST_LAYERS, MOST_COLUMNS = 8, 6
NATURAL = 1.0  # the size of pre-activations at which activations bend; smaller ones need no axis of their own
BINS = 48  # of a histogram as drawn
TAIL = 0.001  # the share of values cut off at either end of a histogram
WIDEST = 1000  # a histogram this many times as wide as the narrowest is not drawn


def draw_probes(variants: Sequence[Variant]) -> "tuple[dict[str, Figure], list[str]]":
    """Figures of the probes' readings by name, and a note on each figure of curves for which runs have one reading."""
    looks = style.variant_looks(variants)
    figures, notes = {}, []
    for name, prefix, draw in (
        ("activations", "activation/", _draw_activations),
        ("histograms", "activation/", _draw_histograms),
        ("landscape", "landscape/", landscape.draw_landscape),
    ):
        observed = _observed(variants, prefix)
        curves = [run.curve(tag) for _, runs in observed.values() for run in runs for tag in _tags(run, prefix)]
        if name != "histograms" and max(map(len, curves), default=0) == 1:
            notes.append(f"No {name}.png: one reading a run is no curve; a smaller probe.{name}.every gives more.")
        elif observed:
            with style.figure_style():
                figure = draw(variants, observed, looks)
            if figure is not None:
                figures[name] = figure
    return figures, notes


def _observed(variants: Sequence[Variant], prefix: str) -> Observed:
    """The variants with readings under ``prefix``, and those runs: the finished ones or, without any, the diverged."""
    observed: Observed = {}
    for i, variant in enumerate(variants):
        finished, diverged = ([run for run in runs if _tags(run, prefix)] for runs in (variant.runs, variant.diverged))
        if finished or diverged:
            observed[i] = (variant.label if finished else f"{variant.label} (diverged)", finished or diverged)
    return observed


def _tags(run: RunRecord, prefix: str) -> list[str]:
    return [tag for tag in run.curves if tag.startswith(prefix)]


def activation_layers(run: RunRecord) -> list[str]:
    """The layers with readings, in the order of the readings."""
    return list(dict.fromkeys(tag.partition("/")[2].rpartition("/")[0] for tag in _tags(run, "activation/")))


def percentile_curves(run: RunRecord, layer: str) -> np.ndarray:
    """Steps and the values of p15, p50 and p85, shape (4, n), at the n steps at which all are finite."""
    curves = [run.curve(f"activation/{layer}/{name}") for name in ("p15", "p50", "p85")]
    rows = [[step, *(curve.get(step, math.nan) for curve in curves)] for step in curves[1]]
    return np.clip([row for row in rows if np.isfinite(row).all()], -HUGE, HUGE).reshape(-1, 4).T


def pool_histograms(runs: Sequence[RunRecord], layer: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Counts and edges of the sum of the runs' last histograms, without tails; None if no run has one.

    The values of a bin are taken to be spread evenly over it.
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
    """The share of saturated inputs at the step of the last histogram, mean over seeds, in words."""
    steps = [(run, run.histograms[tag][-1][0]) for run in runs if run.histograms.get(tag := f"activation/{layer}")]
    share = np.mean([run.curve(f"activation/{layer}/saturation").get(step, math.nan) for run, step in steps])
    return f"{share:.1%} saturated" if math.isfinite(share) else "not all finite"


def reach_of(low: float, high: float) -> float:
    """The largest distance from 0 within an interval, at least `NATURAL`."""
    return max(abs(low), abs(high), NATURAL)


def _describe_units(runs: Iterable[RunRecord]) -> str:
    units = [flatten(run.config).get("probe.activations.unit") for run in runs]
    return "all units" if set(units) == {None} else f"unit {' or '.join(dict.fromkeys(map(str, units)))}"


def _draw_activations(variants: Sequence[Variant], observed: Observed, looks: Sequence[style.Look]) -> "Figure | None":
    """Percentiles as in Ioffe & Szegedy (2015, arXiv:1502.03167), figure 1b and c; None if none is finite.

    They are of one seed, because a mean would hide that a unit drifts up with one seed and down with another.
    """
    shared = set.intersection(*({run.seed for run in runs} for _, runs in observed.values()))
    chosen = {i: next((run for run in runs if run.seed in shared), runs[0]) for i, (_, runs) in observed.items()}
    curves = {i: {layer: percentile_curves(run, layer) for layer in activation_layers(run)}
              for i, run in chosen.items()}  # fmt: skip
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
        words += " An axis with powers of ten is logarithmic outside the range of its narrowest panel."
    scale_steps(axes, last, most=max(1, 15 // len(row) - 1))
    style.finish_figure(figure, variants, words + left_out)
    return figure


def _draw_histograms(variants: Sequence[Variant], observed: Observed, looks: Sequence[style.Look]) -> "Figure | None":
    """The last histogram of every layer, seeds pooled, and the share of saturated inputs; None without histograms."""
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
            if sizes[i] > WIDEST * min(sizes.values()):
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
    """A figure, its panels by layer and variant, and words on the layers and variants that are left out."""
    columns, words = list(observed)[:MOST_COLUMNS], ""
    rows = every = list(dict.fromkeys(layer for i in columns for layer in layers[i]))
    if len(every) > MOST_LAYERS:
        rows = [every[round(k * (len(every) - 1) / (MOST_LAYERS - 1))] for k in range(MOST_LAYERS)]
        words += f" Shown are {MOST_LAYERS} of {len(every)} layers, including the first and the last."
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
    """``name`` in lines of ``width`` characters, broken at spaces and after dots if possible."""
    spaced = re.sub(r"\.(?=[a-z_])", ". ", name)
    return textwrap.fill(spaced, width, max_lines=6, placeholder="…").replace(". ", ".")
