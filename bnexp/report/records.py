"""Run folders read back: config, status and curves of each run that has ended, and the metrics compared.

A run that is still running, was interrupted, failed or is damaged becomes a `Problem` with its reason.
"""

import math
import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from bnexp.errors import UserError, unread
from bnexp.report import stats
from bnexp.store.run_folder import DONE, is_taken, load_status
from bnexp.store.untrusted import number, printable, read_lines, read_yaml

MOST_NESTED = 50  # levels of folders that are searched for runs
Histogram = tuple[list[float], list[int]]  # the ascending edges of the bins, and the count of each bin


@dataclass(frozen=True)
class RunRecord:
    """A finished or diverged run: ``curves`` is {tag: (steps, values)}, ``started`` in seconds since 1970.

    ``name``, if any, names its variant instead of the settings that differ.
    """

    path: Path
    config: dict
    status: dict
    curves: dict[str, tuple[list[int], list[float]]] = field(repr=False)
    started: float = 0.0
    name: str = ""

    @property
    def seed(self):
        return self.config.get("seed")

    @property
    def diverged(self) -> bool:
        return self.status["status"] == "diverged"

    @property
    def overrides(self) -> list[str]:
        return self.status.get("overrides") or []

    @property
    def has_failed(self) -> bool:
        """Whether it diverged, or ended within two standard errors of naming the largest class every time."""
        split = "test" if "accuracy/test" in self.curves else "valid"
        accuracy, majority = self.curves.get(f"accuracy/{split}"), self.majority(split)
        if self.diverged or accuracy is None or majority is None:
            return self.diverged
        share, num_images = majority
        return not accuracy[1][-1] > share + 2 * math.sqrt(share * (1 - share) / num_images)

    def majority(self, split: str) -> tuple[float, int] | None:
        """The share of the largest class in a split and the split's number of images; None in older runs."""
        found = self.status.get("majority")
        pair = found.get(split) if isinstance(found, dict) else None
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, int | float) for each in pair)
        return (float(pair[0]), int(pair[1])) if is_pair and 0 < pair[0] <= 1 <= pair[1] else None

    @property
    def data(self) -> dict:
        """The settings of the data; {} if the config has none."""
        data = self.config.get("data")
        return data if isinstance(data, dict) else {}

    @property
    def images(self) -> str:
        """The fingerprint of the images that the run saw; empty for runs of older versions."""
        return self._fingerprint("images")

    @property
    def origin(self) -> str:
        """That of the images before the run's seed drew the validation images, if it did: one for all seeds."""
        return self._fingerprint("origin") or self.images

    def _fingerprint(self, key: str) -> str:
        images = self.status.get(key)
        return images if isinstance(images, str) and re.fullmatch("[0-9a-f]{12}", images) else ""

    @property
    def evaluation(self) -> str:
        """What the run was evaluated with, in words, if not with running statistics; else empty."""
        words = self.status.get("evaluation")
        return printable(words, 300).rstrip(".") if isinstance(words, str) else ""

    @property
    def device_type(self) -> str:
        """The type of the device that computed the run, ``cpu`` or ``cuda``; empty if it is not known."""
        found = re.match("cpu|cuda", str(self.status.get("device")))
        return found[0] if found else ""

    @property
    def computed(self) -> str:
        """``cuda (NVIDIA H100), matrix products in float32``; empty for runs of older versions."""
        name, precision = (self.status.get(key) for key in ("device_name", "matmul_precision"))
        if not isinstance(name, str) or not isinstance(precision, str):
            return ""
        return printable(f"{self.device_type} ({name}), matrix products in {precision}", 200)

    def curve(self, tag: str) -> dict[int, float]:
        """{step: value} of one tag, by ascending step; {} without readings."""
        return dict(zip(*self.curves.get(tag, ((), ())), strict=True))

    @cached_property
    def histograms(self) -> dict[str, list[tuple[int, list[float], list[int]]]]:
        """{tag: [(step, edges, counts)]} from probes.jsonl, read on first use; {} without probes."""
        return _read_histograms(self.path / "probes.jsonl")


