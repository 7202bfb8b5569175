"""Being asked to stop: Ctrl-C and SIGTERM wait for the end of the step, but not for ever."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

PATIENCE = 2.0  # seconds for what is under way when somebody asks; the checkpoint comes on top
HURRY = 1.0  # seconds after which nothing more is begun


class Interrupted(KeyboardInterrupt):
    """Asked to stop, and stopped between two steps, where a checkpoint can be taken."""


class OutOfPatience(KeyboardInterrupt):
    """Asked to stop, and broken off in the middle of a step, or of looking at the run after it."""


_is_patient = False


@contextmanager
def deferred_signals(longer: float = 0.0) -> Iterator[list[float]]:
    """Note when SIGINT or SIGTERM comes instead of breaking off a step; a second Ctrl-C breaks off at once.

    What is not over ``PATIENCE`` seconds later, or so much ``longer``, is broken off by :class:`OutOfPatience`, but
    never a checkpoint.
    """
    asked: list[float] = []

    def ask(number: int, frame: object) -> None:
        if number == signal.SIGALRM:
            if not _is_patient:
                raise OutOfPatience
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        elif not asked:
            asked.append(perf_counter())
            signal.setitimer(signal.ITIMER_REAL, PATIENCE + longer)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    try:
        before = {each: signal.signal(each, ask) for each in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only a main thread may; elsewhere signals go where they went
        yield asked
        return
    try:
        yield asked
    finally:
        take_time()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def patience() -> Iterator[None]:
    """What is done inside runs out of patience only afterwards: a checkpoint on its way to a slow disk."""
    global _is_patient
    before, _is_patient = _is_patient, True
    try:
        yield
    finally:
        _is_patient = before


def take_time() -> None:
    """What is done from here on, to come to an end, is broken off by nothing but a second Ctrl-C."""
    signal.setitimer(signal.ITIMER_REAL, 0)
