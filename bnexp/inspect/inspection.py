"""The inspection of a run that has a checkpoint: what may be asked, what is printed, what is written down."""

import argparse
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bnexp.cli.inspect import summary_table
from bnexp.errors import UserError
from bnexp.inspect import featuremaps, findings
from bnexp.inspect.diagnosis import Diagnosis, diagnose
from bnexp.report.records import run_folders
from bnexp.store import checkpoint
from bnexp.store.files import write_files
from bnexp.store.run_folder import CONFIG, STATUS, load_status
from bnexp.store.untrusted import printable
from bnexp.train.run import Run

ELSEWHERE = ("allow", "data.root", "device", "threads")  # settings that may differ where a run is inspected


@dataclass(frozen=True)
class Question:
    """What the command line asks for; None for what is left to us."""

    folder: Path
    images: list[int] | None
    layers: list[str] | None
    out: Path
    overrides: list[str]


def parse(arguments: Sequence[str]) -> Question:
    """Read the command line; :class:`UserError` for what cannot be asked of any run."""
    parser = argparse.ArgumentParser(
        "bnexp inspect",
        description="Look again at a run that has a checkpoint; its own files stay as they are.",
        epilog=f"{', '.join(f'{key}=...' for key in ELSEWHERE)} after RUN: where data and devices are others here.",
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument("--images", metavar="0,1,2", help="test images to show, counted from 0; the first three")
    parser.add_argument("--layers", metavar="conv1,...", help="layers to show; at most 8 that put out maps")
    parser.add_argument("--out", metavar="DIR", help="where to write what was found; inspect/ in the run's folder")

    def refuse(message: str) -> None:
        raise UserError(f"inspect: {message}; bnexp inspect --help shows what it takes")

    parser.error = refuse
    is_override = re.compile(rf"({'|'.join(map(re.escape, ELSEWHERE))})=").match
    given = parser.parse_args([word for word in arguments if not is_override(word)])
    folder = find_run(Path(given.run))
    out = folder / "inspect" if given.out is None else Path(given.out)
    if given.out is None and out.is_symlink():
        raise UserError(f"{out}: a link to another place, where nothing is written; remove it or choose with --out DIR")
    check_out(out)
    layers = None if given.layers is None else list(dict.fromkeys(name.strip() for name in given.layers.split(",")))
    return Question(folder, read_images(given.images), layers, out, list(filter(is_override, arguments)))


def find_run(path: Path) -> Path:
    """``path``, if it is the folder of a run with a checkpoint."""
    holds = f"the folder of a run, which holds {CONFIG}, {STATUS} and {checkpoint.NAME}"
    if not path.is_dir():
        if path.is_file() and (path.parent / CONFIG).is_file():
            raise UserError(f"{path}: a file; give the folder that it lies in, {path.parent}")
        raise UserError(f"{path}: no such folder; give {holds}")
    if not (path / CONFIG).is_file():
        runs = [each for each in run_folders(path) if (each / CONFIG).is_file() and (each / checkpoint.NAME).is_file()]
        if runs:
            many = "a run" if len(runs) == 1 else f"{len(runs)} runs"
            raise UserError(f"{path}: holds {many} and is none itself; give the folder of one, such as {runs[0]}")
        raise UserError(f"{path}: holds no run; give {holds}")
    if not (path / checkpoint.NAME).exists():
        raise UserError(f"{path}: there is no {checkpoint.NAME} in it yet, so there are no weights to look at; "
                        f"bnexp resume {path} goes on with a run that is not over")  # fmt: skip
    return path


def check_out(path: Path) -> None:
    """Refuse, before any work, a folder that cannot be written to; what is made to find out is taken away again."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    probe = path / f".{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            probe.unlink()
        for each in missing:
            with suppress(OSError):
                each.rmdir()


def read_images(text: str | None) -> list[int] | None:
    """``0,1,2`` as numbers."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise UserError(f"--images {text}: not numbers of images; give such as 0,1,2, counted from 0")
    return list(dict.fromkeys(map(int, words)))


def check_layers(wanted: Sequence[str] | None, known: Collection[str]) -> None:
    """Refuse names of layers that the model does not have."""
    if missing := [name for name in wanted or () if name not in known]:
        raise UserError(f"--layers {missing[0]}: no layer of this model; there are {', '.join(known)}")


def read_state(folder: Path) -> dict:
    """The run's status as far as it can be read."""
    try:
        return load_status(folder)
    except (OSError, ValueError):
        return {}


def inspect(run: Run, question: Question, console: Console | None = None) -> Diagnosis:
    """Look at the run, print what there is to see and write inspection.json, confusion.csv and the pictures."""
    console = console or Console()
    status = read_state(question.folder)
    found = diagnose(run, question.images, question.layers)
    plain = {"markup": False, "highlight": False, "emoji": False}
    for line in opening(run, question.folder, status, found):
        console.print(line, **plain)
    console.print()
    console.print(summary_table(run.model, run.dataset.in_shape))
    for each in findings.shown(found, console.width):
        console.print()
        console.print(each, **plain)
    shows_pictures = featuremaps.can_show(console)
    console.print("\nThe image and the liveliest map of each layer:" if shows_pictures else "", **plain)
    for portrait in found.portraits:
        console.print(portrait.sentence(found.split, found.classes), **plain)
        if shows_pictures:
            console.print(featuremaps.strip(portrait, console.width))
            console.print()
    about = {
        "run": str(question.folder),
        "status": status.get("status"),
        "step": run.num_steps,
        "epoch": run.epoch,
        "device": str(run.device),
    }
    files = {
        "inspection.json": findings.dump_json(about, found).encode(),
        "confusion.csv": findings.to_csv(found).encode(),
    }
    for portrait in found.portraits:
        files[f"image-{portrait.index}.png"] = featuremaps.draw(portrait, found.split, found.classes)
    try:
        write_files(question.out, files)
    except OSError as error:
        raise cannot_write(question.out, error) from error
    if not shows_pictures:
        console.print()
    console.print(f"written to {printable(question.out)}: {', '.join(files)}", soft_wrap=True, **plain)
    return found


def opening(run: Run, folder: Path, status: dict, found: Diagnosis) -> Iterator[str]:
    """What is looked at, and what must be known before the numbers are read."""
    ended, step = printable(status.get("status", "of unknown status"), 40), status.get("step", run.num_steps)
    weights = f"weights of step {run.num_steps:,} (epoch {run.epoch:.3g}) on {run.device}"
    yield f"{printable(folder)}: {ended} at step {step:,}, {weights}"
    if ended == "diverged":
        since = printable(status.get("diverged_step", step), 40)
        yield f"The loss is not finite since step {since}; what follows is about the last checkpoint."
    if found.split != "test":
        yield f"There are no test images, so the {found.split} images are looked at instead."


def cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(f"--out {folder}: cannot be written to ({error.strerror}); choose another folder with --out DIR")
