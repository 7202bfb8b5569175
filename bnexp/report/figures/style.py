"""What all figures share: page and fonts, the look of each variant, the caption on the runs, rendering to bytes.

A norm has the same colour and marker in every figure; its other settings differ in their dashes. The colours are those
of Okabe & Ito (2008), which colour-blind readers can tell apart; the markers differ in black and white too.
"""

import io
import textwrap
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bnexp.report.variants import Variant, group_names
from bnexp.store.settings import as_typed, flatten
from bnexp.store.untrusted import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Look = dict[str, object]  # color, linestyle and marker, as matplotlib's plot takes them

WIDTH, DPI = 10.0, 160  # inches and pixels per inch: figures are 1600 pixels wide
CAPTION_WIDTH, LABEL_LENGTH = 155, 100  # characters in a line of the caption and in a name of the legend
NORM_COLORS = {
    "none": "#4d4d4d", "library": "#0072b2", "scratch": "#d55e00", "group": "#009e73",
    "ghost": "#cc79a7", "renorm": "#e69f00", "fused": "#56b4e9",
    "rms": "#6a3d9a", "dyt": "#b15928", "skipinit": "#117733",
}  # fmt: skip
OTHER_COLORS = ("#882255", "#332288", "#999933", "#aa4499", "#661100")  # of norms that are not listed above
CAPTION_FORMS = {
    "model": "{}", "data": " on {}", "norm": ", norm {}", "optimizer": ", {}", "optimizer.lr": " lr {}",
    "batch_size": ", batch {}", "epochs": ", {} epochs", "steps": ", {} steps",
}  # fmt: skip
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
RC = {
    "font.family": "DejaVu Sans", "font.size": 10.5, "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True, "axes.edgecolor": "#666666",
    "lines.linewidth": 1.8, "lines.markersize": 4, "xtick.labelsize": 9.5, "ytick.labelsize": 9.5,
    "figure.dpi": DPI, "savefig.dpi": DPI, "legend.frameon": False, "legend.handlelength": 3.5,
    "text.parse_math": False, "svg.hashsalt": "bnexp",
}  # fmt: skip


def variant_looks(variants: Sequence[Variant]) -> list[Look]:
    """The look of every variant: colour and marker by norm, dashes by the other settings; no two are equal.

    From the sixth setting of a norm on, the dashes repeat with the next marker, so 50 looks have the same colour.
    """
    settings: list[dict] = []
    looks: list[Look] = []
    for variant in variants:
        others = {key: value for key, value in variant.parts.items() if key != "norm"}
        if others not in settings:
            settings.append(others)
        norm = group_names(variant.first).get("norm", "") if variant.all_runs else ""
        candidates = [norm_look(norm, settings.index(others) + k) for k in range(len(DASHES) * len(MARKERS))]
        looks.append(next((look for look in candidates if look not in looks), candidates[0]))
    return looks


def norm_look(norm: str, setting: int) -> Look:
    """The look of a norm with its other settings numbered ``setting``."""
    number = zlib.crc32(norm.encode())  # `hash` differs between processes
    marker = list(NORM_COLORS).index(norm) if norm in NORM_COLORS else number
    return {
        "color": NORM_COLORS.get(norm, OTHER_COLORS[number % len(OTHER_COLORS)]),
        "linestyle": DASHES[setting % len(DASHES)],
        "marker": MARKERS[(marker + setting // len(DASHES)) % len(MARKERS)],
    }


def describe_runs(variants: Sequence[Variant]) -> str:
    """The settings that all runs share: "mlp on mnist, adam lr 0.001, batch 64, 3 epochs; 3 seeds each"."""
    runs = [run for variant in variants for run in variant.all_runs]
    if not runs:
        return ""
    configs = [flatten(run.config) | group_names(run) for run in runs]
    shared = {key: value for key, value in configs[0].items()
              if value is not None and all(config.get(key) == value for config in configs)}  # fmt: skip
    if "steps" in shared:
        shared.pop("epochs", None)
    text = "".join(form.format(as_typed(shared[key])) for key, form in CAPTION_FORMS.items() if key in shared)
    text = text.replace(", 1 epochs", ", 1 epoch")
    for override in variants[0].overrides:
        is_named = override.lstrip("+").partition("=")[0] in CAPTION_FORMS
        if not is_named and all(override in run.overrides for run in runs):
            text += f", {printable(override)}"
    counts = sorted({len({repr(run.seed) for run in variant.all_runs}) for variant in variants})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return f"{text.lstrip(', ')}; {seeds} seed{'s' * (counts != [1])} each".lstrip("; ")


def new_figure(height: float) -> "Figure":
    """An empty figure of ``height`` inches, to which legend and caption add theirs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    return figure


def finish_figure(figure: "Figure", variants: Sequence[Variant], words: str) -> None:
    """Write the caption, the settings of ``variants`` and then ``words``, and fix the layout of the figure.

    Without a fixed layout, two renderings of one figure would differ: a layout depends on the one before it.
    """
    lines = textwrap.wrap(describe_runs(variants), CAPTION_WIDTH, max_lines=2, placeholder=" …")
    lines += textwrap.wrap(words, CAPTION_WIDTH)
    figure.set_figheight(figure.get_figheight() + 0.16 * len(lines))
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", size=8.5, color="#444444", linespacing=1.3)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def add_legend(figure: "Figure", labels: Sequence[str], looks: Sequence[Look], title: str | None = None) -> None:
    """Add a legend above the panels, in as many columns as fit, under a bold ``title``."""
    from matplotlib.lines import Line2D

    labels = [label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…" for label in labels]
    most = int(WIDTH / (0.8 + 0.085 * max(map(len, labels), default=0)))  # inches of a line and of a letter
    rows = max(1, -(-len(labels) // most))
    figure.set_figheight(figure.get_figheight() + 0.2 * rows + 0.3 * bool(title))
    figure.legend(
        [Line2D([], [], **look) for look in looks], labels, ncols=max(1, -(-len(labels) // rows)),
        loc="outside upper left", alignment="left", title=title, title_fontproperties={"weight": "bold", "size": 12.5},
    )  # fmt: skip


def set_log_ticks(axis: "Axis") -> None:
    """Label a logarithmic axis with plain numbers: powers of ten and, on a short axis, 2 and 5 times those."""
    from matplotlib.ticker import LogLocator

    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.minorticks_off()


def write_inside(axes: "Axes", words: str) -> None:
    """Write ``words`` in the middle of a panel that shows nothing else."""
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color="#888888", size=9)


@contextmanager
def figure_style() -> Iterator[None]:
    """Within the context, matplotlib has bnexp's settings; those of the user are restored afterwards."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # letters that the font lacks are drawn as boxes
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def render_figure(figure: "Figure", format: str) -> bytes:
    """The figure as ``png`` or ``svg``; the same figure gives the same bytes."""
    file = io.BytesIO()
    with figure_style():
        figure.savefig(file, format=format, metadata={"Date": None} if format == "svg" else None)
    return file.getvalue()
