"""Optimizers from ``torch.optim`` over two parameter groups, and learning-rate schedules.

A schedule is a function ``schedule(step, total_steps) -> factor`` that returns what the learning rate is multiplied
by at ``step``, counted from 0. It keeps no state, so a run that goes on from a checkpoint needs nothing but its step.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps

import torch
from torch import nn
from torch.optim import Optimizer

from bnexp.errors import UserError


def parameter_groups(model: nn.Module, weight_decay: float, norm_weight_decay: float) -> list[dict]:
    """Weights (two or more dimensions) in one group; biases and the parameters of norms (one dimension) in another.

    The next layer can undo the decay of a norm's scale or of a bias, so decay would not regularize them. The second
    group therefore has its own setting, ``norm_weight_decay``.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": norm_weight_decay},
    ]
    return [group for group in groups if group["params"]]


# Options that torch does not check, or only from below, and the largest value that means something.
UNCHECKED = {"momentum": 1, "dampening": 1, "alpha": 1, "lambd": math.inf, "t0": math.inf}
RANGES = {1: "only 0 to 1 has a meaning; give a number in this range", math.inf: "cannot be negative; give 0 or more"}


def make_optimizer(
    optimizer: Callable[[Iterable[dict]], Optimizer],
    model: nn.Module,
    weight_decay: float = 0.0,
    norm_weight_decay: float = 0.0,
) -> Optimizer:
    """Build ``optimizer`` over the model's two groups; ``base_lr`` of a group is its learning rate before the schedule.

    :class:`UserError` for numbers that torch accepts but no training can use.
    """
    for name, decay in (("weight_decay", weight_decay), ("norm_weight_decay", norm_weight_decay)):
        if decay < 0:
            raise UserError(f"optimizer.{name}={decay}: a decay cannot be negative; give 0 or more")
    groups = parameter_groups(model, weight_decay, norm_weight_decay)
    built = optimizer(groups)
    for name, most in UNCHECKED.items():
        value = built.defaults.get(name, 0)
        if isinstance(value, float | int) and not 0 <= value <= most:
            raise UserError(f"optimizer.{name}={value}: {RANGES[most]}")
    eps = built.defaults.get("eps", 1.0)
    if isinstance(eps, float | int) and eps < torch.finfo(torch.float32).tiny:
        raise UserError(f"optimizer.eps={eps}: a gradient of 0 is divided by it; give a number above 0, such as 1e-8")
    for group in built.param_groups:
        group["base_lr"] = group["lr"]
    return built


# Methods of Optimizer that torch excludes from compilation by a wrapper that imports the compiler.
NOT_COMPILED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


@cache
def without_compiler(kind: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """A subclass of the torch optimizer ``kind`` that does not import torch's compiler, which takes a second.

    Its methods skip torch's wrappers until something else imports the compiler; the numbers are bitwise the same.
    Returns ``kind`` itself if it is no optimizer of torch or its methods are not wrapped in this way.
    """
    step = getattr(kind, "step", None)
    if step is None or not kind.__module__.startswith("torch.optim."):
        return kind
    step = inspect.unwrap(step, stop=lambda f: not hasattr(f, "hooked"))  # the subclass gets hooks of its own
    methods = {name: getattr(kind, name) for name in NOT_COMPILED} | {"step": step}
    if step.__code__.co_name != "_use_grad" or not all(hasattr(each, "__wrapped__") for each in methods.values()):
        return kind
    return type(kind.__name__, (kind,), {name: _skip_wrapper(name, method) for name, method in methods.items()})


def _skip_wrapper(name: str, method: Callable) -> Callable:
    """A method that calls ``method`` once torch's compiler is imported, and before that the function it wraps."""

    @wraps(method)
    def call(self: Optimizer, *args, **kwargs):
        if "torch._dynamo" in sys.modules:
            return method(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"] if name == "step" else torch.is_grad_enabled()):
            return method.__wrapped__(self, *args, **kwargs)

    return call


def place_learning_rates(optimizer: Optimizer, device: torch.device) -> None:
    """Replace the learning rates of a fused optimizer by float32 tensors () on ``device``, where its kernel reads them.

    A schedule can then change the rate of a captured step, and an eager step on the device rounds it in the same way.
    """
    for group in optimizer.param_groups:
        if group.get("fused"):
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Set the learning rate of every group to ``factor`` times its ``base_lr``.

    Raises :class:`UserError` for a ``factor`` that is no number, negative or not finite.
    """
    if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
        raise UserError(f"the schedule returns {factor}; it must return a finite number, 0 or more, at every step")
    for group in optimizer.param_groups:
        rate = group["base_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _not_negative(**options: float) -> None:
    """Raise :class:`UserError` if an option of a schedule is below 0."""
    for name, value in options.items():
        if value < 0:
            raise UserError(f"schedule.{name}={value}: cannot be negative; give 0 or more")


def _warmup(step: int, warmup_steps: int) -> float:
    """Linear from 1 / warmup_steps to 1 over the first ``warmup_steps`` steps, then 1."""
    _not_negative(warmup_steps=warmup_steps)
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def constant(step: int, total_steps: int, *, warmup_steps: int = 0) -> float:
    """1, after a linear warm-up."""
    return _warmup(step, warmup_steps)


def cosine(step: int, total_steps: int, *, warmup_steps: int = 0, final: float = 0.0) -> float:
    """Half a cosine from 1 to ``final`` (Loshchilov & Hutter 2017, arXiv:1608.03983), after a linear warm-up."""
    _not_negative(final=final)
    warm = _warmup(step, warmup_steps)
    if step < warmup_steps:
        return warm
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def step(
    step: int, total_steps: int, *, warmup_steps: int = 0, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1
) -> float:
    """1 times ``gamma`` at every milestone, a fraction of the whole run, after a linear warm-up."""
    _not_negative(gamma=gamma)
    if not all(0 <= milestone <= 1 for milestone in milestones):
        raise UserError(f"schedule.milestones={list(milestones)}: fractions of the run; give numbers from 0 to 1")
    passed = sum(step >= milestone * total_steps for milestone in milestones)
    return _warmup(step, warmup_steps) * gamma**passed


def onecycle(
    step: int, total_steps: int, *, warmup_steps: int | None = None, start: float = 0.04, final: float = 4e-6
) -> float:
    """Up from ``start`` to 1 and down to ``final`` by half cosines (Smith & Topin 2019, arXiv:1708.07120).

    The rise takes ``warmup_steps``, or 30% of the run when None.
    """
    _not_negative(warmup_steps=warmup_steps or 0, start=start, final=final)
    rise = warmup_steps if warmup_steps is not None else max(1, round(0.3 * total_steps))
    if step < rise:
        return start + (1 - start) * (1 - math.cos(math.pi * step / rise)) / 2
    done = (step - rise) / max(1, total_steps - 1 - rise)
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, done))) / 2
