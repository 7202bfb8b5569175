"""The contract of a norm, and the code that norms share: settings and buffers of batch norm, checks, the last step.

One call does it all, ``norm(x, residual) = activation(normalize(x) + residual)``, because one kernel can normalize, add
and activate in one pass over memory.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnexp.errors import UserError

ACTIVATIONS = {
    "identity": None, "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish, "gelu": F.gelu,
}  # fmt: skip
FLOAT32 = torch.finfo(torch.float32)


class Norm(nn.Module):
    """Base of every norm: the attributes and methods that the rest of bnexp reads, with their defaults.

    A norm is made by ``norm(num_features, activation="identity")`` and called as ``norm(x, residual=None)`` with ``x``
    of shape (N, C) or (N, C, ...). Other rooms read these names through :func:`contract_of`, which gives the defaults
    for modules that do not derive from this class.
    """

    normalizes = True  # False: stands at a norm's place in a model but normalizes nothing
    implements_batch_norm = False  # True: computes what torch's batch norm computes; bench compares these
    activation: str = "identity"  # a key of ACTIVATIONS
    num_features: int | None = None
    momentum: float | None = 0.0  # weight of the new batch in the running statistics; None: cumulative average
    virtual_batch: int | None = None  # examples per block, where a batch is normalized in blocks

    def reduces_over(self, num_dims: int) -> str:
        """The dimensions over which statistics of an input of ``num_dims`` dimensions are taken, as ``N, H, W``."""
        return ""

    def uses_batch_statistics(self) -> bool:
        """Whether the module, in its present mode, normalizes examples by statistics of their batch."""
        return False

    def keeps_running_statistics(self) -> bool:
        """Whether the module has a ``running_mean`` and a ``running_var``."""
        return False

    def share_left(self, num_batches: int) -> float:
        """The weight, 0 to 1, of the initial values in the running statistics after ``num_batches`` batches."""
        return 0.0

    def check_batch_size(self, batch_size: int) -> None:
        """Raise :class:`UserError` if a training batch of ``batch_size`` examples cannot be normalized."""

    def require_device(self, device: torch.device) -> None:
        """Raise :class:`UserError` unless the norm runs on ``device``."""

    def is_interpreted(self) -> bool:
        """Whether Triton's interpreter, which is slow and only for checks, runs the norm's kernels in this process."""
        return False


CONTRACT = [name for name in vars(Norm) if not name.startswith("_")]


def answers(module: nn.Module, name: str) -> bool:
    """Whether ``module`` has ``name`` as the contract means it: as a method, or as a value that cannot be called."""
    return hasattr(module, name) and callable(getattr(module, name)) == callable(getattr(Norm, name))


def contract_of(module: nn.Module) -> Norm:
    """``module`` if it is a :class:`Norm`, else a Norm with the attributes and methods of ``module``.

    Only names that :func:`answers` accepts are taken over; the others keep their defaults. A foreign module normalizes
    if it has a method ``reduces_over``; a convolution, say, has none.
    """
    if isinstance(module, Norm) and all(answers(module, name) for name in CONTRACT):
        return module
    contract = Norm()
    tracks = all(isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var"))
    contract.normalizes = answers(module, "reduces_over")
    contract.keeps_running_statistics = lambda: tracks
    if isinstance(module, _BatchNorm):
        contract.uses_batch_statistics = lambda: module.training or not tracks
    for name in CONTRACT:
        if answers(module, name) and (name != "activation" or module.activation in list(ACTIVATIONS)):
            setattr(contract, name, getattr(module, name))
    return contract


def check_activation(activation: str) -> str:
    """Return ``activation``; raise :class:`UserError` if it is not a key of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise UserError(f"activation={activation}: not known; choose one of {', '.join(ACTIVATIONS)}")
    return activation


def check_eps(eps: float) -> None:
    """Raise :class:`UserError` unless ``eps`` is positive and finite in float32.

    0 is refused, as ``torch.nn.functional.batch_norm`` does in training: a channel with one value everywhere, such as
    a unit that relu silences, has variance 0, and 0 / 0 makes the whole network NaN.
    """
    if not FLOAT32.tiny <= eps <= FLOAT32.max:
        raise UserError(
            f"norm.eps={eps}: a channel of variance 0 is divided by the root of eps; give a finite number above 0, "
            "such as 1e-5"
        )


def check_fraction(name: str, value: float, meaning: str) -> None:
    """Raise :class:`UserError` unless 0 <= ``value`` <= 1; ``meaning`` explains norm.``name`` in the message."""
    if not 0 <= value <= 1:
        raise UserError(f"norm.{name}={value}: {meaning} cannot be below 0 or above 1; give a number from 0 to 1")


def check_input(x: Tensor, residual: Tensor | None, num_features: int) -> None:
    """Raise ValueError, as ``torch.nn`` does, for a wrong rank, width or type of ``x`` or shape of ``residual``."""
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"expected a 2-D to 5-D input with channels at dimension 1, got {tuple(x.shape)}")
    if x.shape[1] != num_features:
        raise ValueError(f"expected {num_features} channels at dimension 1, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"expected floating-point numbers, got {x.dtype}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"the residual's shape {tuple(residual.shape)} is not the input's {tuple(x.shape)}")


