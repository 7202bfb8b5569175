"""Launch the kernels: bring tensors into one of the two layouts, choose the tiling, allocate outputs, start."""

import contextlib
import logging

import torch
from torch import Tensor

from bnexp.norms.kernels import backward, forward
from bnexp.norms.kernels.tiling import Tiling, dense, like, mask_bytes, power_of_2, statistics_dtype, tiling_for

log = logging.getLogger("bnexp.norms.kernels")


def _sizes(x: Tensor, p: Tiling) -> tuple[int, ...]:
    """rows, columns / vec, channels, groups, programs, tiles, tiles_each: arguments of every kernel."""
    n, c, s = x.shape[0], x.shape[1], x.shape[2:].numel()
    rows, cols = (n * s, c) if p.last else (n, s)
    return rows, cols // p.vec, c, p.groups, p.programs, p.tiles, p.tiles_each


def _blocks(p: Tiling) -> dict:
    sizes = {"ROWS": p.rows, "COLS": p.cols, "VEC": p.vec, "LAST": p.last}
    return {**sizes, "num_warps": p.warps, "enable_fp_fusion": True}


def _on(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def launch_statistics(x: Tensor, p: Tiling, counter: Tensor | None = None) -> Tensor:
    """(count, mean, M2) of every program, (3, programs, C); ``counter`` moves by one."""
    parts = torch.empty((3, p.programs, x.shape[1]), dtype=statistics_dtype(x), device=x.device)
    with _on(x):
        forward.statistics_kernel[(p.groups * p.programs,)](x, parts, counter, *_sizes(x, p), **_blocks(p))
    return parts


def launch_apply(x, residual, weight, bias, mean, rstd, activation, bits=True, *, source="given", p=None, parts=None,
                 running=(None, None), counter=None, momentum=0.0, eps=0.0):  # fmt: skip
    """(y, bits or None) in one pass over x. ``mean`` and ``rstd`` are read if ``source`` is given, else written."""
    x, last = dense(x)
    residual = like(residual, last)
    p = p or tiling_for(x)
    y = torch.empty_like(x, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    mask = None
    if bits and residual is not None and activation == "relu":
        mask = torch.empty(mask_bytes(x), dtype=torch.uint8, device=x.device)
    with _on(x):
        forward.apply_kernel[(p.groups * p.programs,)](
            x, residual, y, mask, weight, bias, mean, rstd, parts, *running, counter, float(momentum or 0.0),
            *_sizes(x, p), EPS=eps, PARTS=power_of_2(p.programs), SOURCE=source,
            CUMULATIVE=momentum is None and counter is not None, ACTIVATION=activation, **_blocks(p),
        )  # fmt: skip
    return y, mask


def launch_forward(x, residual, weight, bias, running_mean, running_var, counter, training, momentum, eps, activation,
                   bits):  # fmt: skip
    """(y, mean, rstd, bits or None). With ``training`` the running statistics and the counter move."""
    x, _ = dense(x)
    p = tiling_for(x)
    log.debug("forward %s: %s", tuple(x.shape), p)
    mean, rstd = (torch.empty(x.shape[1], dtype=statistics_dtype(x), device=x.device) for _ in range(2))
    source, parts = "running", None
    if training and p.tier == "two-launch":
        source, parts = "parts", launch_statistics(x, p, counter)
    elif training:
        source = "tile"
        if momentum is None and counter is not None:
            counter.add_(1)
    y, mask = launch_apply(
        x, residual, weight, bias, mean, rstd, activation, bits, source=source, p=p, parts=parts,
        running=(running_mean, running_var), counter=counter, momentum=momentum, eps=eps,
    )  # fmt: skip
    return y, mean, rstd, mask


def _backward_tiling(x: Tensor, activation: str) -> Tiling:
    p = tiling_for(x, heavy=activation not in ("identity", "relu", "relu6"))
    log.debug("backward %s: %s", tuple(x.shape), p)
    return p


def launch_reduce(dy, x, weight, bias, mean, rstd, saved, activation) -> Tensor:
    """(sum g, sum g * xhat) of every program, (2, programs, C)."""
    x, last = dense(x)
    p = _backward_tiling(x, activation)
    parts = torch.empty((2, p.programs, x.shape[1]), dtype=mean.dtype, device=x.device)
    with _on(x):
        backward.reduce_kernel[(p.groups * p.programs,)](
            x, like(dy, last), like(saved, last), weight, bias, mean, rstd, parts, *_sizes(x, p),
            ACTIVATION=activation, **_blocks(p),
        )  # fmt: skip
    return parts


def launch_backward(dy, x, weight, bias, mean, rstd, saved, activation, training, parts=None, count=None):
    """(dx, dweight, dbias, dresidual), the last three None where the forward had no weight, bias or saved tensor.

    ``parts`` (2, any number, C) and ``count`` (one number, on the device) are sums reduced across ranks; without them
    the sums are taken over ``x``.
    """
    x, last = dense(x)
    dy, saved = like(dy, last), like(saved, last)
    p = _backward_tiling(x, activation)
    dx = torch.empty_like(x)
    dweight, dbias = (None if t is None else torch.empty_like(t) for t in (weight, bias))
    dresidual = None if saved is None else torch.empty_like(x, dtype=dy.dtype)
    if parts is None and p.tier == "two-launch":
        parts = launch_reduce(dy, x, weight, bias, mean, rstd, saved, activation)
    num_parts = 0 if parts is None else parts.shape[1]
    with _on(x):
        backward.dx_kernel[(p.groups * p.programs,)](
            x, dy, saved, weight, bias, mean, rstd, parts, dx, dresidual, dweight, dbias, count, num_parts,
            *_sizes(x, p), BATCH=training, PARTS=power_of_2(num_parts), ACTIVATION=activation, **_blocks(p),
        )  # fmt: skip
    return dx, dweight, dbias, dresidual
