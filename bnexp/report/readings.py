"""Shows the readings of an inspected run as tables, sentences, small pictures, JSON and CSV.

``readings`` are those of :mod:`bnexp.probes` by tag: the tables ``norms``, ``scores``, ``confusion``, ``predictions``
and ``outputs``, and images. ``about`` is the rest of inspection.json: the split, numbers of images, the batch size.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bnexp.report.tables import new_table
from bnexp.store import readings as kinds
from bnexp.store.files import finite

Readings = Mapping[str, Any]
MOST_CONFUSIONS, MOST_CLASSES = 5, 10  # in the sentence, and in the table of the lowest recalls
WIDE_MEAN, WIDE_VARIANCE = 0.5, math.log(1.5)  # larger gaps are marked
SOME_IMAGES, SOME_SHARE = 5, 0.02  # up to so many images, or up to this share of all, may be chance
TILE_SIDE = 12  # columns of the terminal that a small picture takes; it takes half as many rows
STATISTICS = {
    "running": "running: averaged over training batches",
    "recomputed": "population: of {training_images:,} training images",
    "batch": "batch: of each {batch_size:,} {split} images",
}
RANGE_CAPTION = (
    "smallest to largest value over the channels\n"
    "population: recomputed from {training_images:,} training images with the final weights"
)
GAP_CAPTION = (
    "mean gap, var. gap: distance of running from population statistics over all channels, in standard deviations and "
    "as a factor\nunscaled: channels with |gamma| < 0.001 or a population variance < 1e-08\n"
)
DEAD_CAPTION = "dead: units whose output is the same for all {images:,} {split} images"


def show_findings(about: Mapping[str, Any], readings: Readings, width: int) -> Iterator[Table | str]:
    """Yield the tables and sentences in the order of printing, for a terminal ``width`` columns wide."""
    norms, scores, confusion = readings["norms"].records(), readings["scores"], readings["confusion"]
    if tracking := [norm for norm in norms if norm["running_mean"] is not None]:
        yield statistics_table(tracking, RANGE_CAPTION.format_map(about))
    if norms:
        yield gap_table(norms, GAP_CAPTION * bool(tracking) + DEAD_CAPTION.format_map(about))
    yield score_table(about, scores)
    if about["why_one_score"]:
        yield about["why_one_score"]
    elif lost := count_lost(scores, about["images"]):
        yield (
            f"With running statistics {lost:,} more images are wrong than with those of the population: the running "
            "statistics lag behind the weights. More steps, a larger momentum or a smaller learning rate at the end "
            "may help."
        )
    yield confusion_matrix(confusion, width) or recall_table(confusion)
    if not math.isfinite(scores.rows[0][1]):
        yield "The outputs of the model are not finite, so no image is classified."
    elif mistakes := mistakes_of(confusion)[:MOST_CONFUSIONS]:
        parts = (f"{true} taken for {other} ({count:,} of {images:,})" for true, other, count, images in mistakes)
        yield f"Most frequent confusions: {', '.join(parts)}."
    else:
        yield f"All {about['images']:,} {about['split']} images are classified correctly."


def statistics_table(norms: Sequence[dict], caption: str) -> Table:
    """Two rows per norm: its running statistics, which evaluation uses, and those of the population."""
    title = "Running statistics and those of the population"
    table = new_table(title, "norm", "channels", "", "mean", "variance", caption=caption)
    for norm in norms:
        for kind, head in (("running", (norm["layer"], str(norm["channels"]))), ("population", ("", ""))):
            mean, var = (show_cell(norm[f"{kind}_{each}"]) for each in ("mean", "var"))
            table.add_row(Text(head[0]), head[1], kind, mean, var)
    return table


def gap_table(norms: Sequence[dict], caption: str) -> Table:
    """A row per norm: its running statistics against the population's, gamma and beta, unscaled and dead channels."""
    table = new_table("Norms", "norm", "mean gap", "var. gap", "gamma", "beta", "unscaled", "dead", caption=caption)
    for norm in norms:
        mean, variance = norm["mean_gap"], norm["variance_gap"]
        table.add_row(
            Text(norm["layer"]),
            Text(show_cell(mean, "{:.3f}".format), "yellow" if (mean or 0) > WIDE_MEAN else ""),
            Text(show_cell(variance, show_factor), "yellow" if (variance or 0) > WIDE_VARIANCE else ""),
            *(show_cell(norm[each], "{:.2g}".format) for each in ("gamma", "beta")),
            *(Text(show_cell(n, str), "bold red" if n else "") for n in (norm["unscaled"], norm["dead_units"])),
        )
    return table


