"""What probes saw, a page each: pre-activations over steps, their last histograms, the loss along the gradient.

On pages of pre-activations a row is a layer and a column a variant; the panels of a row share their axis, so that
what looks different is different. Colours and dashes are those of the comparison's figure.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bnexp.report.figures import page
from bnexp.report.figures.curves import clip, look, style
from bnexp.report.records import RunRecord
from bnexp.report.variants import Variant
from bnexp.store.settings import flatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Seen = dict[int, tuple[str, list[RunRecord]]]  # label and runs by the variant's place in the comparison
Look = tuple[RunRecord, int, list[float], list[int]]  # run, step, edges and counts of a histogram
Cloud = list[tuple[float, float]]  # (loss, value) of every look

TITLES = {
    "activations": "Pre-activations over steps: median, 15th and 85th percentile",
    "histograms": "Histograms of the pre-activations at the last look",
    "landscape": "How loss and gradient change along the gradient, at equal loss",
}
LANDSCAPE = {
    "loss_range": ("range of the loss", "max L − min L, nats"),
    "gradient_change": ("change of the gradient", "max |g′ − g|"),
    "smoothness": ("effective smoothness", "max |g′ − g| / |w′ − w|"),
    "gradient_change_relative": ("relative change of the gradient", "max |g′ − g| / |g|"),
}
HISTOGRAMS_WORDS = (
    "{units}, {seeds}, pooled. The panels of a row share their axis, but each has its own height. Saturated are inputs "
    "at which tanh or sigmoid has less than 5% of its steepest slope, or at which relu is 0."
)
LANDSCAPE_WORDS = (
    "L is the loss of one batch of training images, always the same, and g its gradient at the weights w; g′ is the "
    "gradient at w′, some steps from w against g. A point is a look at a run, a line joins medians over looks of about "
    "the same loss ({seeds}), which falls to the right. Compare at equal loss; only the relative change of the "
    "gradient does not depend on the scale of the weights."
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_LAYERS, MOST_COLUMNS, MOST_CLOUDS = 8, 6, 4  # clouds of points of more variants are one fog
BINS = 48  # of a histogram as drawn, over what it covers of the axis
TAIL = 0.001  # the share of values that may lie beyond either end of the axis of a histogram
LOSS_BINS, FEWEST = 10, 3  # bins of the loss that have a median each; points that make one
BEYOND = 1000  # times the median: what a diverging run may reach before it leaves the picture


def draw(variants: Sequence[Variant]) -> dict[str, "Figure"]:
    """Figures of what the runs of ``variants``, the baseline first, hold readings of, by name; {} without probes."""
    pages = {"activations": _activations, "histograms": _histograms, "landscape": _landscape}
    with style():
        figures = {name: make(variants) for name, make in pages.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _seen(variants: Sequence[Variant], sees: Callable[[RunRecord], object]) -> Seen:
    """The variants whose runs hold readings, and those runs: the finished, or if there is none the diverged."""
    seen: Seen = {}
    for i, variant in enumerate(variants):
        runs = [run for run in variant.runs if sees(run)]
        lost = [run for run in variant.diverged if sees(run)]
        if runs or lost:
            seen[i] = (variant.label if runs else f"{variant.label} (diverged)", runs or lost)
    return seen


def _count(seen: Seen) -> str:
    counts = sorted({len(runs) for _, runs in seen.values()})
    return f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seed{'s' * (counts != [1])} each"


# ---------------------------------------------------------------- pre-activations


def _activations(variants: Sequence[Variant]) -> "Figure | None":
    """Percentiles as in Ioffe & Szegedy (2015, arXiv:1502.03167), figure 1b and c, of one seed.

    One, because a unit drifts up with one seed and down with another: a mean would hide what is to be seen.
    """
    seen = _seen(variants, lambda run: _layers(run.curves, "/p50"))
    if not seen:
        return None
    shared = set.intersection(*({run.seed for run in runs} for _, runs in seen.values()))
    chosen = {i: next((run for run in runs if run.seed in shared), runs[0]) for i, (_, runs) in seen.items()}
    seeds = " and ".join(dict.fromkeys(str(run.seed) for run in chosen.values()))
    words = f"Seed {seeds}, {_units(chosen.values())}. The panels of a row share their axis."
    heads, rows, left_out = _choose(seen, {i: _layers(run.curves, "/p50") for i, run in chosen.items()})
    lines = {layer: {i: _percentiles(chosen[i], layer) for i in heads} for layer in rows}
    ends = {layer: [(min(each[1]), max(each[3])) for each in lines[layer].values() if each] for layer in rows}
    if not any(ends.values()):
        return None
    if any(map(page.is_wide, ends.values())):
        words += " An axis with powers of ten is logarithmic beyond the narrowest of its panels."
    figure, grid = page.make_grid(TITLES["activations"], rows, heads, words + left_out, has_titles=False)
    last = max(steps for row in lines.values() for each in row.values() if each for steps in each[0])
    for layer, row in grid.items():
        page.scale(row.values(), ends[layer], "y", logarithmic=True)
        for i, axes in row.items():
            page.count_steps(axes, last)
            axes.tick_params(labelleft=i == min(row), labelbottom=layer == list(grid)[-1])
            if lines[layer][i]:
                _draw_percentiles(axes, *lines[layer][i], color=look(i)[0])
            else:
                _say(axes, "no readings")
    for axes in row.values():
        axes.set_xlabel("steps", size=10)
    return figure


def _draw_percentiles(axes: "Axes", steps: list, low: list, middle: list, high: list, color: str) -> None:
    axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    for ys in (low, high):
        axes.plot(steps, ys, color=color, linewidth=1.0, clip_on=False)
    marker = "o" if len(steps) <= 25 else None
    axes.plot(steps, middle, color=color, linewidth=2.0, marker=marker, markersize=3.5, clip_on=False)


def _percentiles(run: RunRecord, layer: str) -> list[list[float]]:
    """Steps at which all are finite, and the values of p15, p50 and p85; [] if there is no such step."""
    curves = [run.curves.get(f"activation/{layer}/{name}", ((), ())) for name in ("p15", "p50", "p85")]
    by_step = [dict(zip(*curve, strict=True)) for curve in curves]
    steps = [step for step in by_step[1] if all(math.isfinite(each.get(step, math.nan)) for each in by_step)]
    return [steps, *([clip(each[step]) for step in steps] for each in by_step)] if steps else []


def _histograms(variants: Sequence[Variant]) -> "Figure | None":
    """The last histogram of every layer, seeds pooled, and the share of values that saturate the activation."""
    seen = _seen(variants, lambda run: _layers(run.curves, "/p50") and _layers(run.histograms))
    if not seen:
        return None
    units = _units(runs[0] for _, runs in seen.values())
    words = HISTOGRAMS_WORDS.format(units=units.capitalize(), seeds=_count(seen))
    layers = {i: _layers(tag for run in runs for tag in run.histograms) for i, (_, runs) in seen.items()}
    heads, rows, left_out = _choose(seen, layers)
    figure, grid = page.make_grid(TITLES["histograms"], rows, heads, words + left_out, has_titles=True)
    for layer, row in grid.items():
        looks = {i: _last_looks(seen[i][1], f"activation/{layer}") for i in row}
        ends = {i: _ends(looks[i]) for i in row if looks[i]}
        calmest = min(map(page.size_of, ends.values()), default=1)
        inside = {i: each for i, each in ends.items() if page.size_of(each) <= BEYOND * calmest}
        page.scale(row.values(), list(inside.values()), "x")
        for i, axes in row.items():
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            if i in inside:
                _draw_histogram(axes, looks[i], np.linspace(*ends[i], BINS + 1), color=look(i)[0])
                axes.set_title(_saturation(layer, looks[i]), loc="left", size=9, weight="normal", pad=3)
            else:
                low, high = (page.plain(float(f"{end:.2g}")) for end in ends.get(i, (0, 0)))
                _say(axes, f"from {low}\nto {high}" if looks[i] else "no readings")
    for axes in row.values():
        axes.set_xlabel("pre-activation", size=10)
    return figure


def _draw_histogram(axes: "Axes", looks: Sequence[Look], bins: np.ndarray, color: str) -> None:
    """All of them in these ``bins``, as if values were spread evenly within the bins that they were counted in."""
    heights = sum(np.diff(np.interp(bins, edges, [0, *np.cumsum(counts)])) for *_, edges, counts in looks)
    axes.stairs(heights, bins, fill=True, color=color, alpha=0.3, linewidth=0)
    axes.stairs(heights, bins, color=color, linewidth=1.2)
    axes.set_ylim(0, 1.05 * heights.max() or 1)


def _last_looks(runs: Sequence[RunRecord], tag: str) -> list[Look]:
    return [(run, *run.histograms[tag][-1]) for run in runs if run.histograms.get(tag)]


def _ends(looks: Sequence[Look]) -> tuple[float, float]:
    """Between which values all of the histograms lies but their tails."""
    lows, highs = [], []
    for *_, edges, counts in looks:
        below = np.cumsum([0, *counts])
        low, high = np.interp([TAIL * below[-1], (1 - TAIL) * below[-1]], below, edges)
        lows.append(clip(low))
        highs.append(clip(high))
    return min(lows), max(highs)


def _saturation(layer: str, looks: Sequence[Look]) -> str:
    """The mean over seeds of what was saturated when the histograms were taken."""
    tag = f"activation/{layer}/saturation"
    shares = [dict(zip(*run.curves.get(tag, ((), ())), strict=True)).get(step, math.nan) for run, step, *_ in looks]
    share = sum(shares) / len(shares)
    return f"{share:.1%} saturated" if math.isfinite(share) else "not all finite"


def _layers(tags: Iterable[str], ending: str = "") -> list[str]:
    """The layers among the tags activation/<layer> with this ending, in order and each once."""
    head = "activation/"
    found = [tag[len(head) : len(tag) - len(ending)] for tag in tags if tag.startswith(head) and tag.endswith(ending)]
    return list(dict.fromkeys(found))


def _units(runs: Iterable[RunRecord]) -> str:
    """What of a layer the probe looked at."""
    units = [flatten({"probes": run.config.get("probe")}).get("probes.activations.unit") for run in runs]
    return "all units" if set(units) == {None} else f"unit {' or '.join(dict.fromkeys(map(str, units)))}"


def _choose(seen: Seen, layers: dict[int, list[str]]) -> tuple[dict[int, tuple[str, str]], list[str], str]:
    """As many variants (labels and colours) and of their ``layers`` as fit on a page, and words on those left out."""
    heads = {i: (seen[i][0], look(i)[0]) for i in list(layers)[:MOST_COLUMNS]}
    rows = every = list(dict.fromkeys(layer for i in heads for layer in layers[i]))
    words = ""
    if len(every) > MOST_LAYERS:
        rows = [every[round(k * (len(every) - 1) / (MOST_LAYERS - 1))] for k in range(MOST_LAYERS)]
        words += f" Shown are {MOST_LAYERS} of {len(every)} layers, the first and the last among them."
    if len(layers) > len(heads):
        words += f" Shown are the first {len(heads)} of {len(layers)} variants."
    return heads, rows, words


def _say(axes: "Axes", words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color="#888888", size=9)


# ---------------------------------------------------------------- landscape


def _landscape(variants: Sequence[Variant]) -> "Figure | None":
    """Santurkar et al. (2018, arXiv:1805.11604), figure 4, against the loss instead of the step."""
    from matplotlib.lines import Line2D

    seen = _seen(variants, lambda run: _points([run], "loss"))
    clouds, num_left = _within({name: {i: _points(runs, name) for i, (_, runs) in seen.items()} for name in LANDSCAPE})
    seen = {i: each for i, each in seen.items() if any(cloud[i] for cloud in clouds.values())}
    if not seen:
        return None
    losses = [x for each in clouds.values() for cloud in each.values() for x, _ in cloud]
    num_bins = max(3, min(LOSS_BINS, min(len(clouds["loss_range"][i]) for i in seen) // (2 * FEWEST)))
    bounds = np.geomspace(min(losses) / 1.02, max(losses) * 1.02, num_bins + 1)
    words = LANDSCAPE_WORDS.format(seeds=_count(seen))
    if num_left:
        words += f" {num_left} points are not shown: 0, not finite, or beyond {BEYOND} times the median."
    lines = [Line2D([], [], **_line(i)) for i in seen]
    figure, panels = page.make_quarters(TITLES["landscape"], [label for label, _ in seen.values()], lines, words)
    for axes, (name, (title, formula)) in zip(panels, LANDSCAPE.items(), strict=True):
        axes.set(xscale="log", yscale="log", xlim=(bounds[-1], bounds[0]))
        axes.set_title(title, loc="left")
        axes.set_ylabel(formula, size=9.5)
        for i in seen:
            _draw_cloud(axes, i, clouds[name][i], bounds, shows_points=len(seen) <= MOST_CLOUDS)
        page.few_numbers(axes.xaxis)
        page.few_numbers(axes.yaxis)
    for axes in panels[2:]:
        axes.set_xlabel("L, nats", size=9.5)
    return figure


def _draw_cloud(axes: "Axes", i: int, cloud: Cloud, bounds: np.ndarray, shows_points: bool) -> None:
    medians = _medians(cloud, bounds)
    if cloud and (shows_points or not medians):
        face = "none" if i == 0 else look(i)[0]
        options = {"facecolor": face, "edgecolor": look(i)[0], "linewidth": 0.6, "alpha": 0.35}
        axes.scatter(*zip(*cloud, strict=True), s=9, marker=MARKERS[i % len(MARKERS)], zorder=2, **options)
    if medians:
        axes.plot(*zip(*medians, strict=True), zorder=3, **_line(i))


def _points(runs: Sequence[RunRecord], name: str) -> Cloud:
    """(loss, value) of every look."""
    points = []
    for run in runs:
        values = dict(zip(*run.curves.get(f"landscape/{name}", ((), ())), strict=True))
        losses = zip(*run.curves.get("landscape/loss", ((), ())), strict=True)
        points += [(loss, values[step]) for step, loss in losses if step in values]
    return points


def _within(clouds: dict[str, dict[int, Cloud]]) -> tuple[dict[str, dict[int, Cloud]], int]:
    """The points that a logarithmic panel can show without losing sight of the others, and how many it cannot."""
    kept: dict[str, dict[int, Cloud]] = {}
    for name, each in clouds.items():
        positive = {i: [p for p in cloud if all(0 < z < math.inf for z in p)] for i, cloud in each.items()}
        most = BEYOND * np.median([p for cloud in positive.values() for p in cloud] or [(1, 1)], axis=0)
        kept[name] = {i: [p for p in cloud if p[0] <= most[0] and p[1] <= most[1]] for i, cloud in positive.items()}
    num_points, num_kept = (sum(len(c) for each in all_.values() for c in each.values()) for all_ in (clouds, kept))
    return kept, num_points - num_kept


def _medians(cloud: Cloud, bounds: np.ndarray) -> Cloud:
    """The median loss and the median value in every bin of the loss that holds enough points."""
    bins = [[p for p in cloud if low <= p[0] < high] for low, high in zip(bounds, bounds[1:], strict=False)]
    return [tuple(np.median(points, axis=0)) for points in bins if len(points) >= FEWEST]


def _line(i: int) -> dict:
    """How the medians of the ``i``-th variant look."""
    color, dashes = look(i)
    face = {"markerfacecolor": "white"} if i == 0 else {}
    return {"color": color, "linestyle": dashes, "marker": MARKERS[i % len(MARKERS)], "markersize": 5.5, **face}
