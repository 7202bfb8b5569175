"""The curves of a comparison on one page: loss and accuracy, training and validation, against steps.

A line is the mean over seeds, its band the 95% t-interval. Lines are named at their ends and told apart by
colour and by dashes, for a black and white printer and for the colour-blind (colours of Okabe & Ito, 2008).
"""

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bnexp.report import stats
from bnexp.report.variants import Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[list[int], list[float], list[float], list[float]]  # steps, means, lower and upper ends

PANELS = {
    "loss/train": "training loss", "loss/valid": "validation loss",
    "accuracy/train": "training accuracy", "accuracy/valid": "validation accuracy",
}  # fmt: skip
BASELINE = ("#4d4d4d", (0, (4, 1.5)))
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (6, 1.5, 1, 1.5)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))  # 5 x 6: 30 looks
WIDTH, HEIGHT, DPI = 10.0, 7.4, 160  # inches: 1600 pixels wide
TOP, BOTTOM, LEFT, GAP, PAD = 0.42, 0.92, 0.78, 0.72, 0.14  # inches: margins, between rows, beside a label
MOST_POINTS = 100  # of a line; more readings than that are averaged in windows, or only their noise is seen
EXPLODED = 30.0  # a loss this many times above the calmest variant's peak leaves the picture
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.titlepad": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e6e6e6", "axes.axisbelow": True, "axes.edgecolor": "#666666", "lines.linewidth": 1.8,
    "text.parse_math": False, "svg.hashsalt": "bnexp",
}  # fmt: skip


def draw(variants: Sequence[Variant]) -> "Figure":
    """A 2x2 figure of ``variants``, the baseline first. Diverged runs are thin lines that end in a cross."""
    with style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI)
        FigureCanvasAgg(figure)
        panels = list(figure.subplots(2, 2).flat)
        ends = [_panel(axes, tag, variants) for axes, tag in zip(panels, tags_of(variants), strict=True)]
        _name_lines(figure, panels, ends, [shorten(each.label) for each in variants])
        figure.text(PAD / WIDTH, PAD / HEIGHT, _caption(variants), size=8.5, color="#444444")
    return figure


def tags_of(variants: Sequence[Variant]) -> list[str]:
    """The tags of the four panels: training as evaluated on the whole set, if every run did, else as it went."""
    runs = [run for variant in variants for run in variant.runs + variant.diverged]
    evaluated = {tag: tag.replace("/train", "/train_eval") for tag in PANELS if tag.endswith("/train")}
    has = {tag for tag in evaluated.values() if runs and all(tag in run.curves for run in runs)}
    return [evaluated[tag] if evaluated.get(tag) in has else tag for tag in PANELS]


def render(figure: "Figure", format: str) -> bytes:
    """The figure as ``png`` or ``svg``; the same figure gives the same bytes."""
    file = io.BytesIO()
    with style():
        figure.savefig(file, format=format, dpi=DPI, metadata={"Date": None} if format == "svg" else None)
    return file.getvalue()


def _caption(variants: Sequence[Variant]) -> str:
    counts = [len(each.runs) for each in variants if each.runs]
    each_count = ", ".join(f"{shorten(each.label)} {len(each.runs)}" for each in variants)
    seeds = f"{counts[0]} each" if len(set(counts)) == 1 else each_count
    crosses = "A cross ends a run that diverged. " if any(each.diverged for each in variants) else ""
    words = f"Mean over seeds and its 95% interval. {crosses}Number of seeds: {seeds}."
    return "\n".join(textwrap.wrap(words, 150, max_lines=2))