@dataclass(frozen=True)
class Problem:
    """A run left out of the report; ``reason`` is one line.

    ``status`` is running, dead, interrupted, failed, damaged, unreadable or superseded.
    """

    path: Path
    status: str
    reason: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """One number of a run: the last value of the curve ``tag``, its best value, or its value ``at`` another's best.

    A best value has no p: it is the largest of several noisy readings, so the noisier of two norms seems better.
    """

    key: str
    tag: str
    title: str
    best: bool = False
    at: str | None = None

    @property
    def is_accuracy(self) -> bool:
        return self.tag.startswith("accuracy")

    def of(self, run: RunRecord) -> float | None:
        """The run's value: None without readings; a best ignores readings that are not finite if others are."""
        curve = run.curve(self.tag)
        if self.at is not None:
            other = {step: value for step, value in run.curve(self.at).items() if math.isfinite(value)}
            return curve.get(max(other, key=other.__getitem__)) if other and len(curve) > 1 else None
        values = list(curve.values())
        if self.best:
            values = [value for value in values if math.isfinite(value)] or values
            return (max if self.is_accuracy else min)(values, default=None)
        return values[-1] if values else None

    def values(self, runs: Sequence[RunRecord]) -> list[float]:
        return [value for value in map(self.of, runs) if value is not None]

    def mean(self, runs: Sequence[RunRecord]) -> stats.Mean:
        return stats.mean(self.values(runs), is_share=self.is_accuracy)

    @property
    def heading(self) -> str:
        return f"{self.title}, %" if self.is_accuracy else self.title

    def show(self, value: float, sign: str = "") -> str:
        """``value`` as text: an accuracy in percent, a loss in nats."""
        if self.is_accuracy:
            return f"{100 * value:{sign}.2f}"
        return f"{value:{sign}.4f}" if abs(value) < 1000 else f"{value:{sign}.3g}"


METRICS = (
    Metric("accuracy/test", "accuracy/test", "test accuracy"),
    Metric("loss/test", "loss/test", "test loss"),
    Metric(
        "accuracy/test/at_best", "accuracy/test", "test accuracy at the best validation reading", at="accuracy/valid"
    ),
    Metric("accuracy/valid/final", "accuracy/valid", "final validation accuracy"),
    Metric("loss/valid/final", "loss/valid", "final validation loss"),
    Metric("accuracy/valid/best", "accuracy/valid", "best validation accuracy", best=True),
    Metric("loss/valid/best", "loss/valid", "best validation loss", best=True),
    Metric("loss/train/final", "loss/train", "final training loss"),
)
BY_KEY = {metric.key: metric for metric in METRICS}
PRIMARY = BY_KEY["accuracy/test"]  # the metric that is judged, unless primary= names another


def read_runs(
    paths: Iterable[str | os.PathLike], names: Mapping[Path, str] | None = None
) -> tuple[list[RunRecord], list[Problem]]:
    """Read every run at or below ``paths`` once: path by path, and below one path by the time of the start.

    Finished and diverged runs become records, all others problems. ``names`` are names of variants by run folder.
    A path without a run is a `UserError`.
    """
    records: list[RunRecord] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give a run's folder or one with runs below it")
        folders = run_folders(path)
        if not folders:
            raise UserError(f"{path}: no run in it (a folder with config.yaml and status.json); give one")
        new = [folder for folder in folders if os.path.realpath(folder) not in seen]
        read = [_read_run(folder, (names or {}).get(folder, "")) for folder in new]
        seen |= {os.path.realpath(folder) for folder in folders}
        records += sorted((run for run in read if isinstance(run, RunRecord)), key=lambda run: run.started)
        problems += [run for run in read if isinstance(run, Problem)]
    return _told_apart(records), problems


