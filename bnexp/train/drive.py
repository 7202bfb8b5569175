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
from bnexp.train.progress import NullProgress
from bnexp.train.run import Run


def drive(loop: Loop, progress: NullProgress) -> str:
    """Train to the end and return how it ended: ``finished`` or ``diverged``. Raise the error of a run that failed.

    A signal to stop waits for the end of the step; then a checkpoint is saved and KeyboardInterrupt raised. It does
    not wait long for an evaluation or a probe: the checkpoint is then of the step before.
    """
    try:
        with deferred_signals() as asked:
            try:
                progress.start(loop.run)
                while loop.is_running:
                    metrics = loop.step()
                    if loop.is_running:
                        progress.update(loop.run, metrics)
                        if asked:
                            raise Interrupted
            except BaseException as reason:
                if loop.is_running:
                    # Progress that cannot be shown, on a closed terminal say, leaves the time for a checkpoint.
                    loop.stop(reason if isinstance(reason, KeyboardInterrupt) else Interrupted())
                if loop.error is None:
                    raise
                raise loop.error from loop.error.__cause__  # the checkpoint could not be written
        if loop.error is not None:
            raise loop.error
        if asked:  # while the run came to its end; others may come after it
            raise Interrupted
    finally:
        progress.end(loop.run, loop.status)
    return loop.status


@dataclass(frozen=True)
class Group:
    """Loops whose runs step together: ``step_runs(runs)`` takes the next step of runs that are at the same step.

    Without it every run takes its own.
    """

    loops: Sequence[Loop]
    step_runs: Callable[[Sequence[Run]], None] | None = None

    def step(self, num_steps: int) -> None:
        """Take the next step of the runs that have taken ``num_steps``, then look at each of them."""
        loops = [loop for loop in self.loops if loop.is_running and loop.run.num_steps == num_steps]
        if self.step_runs is None:
            for loop in loops:
                loop.step()
        else:
            self.step_together(loops)
        tell_not_recorded(loops)

    def step_together(self, loops: Sequence[Loop]) -> None:
        """:meth:`Loop.step` of all ``loops``; each is given the same share of the seconds of the common step."""
        for loop in loops:
            attempt(loop, loop.begin)
        loops = [loop for loop in loops if loop.is_running]
        if not loops:
            return
        runs = [loop.run for loop in loops]
        try:
            seconds = timed(partial(self.step_runs, runs), runs[0].deterministic)
        except Exception as error:
            for loop in loops:
                loop.fail(error)
            return
        for loop in loops:
            attempt(loop, partial(loop.conclude, seconds / len(loops)))


def attempt(loop: Loop, function: Callable[[], object]) -> None:
    """Call ``function``; what it raises fails ``loop``."""
    try:
        function()
    except Exception as error:
        loop.fail(error)


def lockstep(groups: Sequence[Group]) -> Iterator[int]:
    """Step all runs to their ends; yield the number of steps that every run still on its way has taken.

    Runs that are behind, because they continue from an earlier checkpoint, go first. A signal to stop ends every run
    with a checkpoint and raises KeyboardInterrupt.
    """
    loops = [loop for group in groups for loop in group.loops]
    with deferred_signals() as asked:
        try:
            while running := [loop for loop in loops if loop.is_running]:
                num_steps = min(loop.run.num_steps for loop in running)
                with suppress(OutOfPatience):  # the others are stopped below too, with the time for a checkpoint
                    for group in groups:
                        if not (asked and perf_counter() - asked[0] > HURRY):
                            group.step(num_steps)
                if asked:
                    raise Interrupted
                if any(loop.run.num_steps > num_steps for loop in running):  # after its last step a run only ends
                    yield num_steps + 1
        except BaseException as reason:
            raise stop_all(loops, reason) from None
    if asked:
        raise Interrupted


def stop_all(loops: Sequence[Loop], reason: BaseException) -> BaseException:
    """Stop every loop on its way for ``reason``; return it, or what was raised meanwhile: a second Ctrl-C, say."""
    for loop in loops:
        if loop.is_running:
            try:
                loop.stop(reason)
            except BaseException as again:
                reason = again
            tell_not_recorded([loop])
    return reason


def tell_not_recorded(loops: Sequence[Loop]) -> None:
    """Say on stderr which runs could not be written down."""
    for loop in loops:
        if isinstance(loop.error, StorageError):
            print(f"bnexp: error: {loop.error}", file=sys.stderr)
