"""Requests to stop: signals wait for the end of the step, but not for ever."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

PATIENCE = 2.0  # seconds after a signal until a step or a look is broken off; a checkpoint may take longer
HURRY = 1.0  # seconds after a signal from which no step is begun
# Ctrl-C, kill, a closed terminal, and the warning that schedulers send before the time of a job is over.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """A request to stop, carried out between two steps, where a checkpoint can be saved."""


class OutOfPatience(KeyboardInterrupt):
    """A request to stop that broke off a step or a look, because it was not over in time."""


_is_patient = False


@contextmanager
def deferred_signals(longer: float = 0.0) -> Iterator[list[float]]:
    """Note in the list when one of SIGNALS comes, in place of breaking off a step; a second Ctrl-C breaks off at once.

    ``PATIENCE`` plus ``longer`` seconds later :class:`OutOfPatience` is raised, but never inside :func:`patience`.
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
    except ValueError:  # not the main thread: signals keep their handlers
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
    """Put :class:`OutOfPatience` off until the block is over: a checkpoint may be on its way to a slow disk."""
    global _is_patient
    before, _is_patient = _is_patient, True
    try:
        yield
    finally:
        _is_patient = before


def take_time() -> None:
    """Raise no :class:`OutOfPatience` from here on; only a second Ctrl-C breaks off what follows."""
    signal.setitimer(signal.ITIMER_REAL, 0)
