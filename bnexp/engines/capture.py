"""Steps that are captured once as a CUDA graph and replayed, and counters that a captured step changes.

:mod:`bnexp.engines.graph` defines the step of one run, :mod:`bnexp.engines.graph_fold` that of many.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bnexp.errors import first_line
from bnexp.train.device import forked_rng
from bnexp.train.run import Run


@cache
def warn_uncaptured(reason: str) -> None:
    """Warn on stderr, once for each reason, that steps or the evaluation are not captured."""
    print(f"bnexp: warning: engine=graph: {reason}; going on as engine=eager does", file=sys.stderr)


def go_eagerly(runs: Sequence[Run], reason: str) -> None:
    """Set the ``fallback`` of ``runs`` to ``reason``, and warn."""
    for run in runs:
        run.fallback = reason
    warn_uncaptured(reason)


def find_obstacle(run: Run) -> str | None:
    """Why the steps of ``run`` cannot be captured; None if no reason is known."""
    if not run.dataset.is_resident:
        return "the images are not on the device, and a captured step reads nothing else (data.resident=true puts them)"
    optimizer = run.optimizer
    if all(group.get("fused") for group in optimizer.param_groups):
        return None
    name = type(optimizer).__name__
    return f"only SGD, Adam and AdamW with optimizer.fused=true can be captured, this is {name}"


class Counter:
    """A number on the device that a captured step changes, and its value as the host counts it."""

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros(1, dtype=torch.int64, device=device)
        self.known = 0

    def put(self, value: int) -> None:
        """Set the number to ``value``."""
        if value != self.known:
            self.tensor.fill_(value)
            self.known = value


class CudaGraphs:
    """Captures by CUDA on ``device``. Tests on a CPU use a stand-in."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Run the block on a side stream, as captures do. Inside, waiting for the device is an error."""
        with torch.cuda.device(self.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the debug mode is a prototype
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            before = torch.cuda.get_sync_debug_mode()
            stream.wait_stream(current)
            torch.cuda.set_sync_debug_mode("error")
            try:
                with torch.cuda.stream(stream):
                    yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
                current.wait_stream(stream)  # after an error too: its changes are undone on the current stream

    def capture(
        self, function: Callable[[], None], generators: Sequence[torch.Generator], what: str = "steps"
    ) -> Callable[[], None]:
        """Record ``function()`` and return a function that replays it; every replay advances ``generators``.

        ``what`` is ``steps`` or ``evaluation``, see :func:`shared_memory`. After an error the stream is the one before,
        and the generators have their states of before: CUDA itself leaves them unusable.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            drawn_from = [*generators, torch.cuda.default_generators[torch.cuda.current_device()]]
            current, states = torch.cuda.current_stream(), [each.get_state() for each in drawn_from]
            for generator in generators:
                graph.register_generator_state(generator)
            try:
                # thread_local: what another thread asks of CUDA does not end the capture
                with torch.cuda.graph(graph, **shared_memory(what, self.device), capture_error_mode="thread_local"):
                    function()
            except BaseException:
                shared_memory.cache_clear()
                torch.cuda.set_stream(current)
                for generator, state in zip(drawn_from, states, strict=True):
                    fresh = torch.Generator(self.device)
                    fresh.set_state(state)
                    generator.graphsafe_set_state(fresh.graphsafe_get_state())
                raise
        return graph.replay


@cache
def shared_memory(what: str, device: torch.device) -> dict[str, Any]:
    """The memory pool of all graphs of one kind, ``steps`` or ``evaluation``, and the stream on which they allocate.

    A graph may overwrite what an earlier graph of the pool has freed, and what a later one has kept. Kept are only the
    gradients of a step, until the next step; evaluation comes before that, and therefore has a pool of its own.
    """
    return {"pool": torch.cuda.graph_pool_handle(), "stream": torch.cuda.Stream(device)}


@contextmanager
def convolutions_tried(is_tried: bool) -> Iterator[None]:
    """Inside, cuDNN times its algorithms for each new shape and keeps the fastest, which need not repeat its bits."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, is_tried
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Replayed:
    """Steps that are captured once for each batch size and replayed; bit for bit the uncaptured steps.

    ``step(picked)`` takes the step of one run, or the common step of many, on the training images at the indices
    ``picked`` (runs, B). It must use nothing from the host. It uses ``optimizer``, leaves gradients in the tensors
    ``learned``, and changes the tensors ``moved`` beside the optimizer's.

    The first step of a process is not captured, because it makes the optimizer's state; with a loss scaler the first
    that moves the weights. Before the capture, at the
    second step, ``warmup_steps`` steps make what torch makes lazily (workspaces, algorithm choices, autograd's
    buffers); then everything that they changed is restored. A short last batch has a graph of its own.

    The number of the step (``at``), the start of its batch in the epoch's order (``start``), the orders and the
    learning rates of all steps are on the device. The seconds of captures are added to the runs' ``setup_seconds``.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        step: Callable[[Tensor], Any],
        optimizer: Optimizer,
        learned: Sequence[Tensor],
        moved: Sequence[Tensor],
        graphs: CudaGraphs,
        warmup_steps: int,
    ) -> None:
        self.runs, self.step, self.optimizer, self.learned, self.moved = runs, step, optimizer, learned, moved
        self.graphs, self.warmup_steps = graphs, warmup_steps
        self.batches = [run.batches for run in runs]
        self.generators = [batches.generator for batches in self.batches]
        self.drawn = [batches.order for batches in self.batches]
        self.orders = torch.stack(self.drawn)  # (runs, training images)
        device = runs[0].device
        self.places = torch.arange(self.batches[0].batch_size, device=device)
        self.start, self.at = Counter(device), Counter(device)
        groups = [group for run in runs for group in run.optimizer.param_groups]
        factors = [runs[0].schedule(k, runs[0].total_steps) for k in range(runs[0].total_steps)]
        rates = [[group["base_lr"] * factor for group in groups] for factor in factors]
        self.rates = torch.tensor(rates, dtype=torch.float64).to(device, torch.float32)  # (steps, groups)
        self.set_rates = [group["lr"] for group in groups]
        self.replays: dict[int, tuple[Callable[[], None], list[tuple[Tensor, Tensor | None]], Any]] = {}
        self.has_stepped = self.has_failed = False

    def take(self) -> Any:
        """Take the next step of the runs; return the result of ``step``, which the next step may overwrite."""
        ((start, end),) = {batches.advance() for batches in self.batches}  # equal, because the runs are at one step
        for i, batches in enumerate(self.batches):
            if self.drawn[i] is not batches.order:
                self.orders[i].copy_(batches.order)
                self.drawn[i] = batches.order
        size = end - start
        self.start.put(start)
        self.at.put(self.runs[0].num_steps)
        if not self.has_stepped or (size not in self.replays and not self.capture(size)):
            with convolutions_tried(not self.runs[0].deterministic):
                result = self.device_step(size)
        else:
            replay, gradients, result = self.replays[size]
            for p, gradient in gradients:
                p.grad = gradient  # the tensor that this graph writes; probes read it
            replay()
        self.has_stepped = all(run.has_moved or not run.scaler.is_enabled() for run in self.runs)
        self.start.known += size
        self.at.known += 1
        return result

    def device_step(self, size: int) -> Any:
        """The step that is captured: on ``size`` images, with the learning rates and the counters."""
        picked = self.orders.index_select(1, self.start.tensor + self.places[:size])
        torch._foreach_copy_(self.set_rates, list(self.rates.index_select(0, self.at.tensor).squeeze(0).unbind()))
        result = self.step(picked)
        self.start.tensor.add_(size)
        self.at.tensor.add_(1)
        return result

    def capture(self, size: int) -> bool:
        """Capture a step of ``size`` images, which changes nothing; return False, with a warning, if that fails."""
        if self.has_failed:
            return False
        began = perf_counter()
        switched = [group for group in self.optimizer.param_groups if "capturable" in group]
        results: list[Any] = []
        try:
            for _ in range(self.warmup_steps):
                with self.undone(), convolutions_tried(not self.runs[0].deterministic), self.graphs.warming_up():
                    self.device_step(size)
            for group in switched:
                group["capturable"] = True  # torch asks for it; the fused kernel is the same
            for p in self.learned:
                p.grad = None
            with self.undone():
                replay = self.graphs.capture(lambda: results.append(self.device_step(size)), self.generators)
        except RuntimeError as error:
            self.has_failed = True
            self.replays.clear()  # their generators are no longer those of the runs
            go_eagerly(self.runs, f"the step cannot be captured ({first_line(error)})")
            return False
        finally:
            for group in switched:
                group["capturable"] = False
        self.replays[size] = replay, [(p, p.grad) for p in self.learned], results[0]
        for run in self.runs:
            run.setup_seconds += (perf_counter() - began) / len(self.runs)
        return True

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Restore what a step in the block changes: weights, buffers, optimizer state, generators, counters."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        moved = [*self.moved, *state, *self.set_rates, self.start.tensor, self.at.tensor]
        kept = [(tensor, tensor.detach().clone()) for tensor in moved if isinstance(tensor, Tensor)]
        drawn = [(generator, generator.get_state()) for generator in self.generators]
        try:
            with forked_rng(self.runs[0].device):
                yield
        finally:
            for generator, state in drawn:
                generator.set_state(state)
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)
