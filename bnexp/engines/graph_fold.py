"""The common step of runs computed as one (:mod:`bnexp.engines.fold`), captured as a CUDA graph."""

from collections.abc import Sequence

from torch import Tensor

from bnexp.engines.capture import CudaGraphs, Replayed, find_obstacle, go_eagerly
from bnexp.engines.fold import Stack, gather
from bnexp.train.run import Run


class CapturedStack(Stack):
    """A stack whose step is captured; if it cannot be captured, it is eager, with a warning on stderr.

    Evaluation is eager. When a run ends, the step of the others is captured again.
    """

    def __init__(self, runs: Sequence[Run], warmup_steps: int = 3, graphs: CudaGraphs | None = None) -> None:
        super().__init__(runs)
        self.replayed = None
        kind = type(self.runs[0].optimizer)
        reason = None if self.joint else f"each run has its own {kind.__name__}, a class of {kind.__module__}"
        if reason := find_obstacle(self.runs[0]) or reason:
            go_eagerly(self.runs, reason)
            return
        learned = [*self.parameters.values(), *(p for run in self.runs for p in run.parameters)]
        moved = [*self.parameters.values(), *self.buffers.values()]
        graphs = graphs or CudaGraphs(self.runs[0].device)
        joint = self.joint.optimizer
        self.replayed = Replayed(self.runs, self.device_step, joint, learned, moved, graphs, warmup_steps)

    def take(self) -> list[tuple[Tensor, ...]]:
        if self.replayed is None:
            return super().take()
        return list(zip(*(each.clone() for each in self.replayed.take()), strict=True))

    def device_step(self, picked: Tensor) -> tuple[Tensor, ...]:
        images, labels = gather([run.batches for run in self.runs], picked)
        loss, logits, found = self.descend(images, labels)
        return loss, logits, labels, found

    def release(self) -> None:
        super().release()
        self.replayed = None  # it refers back to this stack, and its graphs hold memory