def score_table(about: Mapping[str, Any], scores: kinds.Table) -> Table:
    """A row of loss and accuracy per kind of statistics."""
    is_choice = len(scores.rows) > 1
    title = f"{about['split'].capitalize()} set, {about['images']:,} images"
    table = new_table(title, "statistics" if is_choice else "", "loss", "accuracy", "wrong")
    for name, loss, accuracy in scores.rows:
        what = STATISTICS[name].format_map(about) if is_choice else "evaluated as in training"
        wrong = round((1 - accuracy) * about["images"])
        table.add_row(what, show_cell(loss, "{:.4f}".format), f"{accuracy:.2%}", f"{wrong:,}")
    return table


def count_lost(scores: kinds.Table, num_images: int) -> int:
    """How many more images are wrong with running than with population statistics; 0 if it may be chance."""
    (loss, accuracy), (other_loss, other_accuracy) = (row[1:] for row in scores.rows[:2])
    lost = round((other_accuracy - accuracy) * num_images)
    return lost if lost > max(SOME_IMAGES, SOME_SHARE * num_images) and loss > other_loss else 0


def show_cell(value: Any, form: Callable[[Any], str] = "{:.3g}".format) -> str:
    """``0.42`` for a number, ``-0.31 to 0.42`` for a range, ``-`` for None, else ``not finite``."""
    if value is None:
        return "-"
    values = value if isinstance(value, Sequence) else (value,)
    return " to ".join(map(form, values)) if all(map(math.isfinite, values)) else "not finite"


def show_factor(logarithm: float) -> str:
    """A logarithm as a factor, ``x1.03``."""
    return f"x{math.exp(min(logarithm, 99)):.3g}"


def recalls_of(confusion: kinds.Table) -> list[float]:
    """The recall of every class, the share of its images that are classified correctly; NaN without images."""
    return [row[i] / sum(row[1:]) if any(row[1:]) else math.nan for i, row in enumerate(confusion.rows, 1)]


def mistakes_of(confusion: kinds.Table) -> list[tuple[str, str, int, int]]:
    """(true class, predicted class, number of images, number of images of the true class), most frequent first."""
    found = [
        (true, other, count, sum(counts))
        for true, *counts in confusion.rows
        for other, count in zip(confusion.head[1:], counts, strict=True) if count and true != other
    ]  # fmt: skip
    return sorted(found, key=lambda mistake: -mistake[2])


