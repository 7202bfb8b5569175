"""How weights move: parameter groups for any ``torch.optim`` class, and learning-rate schedules.

A schedule is a function of the step that returns the factor by which the learning rate is multiplied:
``schedule(step, total_steps) -> factor`` with step counted from 0. It keeps no state, so a run that goes on
from a checkpoint needs nothing but its step.
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
    """Two groups: weights (two or more dimensions), and norm parameters and biases (one dimension).

    Decaying the scale of a normalization or a bias regularizes nothing that the next layer cannot undo,
    which is why the second group has a decay of its own, zero unless asked for.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": norm_weight_decay},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    optimizer: Callable[[Iterable[dict]], Optimizer],
    model: nn.Module,
    weight_decay: float = 0.0,
    norm_weight_decay: float = 0.0,
) -> Optimizer:
    """Build ``optimizer`` over the model's groups and remember every group's base learning rate."""
    for name, decay in (("weight_decay", weight_decay), ("norm_weight_decay", norm_weight_decay)):
        if decay < 0:
            raise UserError(f"optimizer.{name}={decay}: a decay cannot be negative")
    try:
        built = optimizer(parameter_groups(model, weight_decay, norm_weight_decay))
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"the optimizer refuses its options: {error}") from error
    for group in built.param_groups:
        group["base_lr"] = group["lr"]
    return built


MARKED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")  # by torch, as not to be compiled


@cache
def without_compiler(kind: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """An optimizer class of torch that gets made and used without importing torch's compiler, which takes a second.

    These methods import it to say that they are not to be compiled. While nobody else has imported it nothing is being
    compiled, and what they wrap does the same to the bit. A class that torch did not make like that is returned as is.
    """
    step = getattr(kind, "step", None)
    if step is None or not kind.__module__.startswith("torch.optim."):
        return kind
    step = inspect.unwrap(step, stop=lambda f: not hasattr(f, "hooked"))  # the subclass gets hooks of its own
    methods = {name: getattr(kind, name) for name in MARKED} | {"step": step}
    if step.__code__.co_name != "_use_grad" or not all(hasattr(each, "__wrapped__") for each in methods.values()):
        return kind
    return type(kind.__name__, (kind,), {name: _quick(name, method) for name, method in methods.items()})


def _quick(name: str, method: Callable) -> Callable:
    """``method`` of an optimizer if the compiler is there, else what it wraps."""

    @wraps(method)
    def quick(self: Optimizer, *args, **kwargs):
        if "torch._dynamo" in sys.modules:
            return method(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"] if name == "step" else torch.is_grad_enabled()):
            return method.__wrapped__(self, *args, **kwargs)

    return quick


def keep_rates_on(optimizer: Optimizer, device: torch.device) -> None:
    """Have learning rates as float32 tensors () on ``device`` where the optimizer's kernel reads them there (fused).

    So that a captured step can change them; an eager one on the same device then rounds them alike.
    """
    for group in optimizer.param_groups:
        if group.get("fused"):
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Every group gets its base learning rate times ``factor``."""
    for group in optimizer.param_groups:
        rate = group["base_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _warmup(step: int, warmup_steps: int) -> float:
    """Linear from 1 / warmup_steps to 1 over the first ``warmup_steps`` steps, then 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def constant(step: int, total_steps: int, *, warmup_steps: int = 0) -> float:
    """1, after a linear warm-up."""
    return _warmup(step, warmup_steps)


def cosine(step: int, total_steps: int, *, warmup_steps: int = 0, final: float = 0.0) -> float:
    """Half a cosine from 1 to ``final`` (Loshchilov & Hutter 2017, arXiv:1608.03983), after a linear warm-up."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def step(
    step: int,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
) -> float:
    """Times ``gamma`` at every milestone, given as a fraction of the whole run, after a linear warm-up."""
    passed = sum(step >= milestone * total_steps for milestone in milestones)
    return _warmup(step, warmup_steps) * gamma**passed


def onecycle(
    step: int,
    total_steps: int,
    *,
    warmup_steps: int | None = None,
    start: float = 0.04,
    final: float = 4e-6,
) -> float:
    """Up from ``start`` to 1 and down to ``final`` by half cosines (Smith & Topin 2019, arXiv:1708.07120).

    The rise takes ``warmup_steps``, or 30% of the run when None.
    """
    rise = warmup_steps if warmup_steps is not None else max(1, round(0.3 * total_steps))
    if step < rise:
        return start + (1 - start) * (1 - math.cos(math.pi * step / rise)) / 2
    done = (step - rise) / max(1, total_steps - 1 - rise)
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, done))) / 2
