"""Steps that are captured once as a CUDA graph and replayed, and counters that a captured step moves.

:mod:`bnexp.engines.graph` defines the step of one run, :mod:`bnexp.engines.graph_fold` that of many.
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
    """Raise :class:`UserError` unless ``warmup_steps`` is a whole number, 1 or more."""
    if type(warmup_steps) is not int or warmup_steps < 1:
        raise UserError(f"engine.warmup_steps={warmup_steps}: steps before the capture; give a whole number, 1 or more")


@cache
def tell(reason: str) -> None:
    """Say on stderr, once for each reason, why nothing is captured."""
    print(f"bnexp: warning: engine=graph: {reason}; going step by step as engine=eager does", file=sys.stderr)


def why_not(optimizer: Optimizer) -> str | None:
    """Why an optimizer is known not to be capturable, None if no reason is known."""
    if all(group.get("fused") for group in optimizer.param_groups):
        return None
    name = type(optimizer).__name__
    return f"of the optimizers only SGD, Adam and AdamW with optimizer.fused=true can be captured, this is {name}"


class Counter:
    """A number on the device that a captured step moves, and its value as the host counts it."""

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros(1, dtype=torch.int64, device=device)
        self.known = 0

    def put(self, value: int) -> None:
        """Set the number to ``value``, if it is another."""
        if value != self.known:
            self.tensor.fill_(value)
            self.known = value


class CudaGraphs:
    """Captures by CUDA. A test on a CPU puts another recorder in its place."""

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Run the block on a side stream, as captures do; waiting for the device is an error in it."""
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
        """Record ``function()`` and return a function that repeats it; every replay moves ``generators`` on."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            function()
        return graph.replay


class Replayed(ABC):
    """Steps that are captured once for each batch size and replayed, bit for bit the uncaptured steps.

    The first step of a process is taken uncaptured, because it makes the optimizer's state. Before the capture, at the
    second step, some steps warm up what is made lazily (workspaces, algorithm choices, autograd's buffers); all that
    they moved is put back. A short last batch has a graph of its own.

    The number of the step (``at``) and where its batch begins in the epoch's order (``start``) are on the device, and
    a captured step moves them on. ``setup_seconds`` counts the time of captures.
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
        """Take a step of ``size`` images with nothing from the host in it; this is what is captured."""

    @abstractmethod
    def generators(self) -> list[torch.Generator]:
        """The generators that a step draws from."""

    @abstractmethod
    def learned(self) -> list[Tensor]:
        """All tensors that have a gradient after a step."""

    @abstractmethod
    def moved(self) -> Iterable[Tensor]:
        """All tensors that a step changes, except the generators' and those of :class:`Replayed` itself."""

    def take(self, start: int, at: int, size: int) -> Any:
        """Take step ``at``, whose batch begins at ``start``. The next step may overwrite the result."""
        self.start.put(start)
        self.at.put(at)
        if not self.has_stepped or (size not in self.replays and not self.capture(size)):
            result = self.device_step(size)
        else:
            replay, gradients, result = self.replays[size]
            for p, gradient in gradients:
                p.grad = gradient  # this graph writes it there, and probes read it
            replay()
        self.has_stepped = True
        self.start.known += size
        self.at.known += 1
        return result

    def picked(self, size: int) -> Tensor:
        """The places (size,) of the step's batch in the epoch's order."""
        return self.start.tensor + self.places[:size]

    def move_on(self, size: int) -> None:
        """Move ``start`` and ``at`` on, at the end of a captured step."""
        self.start.tensor.add_(size)
        self.at.tensor.add_(1)

    def capture(self, size: int) -> bool:
        """Capture a step of ``size`` images and leave everything as it was; False, told once, if that fails."""
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
        """Put back all that a step in the block moves: weights, buffers, optimizer state, generators, counters."""
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