def confusion_matrix(confusion: kinds.Table, width: int) -> Table | None:
    """The matrix in colours; None if the classes do not fit into ``width`` columns."""
    _, *classes = confusion.head
    first = min(14, max(map(len, classes)) + 1)
    column = min(9, (width - first - 8) // len(classes))
    if column < max(4, *(len(str(count)) + 1 for row in confusion.rows for count in row[1:])):
        return None
    table = new_table("Confusion matrix: a row per true class, a column per predicted class")
    table.box, table.pad_edge = None, False
    table.add_column("", width=first - 1, no_wrap=True)
    cut = [name[: column - 1] for name in classes]
    for i, name in enumerate(cut):  # a number instead of names that look alike when cut
        head = str(i) if cut.count(name) > 1 else name
        table.add_column(Text(head), width=column - 1, justify="right", no_wrap=True)
    table.add_column("recall", width=8, justify="right")
    for (name, *counts), recall in zip(confusion.rows, recalls_of(confusion), strict=True):
        cells = [color_count(n, sum(counts), name == other) for n, other in zip(counts, classes, strict=True)]
        table.add_row(Text(name), *cells, "-" if math.isnan(recall) else f"{recall:.1%}")
    return table


def color_count(count: int, num_images: int, is_right: bool) -> Text:
    """A count on green if right, else on red; the larger its share of the class's images, the brighter."""
    if not count:
        return Text(".", "dim")
    share = count / num_images
    color = f"0,{round(50 + 80 * share)},40" if is_right else f"{round(50 + 150 * min(1.0, 5 * share))},0,0"
    return Text(str(count), f"bold #ffffff on rgb({color})")


def recall_table(confusion: kinds.Table) -> Table:
    """The classes with the lowest recall, shown if the matrix does not fit."""
    rows = zip(recalls_of(confusion), confusion.rows, strict=True)
    known = sorted((each for each in rows if not math.isnan(each[0])), key=lambda each: each[0])
    title = f"Recall, lowest of {len(known)} classes" if len(known) > MOST_CLASSES else "Recall"
    table = new_table(title, "class", "images", "recall", caption="the confusion matrix is in confusion.csv")
    for recall, (name, *counts) in known[:MOST_CLASSES]:
        table.add_row(Text(name), f"{sum(counts):,}", f"{recall:.1%}")
    return table


def show_images(console: Console, split: str, readings: Readings) -> None:
    """Print every prediction; in a terminal with colours also the image and a feature map of each layer."""
    has_colours = console.color_system in ("256", "truecolor") and not console.no_color
    shows_pictures = console.is_terminal and has_colours and console.encoding.startswith("utf")
    if shows_pictures:
        console.print("The image, and of each layer the map with the largest standard deviation:")
    for row in readings["predictions"].rows:
        console.print(show_prediction(split, row), markup=False, highlight=False, emoji=False)
        if shows_pictures:
            start = f"liveliest-{row[0]}/"
            maps = {tag.removeprefix(start): each.pixels for tag, each in readings.items() if tag.startswith(start)}
            console.print(half_blocks({"input": readings[f"image-{row[0]}"].pixels} | maps, console.width), "")


def show_prediction(split: str, row: Sequence[Any]) -> str:
    """``test image 0: true class 7, predicted 7 (99.8%)``, from a row of the table ``predictions``."""
    index, true, predicted, *shares = row
    share = show_cell(np.max(shares), "{:.1%}".format)
    return f"{split} image {index}: true class {true}, predicted {predicted} ({share})"


def half_blocks(pictures: Mapping[str, Any], width: int) -> Text:
    """Pictures, uint8 (H, W) or (H, W, 3), as half blocks side by side under their names, ``width`` columns at most."""
    from PIL import Image

    shown = list(pictures.items())[: max(1, width // (TILE_SIDE + 1))]
    text = Text("".join(f"{name[-TILE_SIDE:]:<{TILE_SIDE + 1}}" for name, _ in shown).rstrip() + "\n", no_wrap=True)
    images = [Image.fromarray(np.asarray(pixels)).convert("RGB") for _, pixels in shown]
    tiles = [np.asarray(image.resize((TILE_SIDE, TILE_SIDE), Image.Resampling.BOX)).tolist() for image in images]
    for row in range(0, TILE_SIDE, 2):
        for tile in tiles:
            for upper, lower in zip(tile[row], tile[row + 1], strict=True):
                text.append("▀", f"rgb({','.join(map(str, upper))}) on rgb({','.join(map(str, lower))})")
            text.append(" ")
        text.append("\n")
    return text


def to_json(about: Mapping[str, Any], readings: Readings) -> str:
    """The text of inspection.json: every number that is printed; null if it is not finite or does not exist."""
    confusion, classes = readings["confusion"], readings["confusion"].head[1:]
    content = about | {
        "scores": {name: {"loss": loss, "accuracy": accuracy} for name, loss, accuracy in readings["scores"].rows},
        "norms": {norm["layer"]: norm for norm in readings["norms"].records()},
        "classes": classes,
        "confusion": [counts for _, *counts in confusion.rows],
        "recall": dict(zip(classes, recalls_of(confusion), strict=True)),
        "confusions": [
            {"true": true, "predicted": other, "images": count} for true, other, count, _ in mistakes_of(confusion)
        ],
        "pictures": [
            {
                "image": index,
                "true": true,
                "predicted": predicted,
                "probabilities": dict(zip(classes, shares, strict=True)),
                "layers": {each[1]: each[2] for each in readings["outputs"].rows if each[0] == index},
            }
            for index, true, predicted, *shares in readings["predictions"].rows
        ],
    }
    return json.dumps(finite(content), indent=1, allow_nan=False) + "\n"


def to_csv(table: kinds.Table) -> str:
    """The table as CSV, with its head."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([table.head, *table.rows])
    return file.getvalue()