def _told_apart(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The records with ``data.root`` and ``data.images`` by the images that the runs saw, not by the path's spelling.

    Runs on the same images get the ``data.root`` of the first of them. Where runs with the same settings of the data
    saw different images, ``data.images`` is the fingerprint of them. Runs of older versions have no fingerprint.
    """
    roots: dict[str, object] = {}
    seen: defaultdict[str, set[str]] = defaultdict(set)
    for run in records:
        if run.images:
            seen[repr((run.origin == run.images, _with_root(run, roots)))].add(run.origin)
    told = []
    for run in records:
        if run.images:
            data = _with_root(run, roots)
            data |= {"images": run.origin} if len(seen[repr((run.origin == run.images, data))]) > 1 else {}
            run = replace(run, config=run.config | {"data": data})
        told.append(run)
    return told


def _with_root(run: RunRecord, roots: dict[str, object]) -> dict:
    """The run's settings of the data with the first ``data.root`` that ``roots`` knows for its images."""
    if "root" not in run.data:
        return run.data
    return run.data | {"root": roots.setdefault(run.origin, run.data["root"])}


def run_folders(folder: Path, depth: int = 0) -> list[Path]:
    """Return the folders of all runs at or below ``folder``, ended or not; links are not followed."""
    try:
        entries = {entry.name: entry for entry in os.scandir(folder)}
    except OSError as error:
        raise unread(error, folder) from error
    if "status.json" in entries:
        return [folder]
    if depth == MOST_NESTED:
        raise UserError(f"{folder}: more than {MOST_NESTED} levels of folders; give the folder of the runs itself")
    inner = [each.name for each in entries.values() if each.is_dir(follow_symlinks=False)]
    inner = [name for name in inner if not name.startswith(".")]  # .hydra holds another config.yaml
    below = [run for name in sorted(inner) for run in run_folders(folder / name, depth + 1)]
    return below or ([folder] if "config.yaml" in entries else [])


def _read_run(folder: Path, name: str) -> RunRecord | Problem:
    overrides: tuple[str, ...] = ()
    try:
        status = load_status(folder)
        kind, overrides = printable(status["status"], 40), tuple(status["overrides"])
        if kind not in DONE:
            if kind == "running":
                kind, reason = _running_or_dead(folder, status)
                if kind == "dead" and load_status(folder)["status"] != "running":
                    return _read_run(folder, name)  # it ended between the two readings of its status
            else:
                reason = status.get("error") or f"{kind} at step {status.get('step', 0)}"
            return Problem(folder, kind, printable(" ".join(str(reason).split()), 1000), overrides)
        config = read_yaml(folder / "config.yaml")
        if not isinstance(config.get("seed"), int | str | None):
            raise ValueError("config.yaml: seed is neither a number nor text")
        curves = _read_curves(folder / "metrics.jsonl", required=kind == "finished")
        started = status.get("started", (folder / "status.json").stat().st_mtime)
        return RunRecord(folder, config, status, curves, started, name)
    except FileNotFoundError as error:
        if not any((folder / each).exists() for each in ("status.json", "metrics.jsonl")):  # it has just begun
            return Problem(folder, *_running_or_dead(folder, {}))
        return Problem(folder, "damaged", f"{Path(error.filename).name} is missing", overrides)
    except OSError as error:
        return Problem(folder, "unreadable", str(unread(error, Path(error.filename or folder))), overrides)
    except ValueError as error:
        return Problem(folder, "damaged", f"unreadable: {printable(' '.join(str(error).split()), 200)}", overrides)


def _running_or_dead(folder: Path, status: dict) -> tuple[str, str]:
    """``running`` or ``dead``, and the reason. The lock of a run shows only processes of this machine."""
    step, host = status.get("step", 0), status.get("host")
    if is_taken(folder):
        return "running", f"running at step {step}"
    if host not in (None, socket.gethostname()):
        heard = f", last heard of {max(0, time.time() - status['heartbeat']) / 60:.0f} minutes ago"
        return "running", f"running at step {step} on {host}{heard if 'heartbeat' in status else ''}"
    return "dead", f"died at step {step}; bnexp resume {folder} continues it"


def _read_curves(path: Path, required: bool) -> dict[str, tuple[list[int], list[float]]]:
    """{tag: (steps, values)}; null becomes NaN. A file that is missing or empty is an error if ``required``."""
    if not required and not path.exists():
        return {}
    points: dict[str, dict[int, float]] = defaultdict(dict)
    is_empty = True
    for row in read_lines(path):
        is_empty, step = False, row["step"]
        for tag, value in row.items():
            if "/" in tag or tag in ("epoch", "seconds"):
                points[tag][step] = value if type(value) is float else number(value, f"{path.name}: {tag} at {step}")
    if required and is_empty:
        raise ValueError("metrics.jsonl holds no reading")
    return {printable(tag): tuple(map(list, zip(*sorted(curve.items()), strict=True))) for tag, curve in points.items()}


def _read_histograms(path: Path) -> dict[str, list[tuple[int, list[float], list[int]]]]:
    found: dict[str, dict[int, Histogram]] = defaultdict(dict)
    try:
        for row in read_lines(path) if path.exists() else ():
            if "edges" in row:  # a histogram, not a table
                found[printable(row.get("tag"))][row["step"]] = _bins(row, f"{path.name}: line of step {row['step']}")
    except OSError as error:
        raise unread(error, path) from error
    except ValueError as error:
        raise UserError(f"{path}: unreadable ({error}); without it the run's histograms are missing") from error
    return {tag: [(step, *by_step[step]) for step in sorted(by_step)] for tag, by_step in found.items()}


def _bins(row: dict, where: str) -> Histogram:
    edges, counts = row["edges"], row.get("counts")
    if not isinstance(edges, list) or not isinstance(counts, list) or len(edges) != len(counts) + 1 or not counts:
        raise ValueError(f"{where}: a histogram needs one count between every two edges")
    edges, counts = ([number(value, where) for value in column] for column in (edges, counts))
    if not all(map(math.isfinite, edges)) or not all(low < high for low, high in zip(edges, edges[1:], strict=False)):
        raise ValueError(f"{where}: the edges of the bins do not ascend")
    if not all(0 <= count < math.inf for count in counts) or not sum(counts):
        raise ValueError(f"{where}: the counts are negative, not finite or all zero")
    return edges, counts
