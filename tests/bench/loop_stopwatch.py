"""The stopwatch that a loop runs under, and turns, so that a slow spell of the machine meets every loop."""

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

    Other programs lengthen the first, but not the second.
    """

    clock: float
    processor: float


def now() -> Time:
    """The present time; only differences mean something."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Time(perf_counter(), sum(each.ru_utime + each.ru_stime for each in used))


def time_since(began: Time) -> Time:
    """The difference between now and ``began``."""
    return Time(*(after - before for after, before in zip(now(), began, strict=True)))


class Stopwatch:
    """The time of one turn, which is a piece of an epoch.

    ``total`` is the whole turn. ``single`` is the part of it that an epoch has once, whatever its length.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = self.single = Time(0.0, 0.0)
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the block, and the work that it starts on the device."""
        self._synchronize()
        began = now()
        yield
        self._synchronize()
        self.total = time_since(began)

    @contextmanager
    def once(self) -> Iterator[None]:
        """Count the block's time as what an epoch has once."""
        began = now()
        yield
        spent = time_since(began)
        self.single = Time(self.single.clock + spent.clock, self.single.processor + spent.processor)

    def count(self, thing: object, method: str, name: str, clock: Callable[[], float] = perf_counter) -> None:
        """From now on, add up the seconds and calls of ``thing.method`` under ``name``."""
        inner = getattr(thing, method)

        def counted(*args: object, **options: object) -> object:
            began = clock()
            result = inner(*args, **options)
            self.seconds[name] += clock() - began
            self.calls[name] += 1
            return result

        setattr(thing, method, counted)

    def count_once(self, thing: object, method: str) -> None:
        """From now on, count the time of ``thing.method`` as what an epoch has once."""
        inner = getattr(thing, method)

        def counted(*args: object, **options: object) -> object:
            with self.once():
                return inner(*args, **options)

        setattr(thing, method, counted)

    def epoch(self, scale: float) -> Time:
        """The time of an epoch of ``scale`` turns."""
        pairs = zip(self.total, self.single, strict=True)
        return Time(*((total - single) * scale + single for total, single in pairs))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def in_turns(contestants: Mapping[str, Callable[[], Result]], rounds: int, warmup: int = 1) -> dict[str, list[Result]]:
    """The results of every contestant in every round, in rotating order, after ``warmup`` rounds that do not count."""
    names = list(contestants)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            result = contestants[name]()
            if turn >= 0:
                results[name].append(result)
    return results
