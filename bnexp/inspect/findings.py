"""Shows what was found in a run: tables and sentences to read, JSON and CSV to keep."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from bnexp.inspect.diagnosis import Diagnosis, Range
from bnexp.probes.statistics import SMALL_SCALE, SMALL_VARIANCE

MOST_CONFUSIONS, MOST_CLASSES = 5, 10  # in words, and in the table of the classes that are recognized least
WIDE_MEAN, WIDE_VARIANCE = 0.5, math.log(1.5)  # gaps beyond these are marked
SOME_IMAGES, SOME_SHARE = 5, 0.02  # fewer images than that, or a smaller share of them, may be chance
STATISTICS = {
    "running": "running: averages of the batches of training",
    "recomputed": "population: recomputed from {training:,} training images",
    "batch": "batch: every {batch:,} {split} images by their own",
}
LEFT = {"title_justify": "left", "caption_justify": "left", "show_edge": False}


def shown(found: Diagnosis, width: int) -> Iterator[Table | str]:
    """The tables and sentences that apply, in order, for a terminal ``width`` columns wide."""
    if any(norm.running_mean is not None for norm in found.norms):
        yield statistics_table(found)
    if found.norms:
        yield norm_table(found)
    yield score_table(found)
    yield from on_scores(found)
    confusion = confusion_table(found, width)
    yield recall_table(found) if confusion is None else confusion
    yield on_confusions(found)


def new_table(title: str, *columns: str, caption: str | None = None) -> Table:
    table = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), min_width=len(title), **LEFT
    )  # fmt: skip
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    return table


def statistics_table(found: Diagnosis) -> Table:
    """Two rows per norm: what evaluation normalizes by, and what it ought to be."""
    caption = f"smallest to largest over channels; population: of {found.num_training_images:,} training images, now"
    title = "Running statistics and those of the population"
    table = new_table(title, "norm", "channels", "", "mean", "variance", caption=caption)
    for norm in found.norms:
        if norm.running_mean is not None:
            mean, var = show(norm.running_mean), show(norm.running_var)
            table.add_row(Text(norm.layer), str(norm.channels), "running", mean, var)
            table.add_row("", "", "population", show(norm.population_mean), show(norm.population_var))
    return table


def norm_table(found: Diagnosis) -> Table:
    """How far running and population are apart, and what the norm has learned."""
    caption = None
    if any(norm.mean_gap is not None for norm in found.norms):
        caption = (
            "gap from running to population, over all channels: of means in standard deviations, of variances as a "
            f"factor\ndead: channels with |gamma| < {SMALL_SCALE:g} or a population variance < {SMALL_VARIANCE:g}"
        )
    table = new_table("Norms", "norm", "mean gap", "var. gap", "gamma", "beta", "dead", caption=caption)
    for norm in found.norms:
        is_wide = (norm.mean_gap or 0) > WIDE_MEAN, (norm.variance_gap or 0) > WIDE_VARIANCE
        gaps = show_number(norm.mean_gap, "{:.3f}".format), show_number(norm.variance_gap, show_factor)
        table.add_row(
            Text(norm.layer),
            *(Text(gap, "yellow" if wide else "") for gap, wide in zip(gaps, is_wide, strict=True)),
            show(norm.gamma, 2),
            show(norm.beta, 2),
            Text("-" if norm.dead is None else str(norm.dead), "bold red" if norm.dead else ""),
        )
    return table


def score_table(found: Diagnosis) -> Table:
    """Loss and accuracy, a row for every way to normalize."""
    title = f"{found.split.capitalize()} set, {found.num_images:,} images"
    is_choice = len(found.scores) > 1
    table = new_table(title, "normalized with statistics" if is_choice else "", "loss", "accuracy", "wrong")
    for name, score in found.scores.items():
        what = STATISTICS[name] if is_choice else "evaluated as in training"
        what = what.format(training=found.num_training_images, batch=found.batch_size, split=found.split)
        wrong = round((1 - score.accuracy) * found.num_images)
        table.add_row(what, show_number(score.loss, "{:.4f}".format), f"{score.accuracy:.2%}", f"{wrong:,}")
    return table


def on_scores(found: Diagnosis) -> Iterator[str]:
    """Why there is one score only, or whether the running statistics do harm."""
    if found.why_one_score:
        yield found.why_one_score
        return
    running, population = found.scores["running"], found.scores["recomputed"]
    lost = round((population.accuracy - running.accuracy) * found.num_images)
    if lost > max(SOME_IMAGES, SOME_SHARE * found.num_images) and running.loss > population.loss:
        yield (
            f"The running statistics cost {lost:,} images that the population's get right: they have not caught up "
            "with the weights. More steps, a larger momentum or a smaller learning rate at the end may help."
        )


def show(span: Range | None, digits: int = 3) -> str:
    """``-0.31 to 0.42``."""
    if span is None:
        return "-"
    return f"{span[0]:.{digits}g} to {span[1]:.{digits}g}" if all(map(math.isfinite, span)) else "not finite"


def show_number(value: float | None, form: Callable[[float], str]) -> str:
    if value is None:
        return "-"
    return form(value) if math.isfinite(value) else "not finite"


def show_factor(logarithm: float) -> str:
    """``x1.03``."""
    return f"x{math.exp(min(logarithm, 99)):.3g}"


# ---------------------------------------------------------------- what is taken for what


def confusion_table(found: Diagnosis, width: int) -> Table | None:
    """The matrix in colours; None where so many classes do not fit into ``width`` columns."""
    counts, classes = found.confusion.tolist(), found.classes
    first = min(14, max(map(len, classes)) + 1)
    column = min(9, (width - first - 8) // len(classes))
    if column < max(4, len(str(int(found.confusion.max()))) + 1):
        return None
    title = "Confusion matrix: a row per true class, a column per predicted class"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0), pad_edge=False, **LEFT)
    table.add_column("", width=first - 1, no_wrap=True)
    for name in shortened(classes, column - 1):
        table.add_column(Text(name), width=column - 1, justify="right", no_wrap=True)
    table.add_column("recall", width=8, justify="right")
    for i, (row, recall) in enumerate(zip(counts, found.recall, strict=True)):
        cells = [cell(count, sum(row), is_right=i == j) for j, count in enumerate(row)]
        table.add_row(Text(classes[i]), *cells, "-" if math.isnan(recall) else f"{recall:.1%}")
    return table


def cell(count: int, num_images: int, *, is_right: bool) -> Text:
    """A count on green, brighter for more of the class's images, or on red, brighter for more of its mistakes."""
    if not count:
        return Text(".", "dim")
    if is_right:
        return Text(str(count), f"bold #ffffff on rgb(0,{round(50 + 80 * count / num_images)},40)")
    return Text(str(count), f"bold #ffffff on rgb({round(50 + 150 * min(1.0, 5 * count / num_images))},0,0)")


