"""Contestants in turns, so that a slow spell of the machine meets them all, and the stopwatch that each runs under."""

import resource
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar("Result")


class Time(NamedTuple):
    """Seconds by the clock, and of processor time: of all threads, and of child processes that have ended.

    Whoever else uses the machine lengthens the first; the second counts only us.
    """

    clock: float
    processor: float


def now() -> Time:
    """The time, counted from somewhere."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Time(perf_counter(), sum(each.ru_utime + each.ru_stime for each in used))


class Stopwatch:
    """What one turn of a loop took: a piece of an epoch, and in it what an epoch has once, however long it is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = self.single = Time(0.0, 0.0)
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what happens inside, on the device too."""
        self._synchronize()
        began = now()
        yield
        self._synchronize()
        self.total = _since(began)

    @contextmanager
    def once(self) -> Iterator[None]:
        """What happens inside belongs to an epoch, and not to each of its images."""
        began = now()
        yield
        spent = _since(began)
        self.single = Time(self.single.clock + spent.clock, self.single.processor + spent.processor)

    def count(self, thing: object, method: str, name: str, clock: Callable[[], float] = perf_counter) -> None:
        """Add up under ``name`` the seconds and calls of ``thing.method`` from now on."""
        inner = getattr(thing, method)

        def counted(*args: object, **options: object) -> object:
            began = clock()
            result = inner(*args, **options)
            self.seconds[name] += clock() - began
            self.calls[name] += 1
            return result

        setattr(thing, method, counted)

    def count_once(self, thing: object, method: str) -> None:
        """Take ``thing.method`` for something that an epoch has once."""
        inner = getattr(thing, method)

        def counted(*args: object, **options: object) -> object:
            with self.once():
                return inner(*args, **options)

        setattr(thing, method, counted)

    def epoch(self, scale: float) -> Time:
        """What an epoch takes that is ``scale`` times the piece."""
        pairs = zip(self.total, self.single, strict=True)
        return Time(*((total - single) * scale + single for total, single in pairs))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _since(began: Time) -> Time:
    return Time(*(after - before for after, before in zip(now(), began, strict=True)))


def in_turns(contestants: Mapping[str, Callable[[], Result]], rounds: int, warmup: int = 1) -> dict[str, list[Result]]:
    """What each contestant returned in every round, in rotating order, after ``warmup`` rounds that do not count."""
    names = list(contestants)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            result = contestants[name]()
            if turn >= 0:
                results[name].append(result)
    return results
