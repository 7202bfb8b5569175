"""The loop of one run: steps, evaluations, probes and checkpoints when they are due, and the record of its end."""

import math
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from bnexp.errors import StorageError, UserError, first_line
from bnexp.store.files import not_written
from bnexp.store.readings import Reading, Scalar
from bnexp.store.writer import try_out
from bnexp.train.device import allow_tf32, explain_memory, forked_rng, naming_exceptions, prefer_repeatable
from bnexp.train.interrupt import take_time
from bnexp.train.meter import Measured
from bnexp.train.own import FAILURES, PartFailed, culprit, naming
from bnexp.train.probe import Probe
from bnexp.train.recorder import Recorder
from bnexp.train.run import Run

RUN_TAGS = {  # of the run's own readings and columns; no probe may use them
    "step", "epoch", "seconds", "optimizer/lr", "gradient/non_finite", "time/setup", "time/step", "time/probes",
    "throughput/images_per_s",
    *(f"{what}/{split}" for what in ("loss", "accuracy") for split in ("train", "train_eval", "valid", "test")),
}  # fmt: skip
LONG = 0.1  # seconds; a step with evaluations and probes that takes longer may be broken off by a signal to stop


@dataclass(frozen=True)
class Plan:
    """When a run is evaluated, probed and saved, in steps. The weights of the run do not depend on it.

    If ``checkpoint_every`` is None, checkpoints are ``checkpoint_seconds`` apart.
    """

    log_every: int
    eval_every: int
    checkpoint_every: int | None
    eval_train: bool = False
    eval_test: bool = False
    probes: Sequence[Probe] = ()
    checkpoint_seconds: float | None = None

    def wants_checkpoint(self, step: int, seconds_since: float) -> bool:
        """Whether a checkpoint is due after ``step``, ``seconds_since`` the last one was saved."""
        if self.checkpoint_every is None:
            return seconds_since >= self.checkpoint_seconds
        return step % self.checkpoint_every == 0

    def looks(self, step: int, total_steps: int) -> tuple[str, ...]:
        """The names of the evaluations and probes that are due after ``step``."""
        evaluation = ("evaluation",) if step % self.eval_every == 0 or step == total_steps else ()
        return evaluation + tuple(type(each).__name__ for each in self.due(step, total_steps))

    def due(self, step: int, total_steps: int) -> list[Probe]:
        """The probes that look after ``step``."""
        due = []
        for probe in self.probes:
            with naming(probe.label):
                due += [probe] * bool(probe.is_due(step, total_steps))
        return due


