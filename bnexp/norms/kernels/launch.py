"""Launch the kernels: bring tensors into one of the two layouts, choose the tiling, allocate, start."""

import contextlib
import logging

import torch
from torch import Tensor

from bnexp.norms.kernels import backward, forward
from bnexp.norms.kernels.tiling import Tiling, dense, like, mask_bytes, statistics_dtype, tiling_for

log = logging.getLogger("bnexp.norms.kernels")


def empty(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized output or workspace without a memory format; tests fill it with NaN."""
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialized output in the memory format of ``x``; tests fill it with NaN."""
    return torch.empty_like(x, dtype=dtype)


def _sizes(x: Tensor, p: Tiling) -> tuple[int, int, int]:
    """rows, columns / vec, channels: arguments of every kernel."""
    n, c, s = x.shape[0], x.shape[1], x.shape[2:].numel()
    return (n * s, c // p.vec, c) if p.last else (n, s // p.vec, c)


def _grid(p: Tiling) -> tuple[int, int, int, int]:
    return p.groups, p.programs, p.tiles, p.tiles_each


def _blocks(p: Tiling) -> dict:
    sizes = {"ROWS": p.rows, "COLS": p.cols, "VEC": p.vec, "LAST": p.last}
    return {**sizes, "num_warps": p.warps, "enable_fp_fusion": True}


def _on(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _outputs(x, residual, activation, bits):
    y = empty_like(x, x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    if not (bits and residual is not None and activation == "relu"):
        return y, None
    return y, empty(mask_bytes(x), torch.uint8, x.device)


def launch_statistics(x: Tensor, p: Tiling, counter: Tensor | None = None) -> Tensor:
    """(count, mean, M2) of every program, (3, programs, C)."""
    parts = empty((3, p.programs, x.shape[1]), statistics_dtype(x), x.device)
    with _on(x):
        forward.statistics_kernel[(p.groups * p.programs,)](
            x, parts, counter, *_sizes(x, p), *_grid(p), **_blocks(p)
        )
    return parts


def launch_apply(x, residual, weight, bias, mean, rstd, activation, bits=True, *, source="given", p=None, parts=None,
          running=(None, None), counter=None, momentum=0.0, eps=0.0):  # fmt: skip
    """One pass: (y, bits or None). ``mean`` and ``rstd`` are read if given, else written."""
    x, last = dense(x)
    residual = like(residual, last)
    p = p or tiling_for(x)
    y, mask = _outputs(x, residual, activation, bits)
    with _on(x):
        forward.apply_kernel[(p.groups * p.programs,)](
            x, residual, y, mask, weight, bias, mean, rstd, parts, *running, counter, float(momentum),
            *_sizes(x, p), *_grid(p), EPS=eps, PARTS=1 << (p.programs - 1).bit_length(), SOURCE=source,
            ACTIVATION=activation, **_blocks(p),
        )  # fmt: skip
    return y, mask


def launch_forward(x, residual, weight, bias, running_mean, running_var, counter, training,
               momentum, eps, activation, bits):  # fmt: skip
    """(y, mean, rstd, bits or None); ``training`` moves running statistics and counter."""
    x, last = dense(x)
    residual = like(residual, last)
    p = tiling_for(x)
    log.debug("forward %s: %s", tuple(x.shape), p)
    mean, rstd = (empty(x.shape[1], statistics_dtype(x), x.device) for _ in range(2))
    running = (running_mean, running_var)
    if not training:
        y, mask = launch_apply(x, residual, weight, bias, mean, rstd, activation, bits,
                        source="running", p=p, running=running, eps=eps)  # fmt: skip
        return y, mean, rstd, mask
    cumulative = momentum is None and counter is not None
    momentum = float(momentum or 0.0)
    if p.tier == "two-launch":
        parts = launch_statistics(x, p, counter)
        y, mask = launch_apply(x, residual, weight, bias, mean, rstd, activation, bits,
                        source="parts", p=p, parts=parts, running=running,
                        counter=counter if cumulative else None, momentum=momentum, eps=eps)  # fmt: skip
        return y, mean, rstd, mask
    if cumulative:
        counter.add_(1)
    y, mask = _outputs(x, residual, activation, bits)
    with _on(x):
        forward.local_kernel[(p.groups,)](
            x, residual, y, mask, weight, bias, mean, rstd, *running, counter, momentum, *_sizes(x, p),
            EPS=eps, ACTIVATION=activation, CUMULATIVE=cumulative, **_blocks(p),
        )  # fmt: skip
    return y, mean, rstd, mask


def _backward_tiling(x: Tensor, activation: str) -> Tiling:
    p = tiling_for(x, heavy=activation in ("sigmoid", "tanh"))
    log.debug("backward %s: %s", tuple(x.shape), p)
    return p


def launch_reduce(dy, x, weight, bias, mean, rstd, saved, activation) -> Tensor:
    """(sum g, sum g * xhat) of every program, (2, programs, C)."""
    x, last = dense(x)
    p = _backward_tiling(x, activation)
    parts = empty((2, p.programs, x.shape[1]), mean.dtype, x.device)
    with _on(x):
        backward.reduce_kernel[(p.groups * p.programs,)](
            x, like(dy, last), like(saved, last), weight, bias, mean, rstd, parts, *_sizes(x, p), *_grid(p),
            ACTIVATION=activation, **_blocks(p),
        )  # fmt: skip
    return parts


def launch_backward(dy, x, weight, bias, mean, rstd, saved, activation, training, parts=None, count=None):
    """(dx, dweight, dbias, dresidual), the last three None where the forward had no weight, bias or saved tensor.

    ``parts`` (2, any number, C) and ``count`` (one number, on the device) are sums reduced across ranks; without them
    the sums are taken here.
    """
    x, last = dense(x)
    dy, saved = like(dy, last), like(saved, last)
    p = _backward_tiling(x, activation)
    dx = empty_like(x, x.dtype)
    dweight, dbias = (None if t is None else empty(t.shape, t.dtype, t.device) for t in (weight, bias))
    dresidual = None if saved is None else empty_like(x, dy.dtype)
    outputs = (dx, dresidual, dweight, dbias)
    flags = {"BATCH": training, "ACTIVATION": activation, **_blocks(p)}
    with _on(x):
        if p.tier == "local" and parts is None:
            backward.local_dx_kernel[(p.groups,)](
                x, dy, saved, weight, bias, mean, rstd, *outputs, *_sizes(x, p), **flags
            )
        else:
            if parts is None:
                parts = launch_reduce(dy, x, weight, bias, mean, rstd, saved, activation)
            backward.dx_kernel[(p.groups * p.programs,)](
                x, dy, saved, weight, bias, mean, rstd, parts, *outputs, count, *_sizes(x, p),
                p.groups, p.programs, parts.shape[1], p.tiles, p.tiles_each,
                PARTS=1 << (parts.shape[1] - 1).bit_length(), **flags,
            )  # fmt: skip
    return dx, dweight, dbias, dresidual
