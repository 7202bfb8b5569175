"""The common step of many runs computed as one (:mod:`bnexp.engines.fold`), captured as a CUDA graph."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bnexp.engines.capture import CudaGraphs, Replayed, tell, why_not
from bnexp.engines.fold import Stack, gather
from bnexp.train.run import Run


class CapturedStack(Stack):
    """A stack whose step is captured; where it cannot be, the step is eager and stderr says why.

    Evaluation is eager. When a run leaves, the step of the others is captured anew.
    """

    def __init__(self, runs: Sequence[Run], warmup_steps: int = 3, graphs: CudaGraphs | None = None) -> None:
        super().__init__(runs)
        self.replayed = None
        if reason := why_not(self.runs[0].optimizer):
            tell(reason)
        else:
            self.replayed = ReplayedStack(self, graphs or CudaGraphs(), warmup_steps)

    def take(self) -> list[tuple[Tensor, ...]]:
        return super().take() if self.replayed is None else self.replayed.step()

    def release(self) -> None:
        super().release()
        self.replayed = None  # it refers back to this stack, and its graphs hold memory


class ReplayedStack(Replayed):
    """The steps of a stack by replay, bit for bit its eager steps."""

    def __init__(self, stack: Stack, graphs: CudaGraphs, warmup_steps: int) -> None:
        self.stack, self.batches = stack, [run.batches for run in stack.runs]
        run = stack.runs[0]
        super().__init__(graphs, warmup_steps, run.device, run.batches.batch_size, stack.joint.optimizer)
        self.orders = torch.stack([batches.order for batches in self.batches])
        self.drawn = [batches.order for batches in self.batches]
        groups = [group for each in stack.runs for group in each.optimizer.param_groups]
        factors = [run.schedule(k, run.total_steps) for k in range(run.total_steps)]
        rates = [[group["base_lr"] * factor for group in groups] for factor in factors]
        self.rates = torch.tensor(rates, dtype=torch.float64).to(run.device, torch.float32)  # (steps, groups)
        self.set_rates = [group["lr"] for group in groups]

    def step(self) -> list[tuple[Tensor, ...]]:
        """:meth:`Stack.take`."""
        places = {batches.advance() for batches in self.batches}
        assert len(places) == 1, "runs at the same step are at the same place of their epochs"
        ((start, end),) = places
        for i, batches in enumerate(self.batches):
            if self.drawn[i] is not batches.order:
                self.orders[i].copy_(batches.order)
                self.drawn[i] = batches.order
        measured = self.take(start, self.stack.runs[0].num_steps, end - start)
        share = self.setup_seconds / len(self.batches)
        for run in self.stack.runs:
            run.setup_seconds += share
        self.setup_seconds = 0.0
        return list(zip(*(each.clone() for each in measured), strict=True))

    def device_step(self, size: int) -> tuple[Tensor, ...]:
        images, labels = gather(self.batches, self.orders.index_select(1, self.picked(size)))
        torch._foreach_copy_(self.set_rates, list(self.rates.index_select(0, self.at.tensor).squeeze(0).unbind()))
        loss, logits, found = self.stack.descend(images, labels)
        self.move_on(size)
        return loss, logits, labels, found

    def generators(self) -> list[torch.Generator]:
        return [batches.generator for batches in self.batches]

    def learned(self) -> list[Tensor]:
        own = [p for run in self.stack.runs for p in run.parameters]
        return [*self.stack.parameters.values(), *own]

    def moved(self) -> Iterable[Tensor]:
        return *self.stack.parameters.values(), *self.stack.buffers.values(), *self.set_rates