def finish(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """``activation(y + residual)``, the last step of every norm but fused."""
    y = y if residual is None else y + residual
    function = ACTIVATIONS[activation]
    return y if function is None else function(y)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """``values`` (C,) as a view that broadcasts against ``x`` (N, C, ...)."""
    return values.view([-1 if d == 1 else 1 for d in range(x.dim())])


def scale_and_shift(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``weight * xhat + bias``, one weight and one bias per channel (dimension 1); None omits the factor or term."""
    if weight is not None:
        xhat = per_channel(weight, xhat) * xhat
    return xhat if bias is None else xhat + per_channel(bias, xhat)


def move(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    """``running = (1 - momentum) * running + momentum * batch`` in place.

    Computed in the precision of ``batch`` and rounded once, to that of ``running``.
    """
    running.copy_((1 - momentum) * running.to(batch.dtype) + momentum * batch)


def divisors(number: int) -> list[int]:
    """The divisors of ``number`` in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


class GuardedEps:
    """The attribute ``eps``, which raises :class:`UserError` in functions of torch that would lose part of the norm.

    ``SyncBatchNorm.convert_sync_batchnorm`` replaces norms without residual, activation and options.
    ``torch.nn.utils.fusion`` puts a norm into the layer before it, without activation. Both read ``eps``.
    """

    def __get__(self, norm: nn.Module | None, owner: type) -> float:
        if norm is None or "eps" not in vars(norm):
            raise AttributeError("eps")
        if not torch.compiler.is_compiling():  # the compiler does not read frames
            reader = sys._getframe(1).f_code.co_name
            is_fused = reader in ("fuse_conv_bn_eval", "fuse_linear_bn_eval") and norm.activation != "identity"
            if reader == "convert_sync_batchnorm" or is_fused:
                raise UserError(
                    f"{owner.__module__}.{owner.__qualname__}: cannot be replaced by {reader}, whose result has no "
                    f"{'activation' if is_fused else 'residual and no activation'}; leave this norm out"
                )
        return vars(norm)["eps"]

    def __set__(self, norm: nn.Module, value: float) -> None:
        vars(norm)["eps"] = value


class BatchNormBase(Norm, _BatchNorm):
    """The settings and buffers of ``torch.nn.BatchNorm1d/2d/3d`` plus an activation; no arithmetic.

    The state dict has torch's keys (``weight bias running_mean running_var num_batches_tracked``), so a
    checkpoint of one implementation loads into every other and into ``torch.nn``.

    ``momentum`` is the weight of the *new* batch in the running statistics, 0 to 1; ``None`` takes the cumulative
    average over all batches. ``affine=False`` drops weight and bias, ``bias=False`` the bias.

    The class derives from torch's ``_BatchNorm``, so that ``torch.optim.swa_utils.update_bn`` recomputes its running
    statistics.
    """

    implements_batch_norm = True
    made_for_small_batches = False  # True: corrects for noisy statistics of a few examples
    eps = GuardedEps()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str = "identity",
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_eps(eps)
        if momentum is not None:
            check_fraction("momentum", momentum, "the weight of a new batch")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.bias = None  # torch 2.11 has no such argument
        self.activation = check_activation(activation)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def keeps_running_statistics(self) -> bool:
        return self.running_mean is not None and self.running_var is not None

    def uses_batch_statistics(self) -> bool:
        """In training, and in evaluation when no running statistics are kept, as in ``torch.nn``."""
        return self.training or (self.running_mean is None and self.running_var is None)

    def check(self, x: Tensor, residual: Tensor | None) -> None:
        """Raise ValueError as in :func:`check_input`, and for batch statistics of one value per channel, as torch."""
        check_input(x, residual, self.num_features)
        if self.uses_batch_statistics() and x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")

    def count_batch(self) -> float:
        """Count this training batch and return the weight it gets in the running statistics.

        The weight is ``momentum``, or 1 / (number of batches so far) when ``momentum`` is None. A counter that was set
        to None, to turn tracking off in a finished network, is left alone, as in torch.
        """
        if self.num_batches_tracked is None:
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        if self.momentum is None and not self.num_batches_tracked.is_meta:  # a check on the meta device has no numbers
            return 1.0 / float(self.num_batches_tracked)
        return self.momentum or 0.0

    def share_left(self, num_batches: int) -> float:
        """(1 - momentum)^num_batches, because every batch multiplies the share by 1 - momentum.

        For a cumulative average the first batch replaces the initial values. Without tracking they are not used.
        """
        if not self.track_running_stats:
            return 0.0
        if self.momentum is None:
            return 0.0 if num_batches else 1.0
        return float((1 - self.momentum) ** num_batches)

    def momentum_setting(self, momentum: float) -> str:
        """``momentum`` as a setting on the command line."""
        return f"norm.momentum={momentum:.6g}"

    def ways_to_forget(self) -> list[str]:
        """Settings, other than momentum, with which the running statistics lose their initial values sooner."""
        return ["let norm.momentum=null average all batches"]

    def reduces_over(self, num_dims: int) -> str:
        return "N" + {2: "", 3: ", L", 4: ", H, W", 5: ", D, H, W"}[num_dims]

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}, "
            f"activation={self.activation}"
        )
