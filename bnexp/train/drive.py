"""Drives one loop to its end, or several in lockstep: every run takes step k before any takes k + 1."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from bnexp.errors import StorageError
from bnexp.train.interrupt import HURRY, Interrupted, OutOfPatience, deferred_signals
from bnexp.train.loop import Loop, timed
from bnexp.train.own import FAILURES
from bnexp.train.progress import NullProgress
from bnexp.train.run import Run


def drive(loop: Loop, progress: NullProgress) -> str:
    """Train to the end and return how it ended: ``finished`` or ``diverged``. Raise the error of a run that failed.

    After a signal to stop, the step is finished, a checkpoint saved and KeyboardInterrupt raised. An evaluation or a
    probe that takes long is broken off; the checkpoint is then that of the step before.
    """
    try:
        with deferred_signals() as asked:
            try:
                progress.start(loop)
                while loop.is_running:
                    loop.step()
                    if loop.is_running:
                        progress.update(loop)
                        if asked:
                            raise Interrupted
            except BaseException as reason:
                if loop.is_running:
                    # A checkpoint is saved too if progress cannot be shown, on a closed terminal for example.
                    loop.stop(reason if isinstance(reason, KeyboardInterrupt) else Interrupted())
                if loop.error is None:
                    raise
                raise loop.error from loop.error.__cause__  # the checkpoint could not be written
        if loop.error is not None:
            raise loop.error
        if asked:  # during the run's end; a sweep must not go on with the next run
            raise Interrupted
    finally:
        progress.end(loop)
    return loop.status


@dataclass(frozen=True)
class Group:
    """Loops whose runs step together.

    ``step_runs(runs)`` takes the next step of runs that are at the same step; without it they step one by one.
    """

    loops: Sequence[Loop]
    step_runs: Callable[[Sequence[Run]], None] | None = None

    def step(self, num_steps: int) -> None:
        """Take the next step of the runs that have taken ``num_steps``, and record it."""
        loops = [loop for loop in self.loops if loop.is_running and loop.run.num_steps == num_steps]
        if self.step_runs is None:
            for loop in loops:
                loop.step()
        else:
            self.step_together(loops)
        tell_not_recorded(loops)

    def step_together(self, loops: Sequence[Loop]) -> None:
        """Do :meth:`Loop.step` for all ``loops``. The seconds of the common step are divided equally among them."""
        for loop in loops:
            attempt(loop, loop.begin)
        loops = [loop for loop in loops if loop.is_running]
        if not loops:
            return
        runs = [loop.run for loop in loops]
        try:
            seconds = timed(partial(self.step_runs, runs), runs[0].deterministic)
        except FAILURES as error:
            for loop in loops:
                loop.fail(error)
            return
        for loop in loops:
            attempt(loop, partial(loop.conclude, seconds / len(loops)))


def attempt(loop: Loop, function: Callable[[], object]) -> None:
    """Call ``function``; if it raises an error, ``loop`` ends as failed."""
    try:
        with loop.run.draws:
            function()
    except FAILURES as error:
        loop.fail(error)


def lockstep(groups: Sequence[Group]) -> Iterator[int]:
    """Step all runs to their ends; yield the number of steps taken, after every step.

    Runs that continue from an earlier checkpoint than the others catch up first. After a signal to stop, every run
    saves a checkpoint and KeyboardInterrupt is raised.
    """
    loops = [loop for group in groups for loop in group.loops]
    with deferred_signals() as asked:
        try:
            while running := [loop for loop in loops if loop.is_running]:
                num_steps = min(loop.run.num_steps for loop in running)
                with suppress(OutOfPatience):  # Interrupted, raised below, lets every run save a checkpoint
                    for group in groups:
                        if not (asked and perf_counter() - asked[0] > HURRY):
                            group.step(num_steps)
                if asked:
                    raise Interrupted
                if any(loop.run.num_steps > num_steps for loop in running):  # not in the turn in which runs only end
                    yield num_steps + 1
        except BaseException as reason:
            raise stop_all(loops, reason) from None
    if asked:
        raise Interrupted


def stop_all(loops: Sequence[Loop], reason: BaseException) -> BaseException:
    """Stop every running loop for ``reason``. Return it, or the last error while stopping (a second Ctrl-C)."""
    for loop in loops:
        if loop.is_running:
            try:
                loop.stop(reason)
            except BaseException as again:
                reason = again
            tell_not_recorded([loop])
    return reason


def tell_not_recorded(loops: Sequence[Loop]) -> None:
    """Print on stderr why runs could not be recorded."""
    for loop in loops:
        if isinstance(loop.error, StorageError):
            print(f"bnexp: error: {loop.error}", file=sys.stderr)