@contextmanager
def style() -> Iterator[None]:
    """Our looks whatever the user's matplotlibrc says, and nothing of them left behind."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a label in letters that the font lacks is no fault
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _panel(axes: "Axes", tag: str, variants: Sequence[Variant]) -> dict[int, tuple[float, float]]:
    """Draw one tag of every variant; returns where each line ends, by the variant's index."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    curves = [curve(variant, tag, MOST_POINTS) for variant in variants]
    lost = [[_finite(run.curves.get(tag, ((), ()))) for run in variant.diverged] for variant in variants]
    lost = [[stray for stray in strays if stray[0]] for strays in lost]
    alpha = 0.17 if len(variants) <= 4 else 0.08
    ends = {}
    for i, ((steps, means, lows, highs), strays) in enumerate(zip(curves, lost, strict=True)):
        color, dashes = look(i)
        if steps:
            marker = "o" if len(steps) <= 25 else None
            axes.plot(steps, means, color=color, linestyle=dashes, marker=marker, markersize=3.5, zorder=3)
            axes.fill_between(steps, lows, highs, color=color, alpha=alpha, linewidth=0)
        for xs, ys in strays:
            axes.plot(xs, ys, color=color, linewidth=0.9, alpha=0.8)
        points = _finite((steps, means))
        points = points if points[0] else max(strays, key=lambda stray: len(stray[0]), default=([], []))
        if points[0]:
            ends[i] = (points[0][-1], points[1][-1])
    axes.set_title(_title(tag), loc="left")
    axes.set_xlabel("steps" if tag.startswith("accuracy") else "")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if not ends:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no readings", transform=axes.transAxes, ha="center", color="#888888")
        return ends
    axes.set_xlim(0, max(x for x, _ in ends.values()))
    if tag.startswith("accuracy"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    _limit(axes, tag, curves, lost)
    for i, strays in enumerate(lost):
        for xs, ys in strays:
            cross = axes.transAxes.inverted().transform(_leaves(axes, xs, ys))
            mark = {"color": look(i)[0], "markersize": 7, "markeredgewidth": 2, "transform": axes.transAxes}
            axes.plot(*cross, "x", **mark, zorder=4, clip_on=False)
    return ends


def _leaves(axes: "Axes", xs: list[int], ys: list[float]) -> tuple[float, float]:
    """Where, in pixels, a line ends or first leaves the picture through its top."""
    points, top = axes.transData.transform(list(zip(xs, ys, strict=True))), axes.bbox.y1
    for (x0, y0), (x1, y1) in zip([points[0], *points], points, strict=False):
        if y1 > top:
            return (x0 + (x1 - x0) * (top - y0) / (y1 - y0) if y0 < top else x1), top
    return tuple(points[-1])


def _title(tag: str) -> str:
    return PANELS.get(tag) or f"{PANELS[tag.removesuffix('_eval')]}, evaluated"


def look(i: int) -> tuple[str, object]:
    """Colour and dashes of the ``i``-th variant; 0 is the baseline."""
    return BASELINE if i == 0 else (COLORS[(i - 1) % len(COLORS)], DASHES[(i - 1) % len(DASHES)])


def curve(variant: Variant, tag: str, most: int | None = None) -> Curve:
    """Mean and interval over the finished runs at the steps that all have; no spread, no width.

    Of more than ``most`` readings, as many neighbours as it takes are first averaged within each run.
    """
    curves = [dict(zip(*run.curves[tag], strict=True)) for run in variant.runs if tag in run.curves]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    width = -(-len(steps) // most) if most else 1
    windows = [steps[i : i + width] for i in range(0, len(steps), max(1, width))]
    results = [stats.mean([sum(map(curve.get, window)) / len(window) for curve in curves]) for window in windows]
    steps = [window[-1] for window in windows]
    bounds = [(each.low, each.high) if each.low is not None else (each.mean, each.mean) for each in results]
    columns = ([each.mean, *bound] for each, bound in zip(results, bounds, strict=True))
    numbers = [[math.nan if value is None else clip(value) for value in column] for column in columns]
    return (steps, *map(list, zip(*numbers, strict=True))) if steps else ([], [], [], [])


def _finite(curve: tuple) -> tuple[list[int], list[float]]:
    points = [(x, clip(y)) for x, y in zip(*curve, strict=True) if math.isfinite(y)]
    return [x for x, _ in points], [y for _, y in points]


def clip(value: float) -> float:
    return min(max(value, -1e30), 1e30)  # beyond, matplotlib overflows on a logarithmic axis


def _limit(axes: "Axes", tag: str, curves: Sequence[Curve], lost: Sequence[list]) -> None:
    """Limits of y such that every line can be read: what explodes leaves the picture, and the title says so.

    Bands widen the limits by at most a quarter: with two seeds they are 13 times the spread.
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    lines = [_finite(curve[:2])[1] or [y for stray in strays for y in stray[1]] for curve, strays in
             zip(curves, lost, strict=True)]  # fmt: skip
    lines = [line for line in lines if line]
    low, high = min(map(min, lines)), max(map(max, lines))
    ends = [y for curve in curves for bound in curve[2:] for y in bound if math.isfinite(y)]
    if tag.startswith("loss"):
        cap = EXPLODED * min(map(max, lines))
        if 0 < cap < high:
            high = cap
            axes.set_title(f"{_title(tag)} (cut at {cap:.2g})", loc="left")
        if low > 0 and high / low > EXPLODED:
            axes.set_yscale("log")
            axes.set_ylim(low / 1.3, high * 1.3)
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            return
    span = (high - low) or abs(high) or 1.0
    bottom = max(min([low, *ends]), low - span / 4) - span / 20
    top = min(max([high, *ends]), high + span / 4) + span / 20
    is_accuracy = tag.startswith("accuracy")
    axes.set_ylim(max(bottom, -0.01) if is_accuracy else bottom, min(top, 1.01) if is_accuracy else top)


def _name_lines(figure: "Figure", panels: list, ends: list[dict], names: list[str]) -> None:
    """Put the names beside the panels, level with the lines' ends or, where these crowd, as near as fits."""
    size = min(10.5, 150 / max(len(names), 1))  # points; a panel is about 190 high
    texts = [{i: axes.text(0, 0, names[i], size=size, va="center_baseline") for i in end} for axes, end in
             zip(panels, ends, strict=True)]  # fmt: skip
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for each in texts for text in each.values()]
    beside = max([box.width for box in boxes], default=0) / DPI + 2 * PAD
    width = (WIDTH - 2 * LEFT - 2 * beside) / 2
    height = (HEIGHT - TOP - BOTTOM - GAP) / 2
    apart = max([box.height for box in boxes], default=0) * 1.05
    for k, (axes, end) in enumerate(zip(panels, ends, strict=True)):
        left = LEFT + (k % 2) * (width + beside + LEFT)
        bottom = BOTTOM + (1 - k // 2) * (height + GAP)
        axes.set_position((left / WIDTH, bottom / HEIGHT, width / WIDTH, height / HEIGHT))
        box = axes.get_window_extent()
        wanted = {i: min(max(axes.transData.transform(end[i])[1], box.y0), box.y1) for i in end}
        places = spread(sorted(wanted.values()), apart, box.y0, box.y1)
        for i, y in zip(sorted(wanted, key=wanted.get), places, strict=True):
            color = look(i)[0]
            label_at = (1 + PAD / width, (y - box.y0) / box.height)
            texts[k][i].update({"transform": axes.transAxes, "position": label_at, "color": color})
            xs, ys = (1.0, 1 + 0.75 * PAD / width), ((wanted[i] - box.y0) / box.height, label_at[1])
            if end[i][0] == axes.get_xlim()[1]:
                axes.plot(xs, ys, transform=axes.transAxes, color=color, linewidth=0.8, clip_on=False)


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Ascending positions in [low, high], ``apart`` from each other, least squares from ``wanted``.

    Where that many do not fit, they are as far apart as they can be. With ``apart`` times the rank taken off
    this is isotonic regression, solved by pooling adjacent violators.
    """
    if len(wanted) > 1:
        apart = min(apart, (high - low) / (len(wanted) - 1))
    last = high - (len(wanted) - 1) * apart
    blocks: list[list[float]] = []  # sum and count of the pooled
    for rank, y in enumerate(wanted):
        blocks.append([y - rank * apart, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    level = [min(max(total / count, low), last) for total, count in blocks for _ in range(int(count))]
    return [y + rank * apart for rank, y in enumerate(level)]


def shorten(label: str) -> str:
    return label if len(label) <= 28 else f"{label[:27]}…"
