"""Many runs of one small model computed as one: their tensors are stacked, and one step moves them all.

A small model keeps no device busy, because starting its many short operations takes longer than computing them.
Folded, each operation is started once for all runs (``torch.vmap``), on as many times the numbers.

On one CPU core that pays for dense networks and not for convolutions, which become grouped ones: 8 MLPs with batch
norm train about 1.5 times as fast as in turn, 32 of them 2 to 2.6 times, 8 LeNets 0.7 (batches of 64) to 1 time (16).
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import perf_counter

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

# They reckon element by element, so one call on stacked weights does what one call per run does.
ELEMENTWISE = {kind for plain in (SGD, Adam, AdamW) for kind in (plain, without_compiler(plain))}


class Fold:
    """Runs that take their steps together: the first that is asked for a step takes it for all of them.

    They are ordinary runs whose configs agree in everything but the seed and the optimizer's numbers, driven in
    lockstep. Each keeps its own batches, learning rate, statistics, meter, evaluation and checkpoints. Its numbers are
    those that it has alone, up to rounding: sums are taken in another order. One that diverges harms no other.

    A run that is not where the others are, because it goes on from an earlier checkpoint, goes by itself until all are
    level. A folded step that fails fails for all. ``run.seconds_elsewhere`` gives every run its share of a step's time.

    ``stack_of`` makes the :class:`Stack` of runs that are level.
    """

    def __init__(self, runs: Sequence[Run], stack_of: "Callable[[Sequence[Run]], Stack] | None" = None) -> None:
        self.runs = list(runs)
        self.stack_of = stack_of or Stack
        self.stack: Stack | None = None
        self.taken: dict[Run, tuple[Tensor, ...]] = {}  # of runs that are ahead: what the step measured
        self.error: BaseException | None = None
        for run in self.runs:
            run.take_step = partial(self.take, run)
            run.optimizer.register_load_state_dict_pre_hook(partial(self.make_way, run))
            run.optimizer.register_state_dict_pre_hook(partial(self.require_level, run))

    def take(self, run: Run) -> None:
        """The step of one of the runs, which in most turns has been taken already."""
        began = perf_counter()
        if not run.is_ahead:
            if len(self.runs) == 1 or any(each.num_steps != run.num_steps for each in self.runs):
                run.seconds_elsewhere = 0.0
                run.eager_step()
                return
            self.step()
            seconds = perf_counter() - began
            for each in self.runs:
                each.seconds_elsewhere = seconds / len(self.runs) - (seconds if each is run else 0.0)
        if self.error is not None:
            raise self.error
        run.meter.add(*self.taken.pop(run))
        run.is_ahead = False

    def step(self) -> None:
        """The next step of all runs. Broken off, it leaves them ahead for good: batches drawn, weights anywhere."""
        try:
            if self.stack is None:
                self.stack = self.stack_of(self.runs)
            for run in self.runs:
                run.is_ahead = True
            self.taken = dict(zip(self.stack.runs, self.stack.step(), strict=True))
        except BaseException as error:
            self.error = error
            raise

    def leave(self, ended: Iterable[Run]) -> None:
        """Let go of runs that have ended, if they are in here: nothing moves them any more."""
        for run in set(ended).intersection(self.runs):
            self.unstack()
            self.runs.remove(run)
            run.take_step = run.eager_step
            run.seconds_elsewhere = 0.0

    def make_way(self, run: Run, optimizer: Optimizer, state: dict) -> None:
        """Let another state take the place of a run's own."""
        self.unstack()
        run.is_ahead = False

    def require_level(self, run: Run, optimizer: Optimizer) -> None:
        """Let nobody take down the state of a run that is a step further than it knows."""
        assert not run.is_ahead, "its step was taken in another run's turn and not yet asked for"

    def unstack(self) -> None:
        """Give every run its tensors back, as its own."""
        if self.stack is not None:
            self.stack.release()
            self.stack = None


