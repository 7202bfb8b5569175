"""Does an implementation of BN+ReLU agree with float64: output, every gradient, running statistics, counter?"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnexp.bench.cases import Case

CHUNK = 2**22  # number of values that are compared with float64 at a time

# Statistics are float32 whatever the input's type is. Blocked sums have a relative error of 5e-6 of their terms, and
# TOLERANCE allows four times that. Channels have means of up to 100 standard deviations. Such a mean, rounded to
# float32, is off by 100 unit roundoffs of a standard deviation; results that depend on it may be off by MEAN_ROUNDOFFS
# times as much. The variance does not depend on it, unless it is computed as E[x^2] - E[x]^2, which loses up to
# 10,000 roundoffs, 6e-4, and fails. Tensors stored in half precision are rounded after the norm and after the
# addition; four roundoffs are allowed, twice as many.
TOLERANCE = 2e-5
MEAN_ROUNDOFFS = 16
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-11}
STORED = ("output", "output in evaluation", "gradient of x", "gradient of residual")
# In the order of the computation, so that the first failure is the cause of those after it.
ORDER = ("running_mean", "running_var", "num_batches_tracked", *STORED, "gradient of weight", "gradient of bias")


class Inputs(NamedTuple):
    """``x``, ``residual`` and the output's gradient ``dy``, all of one shape; ``spare`` for the elementwise kernels."""

    x: Tensor
    residual: Tensor
    dy: Tensor
    spare: tuple[Tensor, ...] = ()


class State(NamedTuple):
    """Parameters and running statistics of a norm before the step, each (C,) and float32."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


def make_inputs(case: Case, dtype: torch.dtype, nhwc: bool, device: torch.device) -> tuple[Inputs, State]:
    """Random inputs and parameters of one case, always the same.

    The standard deviations of the channels go down to 0.003, where eps matters; their means go up to 100 deviations.
    """
    draw = torch.Generator(device).manual_seed(0)
    num_channels = case.shape[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device)

    def in_layout(t: Tensor) -> Tensor:
        t = t.to(dtype)
        if case.gaps:
            wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
            wide[..., ::2] = t
            return wide[..., ::2]
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return t.contiguous(memory_format=formats[t.dim()]) if nhwc and t.dim() in formats else t

    channel = torch.arange(num_channels, device=device)
    deviation = torch.tensor([0.01, 3.0, 0.003], device=device)[channel % 3]
    centre = torch.tensor([1.0, 0.0, 100.0, -1.0], device=device)[channel % 4] * deviation
    state = State(1 + 0.3 * normal(num_channels), 0.3 * normal(num_channels), 0.2 * deviation, 0.1 * deviation**2)
    view = [1, -1] + [1] * (len(case.shape) - 2)
    x = normal(*case.shape).mul_(deviation.view(view)).add_(centre.view(view))
    tensors = [in_layout(t).requires_grad_() for t in (x, normal(*case.shape))]
    return Inputs(*tensors, in_layout(normal(*case.shape).add_(0.5))), state


def copy_inputs(inputs: Inputs) -> Inputs:
    """A copy with the same values and strides, and two spare tensors for the elementwise kernels to write to."""

    def copy(t: Tensor) -> Tensor:
        other = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        return other.copy_(t.detach()).requires_grad_(t.requires_grad)

    tensors = list(map(copy, inputs[:3]))
    return Inputs(*tensors, spare=tuple(torch.zeros_like(inputs.x.detach()) for _ in range(2)))


def set_state(module: nn.Module, state: State) -> None:
    """Give a norm the state before the step: ``state``, and three batches counted."""
    with torch.no_grad():
        for name, value in state._asdict().items():
            getattr(module, name).copy_(value)
        module.num_batches_tracked.fill_(3)


def float64_results(
    x: Tensor, residual: Tensor | None, dy: Tensor, is_positive: Tensor, state: State, momentum: float, eps: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Every result of BN+ReLU in float64, each with the magnitude of the terms that add up to it.

    With xhat = (x - mean) / sqrt(var + eps) and the gradient dz = dy where y > 0, over M values per channel::

        y  = max(0, weight xhat + bias + residual)       dbias = sum dz       dweight = sum dz xhat
        dx = weight / sqrt(var + eps) (dz - dbias / M - xhat dweight / M)

    ``is_positive`` is the implementation's mask y > 0: near zero, rounding decides it, and y is compared anyway.
    """
    dims = [0, *range(2, x.dim())]
    x, dy = x.double(), dy.double()
    weight, bias, running_mean, running_var = (t.double().view([1, -1] + [1] * (x.dim() - 2)) for t in state)
    residual = torch.zeros_like(x) if residual is None else residual.double()
    m = x.numel() // x.shape[1]
    mean = x.mean(dims, keepdim=True)
    var = (x - mean).square().mean(dims, keepdim=True)
    rstd = (var + eps).rsqrt()
    xhat = (x - mean) * rstd
    lost = MEAN_ROUNDOFFS * ROUNDOFF[torch.float32] / TOLERANCE * mean.abs() * rstd  # of xhat, by rounding the mean
    mean_terms = running_mean.abs()
    if m:  # an empty batch is counted, but changes no statistics
        mean_terms = (1 - momentum) * mean_terms + momentum * mean.abs()
        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var = (1 - momentum) * running_var + momentum * var * m / (m - 1)
    dz = dy * is_positive
    dbias, dweight = dz.sum(dims, keepdim=True), (dz * xhat).sum(dims, keepdim=True)
    size = dz.square().mean(dims, keepdim=True).sqrt()
    xhat_in_eval = (x - running_mean) * (running_var + eps).rsqrt()
    terms = bias.abs() + residual.abs()
    results = {
        "output": ((weight * xhat + bias + residual).relu(), weight.abs() * (1 + xhat.abs() + lost) + terms),
        "output in evaluation": (
            (weight * xhat_in_eval + bias + residual).relu(),
            weight.abs() * (1 + xhat_in_eval.abs() + (x * (running_var + eps).rsqrt()).abs()) + terms,
        ),
        "gradient of x": (
            weight * rstd * (dz - dbias / max(m, 1) - xhat * dweight / max(m, 1)),
            weight.abs() * rstd * (dz.abs() + size * (1 + xhat.abs() + lost)),
        ),
        "gradient of residual": (dz, dz.abs() + size),
        "gradient of weight": (
            dweight,
            dweight.abs() + (dz * xhat).square().sum(dims, keepdim=True).sqrt() + lost * m * size,
        ),
        "gradient of bias": (dbias, dbias.abs() + size * m**0.5),
        "running_mean": (running_mean, mean_terms),
        "running_var": (running_var, running_var),
    }
    return {name: pair if name in STORED else (pair[0].flatten(), pair[1].flatten()) for name, pair in results.items()}


