"""Writes readings as TensorBoard events and JSON lines into a run's folder.

``metrics.jsonl`` holds the scalars, one line per step; reports read it. ``probes.jsonl`` holds histograms and tables,
one line each. The event file holds all of these for TensorBoard, and the images.
"""

import io
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from bnexp.store.files import finite, sync, writing
from bnexp.store.readings import Band, Histogram, Image, Reading, Scalar, Table
from bnexp.store.run_folder import METRICS, PROBES
from bnexp.store.untrusted import MOST_LINE, is_step


class Writer:
    """Writes the readings of one run; ``step`` is the step of its checkpoint, 0 for a new run."""

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        self.folder = folder
        self.metrics = Lines(folder / METRICS, step)
        self.probes = Lines(folder / PROBES, step) if (folder / PROBES).exists() else None
        self.events = EventFile(folder)
        # START at a later step makes TensorBoard drop the later events of earlier files. TensorBoard ignores the first
        # START of a run, so a new run writes one too.
        self.events.add(step=step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, epoch: float, seconds: float, readings: Iterable[Reading]) -> dict[str, float]:
        """Write the readings of one step; returns the scalars among them by tag."""
        readings = list(readings)
        metrics = scalars(readings)
        self.metrics.add({"step": step, "epoch": round(epoch, 6), "seconds": round(seconds, 6), **metrics})
        others = [reading for reading in readings if not isinstance(reading, Scalar)]
        if rows := [row for reading in others for row in as_rows(step, reading)]:
            self.probes = self.probes or Lines(self.folder / PROBES, step)
            self.probes.add(*rows)
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        values += [value for reading in others for value in as_summary(reading).value]
        self.events.add(step=step, summary=Summary(value=values))
        return metrics

    def describe(self, config: str, hparams: Mapping[str, bool | int | float | str], group: str) -> None:
        """Write the resolved config as text, and HParams that TensorBoard averages over the runs of one ``group``."""
        self.events.add(summary=text("config", f"```yaml\n{config}\n```"))
        # No list of columns: TensorBoard would take the first run's list for all runs, and miss norm.eps if that run
        # has norm=none. Without a list it collects the settings of all runs and puts those that differ first.
        self.events.add(summary=summary_v2.hparams_pb(dict(hparams), trial_id=group))

    def sync(self) -> None:
        """Flush all lines to the disk."""
        for lines in (self.metrics, self.probes):
            if lines is not None:
                lines.sync()

    def close(self, success: bool) -> None:
        """Write how the run ended and close the files; a second call does nothing."""
        if self.metrics.file.closed:
            return
        status = api_pb2.STATUS_SUCCESS if success else api_pb2.STATUS_FAILURE
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        content = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
        value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=content, tensor=metadata.NULL_TENSOR)
        with self.metrics.file, self.events.file:
            if self.probes is not None:
                self.probes.file.close()
            self.events.add(summary=Summary(value=[value]))


class Lines:
    """A JSON Lines file in the order of steps; lines after ``step`` are dropped when it is opened."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        keep = 0
        with writing(path):  # later lines are from a process that died before its next checkpoint
            with open(path, "rb") as file, suppress(ValueError, KeyError, TypeError, RecursionError):
                while (line := file.readline(MOST_LINE)) and is_step(at := json.loads(line)["step"]) and at <= step:
                    keep += len(line)
            os.truncate(path, keep)

    def add(self, *rows: dict) -> None:
        """Write a line for each of ``rows``, all or none; numbers that are not finite become null."""
        append(self.file, b"".join(json.dumps(finite(row), allow_nan=False).encode() + b"\n" for row in rows))

    def sync(self) -> None:
        """Flush the lines to the disk."""
        with writing(self.path):
            sync(self.file.fileno(), self.path.parent)


class EventFile:
    """A TensorBoard event file, written unbuffered in this thread, so that a full disk is an error here."""

    def __init__(self, folder: Path) -> None:
        # TensorBoard reads the files of a run in the order of their names, which begin with the time.
        earlier = (re.match(r"events\.out\.tfevents\.(\d+\.\d+)", path.name) for path in folder.iterdir())
        latest = max((float(found[1]) for found in earlier if found), default=0.0)
        now = max(time.time(), latest + 1e-5)
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = open(folder / name, "xb", buffering=0)  # noqa: SIM115 (open as long as the run)
        self.add(file_version="brain.Event:2")

    def add(self, **fields: object) -> None:
        """Write an event with these fields of TensorBoard's message."""
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        append(self.file, record.getvalue())


