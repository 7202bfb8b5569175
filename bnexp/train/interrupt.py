"""Signals that stop a run: a step is finished first, unless it takes too long."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

PATIENCE = 2.0  # seconds after a signal until a step is broken off; a checkpoint may take longer
HURRY = 1.0  # seconds after a signal from which no step is begun
# Ctrl-C, kill, a closed terminal, and the warning of a scheduler that a job's time is nearly over.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """Raised between two steps after a signal to stop: a checkpoint of this step can be saved."""


class OutOfPatience(KeyboardInterrupt):
    """Raised inside a step that was not over in time after a signal to stop."""


_is_patient = False


@contextmanager
def deferred_signals(longer: float = 0.0) -> Iterator[list[float]]:
    """Yield a list to which the time of the first of SIGNALS is added, instead of breaking off a step.

    :class:`OutOfPatience` is raised ``PATIENCE + longer`` seconds after it, but never inside :func:`patience`, and
    KeyboardInterrupt at a second Ctrl-C.
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

    heard = [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]  # nohup
    try:
        before = {each: signal.signal(each, ask) for each in (signal.SIGALRM, *heard)}
    except ValueError:  # not the main thread, in which alone Python sets handlers
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
    """Raise no :class:`OutOfPatience` inside: a checkpoint may be on its way to a slow disk."""
    global _is_patient
    before, _is_patient = _is_patient, True
    try:
        yield
    finally:
        _is_patient = before


def take_time() -> None:
    """Raise no :class:`OutOfPatience` from here on. A second Ctrl-C still raises KeyboardInterrupt."""
    signal.setitimer(signal.ITIMER_REAL, 0)
