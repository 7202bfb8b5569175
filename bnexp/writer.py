"""The TensorBoard door: readings become events and one JSON line per step, in a run's folder.

``metrics.jsonl`` is the truth that reports read; the events are the same numbers for TensorBoard.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
from torch.utils.tensorboard import SummaryWriter

from bnexp.folder import METRICS, finite
from bnexp.readings import Scalar

# What HParams shows beside the settings of a run.
HPARAMS_METRICS = ("accuracy/valid", "loss/valid", "accuracy/test", "loss/test", "loss/train")


class Writer:
    """Writes the readings of one run. ``step`` 0 starts anew, a later one goes on after that step."""

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        self.path = folder / METRICS
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self._drop_after(step)
        self.events = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def _drop_after(self, step: int) -> None:
        """Forget what was written after ``step``, by a process that died before its next checkpoint."""
        keep = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError):
                break
            keep += len(line)
        os.truncate(self.path, keep)

    def write(self, step: int, epoch: float, seconds: float, readings: Iterable[Scalar]) -> dict[str, float]:
        """Keep the readings of one step; returns them by tag.

        A line that does not fit on the disk any more is taken back, so that the file stays readable.
        """
        metrics = {reading.tag: reading.value for reading in readings}
        line = {"step": step, "epoch": round(epoch, 6), "seconds": round(seconds, 6), **metrics}
        data = json.dumps(finite(line), allow_nan=False).encode() + b"\n"
        before = os.path.getsize(self.path)
        try:
            written = self.file.write(data)
            if written != len(data):
                self.file.write(data[written:])
        except OSError:
            os.truncate(self.path, before)
            raise
        for tag, value in metrics.items():
            self.events.add_scalar(tag, value, step)
        return metrics

    def describe(self, config: str, hparams: Mapping[str, bool | int | float | str], group: str) -> None:
        """The resolved config as text, and HParams in this very run, its seeds averaged under ``group``."""
        self.events.add_text("config", f"```yaml\n{config}\n```")
        shown = [summary_v2.Metric(tag) for tag in HPARAMS_METRICS]
        names = [summary_v2.HParam(name) for name in hparams]
        self._add(summary_v2.hparams_config_pb(names, shown))
        self._add(summary_v2.hparams_pb(dict(hparams), trial_id=group))

    def close(self, success: bool) -> None:
        """Say how the run ended, and let go of the files."""
        status = api_pb2.STATUS_SUCCESS if success else api_pb2.STATUS_FAILURE
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        content = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
        value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=content, tensor=metadata.NULL_TENSOR)
        self._add(Summary(value=[value]))
        self.events.close()
        self.file.close()

    def _add(self, content: Summary) -> None:
        self.events.file_writer.add_event(Event(summary=content))


class NullWriter:
    """Keeps nothing; for loops that are only timed."""

    def write(self, step: int, epoch: float, seconds: float, readings: Iterable[Scalar]) -> dict[str, float]:
        return {reading.tag: reading.value for reading in readings}

    def close(self, success: bool) -> None:
        pass
