"""Signals that stop a run: a step is finished first, unless it takes too long."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from bnexp.startup import SIGNALS

PATIENCE = 2.0  # seconds after a signal until a step is broken off; a checkpoint may take longer
HURRY = 1.0  # seconds after a signal from which no step is begun


class Interrupted(KeyboardInterrupt):
    """Raised between two steps after a signal to stop: a checkpoint of this step can be saved."""


class OutOfPatience(KeyboardInterrupt):
    """Raised inside a step that was not over in time after a signal to stop."""


_is_patient = False
_asked: list[float] | None = None  # the times of signals, while in raised_signals


def handle(handler: Callable[[int, object], object], *also: int) -> dict[int, object]:
    """Set the handler of ``also`` and of all SIGNALS that the process does not ignore; returns the earlier handlers.

    Does nothing in other threads than the main thread, because Python sets handlers in no other.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [each for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN]  # as in nohup
    return {each: signal.signal(each, handler) for each in (*also, *heard)}


@contextmanager
def handled(handler: Callable[[int, object], object], *also: int) -> Iterator[None]:
    """:func:`handle` signals inside the block."""
    before = handle(handler, *also)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def raised_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt inside the block at the first of SIGNALS, and at every further Ctrl-C.

    If it is raised where it cannot be passed on, the next :func:`deferred_signals` yields the time of the signal.
    """
    global _asked
    asked: list[float] = []

    def stop(number: int, frame: object) -> None:
        if number == signal.SIGINT or not asked:
            asked.append(perf_counter())
            raise KeyboardInterrupt

    before, _asked = _asked, asked
    try:
        with handled(stop):
            yield
    finally:
        _asked = before


@contextmanager
def deferred_signals(longer: float = 0.0, tell: Callable[[], object] = lambda: None) -> Iterator[list[float]]:
    """Yield a list to which the time of the first of SIGNALS is added, instead of breaking off a step.

    ``tell()`` is called at the first signal. :class:`OutOfPatience` is raised ``PATIENCE + longer`` seconds after it,
    but never inside :func:`patience`, and KeyboardInterrupt at a second Ctrl-C.
    """
    asked = [] if _asked is None else _asked

    def ask(number: int, frame: object) -> None:
        if number == signal.SIGALRM:
            if not _is_patient:
                raise OutOfPatience
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        elif not asked:
            asked.append(perf_counter())
            signal.setitimer(signal.ITIMER_REAL, PATIENCE + longer)
            tell()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    with handled(ask, signal.SIGALRM):
        try:
            yield asked
        finally:
            take_time()


@contextmanager
def blocked_in_children() -> Iterator[None]:
    """Start processes inside the block with SIGNALS blocked: a signal waits until they unblock it.

    This process is not affected: a thread receives signals for it, and Python runs handlers in the main thread.
    """
    from multiprocessing.resource_tracker import ensure_running  # slow to import

    is_over = threading.Event()
    threading.Thread(target=is_over.wait, daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        ensure_running()  # it unblocks signals, in Python before 3.12
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        is_over.set()


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