def shortened(names: Sequence[str], length: int) -> list[str]:
    """The beginnings of the names, with a number where two would look alike."""
    cut = [name[:length] for name in names]
    return [str(i) if cut.count(each) > 1 else each for i, each in enumerate(cut)]


def recall_table(found: Diagnosis) -> Table:
    """The classes that are recognized least, where the matrix has no room."""
    images, recall = found.confusion.sum(1).tolist(), found.recall
    known = sorted((i for i, share in enumerate(recall) if not math.isnan(share)), key=recall.__getitem__)
    title = f"Recall, lowest of {len(known)} classes" if len(known) > MOST_CLASSES else "Recall"
    table = new_table(title, "class", "images", "recall", caption="the confusion matrix is in confusion.csv")
    for i in known[:MOST_CLASSES]:
        table.add_row(Text(found.classes[i]), f"{images[i]:,}", f"{recall[i]:.1%}")
    return table


def on_confusions(found: Diagnosis) -> str:
    """The most frequent mistakes, in words."""
    if not math.isfinite(found.scores["running"].loss):
        return "What the model puts out is not finite, so there is nothing to recognize in it."
    confusions, images = found.confusions, found.confusion.sum(1).tolist()
    if not confusions:
        return f"Every one of the {found.num_images:,} {found.split} images is recognized."
    parts = [
        f"{found.classes[true]} taken for {found.classes[predicted]} ({count:,} of {images[true]:,})"
        for true, predicted, count in confusions[:MOST_CONFUSIONS]
    ]
    return f"Most frequent confusions: {', '.join(parts)}."


# ---------------------------------------------------------------- to keep


def dump_json(about: dict[str, Any], found: Diagnosis) -> str:
    """The content of inspection.json: every number that is printed; null for what is not finite or not there."""
    names = found.classes
    content = about | {
        "split": found.split,
        "images": found.num_images,
        "training_images": found.num_training_images,
        "batch_size": found.batch_size,
        "scores": {name: asdict(score) for name, score in found.scores.items()},
        "why_one_score": found.why_one_score or None,
        "norms": {norm.layer: asdict(norm) for norm in found.norms},
        "classes": list(names),
        "confusion": found.confusion.tolist(),
        "recall": dict(zip(names, found.recall, strict=True)),
        "confusions": [
            {"true": names[true], "predicted": names[predicted], "images": count}
            for true, predicted, count in found.confusions
        ],
        "pictures": [
            {
                "image": each.index,
                "true": names[each.label],
                "predicted": names[each.predicted],
                "probabilities": dict(zip(names, each.probabilities.tolist(), strict=True)),
                "layers": {name: list(output.shape) for name, output in each.outputs.items()},
            }
            for each in found.portraits
        ],
    }  # fmt: skip
    return json.dumps(strict(content), indent=1, allow_nan=False) + "\n"


def strict(value: Any) -> Any:
    """``value`` without what JSON has no word for: a number that is not finite is None."""
    if isinstance(value, dict):
        return {key: strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_csv(found: Diagnosis) -> str:
    """The confusion matrix: a line per true class, a column per predicted class."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["true", *found.classes])
    writer.writerows([name, *row] for name, row in zip(found.classes, found.confusion.tolist(), strict=True))
    return file.getvalue()
