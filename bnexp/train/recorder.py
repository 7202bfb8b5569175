"""Where a run is written down, and how it ended: readings, status and checkpoints in one folder, or nowhere."""

import math
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from bnexp.errors import StorageError, UserError
from bnexp.store import checkpoint
from bnexp.store.files import not_written
from bnexp.store.readings import Reading
from bnexp.store.run_folder import DONE, Status
from bnexp.store.writer import NullWriter, Writer
from bnexp.train.device import memory_explained
from bnexp.train.interrupt import Interrupted, OutOfPatience, patience, take_time
from bnexp.train.run import Run


class Diverged(Exception):
    """The loss stopped being finite: a result, not a fault."""

    def __init__(self, step: int, last_finite_loss: float | None) -> None:
        super().__init__(f"the loss is not finite since step {step}")
        self.step = step
        self.last_finite_loss = last_finite_loss


class Journal:
    """Where a run is recorded: readings, status and checkpoints in one folder, or nowhere (``folder=None``).

    ``keep=best`` keeps the best weights too, in best.pt, ``all`` every checkpoint, as checkpoint-STEP.pt. ``best`` is
    the :func:`merit` that a run which goes on has come to before.
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
        self.before: dict | None = None  # the run before a step that it takes long to look at
        self.saved: int | None = None  # the step of the last checkpoint

    def write(self, run: Run, readings: list[Reading]) -> dict[str, float]:
        metrics = self.writer.write(run.num_steps, run.epoch, run.seconds, readings)
        self._update(run, metrics=metrics)
        if self.folder is not None and self.keep == "best":
            self._save_best(run, metrics)
        return metrics

    def save(self, run: Run) -> None:
        """Write a checkpoint, unless there is one of this step."""
        if self.folder is not None and self.saved != run.num_steps:
            self._update(run)  # with the readings that this checkpoint takes for granted
            self._save(run.state_dict())

    def _save(self, state: dict) -> None:
        step = state["num_steps"]
        also = [self.folder / f"checkpoint-{step}.pt"] if self.keep == "all" else []
        with patience():
            self.writer.sync()  # so that no checkpoint is safer than the readings it takes for granted
            checkpoint.save(state, self.folder, *also)
        self.saved = step

    def _save_best(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Keep these weights if no reading was as good, before any checkpoint that takes this reading for granted."""
        if (found := merit(metrics, len(run.dataset.valid) > 0)) > self.best:
            checkpoint.write(run.state_dict(), self.folder / checkpoint.BEST)
            self.best = found

    def remember(self, run: Run | None) -> None:
        """Keep a copy of ``run`` for :meth:`stop`, or of none."""
        is_wanted = run is not None and self.folder is not None and run.num_steps != self.saved
        self.before = copied(run.state_dict()) if is_wanted else None

    def stop(self, run: Run, reason: BaseException) -> None:
        """Leave a checkpoint, if ``reason`` leaves the time: of now, or if that is no whole step of before it."""
        take_time()
        try:
            if isinstance(reason, Interrupted) and not run.is_ahead:
                self.save(run)
            elif isinstance(reason, Interrupted | OutOfPatience) and self.before:
                self._save(self.before)
        finally:
            self.end(run, "interrupted")

    def end(self, run: Run, status: str, **fields: object) -> None:
        """Write how the run ended, and of a result that only when all of it is written down."""
        try:
            self.writer.close(success=status != "failed")
        except OSError:
            if status not in DONE:
                self._update(run, status=status, **fields)
            raise
        self._update(run, status=status, **fields)

    def _update(self, run: Run, **fields: object) -> None:
        if self.status is not None:
            where = {"step": run.num_steps, "epoch": run.epoch, "seconds": run.seconds}
            self.status.update(**where, non_finite_gradients=run.num_bad_gradients, **fields)


def merit(metrics: Mapping[str, float | None], has_valid: bool) -> float:
    """How good a reading is, more is better: the accuracy on validation images or, where there are none, the
    training loss since the reading before, negated; -inf for what was not read."""
    value = metrics.get("accuracy/valid" if has_valid else "loss/train")
    if not isinstance(value, int | float) or not abs(value) < math.inf:
        return -math.inf
    return value if has_valid else -value


def copied(state: object) -> object:
    """``state`` with every tensor in it copied to the host, where there is room."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return type(state)(map(copied, state)) if isinstance(state, list | tuple) else state


@contextmanager
def recorded(run: Run, journal: Journal, ended: dict[str, str]) -> Iterator[None]:
    """Write down how what happens inside ends; only divergence is not passed on."""
    try:
        end: dict[str, object] = {"status": "finished"}
        try:
            with memory_explained(run.device, type(run.model).__name__, run.batches.batch_size):
                yield
        except Diverged as error:
            end = {"status": "diverged", "diverged_step": error.step, "last_finite_loss": error.last_finite_loss}
        ended["status"] = end["status"]
        journal.end(run, **end)
    except (KeyboardInterrupt, GeneratorExit) as error:
        ended["status"] = "interrupted"
        try:
            journal.stop(run, error)
        except OSError as problem:
            raise stopped(run, journal, problem) from problem
        raise
    except Exception as error:
        ended["status"] = "failed"
        reason = (str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}").splitlines()[0]
        try:
            journal.end(run, "failed", error=reason, traceback=traceback.format_exc())
        except OSError as second:
            error.add_note(f"and the status could not be written: {second}")
        if isinstance(error, OSError):
            raise stopped(run, journal, error) from error
        raise


def stopped(run: Run, journal: Journal, error: OSError) -> StorageError:
    """What to tell when a run that had begun could not be written down."""
    return StorageError(f"the run stopped at step {run.num_steps} because {not_written(error, journal.folder)}")


KEEP = ("last", "best", "all")  # which checkpoints stay: the last two always
