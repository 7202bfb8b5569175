"""Drives a run from its first step to its last: readings on schedule, evaluation, checkpoints, a clean end."""

import math
import signal
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from bnexp import checkpoint
from bnexp.device import memory_explained, naming_exceptions, prefer_repeatable
from bnexp.errors import StorageError, UserError
from bnexp.folder import Status
from bnexp.meter import Measured
from bnexp.probes.base import Probe, same_chance
from bnexp.progress import NullProgress
from bnexp.readings import Reading, Scalar
from bnexp.run import Run, first_non_finite
from bnexp.writer import NullWriter, Writer

KEEP = ("last", "best", "all")  # which checkpoints stay: the last two always


@dataclass(frozen=True)
class Plan:
    """When a run is looked at, in steps. Whatever stands here, the run's weights come out the same.

    ``checkpoint_seconds`` is the time between two checkpoints, where ``checkpoint_every`` is None.
    """

    log_every: int
    eval_every: int
    checkpoint_every: int | None
    eval_train: bool = False
    eval_test: bool = False
    probes: Sequence[Probe] = ()
    checkpoint_seconds: float | None = None

    def wants_checkpoint(self, step: int, seconds_since: float) -> bool:
        """Whether one is due after ``step``, the last being ``seconds_since`` old."""
        if self.checkpoint_every is None:
            return seconds_since >= self.checkpoint_seconds
        return step % self.checkpoint_every == 0


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

    def write(self, run: Run, readings: list[Reading]) -> dict[str, float]:
        metrics = self.writer.write(run.num_steps, run.epoch, run.seconds, readings)
        self._update(run, metrics=metrics)
        if self.folder is not None and self.keep == "best":
            self._save_best(run, metrics)
        return metrics

    def save(self, run: Run) -> None:
        if self.folder is not None:
            path = checkpoint.save(run.state_dict(), self.folder)
            if self.keep == "all":
                checkpoint.also_call(path, self.folder / f"checkpoint-{run.num_steps}.pt")

    def _save_best(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Keep these weights if no reading was as good, before any checkpoint that takes this reading for granted."""
        if (found := merit(metrics, len(run.dataset.valid) > 0)) > self.best:
            checkpoint.write(run.state_dict(), self.folder / checkpoint.BEST)
            self.best = found

    def end(self, run: Run, status: str, **fields: object) -> None:
        """Write how the run ended. Should even that fail, what was written before stays as it is."""
        try:
            self._update(run, status=status, **fields)
        finally:
            self.writer.close(success=status != "failed")

    def _update(self, run: Run, **fields: object) -> None:
        if self.status is not None:
            where = {"step": run.num_steps, "epoch": run.epoch, "seconds": run.seconds}
            self.status.update(**where, non_finite_gradients=run.num_bad_gradients, **fields)


def merit(metrics: Mapping[str, float | None], has_valid: bool) -> float:
    """How good a reading is, more is better: the accuracy on validation images or, where there are none, the
    training loss since the reading before, negated; -inf for what was not read."""
    value = metrics.get("accuracy/valid" if has_valid else "loss/train")
    if value is None or not math.isfinite(value):
        return -math.inf
    return value if has_valid else -value


def advance(run: Run, plan: Plan, journal: Journal) -> Iterator[dict[str, float]]:
    """Take the run to its last step, one step per item; an item holds that step's readings, mostly none.

    Being a generator it can be driven to the end at once or in lockstep with others: the numbers are the same.
    ``run.seconds`` counts the time spent in here. Raises :class:`Diverged`.
    """
    busy, last_finite, saved = 0.0, None, perf_counter()
    while run.num_steps < run.total_steps:
        origin = perf_counter() - run.seconds
        take_turn(run)
        due = [probe for probe in plan.probes if probe.is_due(run.num_steps + 1, run.total_steps)]
        before = [probe.before(run) for probe in due]
        began = perf_counter()
        if run.deterministic:
            naming_exceptions(run.step)
        else:
            run.step()
        step, is_last = run.num_steps, run.num_steps == run.total_steps
        saves = is_last or plan.wants_checkpoint(step, perf_counter() - saved)
        readings: list[Reading] = []
        if step % plan.log_every == 0 or is_last or (saves and not run.meter.is_finite()):
            measured = run.meter.read()
            busy += perf_counter() - began
            run.num_bad_gradients += measured.num_bad
            if (bad := first_non_finite(measured.losses)) is not None:
                run.seconds = perf_counter() - origin
                raise Diverged(step - len(measured.losses) + bad + 1, measured.losses[bad - 1] if bad else last_finite)
            last_finite = measured.losses[-1]
            readings += progress_of(run, measured, busy)
            busy = 0.0
        else:
            busy += perf_counter() - began
        if step % plan.eval_every == 0 or is_last:
            readings += evaluate(run, plan.eval_train, test=is_last or plan.eval_test)
        if due:
            readings += look(run, due, before)
        run.seconds = perf_counter() - origin
        metrics = journal.write(run, readings) if readings else {}
        if saves:
            journal.save(run)
            saved = perf_counter()
        run.seconds = perf_counter() - origin
        yield metrics


def take_turn(run: Run) -> None:
    """Set what belongs to the process as this run wants it: somebody else's turn may have been before."""
    if torch.get_num_threads() != run.threads:
        torch.set_num_threads(run.threads)
    if torch.are_deterministic_algorithms_enabled() != run.deterministic:
        prefer_repeatable(run.deterministic)


def progress_of(run: Run, measured: Measured, busy: float) -> list[Scalar]:
    """What the steps since the last reading say, which kept us ``busy`` for so many seconds.

    A step in which the engine got ready, by compiling say, is told apart (``time/setup``) and not in ``time/step``.
    """
    readings = [
        Scalar("loss/train", measured.loss),
        Scalar("accuracy/train", measured.accuracy),
        Scalar("optimizer/lr", run.learning_rate),
    ]
    if measured.num_bad:
        readings.append(Scalar("gradient/non_finite", measured.num_bad))
    sizes = measured.sizes
    if run.setup_seconds:
        readings.append(Scalar("time/setup", run.setup_seconds))
        busy, sizes, run.setup_seconds = busy - run.setup_seconds, sizes[1:], 0.0
    if sizes:
        readings += [Scalar("time/step", busy / len(sizes)), Scalar("throughput/images_per_s", sum(sizes) / busy)]
    return readings


def look(run: Run, probes: Sequence[Probe], before: Sequence[object]) -> list[Reading]:
    """What these probes see of the run, and the seconds that looking took."""
    began = perf_counter()
    with same_chance(run):
        readings = [reading for probe, seen in zip(probes, before, strict=True) for reading in probe.look(run, seen)]
    return [*readings, Scalar("time/probes", perf_counter() - began)]


def evaluate(run: Run, eval_train: bool, *, test: bool) -> list[Scalar]:
    """Loss and accuracy on the splits that are due and not empty."""
    splits = {"valid": run.dataset.valid}
    if eval_train:
        splits["train_eval"] = run.dataset.train
    if test:
        splits["test"] = run.dataset.test
    readings = []
    for name, split in splits.items():
        if len(split):
            loss, accuracy = run.evaluate(split)
            readings += [Scalar(f"loss/{name}", loss), Scalar(f"accuracy/{name}", accuracy)]
    return readings


def drive(run: Run, plan: Plan, journal: Journal, progress: NullProgress) -> str:
    """Train to the end and return how it ended: ``finished`` or ``diverged``.

    Ctrl-C and SIGTERM wait for the end of the step, then leave a checkpoint and raise KeyboardInterrupt.
    """
    ended: dict[str, str] = {}
    steps = follow(run, plan, journal, ended)
    progress.start(run)
    try:
        with deferred_signals() as asked:
            for metrics in steps:
                progress.update(run, metrics)
                if asked:
                    steps.throw(Interrupted())
    finally:
        steps.close()
        progress.end(run, ended["status"])
    return ended["status"]


def follow(
    run: Run, plan: Plan, journal: Journal, ended: dict[str, str]
) -> Generator[dict[str, float], None, None]:
    """:func:`advance`, recorded: however it ends, the journal and ``ended["status"]`` say so.

    Divergence ends it quietly. To interrupt it between two steps, throw :class:`Interrupted` into it.
    """
    with recorded(run, journal, ended):
        yield from advance(run, plan, journal)


class Interrupted(KeyboardInterrupt):
    """Asked to stop, and stopped between two steps, where a checkpoint can be taken."""


@contextmanager
def recorded(run: Run, journal: Journal, ended: dict[str, str]) -> Iterator[None]:
    """Write down how what happens inside ends; only divergence is not passed on."""
    try:
        with memory_explained(run.device, type(run.model).__name__, run.batches.batch_size):
            yield
        ended["status"] = "finished"
        journal.end(run, "finished")
    except Diverged as error:
        ended["status"] = "diverged"
        journal.end(run, "diverged", diverged_step=error.step, last_finite_loss=error.last_finite_loss)
    except (KeyboardInterrupt, GeneratorExit) as error:
        ended["status"] = "interrupted"
        if isinstance(error, Interrupted):
            journal.save(run)
        journal.end(run, "interrupted")
        raise
    except Exception as error:
        ended["status"] = "failed"
        reason = (str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}").splitlines()[0]
        try:
            journal.end(run, "failed", error=reason, traceback=traceback.format_exc())
        except OSError as second:
            error.add_note(f"and the status could not be written: {second}")
        if isinstance(error, OSError):
            raise StorageError(
                f"the run stopped at step {run.num_steps} because it could not be written down: {error}; what was "
                f"written before stays readable in {journal.folder}; free some space, then go on with "
                f"bnexp resume {journal.folder}"
            ) from error
        raise


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of breaking off a step; a second Ctrl-C breaks off at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only a main thread may; elsewhere signals go where they went
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
