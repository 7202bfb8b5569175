"""Where a benchmark leaves what it found: a folder of its own with JSON and CSV, and tables for people."""

import csv
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexp.errors import UserError
from bnexp.store.files import write_new
from bnexp.store.run_folder import check_free, git_commit, versions

if TYPE_CHECKING:  # torch takes seconds to import, a misspelt setting is found before
    import torch
    from rich.console import Console
    from rich.table import Table
FILES = ("bench.json", "bench.csv")


def check_out(path: Path) -> None:
    """Refuse, before any work, a folder that holds results or cannot be written."""
    check_free(path)
    if any((path / name).exists() for name in FILES):
        raise UserError(f"out={path}: already holds a benchmark, which is never overwritten; choose another folder")


def claim_out(out: str | None) -> Path:
    """The folder asked for, or a new one ``outputs/<date>/bench-HHMMSS`` that no other process has."""
    if out:
        check_out(Path(out))
    path = first = Path(out) if out else Path("outputs") / time.strftime("%Y-%m-%d/bench-%H%M%S")
    suffix = 1
    while True:
        try:
            path.mkdir(parents=True, exist_ok=out is not None)
            return path
        except FileExistsError as error:
            if out:
                raise UserError(f"out={out}: is a file; choose a folder") from error
            suffix += 1
            path = first.with_name(f"{first.name}-{suffix}")
        except OSError as error:
            raise UserError(f"out={path}: cannot be made ({error.strerror}); choose another folder") from error


def introduce(console: "Console", settings: Any, device: "torch.device") -> dict[str, Any]:
    """What was asked and where it runs, printed in a line; the load is the machine's, before: others' work."""
    about = asdict(settings) | {"device": device_name(device), "versions": versions(), "git_commit": git_commit()}
    about |= {"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    told = f"{about['device']}, torch {about['versions']['torch']}, load average {about['load']:.1f}\n"
    console.print(told, highlight=False, markup=False)
    return about


def device_name(device: "torch.device") -> str:
    """The device as a person knows it; of a CPU the model and the threads that torch uses."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    model = models[0].partition(":")[2].strip() if models else "CPU"
    return f"{model}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def table_of(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    looks = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False, "pad_edge": False}
    table = Table(title=title, title_justify="left", **looks)
    for column in columns:
        table.add_column(column)
    return table


def write(path: Path, content: Mapping[str, Any], rows: Sequence[Mapping]) -> None:
    """``bench.json`` with all of ``content`` and ``bench.csv`` with a line per row; neither is ever overwritten."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    texts = (json.dumps(content, indent=1, allow_nan=False) + "\n", text.getvalue())
    for name, words in zip(FILES, texts, strict=True):
        if not write_new(path / name, words):
            raise UserError(f"out={path}: another benchmark has just taken this folder; choose another")


def where(about: Mapping[str, Any]) -> dict[str, str]:
    """What every line of a CSV file repeats, so that it stands for itself: device, versions, command."""
    versions = " ".join(f"{name} {number}" for name, number in about["versions"].items())
    return {"device": about["device"], "versions": versions, "command": about["command"]}
