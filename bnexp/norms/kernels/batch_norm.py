"""Batch normalization, residual addition and activation as one differentiable operator.

:func:`batch_norm` is the operator. Its parts are public so that the statistics can be reduced across ranks:

    mean, m2, count = combine(*(all_gather(part) for part in statistics(x)))
    y, saved = apply(x, mean, rsqrt(m2, count, eps), weight, bias, residual, activation)
    ...
    sums = all_reduce(gradient_sums(dy, x, mean, rstd, weight, bias, saved, activation))      # dbias, dweight
    dx, dresidual = gradient_apply(dy, x, mean, rstd, weight, bias, saved, activation, sums, count)

where ``all_gather`` stacks the ranks along a new first dimension. Gradients of weight and bias stay local
(the sums before the all-reduce), since data-parallel wrappers average them. Autograd does not record the parts.

Triton is imported at the first launch.
"""

import logging
import os

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bnexp.errors import UserError
from bnexp.norms.kernels.tiling import dense, mask_bytes, statistics_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
log = logging.getLogger("bnexp.norms.kernels")
_warned = False


def interpreted() -> bool:
    """Whether triton interprets its kernels in this process, whatever the device."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def require_kernels(device: torch.device | str) -> None:
    """Raise :class:`UserError` unless the kernels run on ``device``; warn once if they are interpreted."""
    global _warned
    device = torch.device(device)
    try:
        import triton  # noqa: F401
    except ImportError:
        raise UserError("norm=fused: its kernels need triton, which is not installed; use norm=library") from None
    if device.type == "cuda":
        return
    if device.type != "cpu" or not interpreted():
        raise UserError(
            f"norm=fused: its kernels need a CUDA device and this is {device.type}; use norm=library, or set "
            "TRITON_INTERPRET=1 with device=cpu for a slow check"
        )
    if not _warned:
        log.warning("norm=fused: triton interprets its kernels on the CPU: slow, only for checking")
        _warned = True


def _launch(x: Tensor):
    """The module ``launch``, which imports triton; :class:`UserError` if the kernels cannot run on ``x``."""
    require_kernels(x.device)
    if x.dtype not in DTYPES:
        raise UserError(f"norm=fused: {x.dtype} input is not supported; use float32, bfloat16, float16 or float64")
    from bnexp.norms.kernels import launch

    return launch


# ---- the operators ----

_library = torch.library.Library("bnexp", "DEF")
_library.define(
    "batch_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? counter, bool training, float? momentum, float eps, "
    "str activation, bool bits) -> (Tensor y, Tensor mean, Tensor rstd, Tensor bits)"
)
_library.define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "Tensor? saved, bool training, str activation) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)


def _forward(x, residual, weight, bias, running_mean, running_var, counter, training, *options):
    launch = _launch(x)
    arguments = (x, residual, weight, bias, running_mean, running_var, counter, training, *options)
    if x.numel() == 0:  # as in torch: the batch counts, the statistics stay
        if training and counter is not None:
            counter.add_(1)
        return tuple(t.zero_() for t in _forward_fake(*arguments))
    y, mean, rstd, mask = launch.launch_forward(*arguments)
    return y, mean, rstd, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def _forward_fake(x, residual, weight, bias, mean, var, counter, training, momentum, eps, activation, bits):
    x, _ = dense(x)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    mean, rstd = (x.new_empty(x.shape[1], dtype=statistics_dtype(x)) for _ in range(2))
    size = mask_bytes(x) if bits and residual is not None and activation == "relu" else 0
    return torch.empty_like(x, dtype=dtype), mean, rstd, x.new_empty(size, dtype=torch.uint8)


def _backward(dy, x, weight, bias, mean, rstd, saved, training, activation):
    launch = _launch(x)
    if x.numel() == 0:
        fakes = _backward_fake(dy, x, weight, bias, mean, rstd, saved, training, activation)
        return tuple(t.zero_() for t in fakes)
    outputs = launch.launch_backward(dy, x, weight, bias, mean, rstd, saved, activation, training)
    return tuple(x.new_empty(0) if t is None else t for t in outputs)


def _backward_fake(dy, x, weight, bias, mean, rstd, saved, training, activation):
    x, _ = dense(x)
    dweight, dbias = (x.new_empty(0) if t is None else torch.empty_like(t) for t in (weight, bias))
    dresidual = x.new_empty(0) if saved is None else torch.empty_like(x, dtype=dy.dtype)
    return torch.empty_like(x), dweight, dbias, dresidual


for _name, _real, _fake in (
    ("batch_norm", _forward, _forward_fake),
    ("batch_norm_backward", _backward, _backward_fake),
):
    _library.impl(_name, _real, "CPU")
    _library.impl(_name, _real, "CUDA")
    torch.library.register_fake(f"bnexp::{_name}", _fake, lib=_library)


class _BatchNorm(torch.autograd.Function):
    """The operators for autograd: saves x, weight, bias, mean, rstd and the tensor of :func:`_saved`."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, running_mean, running_var, counter, *options):
        y, mean, rstd, bits = torch.ops.bnexp.batch_norm(
            x, residual, weight, bias, running_mean, running_var, counter, *options, True
        )
        training, _, _, activation = options
        saved = _saved(y, bits, residual, activation)
        ctx.save_for_backward(x, weight, bias, mean, rstd, saved)
        ctx.training, ctx.activation = training, activation
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, mean, rstd, saved = ctx.saved_tensors
        dx, dweight, dbias, dresidual = torch.ops.bnexp.batch_norm_backward(
            dy, x, weight, bias, mean, rstd, saved, ctx.training, ctx.activation
        )
        dresidual = dy if saved is None else dresidual  # of an identity, the residual's gradient is dy itself
        dresidual = None if ctx.residual_dtype is None else dresidual.to(ctx.residual_dtype)
        dweight, dbias = (None if t is None else d for t, d in ((weight, dweight), (bias, dbias)))
        return dx, dresidual, dweight, dbias, *[None] * 7


