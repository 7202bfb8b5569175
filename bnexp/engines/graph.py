"""The graph engine: a whole step captured once as a CUDA graph and replayed, so that the host hardly does anything.

Captured are the gathering of the batch, augmentation, forward, backward, the optimizer, the learning rate and the
meter. The host only counts along, shuffles once an epoch and reads what was measured. Evaluation has graphs of its own.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor

from bnexp.data.dataset import Split
from bnexp.errors import UserError
from bnexp.meter import Measured, Meter
from bnexp.run import Run


def require_device(device: torch.device) -> None:
    """Raise :class:`UserError` where there are no CUDA graphs."""
    if device.type != "cuda":
        raise UserError(f"engine=graph: a CUDA graph needs a GPU, and this is device={device}; use engine=eager")


def captured(run: Run, *, warmup_steps: int = 3) -> Callable[[], None]:
    """Steps by :class:`Captured`; eager ones, and stderr says why, where a step cannot be captured."""
    if type(warmup_steps) is not int or warmup_steps < 1:
        raise UserError(f"engine.warmup_steps={warmup_steps}: steps before the capture; give a whole number, 1 or more")
    if reason := why_not(run):
        return told(reason, run.eager_step)
    return Captured(run, CudaGraphs(), warmup_steps).step


def told(reason: str, step: Callable[[], None]) -> Callable[[], None]:
    print(f"bnexp: warning: engine=graph: {reason}; going step by step as engine=eager does", file=sys.stderr)
    return step


def why_not(run: Run) -> str | None:
    """What about the run is known not to be capturable, None if nothing is."""
    if not all(group.get("fused") for group in run.optimizer.param_groups):
        name = type(run.optimizer).__name__
        return f"of the optimizers only SGD, Adam and AdamW with optimizer.fused=true can be captured, this is {name}"
    if run.scaler.is_enabled():
        return "the loss scaler of precision=fp16 asks the device at every step; precision=bf16 needs none"
    return None


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


class StaticMeter(Meter):
    """A meter whose last entries stand in buffers that never move, because a captured step writes there.

    The host says how many they are (:meth:`count`); everybody who reads has them taken over first.
    """

    def __init__(self, device: torch.device, capacity: int = 1024) -> None:
        self.buffers = {
            "losses": torch.zeros(capacity, device=device),
            "hits": torch.zeros(capacity, dtype=torch.int64, device=device),
            "found": torch.zeros(capacity, device=device),
        }
        self.next = Counter(device)
        super().__init__()

    def clear(self) -> None:
        super().clear()
        self.next.put(0)

    def record(self, loss: Tensor, logits: Tensor, labels: Tensor, found: Tensor) -> None:
        """What :meth:`Meter.add` takes, into the next place; on the device alone."""
        values = {"losses": loss, "hits": (logits.argmax(1) == labels).sum(), "found": found}
        for name, value in values.items():
            self.buffers[name].index_copy_(0, self.next.tensor, value.view(1))
        self.next.tensor.add_(1)

    def count(self, size: int) -> None:
        """A step of ``size`` images was recorded."""
        self.sizes.append(size)
        self.next.known += 1
        if self.next.known == len(self.buffers["losses"]):
            self.take_over()

    def take_over(self) -> None:
        """Move what stands in the buffers to where other meters have it, without waiting for the device."""
        for name, buffer in self.buffers.items():
            getattr(self, name).extend(buffer[: self.next.known].clone().unbind())
        self.next.put(0)

    def read(self) -> Measured:
        self.take_over()
        return super().read()

    def is_finite(self) -> bool:
        self.take_over()
        return super().is_finite()

    def state_dict(self) -> dict:
        self.take_over()
        return super().state_dict()


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


class Captured:
    """The steps of one run by replay, bit for bit those of the eager engine on the same device.

    The first step of a process is taken uncaptured, because it makes the optimizer's state. Before the capture, which
    comes with the second, some steps warm up what is made lazily (workspaces, algorithm choices, autograd's buffers);
    all that they moved is put back. A short last batch has a graph of its own.
    """

    def __init__(self, run: Run, graphs: CudaGraphs, warmup_steps: int) -> None:
        self.run, self.graphs, self.warmup_steps = run, graphs, warmup_steps
        run.meter = self.meter = StaticMeter(run.device)
        run.tally = self.tally
        self.order = torch.empty_like(run.batches.order)
        self.places = torch.arange(run.batches.batch_size, device=run.device)
        self.start, self.at = Counter(run.device), Counter(run.device)  # of the batch in the epoch; of the step
        self.drawn: Tensor | None = None  # the order that was last copied to ``order``
        self.rates: list[Tensor] = []
        self.replays: dict[int, tuple[Callable[[], None], list[Tensor | None]]] = {}
        self.tallies: dict[int, tuple[Split, Callable[[], None], list[Tensor]]] = {}
        self.has_stepped = self.has_failed = False

    def step(self) -> None:
        start, end = self.run.batches.advance()
        size = end - start
        self.put(start)
        if not self.has_stepped or (size not in self.replays and not self.capture(size)):
            self.device_step(size)
        else:
            replay, gradients = self.replays[size]
            for p, gradient in zip(self.run.parameters, gradients, strict=True):
                p.grad = gradient  # where this graph leaves it, for whoever looks
            replay()
        self.has_stepped = True
        self.start.known += size
        self.at.known += 1
        self.meter.count(size)

    def put(self, start: int) -> None:
        """Have on the device what the host alone knows: a new epoch's order, and where a loaded run stands."""
        run = self.run
        if self.drawn is not run.batches.order:
            self.order.copy_(run.batches.order)
            self.drawn = run.batches.order
        if not self.rates:
            factors = [run.schedule(k, run.total_steps) for k in range(run.total_steps)]
            for group in run.optimizer.param_groups:
                rates = torch.tensor([group["base_lr"] * factor for factor in factors], device=run.device)
                self.rates.append(rates.to(group["lr"].dtype))
        self.start.put(start)
        self.at.put(run.num_steps)

    def device_step(self, size: int) -> None:
        """A step of ``size`` images with nothing from the host in it: what is captured."""
        run = self.run
        images, labels = run.batches.gather(self.order.index_select(0, self.start.tensor + self.places[:size]))
        for group, rates in zip(run.optimizer.param_groups, self.rates, strict=True):
            group["lr"].copy_(rates.index_select(0, self.at.tensor).view(()))
        loss, logits = run.loss(images, labels)
        found = run.descend(loss)
        self.meter.record(loss.detach(), logits.detach(), labels, found)
        self.start.tensor.add_(size)
        self.at.tensor.add_(1)

    def capture(self, size: int) -> bool:
        """Capture steps of ``size`` images, moving nothing; False, said once, if that cannot be done."""
        if self.has_failed:
            return False
        began = perf_counter()
        run = self.run
        asking = [group for group in run.optimizer.param_groups if "capturable" in group]
        try:
            for _ in range(self.warmup_steps):
                with self.undone(), self.graphs.warming_up():
                    self.device_step(size)
            for group in asking:
                group["capturable"] = True  # the kernel is the same
            run.optimizer.zero_grad(set_to_none=True)
            with self.undone():
                replay = self.graphs.capture(lambda: self.device_step(size), [run.batches.generator])
        except RuntimeError as error:
            self.has_failed = True
            told(f"the step cannot be captured ({str(error).strip().splitlines()[0]})", run.eager_step)
            return False
        finally:
            for group in asking:
                group["capturable"] = False
        self.replays[size] = replay, [p.grad for p in run.parameters]
        run.setup_seconds += perf_counter() - began
        return True

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put everything back that a step moves: weights, buffers, the optimizer's state, generators, counters."""
        run = self.run
        state = [value for values in run.optimizer.state.values() for value in values.values()]
        rates = [group["lr"] for group in run.optimizer.param_groups]
        counters = [self.start.tensor, self.at.tensor, self.meter.next.tensor, *self.meter.buffers.values()]
        moved = [*run.model.parameters(), *run.model.buffers(), *state, *rates, *counters]
        moved = [tensor for tensor in moved if isinstance(tensor, Tensor)]
        kept, drawn = [tensor.detach().clone() for tensor in moved], run.batches.generator.get_state()
        try:
            with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
                yield
        finally:
            run.batches.generator.set_state(drawn)
            with torch.no_grad():
                for tensor, value in zip(moved, kept, strict=True):
                    tensor.copy_(value)

    def tally(self, split: Split) -> tuple[Tensor, Tensor]:
        """:meth:`Run.tally_of` the run's model in evaluation mode, by a graph per split."""
        run = self.run
        if self.has_failed:
            return run.tally_of(split, run.model)
        if id(split) not in self.tallies:
            sums: list[Tensor] = []
            with self.graphs.warming_up():
                run.tally_of(split, run.model)
            replay = self.graphs.capture(lambda: sums.extend(run.tally_of(split, run.model)), [])
            self.tallies[id(split)] = split, replay, sums
        _, replay, sums = self.tallies[id(split)]
        replay()
        return sums[0], sums[1]
