"""The folder of a benchmark's results, JSON with everything and CSV for a spreadsheet; and the look of its tables."""

import csv
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bnexp.errors import UserError
from bnexp.store.files import write_new
from bnexp.store.run_folder import check_free, git_commit, new_folder, versions

if TYPE_CHECKING:  # torch takes seconds to import; a misspelt setting is refused before
    import torch
RESULT_FILES = ("bench.json", "bench.csv")


def check_results_folder(path: Path) -> None:
    """Raise :class:`UserError` for a folder that holds results or a run, or cannot be written."""
    check_free(path)
    if any((path / name).exists() for name in RESULT_FILES):
        raise UserError(f"out={path}: already holds a benchmark, which is never overwritten; choose another folder")


def make_results_folder(out: str | None) -> Path:
    """Make the folder ``out`` or, if it is None, a new one ``outputs/<date>/bench-HHMMSS``; returns its path.

    A new folder belongs to this process alone: of two in the same second, the second gets the suffix ``-2``.
    Raises :class:`UserError` if ``out`` cannot be used.
    """
    if not out:
        return new_folder(Path("outputs") / time.strftime("%Y-%m-%d"), time.strftime("bench-%H%M%S"))
    try:
        check_results_folder(Path(out))
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out}: cannot be made ({error.strerror}); choose another folder") from error
    return Path(out)


def write_results(path: Path, content: Mapping[str, Any], rows: Sequence[Mapping]) -> None:
    """Write ``content`` to ``bench.json`` and ``rows`` to ``bench.csv``, a line each; neither replaces a file.

    Raises :class:`UserError` if another process has written there since the folder was checked.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    texts = (json.dumps(content, indent=1, allow_nan=False) + "\n", text.getvalue())
    for name, words in zip(RESULT_FILES, texts, strict=True):
        if not write_new(path / name, words):
            raise UserError(f"out={path}: another benchmark has just taken this folder; choose another")


def describe_measurement(console: Console, settings: Any, device: "torch.device", command: str) -> dict[str, Any]:
    """Print the machine in one line; returns the settings, the command, the machine, its load and the versions.

    Call it before the measurement, so that the load average counts the work of other programs only.
    """
    about = asdict(settings) | {
        "command": command, "device": device_model(device), "versions": versions(), "git_commit": git_commit(),
        "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0],
    }  # fmt: skip
    line = f"{about['device']}, torch {about['versions']['torch']}, load average {about['load']:.1f}\n"
    console.print(line, highlight=False, markup=False)
    return about


def provenance(about: Mapping[str, Any]) -> dict[str, str]:
    """The device, versions and command, which every line of a CSV file repeats."""
    versions = " ".join(f"{name} {number}" for name, number in about["versions"].items())
    return {"device": about["device"], "versions": versions, "command": about["command"]}


def device_model(device: "torch.device") -> str:
    """The model of a GPU, or of a CPU with the number of torch's threads."""
    import torch

    from bnexp.train.device import device_name

    threads = torch.get_num_threads()
    return device_name(device) + f", {threads} thread{'s' * (threads > 1)}" * (device.type == "cpu")


def results_table(title: str, *columns: str) -> Table:
    """An empty table, drawn as all tables of benchmarks are."""
    look = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False, "pad_edge": False}
    return Table(*columns, title=title, title_justify="left", **look)