class Stack:
    """The tensors of runs that are level, stacked: one (runs, ...) for each, every run's own being views into it.

    So each run can be evaluated, looked at and written down as ever. What it writes down are copies, because torch
    would save all that a view is a view of.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = sorted(runs, key=lambda run: options_of(run.optimizer))
        models = [run.model for run in self.runs]
        self.model = copy.deepcopy(models[0]).to("meta").train()  # of which only the code is used
        self.named = [dict(model.named_parameters()) for model in models]
        self.parameters = stacked(self.named)
        self.buffers = stacked([dict(model.named_buffers()) for model in models])
        self.hooks = [model.register_state_dict_post_hook(copy_values) for model in models]
        self.joint = None
        if type(self.runs[0].optimizer) in ELEMENTWISE:
            self.joint = Joint([run.optimizer for run in self.runs], self.named, self.parameters)

    def step(self) -> list[tuple[Tensor, ...]]:
        """Take a step of every run; returns what a meter wants to know of each."""
        images, labels = draw([run.batches for run in self.runs])
        for run in self.runs:
            set_learning_rate(run.optimizer, run.schedule(run.num_steps, run.total_steps))
        loss, logits, found = self.descend(images, labels)
        return list(zip(loss, logits, labels, found, strict=True))

    def descend(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The runs' losses (runs,), logits and whether a gradient was not finite. The host waits for no device here."""
        for p in self.parameters.values():
            p.grad = None
        loss, logits = torch.vmap(self.loss)(self.parameters, self.buffers, images, labels)
        loss.sum().backward()  # no run's loss depends on another's weights
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        for name, gradient in gradients.items():
            for own, part in zip(self.named, gradient, strict=True):
                own[name].grad = part
        largest = [g.reshape(len(g), -1).abs().amax(1) for g in gradients.values()]  # not a number if any is not
        found = 1 - torch.stack(largest).isfinite().all(0).float()
        if self.joint is not None:
            self.joint.step(gradients)
        else:
            for run in self.runs:
                run.optimizer.step()
        return loss.detach(), logits.detach(), found

    def loss(self, parameters: dict, buffers: dict, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`Run.loss` is with these parameters and buffers; the buffers are moved."""
        logits = self.runs[0].forward(images, lambda x: functional_call(self.model, parameters | buffers, (x,)))
        return F.cross_entropy(logits, labels), logits

    def release(self) -> None:
        """Make every run's tensors its own again."""
        for hook in self.hooks:
            hook.remove()
        if self.joint is not None:
            self.joint.release()
        for run in self.runs:
            for tensor in itertools.chain(run.model.parameters(), run.model.buffers()):
                tensor.data = tensor.data.clone()


class Joint:
    """One optimizer in place of the runs' own: it moves the stacked weights, at once those of runs with like options.

    Runs with another learning rate, say, are groups of their own in it. The state is in here; a run's own optimizer
    gets a copy of its share when its state dict is asked for, and at the end.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], named: Sequence[dict[str, Tensor]], parameters: dict[str, Tensor]
    ) -> None:
        self.optimizers, self.named = optimizers, named
        self.parts: list[tuple[Tensor, str, slice]] = []  # rows of a stacked weight, its name, which rows
        self.sources: list[dict] = []  # for each group in here, one of those that it stands for
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
            if all(shares):  # the number of steps is the same for all of them
                self.optimizer.state[part] = {
                    key: value.clone() if key == "step" else torch.stack([share[key] for share in shares])
                    for key, value in shares[0].items()
                }
        self.hooks = [
            each.register_state_dict_pre_hook(partial(self.give, i)) for i, each in enumerate(optimizers)
        ]  # fmt: skip

    def step(self, gradients: dict[str, Tensor]) -> None:
        """Move all weights, by the learning rates that the runs' own optimizers are set to."""
        for part, name, rows in self.parts:
            part.grad = gradients[name][rows] if name in gradients else None
        for group, source in zip(self.optimizer.param_groups, self.sources, strict=True):
            group["lr"] = source["lr"]
        self.optimizer.step()

    def give(self, i: int, optimizer: Optimizer) -> None:
        """Copy its share of the state to the optimizer of the run in row ``i``."""
        for part, name, rows in self.parts:
            if rows.start <= i < rows.stop and (state := self.optimizer.state.get(part)):
                share = {key: value if key == "step" else value[i - rows.start] for key, value in state.items()}
                optimizer.state[self.named[i][name]] = {key: value.clone() for key, value in share.items()}

    def release(self) -> None:
        for i, (optimizer, hook) in enumerate(zip(self.optimizers, self.hooks, strict=True)):
            hook.remove()
            self.give(i, optimizer)


def options_of(optimizer: Optimizer) -> str:
    """The same for two optimizers of one class and schedule if and only if they move equal weights equally."""
    groups = optimizer.param_groups
    return repr([{key: value for key, value in group.items() if key not in ("params", "lr")} for group in groups])


def stacked(named: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of the same names as one (runs, ...) each, of which they become views."""
    whole = {}
    for name, first in named[0].items():
        whole[name] = torch.stack([each[name].detach() for each in named])
        for each, part in zip(named, whole[name], strict=True):
            each[name].data = part
        whole[name].requires_grad_(first.requires_grad)
    return whole


def copy_values(model: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    """Have a state dict hold copies."""
    for key, value in state.items():
        state[key] = value.clone() if isinstance(value, Tensor) else value


def draw(batches: Sequence[Batches]) -> tuple[Tensor, Tensor]:
    """The next batch of each: images (runs, B, ...) and labels (runs, B)."""
    places = [slice(*each.advance()) for each in batches]  # which may begin an epoch, with an order of its own
    return gather(batches, torch.stack([each.order[place] for each, place in zip(batches, places, strict=True)]))


def gather(batches: Sequence[Batches], picked: Tensor) -> tuple[Tensor, Tensor]:
    """The images at the indices ``picked`` (runs, B) and their labels, each run's as its own batches prepare them."""
    if batches[0].dataset.augment == "none":  # they have the same data
        images, labels = batches[0].gather(picked.flatten())
        return images.unflatten(0, picked.shape), labels.view_as(picked)
    images, labels = zip(*(each.gather(own) for each, own in zip(batches, picked, strict=True)), strict=True)
    return torch.stack(images), torch.stack(labels)


def check(model: nn.Module, images: Sequence[int], device: torch.device) -> None:
    """Raise :class:`UserError` unless two runs of ``model``, of which only the code is used, can take a step as one.

    Tried on ``device``, with zeros for everything: weights, buffers and ``images``, the shape of a batch.
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
            raise UserError(f"its forward pass puts a new tensor in the place of {new[0]}, which would be lost")
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
