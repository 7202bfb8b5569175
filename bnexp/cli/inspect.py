"""``bnexp summary`` prints a model's layers; ``bnexp inspect`` examines a run that has a checkpoint."""

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from bnexp.cli.flags import parse_line, was_shown
from bnexp.cli.parser import Parser
from bnexp.cli.report import read_path
from bnexp.config import build, check, parts, schema
from bnexp.config.compose import composed, session
from bnexp.config.start import fitting
from bnexp.config.stored import moved
from bnexp.errors import UserError
from bnexp.probes.confusion import Confusion
from bnexp.probes.dead import evaluate_units
from bnexp.probes.features import has_maps, look_at_images
from bnexp.probes.layers import Layer, list_layers, tracking_norms
from bnexp.probes.population import population_size, shadow, whole_batch
from bnexp.probes.shapes import show_shape
from bnexp.probes.statistics import norm_table, recomputed_model, score_by_statistics
from bnexp.report import readings as report
from bnexp.report.figures.features import draw_image
from bnexp.report.figures.style import render_figure
from bnexp.report.records import run_folders
from bnexp.store import checkpoint
from bnexp.store.files import write_files
from bnexp.store.readings import Reading
from bnexp.store.run_folder import CONFIG, STATUS, load_status
from bnexp.store.untrusted import printable
from bnexp.train.own import naming
from bnexp.train.run import EVALUATION_BATCH, Run

POPULATION_IMAGES = 10_000  # training images that statistics are recomputed from; more of them change little
SHOWN_LAYERS = 8  # shown by default
SPLIT_WORDS = {"test": "test", "valid": "validation", "train": "training"}  # the first that has images is evaluated
UNMARKED = {"markup": False, "highlight": False, "emoji": False}


def summary(arguments: list[str]) -> int:
    """``bnexp summary [overrides]``: print the layers of the model that the overrides make; reads no data."""
    line = parse_line("summary", arguments)
    if was_shown(line):
        return 0
    with session(line.source):
        cfg = composed(line.words)
    check.check(cfg, runs=False)
    source = parts.part(cfg, "data")()
    with naming(", ".join(parts.own_parts(cfg))):
        Console().print(summary_table(parts.make_model(cfg, source), source.in_shape, cfg.batch_size))
    return 0


def summary_table(model: nn.Module, in_shape: Sequence[int], batch_size: int = 2) -> Table:
    """A table of the layers with their output shapes for one image, then totals: parameters, buffers, multiply-adds.

    A copy of the model runs on torch's meta device, where tensors have no contents, so a large image costs nothing.
    """
    layers = list_layers(model, in_shape, batch_size=batch_size)
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for name, justify in {"layer": "left", "output": "right", "parameters": "right", "norm": "left"}.items():
        table.add_column(name, justify=justify, overflow="fold")
    sites = getattr(getattr(model, "conversion", None), "sites", {})  # what a norm's call does besides
    for layer in layers:
        shape = show_shape(layer.out_shape) or "-"
        table.add_row(
            layer.name or "(model)",
            shape,
            f"{layer.num_parameters:,}",
            " + ".join(filter(None, (layer.norm, sites.get(layer.name)))) or "-",
        )
    table.add_section()
    totals = {
        "parameters": sum(layer.num_parameters for layer in layers),
        "trainable parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "buffer elements": sum(b.numel() for b in model.buffers()),
        "multiply-adds per image": sum(layer.multiply_adds for layer in layers),
    }
    if totals["parameters"] == totals["trainable parameters"]:
        del totals["parameters"]
    for name, total in totals.items():
        table.add_row(name, "", f"{total:,}", "")
    if conversion := getattr(model, "conversion", None):
        table.caption, table.caption_justify = "\n".join(conversion.lines()), "left"
    return table


def inspect(arguments: list[str]) -> int:
    """``bnexp inspect RUN``: evaluate and probe a run's last checkpoint; the files of the run are not changed."""
    options = parse_inspect(arguments)
    run = load_run(options)
    name, indices = choose_images(run, options.images)
    with writing_to(options.out):  # refuses a folder that cannot be written before the work
        options.out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=options.out).close()
    show_inspection(run, options, name, list(look_at_run(run, name, indices, options.layers)), Console())
    return 0


