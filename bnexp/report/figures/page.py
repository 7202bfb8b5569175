"""Pages of panels: places in inches, texts that fit, axes with a few plain numbers."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from bnexp.report.figures.curves import DPI, EXPLODED, PAD, WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Grid = dict[str, dict[int, "Axes"]]  # panels by row and column
TOP, LINE, FOOT, GAP, NAMES = 0.5, 0.19, 0.55, 0.4, 1.2  # inches: title, line of text, labels of x, between columns
CAPTION = 150  # characters in a line
LETTER = 0.075  # inches, of a number on an axis
BOLD = {"weight": "bold", "size": 9.5}
NATURAL = 1.0  # the size of pre-activations at which activations bend: what is smaller needs no axis of its own


def make_grid(
    title: str, rows: Sequence[str], columns: Mapping[int, tuple[str, str]], caption: str, has_titles: bool
) -> "tuple[Figure, Grid]":
    """A page of ``rows`` under ``columns``, {key: (name, colour)}; names are broken and cut to fit.

    Either panels have titles, and numbers below each, or numbers stand left of the first column and below the last row.
    """
    figure = make_page()
    names = {row: fit(figure, row, NAMES, 3, "._", **BOLD) for row in rows}
    between, numbers, over = (0.5, 0.1, 0.3) if has_titles else (0.2, 0.5, 0.1)
    left = 2 * PAD + numbers + max(width_of(figure, "\n".join(lines), **BOLD) for lines in names.values())
    width = (WIDTH - left - GAP) / len(columns) - GAP * (1 - 1 / len(columns))
    style = {"weight": "bold", "size": 11 if len(columns) < 4 else 9.5}
    heads = {key: fit(figure, name, width + GAP / 2, 4, "_", **style) for key, (name, _) in columns.items()}
    top = TOP + max(map(len, heads.values())) * LINE + over
    height = max(0.95, min(2.2, 5.2 / len(rows) - between))
    full = finish(figure, title, caption, top + len(rows) * (height + between) - between + FOOT)
    for (_, color), x, lines in zip(columns.values(), _places(left, width, columns), heads.values(), strict=True):
        for k, line in enumerate(lines):
            figure.text(x / WIDTH, 1 - (TOP + (k + 0.75) * LINE) / full, line, color=color, **style)
    grid: Grid = {}
    for k, row in enumerate(rows):
        y = top + height + k * (height + between)
        figure.text(PAD / WIDTH, 1 - (y - height / 2) / full, "\n".join(names[row]), va="center", **BOLD)
        places = zip(columns, _places(left, width, columns), strict=True)
        grid[row] = {key: add_panel(figure, x, y, width, height) for key, x in places}
    return figure, grid


def _places(left: float, width: float, columns: Mapping) -> list[float]:
    return [left + k * (width + GAP) for k in range(len(columns))]


def make_page() -> "Figure":
    """Without a height as yet: it depends on the texts, and they must be measured on a page."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, WIDTH), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def finish(figure: "Figure", title: str, caption: str, height: float) -> float:
    """Write title and caption around ``height`` inches, the title's among them; returns the page's height."""
    lines = textwrap.wrap(caption, CAPTION)
    height += PAD + 0.16 * len(lines)
    figure.set_size_inches(WIDTH, height)
    figure.text(PAD / WIDTH, 1 - PAD / height, title, size=12.5, weight="bold", va="top")
    figure.text(PAD / WIDTH, PAD / height, "\n".join(lines), size=8.5, color="#444444", linespacing=1.25)
    return height