class Loop:
    """Steps a run, evaluates and probes it by a plan, and records the readings and how it ends.

    Call :meth:`step` until :attr:`is_running` is False, or :meth:`stop` to end it earlier. ``status`` is then
    ``finished``, ``diverged``, ``interrupted`` or ``failed``. An error is not raised, because other runs may be in
    lockstep with this one: it is kept in ``error``, as :class:`StorageError` if the run could not be recorded.

    ``latest`` holds the last value of every tag. ``run.seconds`` counts the time spent in the loop.
    """

    def __init__(self, run: Run, plan: Plan, recorder: Recorder) -> None:
        self.run, self.plan, self.recorder = run, plan, recorder
        self.status: str | None = None
        self.error: Exception | None = None
        self.latest: dict[str, float] = {}
        self.last_finite_loss: float | None = None
        self.is_between_steps = True  # the last step is recorded, the next is not begun
        self.saved_at = perf_counter()
        self.busy = 0.0  # seconds spent in steps since the meter was last read
        self.quick: set[tuple[str, ...]] = {()}  # sets of evaluations and probes that have taken less than LONG
        self.looks: tuple[str, ...] = ()  # the names of what looks after this step
        self.due: list[tuple[Probe, object]] = []  # the probes that look after this step, with their before()

    @property
    def is_running(self) -> bool:
        return self.status is None

    def step(self) -> None:
        """Take a step of the run and record it; end the run if no step is left."""
        try:
            with self.run.draws:
                self.begin()
                if self.is_running:
                    self.conclude(timed(self.run.step, self.run.deterministic))
        except FAILURES as error:
            self.fail(error)

    def begin(self) -> None:
        """Prepare the process, the recorder and the probes for a step, or end as finished if no step is left."""
        run = self.run
        if run.num_steps >= run.total_steps:
            self.end("finished")
            return
        when = run.num_steps + 1, run.total_steps
        self.looks = self.plan.looks(*when)
        self.recorder.remember(None if self.looks in self.quick else run)
        self.is_between_steps = False
        began = perf_counter()
        configure_process(run)
        self.due = []
        for probe in self.plan.due(*when):
            with naming(probe.label), forked_rng(run.device):
                self.due.append((probe, probe.before(run)))
        run.seconds += perf_counter() - began

    def conclude(self, seconds: float) -> None:
        """After a step that took ``seconds``: evaluate, probe, record and save what is due."""
        run, plan = self.run, self.plan
        began = perf_counter()
        origin = began - seconds - run.seconds
        self.busy += seconds
        step, is_last = run.num_steps, run.num_steps == run.total_steps
        saves = is_last or plan.wants_checkpoint(step, began - self.saved_at)
        readings: list[Reading] = []
        if step % plan.log_every == 0 or is_last or (saves and not run.meter.is_finite()):
            readings += self.read_meter(began, origin)
            if not self.is_running:
                return
        try:
            if "evaluation" in self.looks:
                with forked_rng(run.device):
                    readings += evaluate(run, plan.eval_train, test=is_last or plan.eval_test)
            if self.due:
                readings += read_probes(run, self.due)
        except FAILURES:
            if readings:
                self.recorder.write(run, readings)
            raise
        run.seconds = perf_counter() - origin
        if readings:
            self.latest |= self.recorder.write(run, readings)
        if saves:
            self.recorder.save(run)
            self.saved_at = perf_counter()
        now = perf_counter()
        run.seconds = now - origin
        if seconds + now - began < LONG:
            self.quick.add(self.looks)
        self.is_between_steps = True

    def read_meter(self, began: float, origin: float) -> list[Scalar]:
        """The readings of the steps since the meter was last read. Ends as diverged if a loss is not finite.

        ``began`` is the time at which the last step ended, ``origin`` that at which ``run.seconds`` was 0.
        """
        run = self.run
        measured = run.meter.read()
        busy, self.busy = self.busy + perf_counter() - began, 0.0
        run.num_bad_gradients += measured.num_bad
        bad = next((i for i, loss in enumerate(measured.losses) if not math.isfinite(loss)), None)
        if bad is not None:
            run.seconds = perf_counter() - origin
            before = measured.losses[bad - 1] if bad else self.last_finite_loss
            first_bad_step = run.num_steps - len(measured.losses) + bad + 1
            self.end("diverged", diverged_step=first_bad_step, last_finite_loss=before)
        self.last_finite_loss = measured.losses[-1]
        return progress_of(run, measured, busy)

    def end(self, status: str, **fields: object) -> None:
        """End with ``status``; ``fields`` go into status.json."""
        self.recorder.end(self.run, status, **fields)
        self.status = status

    def stop(self, reason: BaseException) -> None:
        """End as interrupted. Unless ``reason`` is a second Ctrl-C, save a checkpoint first.

        The checkpoint is of this step, or of the step before if this one was broken off. An :class:`OSError` is kept
        in ``error``.
        """
        self.status = "interrupted"
        take_time()
        try:
            try:
                if type(reason) is not KeyboardInterrupt:
                    if self.is_between_steps:
                        self.recorder.save(self.run)
                    else:
                        self.recorder.save_remembered()
            finally:
                self.recorder.end(self.run, "interrupted")
        except OSError as error:
            self.error = self.not_recorded(error)

    def fail(self, error: BaseException) -> None:
        """End as failed: ``error`` and its traceback go into status.json."""
        run = self.run
        error = explain_memory(error, run.device, type(run.model).__name__, run.batches.batch_size)
        when = f" after step {run.num_steps}"
        if isinstance(error, PartFailed):
            error = PartFailed(error.label, error.__cause__, when)
        elif not isinstance(error, UserError) and (label := culprit(error, run.own_parts)):
            error = PartFailed(label, error, when)
        self.status, self.error = "failed", error
        text = "".join(traceback.format_exception(error))
        try:
            self.recorder.end(run, "failed", error=first_line(error), traceback=text)
        except OSError as second:
            error.add_note(f"and the status could not be written: {second}")
        if isinstance(error, OSError):
            self.error = self.not_recorded(error)

    def not_recorded(self, error: OSError) -> StorageError:
        """The error for a run that had begun and could not be recorded."""
        why = not_written(error, self.recorder.folder)
        told = StorageError(f"the run stopped at step {self.run.num_steps} because {why}")
        told.__cause__ = error
        return told


def timed(step: Callable[[], None], deterministic: bool) -> float:
    """Call ``step()`` and return the seconds that it took. ``deterministic`` names what torch cannot repeat."""
    began = perf_counter()
    if deterministic:
        naming_exceptions(step)
    else:
        step()
    return perf_counter() - began


def configure_process(run: Run) -> None:
    """Set torch's threads, determinism and precision to those of ``run``, because another run may have stepped."""
    allow_tf32(run.precision == "tf32")
    if torch.get_num_threads() != run.threads:
        torch.set_num_threads(run.threads)
    if torch.are_deterministic_algorithms_enabled() != run.deterministic:
        prefer_repeatable(run.deterministic)


def progress_of(run: Run, measured: Measured, busy: float) -> list[Scalar]:
    """The readings of the steps ``measured``, which took ``busy`` seconds.

    The seconds in which the engine compiled or captured are ``time/setup``; ``time/step`` leaves that step out.
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


def read_probes(run: Run, due: Sequence[tuple[Probe, object]]) -> list[Reading]:
    """The readings of probes, each given with the result of its ``before``, and the seconds that they took."""
    began = perf_counter()
    with forked_rng(run.device):
        looks = [(probe.label, look(probe, run, before)) for probe, before in due]
    check_tags(looks)
    readings = [reading for _, found in looks for reading in found]
    return [*readings, Scalar("time/probes", perf_counter() - began)]


def check_tags(looks: Sequence[tuple[str, Sequence[Reading]]]) -> None:
    """Raise :class:`UserError` if a probe of the user's own, one with a label, yields a tag that is in use."""
    counts = Counter((type(each), each.tag) for _, found in looks for each in found)
    for label, each in ((label, each) for label, found in looks if label for each in found):
        if each.tag in RUN_TAGS or counts[type(each), each.tag] > 1:
            whose = "the run itself" if each.tag in RUN_TAGS else "another reading of this step"
            raise UserError(f"{label}: yields the tag {each.tag}, which {whose} has; give it another")


def look(probe: Probe, run: Run, before: object) -> list[Reading]:
    """The readings of ``probe``. Those of the user's own are tried out, because they can be anything."""
    with naming(probe.label):
        readings = list(probe.look(run, before))
        for reading in readings if probe.label else ():
            try_out(reading)
    return readings


def evaluate(run: Run, eval_train: bool, *, test: bool) -> list[Scalar]:
    """Loss and accuracy on the validation split and, if set, the training and the test split; empty ones left out."""
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