def parse_inspect(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line as ``folder``, ``images``, ``layers``, ``out`` and ``overrides``.

    ``images`` and ``layers`` are lists, or None if they are not given. Raises :class:`UserError` for values that are
    wrong for every run, and for a folder without a run.
    """
    about = "Examine a run that has a checkpoint; the files of the run are not changed."
    parser = Parser("bnexp inspect", description=about)
    parser.add_argument("folder", metavar="RUN", type=read_path, help="the folder of a run")
    where = "data.root=DIR, device=NAME, threads=N or allow=[PACKAGE], if they are not the same as in training"
    parser.add_argument("overrides", metavar="setting=value", nargs="*", help=where)
    images = "test images to show, counted from 0; the first three by default"
    parser.add_argument("--images", metavar="0,1,2", type=read_images, help=images)
    layers = "layers to show; by default up to 8 whose outputs are maps"
    parser.add_argument("--layers", metavar="conv1,...", help=layers)
    parser.add_argument("--out", metavar="DIR", type=read_path, help="where to write, by default RUN/inspect")
    options = parser.parse_intermixed_args(list(arguments))
    check_folder(options.folder)
    inside = options.folder / "inspect"
    if options.out is None and inside.is_symlink():
        raise UserError(f"{inside}: a link, and nothing is written through links; remove it, or give --out DIR")
    options.out = options.out or inside
    if options.layers is not None:
        options.layers = list(dict.fromkeys(name.strip() for name in options.layers.split(",")))
    return options


def read_images(text: str) -> list[int]:
    """``0,1,2`` as numbers, each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise argparse.ArgumentTypeError(f"{text} is not a list of image numbers; give some such as 0,1,2")
    return list(dict.fromkeys(map(int, words)))


def check_folder(path: Path) -> None:
    """Raise :class:`UserError` if ``path`` is not the folder of a run with a checkpoint."""
    holds = f"the folder of a run, which holds {CONFIG}, {STATUS} and {checkpoint.NAME}"
    if path.is_file() and (path.parent / CONFIG).is_file():
        raise UserError(f"{path}: a file; give the folder that it lies in, {path.parent}")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give {holds}")
    if not (path / CONFIG).is_file():
        runs = [each for each in run_folders(path) if (each / CONFIG).is_file() and (each / checkpoint.NAME).is_file()]
        if not runs:
            raise UserError(f"{path}: holds no run; give {holds}")
        many = "a run" if len(runs) == 1 else f"{len(runs)} runs"
        raise UserError(f"{path}: holds {many} and is none itself; give the folder of one, such as {runs[0]}")
    if not (path / checkpoint.NAME).exists():
        raise UserError(f"{path}: has no {checkpoint.NAME} yet, so there are no weights to examine; "
                        f"continue the run with bnexp resume {path}")  # fmt: skip


def load_run(options: argparse.Namespace) -> Run:
    """The run at its last checkpoint."""
    cfg = moved(options.folder, options.overrides, "inspect")
    cfg.engine = OmegaConf.structured(schema.Train).engine  # nothing is trained, so engine=graph needs no GPU
    check.check(cfg, free=False)
    source = parts.part(cfg, "data")()
    model = parts.meta_model(cfg, source)
    with naming(", ".join(parts.own_parts(cfg))):
        layers = list_layers(model, source.in_shape, batch_size=cfg.batch_size)
    known = [layer.name for layer in layers if layer.out_shape]
    if missing := [name for name in options.layers or () if name not in known]:
        raise UserError(f"--layers {missing[0]}: no layer of this model; there are {', '.join(known)}")
    state = checkpoint.load(options.folder, parts.find_device(cfg.device), model)
    run = build.build(cfg)
    with fitting(options.folder / checkpoint.NAME):
        run.model.load_state_dict(state["model"])
    run.num_steps = state["num_steps"]
    return run


def choose_images(run: Run, given: list[int] | None) -> tuple[str, list[int]]:
    """The split to evaluate, ``test``, ``valid`` or ``train``, and the indices of the images to show."""
    name = next(name for name in SPLIT_WORDS if len(getattr(run.dataset, name)))
    num_images = len(getattr(run.dataset, name))
    if beyond := [index for index in given or () if index >= num_images]:
        raise UserError(
            f"--images {beyond[0]}: there are {num_images:,} {SPLIT_WORDS[name]} images, counted from 0; "
            f"the last is {num_images - 1}"
        )
    return name, list(range(min(3, num_images))) if given is None else given


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an OSError raised inside into :class:`UserError` about ``--out``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written to ({error.strerror}); choose another folder") from error


def look_at_run(run: Run, name: str, indices: Sequence[int], layers: Sequence[str] | None) -> Iterator[Reading]:
    """Yield readings of the norms, the whole split ``name`` and its images ``indices``; the run is not changed."""
    split, model = getattr(run.dataset, name), shadow(run).eval()
    recomputed = recomputed_model(run, POPULATION_IMAGES)
    score, dead = evaluate_units(run, split, model)
    yield norm_table(model, recomputed, dead)
    yield score_by_statistics(run, split, model, recomputed, score)
    yield from Confusion(split=name, images=max(2, len(split))).look(run, None)
    layers = layers or choose_layers(layers_of(run))
    yield from look_at_images(run, split, indices, layers)


def layers_of(run: Run) -> list[Layer]:
    """The layers of the run's model."""
    return list_layers(run.model, run.dataset.in_shape, batch_size=run.batches.batch_size)


def choose_layers(layers: Sequence[Layer]) -> list[str]:
    """The layers to show by default, at most 8: those whose outputs are maps, or if there are none the last layers.

    If more than 8 have maps, the last one of every map size is chosen.
    """
    shown = [layer for layer in layers if has_maps(layer.out_shape)]
    if len(shown) > SHOWN_LAYERS:
        shown = list({layer.out_shape[1:]: layer for layer in shown}.values())
    shown = shown or [layer for layer in layers if layer.num_parameters and layer.out_shape][-SHOWN_LAYERS:]
    return [layer.name for layer in shown][:SHOWN_LAYERS]


def why_one_score(layers: Sequence[Layer]) -> str:
    """Why a model without running statistics has one score only, in a sentence for the person."""
    norms = [layer.norm for layer in layers if layer.norm]
    if not norms:
        return "There is no norm in this model, so there are no statistics to choose between."
    if any(re.search(r"over .*\bN\b", norm) for norm in norms):
        return (
            f"Its norms keep no running statistics: they normalize up to {EVALUATION_BATCH} evaluated images together "
            "by their own statistics, so there is nothing to recompute."
        )
    return f"Its norms ({norms[0]}) normalize one image at a time and use no statistics of the batch."


def show_inspection(
    run: Run, options: argparse.Namespace, name: str, readings: Sequence[Reading], console: Console
) -> None:
    """Print the readings, and write inspection.json, confusion.csv and the pictures."""
    by_tag = {reading.tag: reading for reading in readings}
    by_tag["confusion"] = by_tag[f"confusion/{name}"]
    status = {}
    with suppress(OSError, ValueError):
        status = load_status(options.folder)
    about = describe_run(run, options.folder, status, name)
    for line in opening_lines(about, status):
        console.print(line, **UNMARKED)
    console.print()
    console.print(summary_table(run.model, run.dataset.in_shape, run.batches.batch_size))
    for each in report.show_findings(about, by_tag, console.width):
        console.print()
        console.print(each, **UNMARKED)
    console.print()
    report.show_images(console, about["split"], by_tag)
    files = {
        "inspection.json": report.to_json(about, by_tag).encode(),
        "confusion.csv": report.to_csv(by_tag["confusion"]).encode(),
    }
    for index, *_ in by_tag["predictions"].rows:
        files[f"image-{index}.png"] = render_figure(draw_image(index, about["split"], by_tag), "png")
    with writing_to(options.out):
        write_files(options.out, files)
    console.print(f"\nwritten to {printable(options.out)}: {', '.join(files)}", soft_wrap=True, **UNMARKED)


def describe_run(run: Run, folder: Path, status: dict, name: str) -> dict[str, Any]:
    """The content of inspection.json besides the readings."""
    tracks = bool(tracking_norms(run.model))
    return {
        "run": str(folder),
        "status": status.get("status"),
        "step": run.num_steps,
        "epoch": run.epoch,
        "device": str(run.device),
        "split": SPLIT_WORDS[name],
        "images": len(getattr(run.dataset, name)),
        "training_images": population_size(run, POPULATION_IMAGES) if tracks else 0,
        "batch_size": whole_batch(run),
        "why_one_score": None if tracks else why_one_score(layers_of(run)),
    }


def opening_lines(about: dict[str, Any], status: dict) -> Iterator[str]:
    """The lines above the tables: which run and checkpoint, and warnings about how to read the numbers."""
    ended, step = printable(about["status"] or "of unknown status", 40), status.get("step", about["step"])
    weights = f"weights of step {about['step']:,} (epoch {about['epoch']:.3g}) on {about['device']}"
    yield f"{printable(about['run'])}: {ended} at step {step:,}, {weights}"
    if ended == "diverged":
        since = printable(status.get("diverged_step", step), 40)
        yield f"The loss is not finite from step {since} on; the numbers below are of the last checkpoint."
    if about["split"] != "test":
        yield f"There are no test images, so the {about['split']} images are used instead."