def results_of(call: Callable[..., Tensor], module: nn.Module, inputs: Inputs, add: bool) -> dict[str, Tensor | None]:
    """The results of one training step and one evaluation after it, by the names of :func:`float64_results`."""
    residual = inputs.residual if add else None
    y = call(inputs.x, residual)
    leaves = {"x": inputs.x, "weight": module.weight, "bias": module.bias} | ({"residual": residual} if add else {})
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy, allow_unused=True)
    got = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    got |= {name: getattr(module, name).clone() for name in ("running_mean", "running_var", "num_batches_tracked")}
    module.eval()
    with torch.no_grad():
        got |= {"output": y.detach(), "output in evaluation": call(inputs.x, residual)}
    module.train()
    return got


def differences_from_float64(
    call: Callable[..., Tensor], module: nn.Module, inputs: Inputs, state: State, *, add: bool
) -> dict[str, float]:
    """The largest difference of every result from float64, relative to its terms, by name.

    A result of the wrong shape or type has an infinite one. The counter's is absolute.
    """
    set_state(module, state)
    got = results_of(call, module, inputs, add)
    counted = got.pop("num_batches_tracked")
    off = {"num_batches_tracked": abs(float(counted) - 4)}
    for name, result in got.items():
        like = inputs.x if name in STORED else state.weight
        is_alike = result is not None and (result.shape, result.dtype) == (like.shape, like.dtype)
        off[name] = 0.0 if is_alike else math.inf
    if off["output"]:
        return off
    num_channels = inputs.x.shape[1]
    piece = max(1, CHUNK * num_channels // max(1, inputs.x.numel()))  # channels that are compared at a time
    for begin in range(0, num_channels, piece):
        part = slice(begin, begin + piece)
        x, residual, dy = (t.detach()[:, part] for t in inputs[:3])
        expected = float64_results(
            x, residual if add else None, dy, got["output"][:, part] > 0, State(*(t[part] for t in state)),
            module.momentum, module.eps,
        )  # fmt: skip
        for name, (value, scale) in expected.items():
            if value.numel() and off.get(name, math.inf) < math.inf:
                result = got[name][:, part] if name in STORED else got[name][part]
                difference = (result.double() - value).abs()
                relative = torch.where(difference == 0, 0.0, difference / scale)
                off[name] = max(off[name], float(relative.nan_to_num(nan=math.inf, posinf=math.inf).max()))
    return off


def parity_failure(off: dict[str, float], dtype: torch.dtype) -> str:
    """The first result that differs by more than ``dtype`` allows, with both numbers; empty if there is none."""
    for name in sorted(off, key=ORDER.index):
        allowed = 0.0 if name == "num_batches_tracked" else TOLERANCE + 4 * ROUNDOFF[dtype] * (name in STORED)
        if not off[name] <= allowed:
            return f"parity failed: {name} off by {off[name]:.1e} (allowed {allowed:.0e})"
    return ""
