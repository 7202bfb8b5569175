"""The figure of one inspected image: the image, the probabilities of the classes, and the outputs of layers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexp.report.figures.style import figure_style
from bnexp.report.readings import show_cell, show_prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bnexp.store.readings import Reading

PAGE_WIDTH, NAMES_WIDTH = 7.2, 1.6  # inches: the page, and its left column
PIXEL = 1 / 100  # inches that a pixel of a picture takes
TEXT_LINE = 0.17  # inches
MOST_BARS, MOST_LETTERS = 10, 20  # classes with a bar, and letters of their names
TRUE, WRONG, OTHER, PAGE = "#009e73", "#d55e00", "#8c8c8c", "#f0f0f0"  # the page is grey so that white can be seen
FEATURES_CAPTION = (
    "Each map ranges from its smallest value (black) to its largest (white), the units of a dense layer together.\n"
    "Beside them: the smallest and the largest value in the layer. The output of a norm includes its activation."
)


def draw_image(index: int, split: str, readings: "Mapping[str, Reading]") -> "Figure":
    """A page on image ``index`` of ``split``, from the readings of `bnexp.probes.features.look_at_images` by tag."""
    with figure_style():
        from matplotlib.figure import Figure

        prediction = next(row for row in readings["predictions"].rows if row[0] == index)
        layers = [each for each in readings["outputs"].records() if each["image"] == index]
        pictures = [np.asarray(readings[f"image-{index}/{each['layer']}"].pixels) for each in layers]
        num_bars = min(MOST_BARS, len(prediction) - 3)
        room = PAGE_WIDTH - NAMES_WIDTH
        heights = [max(len(each) * min(PIXEL, room / each.shape[1]), 3 * TEXT_LINE) for each in pictures]
        heights = [TEXT_LINE * (num_bars + 1), *heights]
        size = (PAGE_WIDTH, sum(heights) + 0.1 * len(heights) + 5 * TEXT_LINE)
        figure = Figure(figsize=size, layout="constrained", facecolor=PAGE)
        shape = {"width_ratios": [NAMES_WIDTH, room], "height_ratios": heights}
        rows = figure.subplots(len(heights), 2, squeeze=False, gridspec_kw=shape)
        left = {"x": 0.01, "ha": "left"}
        color = "#222222" if prediction[1] == prediction[2] else WRONG
        figure.suptitle(show_prediction(split, prediction), size=11, weight="bold", color=color, **left)
        figure.supxlabel(FEATURES_CAPTION, size=7.5, color="#666666", **left)
        show_pixels(rows[0][0], np.asarray(readings[f"image-{index}"].pixels))
        draw_bars(rows[0][1], prediction, readings["predictions"].head[3:])
        for (names, axes), layer, pixels in zip(rows[1:], layers, pictures, strict=True):
            names.axis("off")
            names.text(0, 1, layer["layer"], weight="bold", size=8, va="top")
            words = f"\n{show_size(layer)}\n{show_cell((layer['lowest'], layer['highest']))}"
            names.text(0, 1, words, size=8, va="top")
            show_pixels(axes, pixels)
    return figure


def show_pixels(axes: "Axes", pixels: np.ndarray) -> None:
    """Draw ``pixels`` in the upper left corner of a panel, without axes."""
    axes.axis("off")
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_anchor("NW")


def draw_bars(axes: "Axes", prediction: Sequence[Any], classes: Sequence[str]) -> None:
    """Draw a bar for each of the most probable classes, the true and the predicted one marked."""
    _, true, predicted, *shares = prediction
    shares = np.array(shares)
    shown = sorted(np.argsort(-shares, kind="stable")[:MOST_BARS])
    marks = {predicted: ("predicted", WRONG), true: ("true class", TRUE)}
    if true == predicted:
        marks = {true: ("true class, predicted", TRUE)}
    words, colors = zip(*(marks.get(classes[i], ("", OTHER)) for i in shown), strict=True)
    bars = axes.barh(range(len(shown)), np.nan_to_num(shares[shown]), color=colors)
    labels = [f"{show_cell(shares[i], '{:.1%}'.format)}  {word}".rstrip() for i, word in zip(shown, words, strict=True)]
    axes.bar_label(bars, labels, padding=4, size=8)
    axes.set_yticks(range(len(shown)), [classes[i][:MOST_LETTERS] for i in shown], size=8)
    axes.set(xlim=(0, 1.4), xticks=[])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_facecolor(PAGE)
    axes.grid(False)


def show_size(layer: Mapping[str, Any]) -> str:
    """``6 maps of 24x24``, ``16 of 64 maps of 7x7``, ``120 units``."""
    number, *size = layer["shape"]
    what = f"maps of {size[0]}x{size[1]}" if size else "units"
    return f"{number} {what}" if layer["pictured"] == number else f"{layer['pictured']} of {number} {what}"