def make_quarters(
    title: str, names: Sequence[str], lines: "Sequence[Line2D]", caption: str
) -> "tuple[Figure, list[Axes]]":
    """A page of four panels under a legend that names ``lines``."""
    figure = make_page()
    names = [fit(figure, name, 3.0, 1, size=10.5)[0] for name in names]
    across = int((WIDTH - 2 * PAD) / (0.8 + max(width_of(figure, name, size=10.5) for name in names)))
    left, width, height, between = 0.95, 3.85, 2.75, 0.72
    top = TOP + 0.24 * -(-len(names) // across) + 0.34
    full = finish(figure, title, caption, top + 2 * height + between + FOOT)
    style = {"frameon": False, "fontsize": 10.5, "handlelength": 3.2, "borderpad": 0, "borderaxespad": 0}
    place = {"loc": "upper left", "bbox_to_anchor": (PAD / WIDTH, 1 - (TOP - 0.05) / full)}
    figure.legend(lines, names, ncols=min(across, len(names)), **style, **place)
    places = [(left + k % 2 * (width + left), top + height + k // 2 * (height + between)) for k in range(4)]
    return figure, [add_panel(figure, x, y, width, height) for x, y in places]


def add_panel(figure: "Figure", x: float, y: float, width: float, height: float) -> "Axes":
    """A panel whose lower left corner is ``x`` inches from the left and ``y`` inches from the top of the page."""
    full = figure.get_figheight()
    axes = figure.add_axes((x / WIDTH, 1 - y / full, width / WIDTH, height / full))
    axes.tick_params(length=2, labelsize=9)
    return axes


def width_of(figure: "Figure", text: str, **style: object) -> float:
    """How wide ``text`` is, in inches."""
    drawn = figure.text(0, 0, text, **style)
    width = drawn.get_window_extent(figure.canvas.get_renderer()).width / DPI
    drawn.remove()
    return width


def fit(figure: "Figure", text: str, width: float, most: int, breaks: str = "", **style: object) -> list[str]:
    """``text`` in as few lines as fit into ``width`` inches, cut after ``most``; may break behind ``breaks``, too."""
    mark = "\x1f"
    marked = "".join(f"{letter}{mark} " if letter in breaks else letter for letter in text)
    for length in range(len(marked), 1, -1):
        lines = textwrap.wrap(marked, length, max_lines=most, placeholder="…")
        lines = [line.replace(f"{mark} ", "").replace(mark, "") for line in lines]
        if width_of(figure, "\n".join(lines), **style) <= width:
            return lines
    return [text[:1]]


def scale(panels: Iterable["Axes"], ends: Sequence[tuple[float, float]], which: str, logarithmic: bool = False) -> None:
    """One axis, ``x`` or ``y``, for all panels, from the lowest to the highest of ``ends``, a pair for each of them.

    If ``logarithmic`` it may be so beyond the narrowest of them, where another is many times as wide.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if not ends:
        return
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if low == high:
        low, high = low - max(0.5, abs(low) / 8), high + max(0.5, abs(high) / 8)
    for axes in panels:
        axis = getattr(axes, f"{which}axis")
        length, letter = (axes.bbox.width, LETTER) if which == "x" else (axes.bbox.height, 0.0)
        ticks = even(low, high, length / DPI, letter)
        if logarithmic and is_wide(ends):
            linear = 10.0 ** math.floor(math.log10(min(map(size_of, ends))))
            getattr(axes, f"set_{which}scale")("symlog", linthresh=linear)
            ticks = decades(low, high, linear, int(length / DPI / 0.18))
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(plain))
        transform = axis.get_transform()
        first, last = transform.transform([low, high])
        pad = (last - first) / 30
        getattr(axes, f"set_{which}lim")(transform.inverted().transform([first - pad, last + pad]))


def is_wide(ends: Sequence[tuple[float, float]]) -> bool:
    """Whether one of them is so wide that of another nothing could be seen beside it."""
    return bool(ends) and max(map(size_of, ends)) > EXPLODED * min(map(size_of, ends))


def size_of(ends: tuple[float, float]) -> float:
    """How far from 0 they reach, or what would be far enough."""
    return max(*map(abs, ends), NATURAL)


def plain(value: float, _: object = None) -> str:
    """``0.05``, ``1000``, ``2e9``."""
    digits, e, power = (f"{value:g}" if 1e-4 < abs(value) < 1e5 or not value else f"{value:.5e}").partition("e")
    return (f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if e else digits).replace("-", "−")


def even(low: float, high: float, length: float, letter: float = 0.0) -> list[float]:
    """Round numbers at equal distances, so few that they fit along ``length`` inches with so many for a letter."""
    from matplotlib.ticker import MaxNLocator

    kept = [low, high]
    for count in range(8, 0, -1):
        ticks = [x for x in MaxNLocator(count, steps=(1, 2, 5, 10)).tick_values(low, high) if low <= x <= high]
        if len(ticks) < 2:
            break
        kept = ticks
        room = max(len(plain(x)) for x in ticks) * letter + (0.08 if letter else 0.18)
        if room < length * (ticks[1] - ticks[0]) / (high - low):
            return ticks
    return [kept[0], kept[-1]]


def decades(low: float, high: float, linear: float, room: int) -> list[float]:
    """0 and powers of ten from ``linear`` on, on the sides that reach so far: about ``room`` numbers in all."""
    sides = [sign for sign, end in ((-1, -low), (1, high)) if end >= linear]
    first, last = round(math.log10(linear)), math.floor(math.log10(max(-low, high)))
    apart = -(-(last - first + 1) * len(sides) // max(room - 1, 2))
    powers = range(last, first + apart - 2 - (apart > 2), -apart)  # the first is about as far from 0 as from the next
    found = [0.0, *(sign * 10.0**power for power in powers for sign in sides)]
    return [x for x in found if low <= x <= high]


def count_steps(axes: "Axes", last: int) -> None:
    """An axis of steps up to the ``last``."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(max(1, min(6, int(axes.bbox.width / DPI / 0.75))), integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def few_numbers(axis: "Axis") -> None:
    """On a logarithmic axis plain numbers at 1, 2 and 5, at powers of ten, or evenly, as its length asks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    is_short, is_long = high / low < 8, high / low > 1500
    evenly = MaxNLocator(6, steps=(1, 2, 5, 10))
    axis.set_major_locator(evenly if is_short else LogLocator(subs=(1.0,) if is_long else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_locator(NullLocator())