def _saved(y: Tensor, bits: Tensor | None, residual: Tensor | None, activation: str) -> Tensor | None:
    """The tensor that gives activation' after a residual: relu's bits, the output of sigmoid and tanh.

    For the other activations the residual itself, because their output does not determine their derivative. None
    without a residual, where backward computes the output from x again, and for the identity.
    """
    if residual is None or activation == "identity":
        return None
    return bits if activation == "relu" else y if activation in ("sigmoid", "tanh") else residual


def batch_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    counter: Tensor | None = None,
    *,
    training: bool,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
) -> Tensor:
    """``activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` of an (N, C, ...) input.

    With ``training`` mean and var are the batch's, the running statistics move towards them by ``momentum``
    (None: by 1 / ``counter``) and ``counter`` by one; without, they are the running statistics: one pass
    over x. A residual of another type is promoted as by ``+``. It can be differentiated once.
    """
    tensors = (x, residual, weight, bias, running_mean, running_var, counter)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:4]):
        return _BatchNorm.apply(*tensors, training, momentum, eps, activation)
    return torch.ops.bnexp.batch_norm(*tensors, training, momentum, eps, activation, False)[0]


# ---- the parts ----


def statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, M2 = sum (x - mean)^2 and count, each (C,), float32 or for float64 input float64; M2 / count = var."""
    launch = _launch(x)
    x, _ = dense(x)
    count, mean, m2 = launch.launch_statistics(x, launch.tiling_for(x))
    return combine(mean, m2, count)


def combine(mean: Tensor, m2: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, M2 and count of the union of sets stacked along dimension 0 (Chan's formula, in their order)."""
    total = count.sum(0)
    d = mean - mean[0]
    shift = (count * d).sum(0) / total
    return mean[0] + shift, (m2 + count * (d - shift) ** 2).sum(0), total


def rsqrt(m2: Tensor, count: Tensor, eps: float) -> Tensor:
    """rstd = 1 / sqrt(M2 / count + eps)."""
    return 1.0 / (m2 / count + eps).sqrt()


def apply(x, mean, rstd, weight=None, bias=None, residual=None, activation="identity"):
    """y = activation((x - mean) * rstd * weight + bias + residual), and ``saved`` for the gradients."""
    y, bits = _launch(x).launch_apply(x, residual, weight, bias, mean, rstd, activation)
    return y, _saved(y, bits, residual, activation)


def gradient_sums(dy, x, mean, rstd, weight=None, bias=None, saved=None, activation="identity") -> Tensor:
    """The gradients of bias and weight, stacked (2, C), in the type of ``mean``."""
    return _launch(x).launch_reduce(dy, x, weight, bias, mean, rstd, saved, activation).sum(1)


def gradient_apply(dy, x, mean, rstd, weight, bias, saved, activation, sums, count):
    """dx and dresidual from ``sums``, the gradients of bias and weight over ``count`` values per channel."""
    dx, _, _, dresidual = _launch(x).launch_backward(
        dy, x, weight, bias, mean, rstd, saved, activation, True, sums[:, None].contiguous(), count
    )
    return dx, dy if saved is None else dresidual
