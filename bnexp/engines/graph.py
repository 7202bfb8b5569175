"""The graph engine: a whole step is captured once as a CUDA graph and replayed.

A captured step gathers and augments the batch, runs forward and backward, sets the learning rate, moves the weights and
writes into the meter. The host counts steps, shuffles once an epoch and reads the meter. Evaluation has other graphs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bnexp.data.dataset import Split
from bnexp.engines.base import with_traits
from bnexp.engines.capture import Counter, CudaGraphs, Replayed, convolutions_tried, find_obstacle, go_eagerly
from bnexp.engines.graph_fold import CapturedStack
from bnexp.errors import UserError, first_line
from bnexp.train.meter import Meter
from bnexp.train.run import Run


def require_gpu(device: torch.device) -> None:
    """Raise :class:`UserError` unless ``device`` is a GPU."""
    if device.type != "cuda":
        raise UserError(f"engine=graph: a CUDA graph needs a GPU, and this is device={device}; use engine=eager")


@with_traits(require_device=require_gpu, make_stack=CapturedStack)
def captured(run: Run, *, warmup_steps: int = 3) -> Callable[[], None]:
    """Return the step of :class:`Captured`; if it cannot be captured, the eager step, with a warning on stderr."""
    if type(warmup_steps) is not int or warmup_steps < 1:
        raise UserError(f"engine.warmup_steps={warmup_steps}: steps before the capture; give a whole number, 1 or more")
    if reason := find_obstacle(run):
        go_eagerly([run], reason)
        return run.eager_step
    return Captured(run, CudaGraphs(run.device), warmup_steps).step


class StaticMeter(Meter):
    """A meter with buffers at fixed addresses, into which a captured step writes.

    The host counts their entries (:meth:`count`). :meth:`settle` moves them to the lists of :class:`Meter`.
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
        """:meth:`Meter.add` into the buffers, by operations of the device alone."""
        values = {"losses": loss, "hits": (logits.argmax(1) == labels).sum(), "found": found}
        for name, value in values.items():
            self.buffers[name].index_copy_(0, self.next.tensor, value.view(1))
        self.next.tensor.add_(1)

    def count(self, size: int) -> None:
        """Count a step of ``size`` images that was recorded."""
        self.sizes.append(size)
        self.next.known += 1
        if self.next.known == len(self.buffers["losses"]):
            self.settle()

    def settle(self) -> None:
        """Move the entries of the buffers to the lists. The host does not wait for the device."""
        for name, buffer in self.buffers.items():
            getattr(self, name).extend(buffer[: self.next.known].clone().unbind())
        self.next.put(0)


class Captured:
    """The steps of one run by replay; bit for bit those of the eager engine on the same device."""

    def __init__(self, run: Run, graphs: CudaGraphs, warmup_steps: int) -> None:
        self.run, self.graphs, self.warmup_steps = run, graphs, warmup_steps
        self.meter = StaticMeter(run.device)
        self.replayed: Replayed | None = None
        self.tallies: dict[int, tuple[Split, Callable[[], None], list[Tensor]] | None] = {}
        run.optimizer.register_load_state_dict_post_hook(self.forget)

    def step(self) -> None:
        if self.replayed is None:
            self.replayed = self.prepare()
        self.meter.count(self.replayed.take())

    def forget(self, _: object = None) -> None:
        """Drop the graphs of steps: they read the optimizer's old state and learning rates."""
        self.replayed = None

    def prepare(self) -> Replayed:
        """Replace the run's meter and evaluation by captured ones. Runs that are computed as one keep theirs."""
        run = self.run
        self.meter.load_state_dict(run.meter.state_dict())
        run.meter, run.tally = self.meter, self.tally
        run.scaler.scale(torch.zeros((), device=run.device))  # makes its tensors, if it is enabled
        scaler = [each for each in vars(run.scaler).values() if isinstance(each, Tensor)]
        own = [self.meter.next.tensor, *self.meter.buffers.values(), *scaler]
        moved = [*run.model.parameters(), *run.model.buffers(), *own]
        return Replayed([run], self.device_step, run.optimizer, run.parameters, moved, self.graphs, self.warmup_steps)

    def device_step(self, picked: Tensor) -> int:
        """Take the step on the images at ``picked`` (1, B); return B."""
        run = self.run
        images, labels = run.batches.gather(picked[0])
        loss, logits = run.loss(images, labels)
        found = run.descend(loss)
        self.meter.record(loss.detach(), logits.detach(), labels, found)
        return len(labels)

    def tally(self, split: Split, model: nn.Module) -> tuple[Tensor, Tensor]:
        """:meth:`Run.tally_of` for the run's own ``model`` in evaluation mode, by one graph for each split."""
        run = self.run
        if id(split) not in self.tallies and not run.fallback:
            self.tallies[id(split)] = self.capture_tally(split, model)
        if not (captured := self.tallies.get(id(split))):
            return run.tally_of(split, model)
        _, replay, sums = captured
        replay()
        return sums[0], sums[1]

    def capture_tally(self, split: Split, model: nn.Module) -> tuple[Split, Callable[[], None], list[Tensor]] | None:
        """``split``, the replay of its evaluation, and the tensors of the sums; None, with a warning, if that fails."""
        run, sums = self.run, []
        run.chunks(split, model)  # puts the order of the images on the device, which a capture cannot do
        try:
            with convolutions_tried(not run.deterministic), self.graphs.warming_up():
                run.tally_of(split, model)
            replay = self.graphs.capture(lambda: sums.extend(run.tally_of(split, model)), [], "evaluation")
        except RuntimeError as error:
            go_eagerly([run], f"evaluation cannot be captured ({first_line(error)})")
            return None
        return split, replay, sums
