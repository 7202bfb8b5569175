"""Many runs of one small model computed as one: their tensors are stacked, and one step moves all weights.

A small model does not keep a device busy, because starting its short operations takes longer than computing them. In a
fold an operation is started once for all runs (``torch.vmap``).

On one CPU core this is faster for dense networks and not for convolutions, which become grouped convolutions: compared
with the same runs one after the other, 8 MLPs with batch norm train about 1.5 times as fast, 32 of them 2 to 2.6 times,
8 LeNets 0.7 times (batches of 64) to 1 time (16).
"""

import copy
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam, AdamW, Optimizer

from bnexp.data.batches import Batches
from bnexp.errors import UserError
from bnexp.norms.base import contract_of
from bnexp.optim import set_learning_rate, without_compiler
from bnexp.train.run import Run

# Optimizers that compute element by element: one call on stacked weights does the same as one call for each run.
ELEMENTWISE = {kind for plain in (SGD, Adam, AdamW) for kind in (plain, without_compiler(plain))}


class Fold:
    """Computes as one the steps of runs that differ only in the seed and in numbers of the optimizer.

    Each run keeps its own batches, learning rate, statistics, meter, evaluation and checkpoints. Its numbers are the
    same as alone, up to rounding: sums are taken in another order. A run that diverges does not change the others.

    ``make_stack(runs)`` returns the :class:`Stack` of the runs that step together.
    """

    def __init__(self, make_stack: "Callable[[Sequence[Run]], Stack] | None" = None) -> None:
        self.make_stack = make_stack or Stack
        self.stack: Stack | None = None

    def step(self, runs: Sequence[Run]) -> None:
        """Take the next step of ``runs``, which are all at the same step. A single run takes an eager step.

        Runs that were in the last call and are not in this one get their own tensors back.
        """
        if self.stack is not None and set(self.stack.runs) != set(runs):
            self.release()
        if len(runs) == 1:
            with runs[0].draws:
                runs[0].eager_step()
            runs[0].num_steps += 1
            return
        if self.stack is None:
            self.stack = self.make_stack(runs)
        self.stack.step()

    def release(self) -> None:
        """Give every run its own tensors back. This must come before a state is loaded into a run."""
        if self.stack is not None:
            self.stack.release()
            self.stack = None


class Stack:
    """The tensors of runs at the same step, stacked: (runs, ...). A run's own tensors become views into them.

    So every run can be evaluated, probed and saved as if it were alone.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = sorted(runs, key=lambda run: options_of(run.optimizer))
        models = [run.model for run in self.runs]
        self.model = copy.deepcopy(models[0]).to("meta").train()  # only its code is used
        self.named = [dict(model.named_parameters()) for model in models]
        self.parameters = stacked(self.named)
        self.buffers = stacked([dict(model.named_buffers()) for model in models])
        self.joint = None
        if type(self.runs[0].optimizer) in ELEMENTWISE:
            self.joint = Joint([run.optimizer for run in self.runs], self.named, self.parameters)

    def step(self) -> None:
        """Take the next step of every run."""
        for run, measured in zip(self.runs, self.take(), strict=True):
            run.meter.add(*measured)
            run.num_steps += 1

    def take(self) -> list[tuple[Tensor, ...]]:
        """Move all weights by a step; return for every run the arguments of its :meth:`Meter.add`."""
        images, labels = draw_batches([run.batches for run in self.runs])
        first = self.runs[0]  # all have the same schedule and are at the same step
        factor = first.schedule(first.num_steps, first.total_steps)
        for run in self.runs:
            set_learning_rate(run.optimizer, factor)
        loss, logits, found = self.descend(images, labels)
        return list(zip(loss, logits, labels, found, strict=True))

    def descend(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Forward, backward and update; return losses (runs,), logits (runs, B, classes) and non-finite flags (runs,).

        A flag is 1 if the run's gradient was not finite, else 0. The host does not wait for the device.
        """
        for p in self.parameters.values():
            p.grad = None
        logits = torch.vmap(self.logits)(self.parameters, self.buffers, images)
        # Not under vmap, which makes of its backward a scatter that CUDA cannot both capture and repeat bit for bit.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).mean(1)
        loss.sum().backward()  # no run's loss depends on another's weights
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        for name, gradient in gradients.items():
            for own, part in zip(self.named, gradient, strict=True):
                own[name].grad = part
        largest = [g.reshape(len(g), -1).abs().amax(1) for g in gradients.values()]  # NaN if one number is NaN
        found = 1 - torch.stack(largest).isfinite().all(0).float()
        if self.joint is not None:
            self.joint.step(gradients)
        else:
            for run in self.runs:
                with run.draws:
                    run.optimizer.step()
        return loss.detach(), logits.detach(), found

    def logits(self, parameters: dict, buffers: dict, images: Tensor) -> Tensor:
        """:meth:`Run.forward` with these parameters and buffers of one run; updates the buffers."""
        return self.runs[0].forward(images, lambda x: functional_call(self.model, parameters | buffers, (x,)))

    def release(self) -> None:
        """Give every run its own tensors back."""
        for run in self.runs:
            for tensor in itertools.chain(run.model.parameters(), run.model.buffers()):
                tensor.data = tensor.data.clone()
            for state in run.optimizer.state.values():
                state |= {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}


