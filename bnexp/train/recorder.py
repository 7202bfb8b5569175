"""The recorder of a run: writes its readings, its status and its checkpoints."""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bnexp.models.initialize import Weights
from bnexp.store import checkpoint
from bnexp.store.readings import Reading
from bnexp.store.run_folder import DONE, Status
from bnexp.store.writer import NullWriter, Writer
from bnexp.train.interrupt import patience
from bnexp.train.run import Run

KEEP = ("last", "best", "all")  # checkpoints that are kept beside the last two


class Recorder:
    """Writes readings by ``writer``, the status, and checkpoints into ``folder``; without a folder no checkpoints.

    ``keep=best`` also keeps the best weights, in best.pt, and ``keep=all`` every checkpoint, as checkpoint-STEP.pt.
    ``best`` is the best :func:`merit` that a continued run has reached so far.
    """

    def __init__(
        self,
        writer: Writer | NullWriter,
        status: Status | None = None,
        folder: Path | None = None,
        keep: str = "last",
        best: float = -math.inf,
    ):
        self.writer = writer
        self.status = status
        self.folder = folder
        self.keep = keep
        self.best = best
        self.remembered: dict | None = None  # the run's state before a step that may be broken off
        self.saved: int | None = None  # the step of the last checkpoint

    def write(self, run: Run, readings: list[Reading]) -> dict[str, float]:
        """Write the readings of this step; return the scalar ones by tag."""
        metrics = self.writer.write(run.num_steps, run.epoch, run.seconds, readings)
        self._update(run, metrics=metrics)
        if self.folder is not None and self.keep == "best":
            self._save_best(run, metrics)
        return metrics

    def save(self, run: Run) -> None:
        """Write a checkpoint, unless the last one is of this step."""
        if self.folder is not None and self.saved != run.num_steps:
            self._update(run)  # a checkpoint must not be newer than the status and its last readings
            self._save(run.state_dict())

    def remember(self, run: Run | None) -> None:
        """Copy the state of ``run`` for :meth:`save_remembered`; None drops the copy."""
        is_wanted = run is not None and self.folder is not None and run.num_steps != self.saved
        self.remembered = copied_to_host(run.state_dict()) if is_wanted else None

    def save_remembered(self) -> None:
        """Write a checkpoint of the copied state, if there is one."""
        if self.remembered:
            self._save(self.remembered)

    def end(self, run: Run, status: str, **fields: object) -> None:
        """Write how the run ended. It counts as finished or diverged only if all its readings could be written."""
        try:
            self.writer.close(success=status != "failed")
        except OSError:
            if status not in DONE:
                self._update(run, status=status, **fields)
            raise
        self._update(run, status=status, **fields)

    def _save(self, state: dict) -> None:
        step = state["num_steps"]
        also = [self.folder / f"checkpoint-{step}.pt"] if self.keep == "all" else []
        with patience():
            self.writer.sync()  # readings must be on the disk before a checkpoint of a later step
            checkpoint.save(state, self.folder, *also)
        self.saved = step

    def _save_best(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Write best.pt if these weights are the best so far."""
        if (found := merit(metrics, len(run.dataset.valid) > 0)) > self.best:
            checkpoint.write(run.state_dict(), self.folder / checkpoint.BEST)
            self.best = found

    def _update(self, run: Run, **fields: object) -> None:
        if self.status is not None:
            where = {"step": run.num_steps, "epoch": run.epoch, "seconds": run.seconds}
            how = {"images": run.dataset.fingerprint, "majority": run.dataset.majority, "threads": run.threads}
            how["initial_weights"] = getattr(run.model, "initial_weights", Weights()).rule
            how |= {"evaluation": run.evaluation} if run.evaluation else {}
            how |= {"origin": run.dataset.origin} if run.dataset.origin else {}
            self.status.update(**where, **how, non_finite_gradients=run.num_bad_gradients, **fields)


def merit(metrics: Mapping[str, float | None], has_valid: bool) -> float:
    """How good a reading is: the validation accuracy or, without validation images, the negated training loss.

    More is better; -inf for a reading without such a number.
    """
    value = metrics.get("accuracy/valid" if has_valid else "loss/train")
    if not isinstance(value, int | float) or not abs(value) < math.inf:
        return -math.inf
    return value if has_valid else -value


def copied_to_host(state: object) -> object:
    """``state`` with every tensor in it copied to the host: a GPU may have no memory left for a copy."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied_to_host(value) for key, value in state.items()}
    return type(state)(map(copied_to_host, state)) if isinstance(state, list | tuple) else state
