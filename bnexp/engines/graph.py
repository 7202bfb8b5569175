"""The graph engine: a whole step is captured once as a CUDA graph and replayed, so that the host hardly does anything.

A captured step gathers and augments the batch, runs forward and backward, sets the learning rate and moves the weights
and the meter. The host counts steps, shuffles once an epoch and reads the meter. Evaluation has graphs of its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bnexp.data.dataset import Split
from bnexp.engines.base import says
from bnexp.engines.capture import Counter, CudaGraphs, Replayed, check_warmup, tell, why_not
from bnexp.engines.graph_fold import CapturedStack
from bnexp.errors import UserError
from bnexp.train.meter import Meter
from bnexp.train.run import Run


def require_gpu(device: torch.device) -> None:
    """Raise :class:`UserError` where there are no CUDA graphs."""
    if device.type != "cuda":
        raise UserError(f"engine=graph: a CUDA graph needs a GPU, and this is device={device}; use engine=eager")


@says(require_device=require_gpu, make_stack=CapturedStack)
def captured(run: Run, *, warmup_steps: int = 3) -> Callable[[], None]:
    """Return the step of :class:`Captured`, or where a step cannot be captured the eager one; stderr says why."""
    check_warmup(warmup_steps)
    reason = why_not(run.optimizer)
    if run.scaler.is_enabled():
        reason = "the loss scaler of precision=fp16 asks the device at every step; precision=bf16 needs none"
    if reason:
        tell(reason)
        return run.eager_step
    return Captured(run, CudaGraphs(), warmup_steps).step


class StaticMeter(Meter):
    """A meter whose last entries stand in buffers at fixed addresses, where a captured step writes them.

    The host counts these entries (:meth:`count`). Every reading first moves them to the lists of :class:`Meter`.
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
        """Write what :meth:`Meter.add` takes into the next place; on the device alone."""
        values = {"losses": loss, "hits": (logits.argmax(1) == labels).sum(), "found": found}
        for name, value in values.items():
            self.buffers[name].index_copy_(0, self.next.tensor, value.view(1))
        self.next.tensor.add_(1)

    def count(self, size: int) -> None:
        """Count a recorded step of ``size`` images."""
        self.sizes.append(size)
        self.next.known += 1
        if self.next.known == len(self.buffers["losses"]):
            self.settle()

    def settle(self) -> None:
        """Move the entries from the buffers to the lists, without waiting for the device."""
        for name, buffer in self.buffers.items():
            getattr(self, name).extend(buffer[: self.next.known].clone().unbind())
        self.next.put(0)


class Captured:
    """The steps of one run by replay, bit for bit the eager engine's on the same device."""

    def __init__(self, run: Run, graphs: CudaGraphs, warmup_steps: int) -> None:
        self.run, self.graphs, self.warmup_steps = run, graphs, warmup_steps
        self.meter = StaticMeter(run.device)
        self.replayed: Replayed | None = None
        self.tallies: dict[int, tuple[Split, Callable[[], None], list[Tensor]]] = {}

    def step(self) -> None:
        if self.replayed is None:
            self.replayed = self.take_hold()
        self.meter.count(self.replayed.take())

    def take_hold(self) -> Replayed:
        """Give the run the meter and the evaluation of captured steps. A run in a fold never does this."""
        run = self.run
        self.meter.load_state_dict(run.meter.state_dict())
        run.meter, run.tally = self.meter, self.tally
        own = [self.meter.next.tensor, *self.meter.buffers.values()]
        moved = [*run.model.parameters(), *run.model.buffers(), *own]
        return Replayed([run], self.device_step, run.optimizer, run.parameters, moved, self.graphs, self.warmup_steps)

    def device_step(self, picked: Tensor) -> int:
        """The step on the images at ``picked`` (1, B); returns B."""
        run = self.run
        images, labels = run.batches.gather(picked[0])
        loss, logits = run.loss(images, labels)
        found = run.descend(loss)
        self.meter.record(loss.detach(), logits.detach(), labels, found)
        return len(labels)

    def tally(self, split: Split) -> tuple[Tensor, Tensor]:
        """:meth:`Run.tally_of` of the run's model in evaluation mode, by one graph for each split."""
        run = self.run
        if self.replayed.has_failed:
            return run.tally_of(split, run.model)
        if id(split) not in self.tallies:
            sums: list[Tensor] = []
            run.chunks(split, run.model)  # keeps an order on the device, which a capture could not bring there
            with self.graphs.warming_up():
                run.tally_of(split, run.model)
            replay = self.graphs.capture(lambda: sums.extend(run.tally_of(split, run.model)), [])
            self.tallies[id(split)] = split, replay, sums
        _, replay, sums = self.tallies[id(split)]
        replay()
        return sums[0], sums[1]