class Joint:
    """One optimizer in place of those of all runs, which hold views into its state.

    Runs with equal options, learning rates included, share its parameter groups and are moved by one call.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], named: Sequence[dict[str, Tensor]], parameters: dict[str, Tensor]
    ) -> None:
        self.optimizers, self.named = optimizers, named
        self.parts: list[tuple[Tensor, str, slice]] = []  # rows of a stacked weight, its name, which rows
        self.sources: list[dict] = []  # for every group here, a group of a run's optimizer that it replaces
        self.is_shared = False  # whether the runs' optimizers hold the views
        groups, end = [], 0
        for _, alike in itertools.groupby(optimizers, key=options_of):
            rows = slice(end, end := end + len(list(alike)))
            names = {id(p): name for name, p in named[rows.start].items()}
            for source in optimizers[rows.start].param_groups:
                mine = [(parameters[names[id(p)]].detach()[rows], names[id(p)], rows) for p in source["params"]]
                self.parts += mine
                self.sources.append(source)
                groups.append({**source, "params": [part for part, _, _ in mine]})
        self.optimizer = type(optimizers[0])(groups)
        for part, name, rows in self.parts:
            shares = [optimizers[i].state.get(named[i][name]) for i in range(rows.start, rows.stop)]
            if all(shares):  # "step" is the same in all of them
                self.optimizer.state[part] = {
                    key: value.clone() if key == "step" else torch.stack([share[key] for share in shares])
                    for key, value in shares[0].items()
                }
        if self.optimizer.state:
            self.share()

    def step(self, gradients: dict[str, Tensor]) -> None:
        """Move all weights by the learning rates of the runs' optimizers."""
        for part, name, rows in self.parts:
            part.grad = gradients[name][rows] if name in gradients else None
        for group, source in zip(self.optimizer.param_groups, self.sources, strict=True):
            group["lr"] = source["lr"]
        self.optimizer.step()
        if not self.is_shared:  # the first step makes the state, later ones change it in place
            self.share()

    def share(self) -> None:
        """Put views into the state of this optimizer into those of the runs."""
        self.is_shared = True
        for part, name, rows in self.parts:
            if state := self.optimizer.state.get(part):
                for row, i in enumerate(range(rows.start, rows.stop)):
                    own = {key: value if key == "step" else value[row] for key, value in state.items()}
                    self.optimizers[i].state[self.named[i][name]] = own


def options_of(optimizer: Optimizer) -> str:
    """A text that is equal for two optimizers of a class if they move equal weights equally."""
    groups = optimizer.param_groups
    return repr([{key: value for key, value in group.items() if key not in ("params", "lr")} for group in groups])


def stacked(named: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One tensor (runs, ...) for each name; the tensors ``named`` become views into it."""
    whole = {}
    for name, first in named[0].items():
        whole[name] = torch.stack([each[name].detach() for each in named])
        for each, part in zip(named, whole[name], strict=True):
            each[name].data = part
        whole[name].requires_grad_(first.requires_grad)
    return whole


def draw_batches(batches: Sequence[Batches]) -> tuple[Tensor, Tensor]:
    """The next batch of every run: images (runs, B, ...) and labels (runs, B)."""
    places = [slice(*each.advance()) for each in batches]  # this may begin an epoch, which changes each.order
    return gather(batches, torch.stack([each.order[place] for each, place in zip(batches, places, strict=True)]))


def gather(batches: Sequence[Batches], picked: Tensor) -> tuple[Tensor, Tensor]:
    """The images at the indices ``picked`` (runs, B) and their labels, prepared by the batches of each run."""
    if batches[0].dataset.augment == "none" and len({each.dataset for each in batches}) == 1:
        images, labels = batches[0].gather(picked.flatten())
        return images.unflatten(0, picked.shape), labels.view_as(picked)
    images, labels = zip(*(each.gather(own) for each, own in zip(batches, picked, strict=True)), strict=True)
    return torch.stack(images), torch.stack(labels)


def check_foldable(model: nn.Module, images: Sequence[int], device: torch.device) -> None:
    """Raise :class:`UserError` unless two runs of ``model`` can be computed as one.

    A forward and backward pass is tried on ``device`` with zeros for weights, buffers and a batch of shape ``images``.
    """
    zeros = [
        {name: torch.zeros(2, *tensor.shape, dtype=tensor.dtype, device=device) for name, tensor in named}
        for named in (model.named_parameters(), model.named_buffers())
    ]

    def forward(parameters: dict, buffers: dict, images: Tensor) -> Tensor:
        before = parameters | buffers
        after = dict(before)
        logits = functional_call(model, after, (images,))
        if new := [name for name in after if after[name] is not before[name]]:
            raise UserError(f"its forward pass replaces the tensor {new[0]} by a new one, which would be lost")
        return logits

    try:
        for parameter in zeros[0].values():
            parameter.requires_grad_()
        torch.vmap(forward)(*zeros, torch.zeros(2, *images, device=device)).sum().backward()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        if any(contract_of(module).momentum is None for module in model.modules()):
            reason = "with norm.momentum=null every run reads back from the device how many batches it has seen"
        raise UserError(f"runs of this model cannot be computed as one ({reason}); leave out replicas") from error