def append(file: io.FileIO, data: bytes) -> None:
    """Append all of ``data`` or nothing: if the disk is full, the file is cut back to its old length."""
    with writing(file.name):
        before = os.fstat(file.fileno()).st_size
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            os.ftruncate(file.fileno(), before)
            raise


def scalars(readings: Iterable[Reading]) -> dict[str, float]:
    """The scalars among ``readings`` by tag."""
    return {reading.tag: reading.value for reading in readings if isinstance(reading, Scalar)}


def try_out(reading: Reading) -> None:
    """Raise an error if ``reading`` cannot be written."""
    if not isinstance(reading, Reading):
        raise TypeError(f"an object of type {type(reading).__name__} is no reading")
    if not isinstance(reading.tag, str):
        raise TypeError(f"the tag {reading.tag!r} is no text")
    if isinstance(reading, Scalar):
        Summary.Value(tag=reading.tag, simple_value=reading.value)
        json.dumps(reading.value)
    else:
        as_summary(reading)
        json.dumps(as_rows(0, reading))


def as_rows(step: int, reading: Reading) -> list[dict]:
    """The lines of probes.jsonl for ``reading``; none for images."""
    if isinstance(reading, Histogram):
        return [{"step": step, "tag": reading.tag, "edges": reading.edges, "counts": reading.counts}]
    if isinstance(reading, Table):
        return [{"step": step, "tag": reading.tag, "head": reading.head, "rows": reading.rows}]
    return []


def as_summary(reading: Histogram | Image | Table) -> Summary:
    """``reading`` as a TensorBoard summary: a histogram, a PNG, a table in Markdown."""
    if isinstance(reading, Histogram):
        return Summary(value=[Summary.Value(tag=reading.tag, histo=histogram_proto(reading))])
    if isinstance(reading, Table):
        rows = [reading.head, ["---"] * len(reading.head), *reading.rows]
        lines = ("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
        return text(reading.tag, "\n".join(lines))
    from PIL import Image as Picture  # here, because most runs write no images

    png = io.BytesIO()
    Picture.fromarray(reading.pixels.numpy()).save(png, format="PNG")
    height, width, *channels = reading.pixels.shape
    image = Summary.Image(
        height=height, width=width, colorspace=channels[0] if channels else 1, encoded_image_string=png.getvalue()
    )
    return Summary(value=[Summary.Value(tag=reading.tag, image=image)])


def text(tag: str, markdown: str) -> Summary:
    """A text summary, with the tag that TensorBoard's text plugin expects."""
    return text_pb(f"{tag}/text_summary", [markdown])


def histogram_proto(reading: Histogram) -> HistogramProto:
    """The histogram as TensorBoard's message; its sums put every value in the middle of its bin."""
    edges, counts = reading.edges, reading.counts
    middles = [(left + right) / 2 for left, right in zip(edges, edges[1:], strict=False)]
    return HistogramProto(
        min=edges[0],
        max=edges[-1],
        num=sum(counts),
        sum=sum(n * x for n, x in zip(counts, middles, strict=True)),
        sum_squares=sum(n * x * x for n, x in zip(counts, middles, strict=True)),
        bucket_limit=edges[1:],
        bucket=counts,
    )


class NullWriter:
    """Writes nothing."""

    def write(self, step: int, epoch: float, seconds: float, readings: Iterable[Reading]) -> dict[str, float]:
        return scalars(readings)

    def sync(self) -> None:
        pass

    def close(self, success: bool) -> None:
        pass


def write_bands(folder: Path, label: str, bands: Iterable[tuple[int, Band]]) -> None:
    """Write a TensorBoard run for a variant: ``TAG/mean``, ``TAG/lower`` and ``TAG/upper`` of each (step, band)."""
    (folder / label).mkdir(parents=True)
    events = EventFile(folder / label)
    with events.file:
        for step, band in bands:
            lines = {f"{band.tag}/{name}": getattr(band, name) for name in ("mean", "lower", "upper")}
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in lines.items()]
            events.add(step=step, summary=Summary(value=values))


def write_layout(folder: Path, tags: Sequence[str]) -> None:
    """Write the layout by which TensorBoard's custom-scalars page draws the bands of ``tags`` as margin charts."""
    from torch.utils.tensorboard import summary  # here, because it imports TensorFlow if that is installed

    charts: dict[str, dict] = {}
    for tag in tags:
        band = [f"{tag}/{name}" for name in ("mean", "lower", "upper")]
        charts.setdefault(tag.partition("/")[0], {})[tag] = ["Margin", band]
    events = EventFile(folder)
    with events.file:
        events.add(summary=summary.custom_scalars(charts))
