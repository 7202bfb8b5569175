"""Drives a run from its first step to its last: readings on schedule, evaluation, checkpoints, a clean end."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from bnexp.store.readings import Reading, Scalar
from bnexp.train.device import naming_exceptions, prefer_repeatable
from bnexp.train.interrupt import Interrupted, deferred_signals
from bnexp.train.meter import Measured
from bnexp.train.probe import Probe, same_chance
from bnexp.train.progress import NullProgress
from bnexp.train.recorder import Diverged, Journal, recorded
from bnexp.train.run import Run, first_non_finite

LONG = 0.1  # seconds; a look that takes longer may have to be broken off by somebody who wants the run to stop


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

    def looks(self, step: int, total_steps: int) -> tuple[str, ...]:
        """How the run is looked at after ``step``."""
        evaluation = ("evaluation",) if step % self.eval_every == 0 or step == total_steps else ()
        return evaluation + tuple(type(each).__name__ for each in self.probes if each.is_due(step, total_steps))


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
        began, origin = began - run.seconds_elsewhere, origin - run.seconds_elsewhere  # of folded runs
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

    Ctrl-C and SIGTERM wait for the end of the step, then leave a checkpoint and raise KeyboardInterrupt. They do not
    wait long for an evaluation or a probe: then the checkpoint is of the step before.
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
        if asked:  # at the very end of this run; others may come after it
            raise Interrupted
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
    steps = recorded_steps(run, plan, journal, ended)
    next(steps)  # from here on nothing that happens to it goes unrecorded
    return steps


def recorded_steps(
    run: Run, plan: Plan, journal: Journal, ended: dict[str, str]
) -> Generator[dict[str, float], None, None]:
    """Nothing, then the items of :func:`advance`."""
    with recorded(run, journal, ended):
        yield {}
        began, quick = perf_counter(), {()}
        for metrics in advance(run, plan, journal):
            if perf_counter() - began < LONG:
                quick.add(plan.looks(run.num_steps, run.total_steps))
            # Here and not when the next step begins, which may have been taken in another run's turn by then.
            is_quick = plan.looks(run.num_steps + 1, run.total_steps) in quick
            journal.remember(None if is_quick else run)
            yield metrics
            began = perf_counter()
