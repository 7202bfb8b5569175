"""What capturing takes: a recorder, numbers that only the device moves, and steps that are captured once and replayed.

What a step is, of one run or of many, say :mod:`bnexp.engines.graph` and :mod:`bnexp.engines.graph_fold`.
"""

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bnexp.errors import UserError


def check_warmup(warmup_steps: int) -> None:
    """Raise :class:`UserError` for what is no number of steps."""
    if type(warmup_steps) is not int or warmup_steps < 1:
        raise UserError(f"engine.warmup_steps={warmup_steps}: steps before the capture; give a whole number, 1 or more")


@cache
def tell(reason: str) -> None:
    """Say on stderr, once, why nothing is captured."""
    print(f"bnexp: warning: engine=graph: {reason}; going step by step as engine=eager does", file=sys.stderr)


def why_not(optimizer: Optimizer) -> str | None:
    """What about an optimizer is known not to be capturable, None if nothing is."""
    if all(group.get("fused") for group in optimizer.param_groups):
        return None
    name = type(optimizer).__name__
    return f"of the optimizers only SGD, Adam and AdamW with optimizer.fused=true can be captured, this is {name}"


class Counter:
    """A number on the device that a captured step moves, and what the host knows it to be."""

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros(1, dtype=torch.int64, device=device)
        self.known = 0

    def put(self, value: int) -> None:
        """Set it, if it is not that already."""
        if value != self.known:
            self.tensor.fill_(value)
            self.known = value


class CudaGraphs:
    """How CUDA captures: the seam at which a test can put in another recorder."""

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """A side stream, as captures have, on which it is an error to wait for the device."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        before = torch.cuda.get_sync_debug_mode()
        stream.wait_stream(current)
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the debug mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
        current.wait_stream(stream)

    def capture(self, function: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        """Record what ``function`` does and return what does it again; ``generators`` move on with every replay."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            function()
        return graph.replay


class Replayed(ABC):
    """Steps of one batch size that are captured once and replayed, bit for bit those that are not captured.

    The first step of a process is taken uncaptured, because it makes the optimizer's state. Before the capture, which
    comes with the second, some steps warm up what is made lazily (workspaces, algorithm choices, autograd's buffers);
    all that they moved is put back. A short last batch has a graph of its own.

    Which step it is (``at``) and where its batch begins in the epoch's order (``start``) are on the device, and a
    captured step moves them on. ``setup_seconds`` is what getting ready has taken so far.
    """

    def __init__(
        self, graphs: CudaGraphs, warmup_steps: int, device: torch.device, batch_size: int, optimizer: Optimizer
    ) -> None:
        self.graphs, self.warmup_steps, self.device, self.optimizer = graphs, warmup_steps, device, optimizer
        self.places = torch.arange(batch_size, device=device)
        self.start, self.at = Counter(device), Counter(device)
        self.replays: dict[int, tuple[Callable[[], None], list[tuple[Tensor, Tensor | None]], Any]] = {}
        self.has_stepped = self.has_failed = False
        self.setup_seconds = 0.0

    @abstractmethod
    def device_step(self, size: int) -> Any:
        """A step of ``size`` images with nothing from the host in it: what is captured, and what it returns."""

    @abstractmethod
    def generators(self) -> list[torch.Generator]:
        """Those that a step draws from."""

    @abstractmethod
    def learned(self) -> list[Tensor]:
        """All that has a gradient after a step."""

    @abstractmethod
    def moved(self) -> Iterable[Tensor]:
        """All that a step changes, but for the generators and what :class:`Replayed` has of its own."""

    def take(self, start: int, at: int, size: int) -> Any:
        """Step ``at``, whose batch begins at ``start``. What it returns may be overwritten by the next."""
        self.start.put(start)
        self.at.put(at)
        if not self.has_stepped or (size not in self.replays and not self.capture(size)):
            result = self.device_step(size)
        else:
            replay, gradients, result = self.replays[size]
            for p, gradient in gradients:
                p.grad = gradient  # where this graph leaves it, for whoever looks
            replay()
        self.has_stepped = True
        self.start.known += size
        self.at.known += 1
        return result

    def picked(self, size: int) -> Tensor:
        """The places (size,) of a step's batch in the epoch's order."""
        return self.start.tensor + self.places[:size]

    def move_on(self, size: int) -> None:
        """The end of a captured step."""
        self.start.tensor.add_(size)
        self.at.tensor.add_(1)

    def capture(self, size: int) -> bool:
        """Capture steps of ``size`` images, moving nothing; False, said once, if that cannot be done."""
        if self.has_failed:
            return False
        began = perf_counter()
        asking = [group for group in self.optimizer.param_groups if "capturable" in group]
        results: list[Any] = []
        try:
            for _ in range(self.warmup_steps):
                with self.undone(), self.graphs.warming_up():
                    self.device_step(size)
            for group in asking:
                group["capturable"] = True  # the kernel is the same
            for p in self.learned():
                p.grad = None
            with self.undone():
                replay = self.graphs.capture(lambda: results.append(self.device_step(size)), self.generators())
        except RuntimeError as error:
            self.has_failed = True
            tell(f"the step cannot be captured ({str(error).strip().splitlines()[0]})")
            return False
        finally:
            for group in asking:
                group["capturable"] = False
        self.replays[size] = replay, [(p, p.grad) for p in self.learned()], results[0]
        self.setup_seconds += perf_counter() - began
        return True

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put everything back that a step moves: weights, buffers, the optimizer's state, generators, counters."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        moved = [*self.moved(), *state, *rates, self.start.tensor, self.at.tensor]
        moved = [tensor for tensor in moved if isinstance(tensor, Tensor)]
        kept = [tensor.detach().clone() for tensor in moved]
        drawn = [(generator, generator.get_state()) for generator in self.generators()]
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                yield
        finally:
            for generator, state in drawn:
                generator.set_state(state)
            with torch.no_grad():
                for tensor, value in zip(moved, kept, strict=True):
                    tensor.copy_(value)
