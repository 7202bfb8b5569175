"""The two layouts of an input, channels first (N, C, S) and channels last (R, C), and the plan of one."""

import functools

import torch
from torch import Tensor

from bnexp.kernels.plan import Plan, plan


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """``x`` in one of the two layouts, copied only if it is in neither, and whether channels come last."""
    if x.movedim(1, -1).is_contiguous() and (x.shape[2:].numel() == 1 or not x.is_contiguous()):
        return x, True
    if x.is_contiguous():
        return x, False
    last = x.shape[2:].numel() == 1 or (x.stride(1) == 1 and x.shape[1] > 1)
    return like(x, last), last


def like(x: Tensor | None, last: bool) -> Tensor | None:
    """``x`` (or nothing, or flat bits) with its channels last or first."""
    if x is None or x.dim() == 1:
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


def mask_bytes(x: Tensor) -> int:
    """Bytes of relu's mask for a dense ``x``: one bit per element, every row of columns padded to a byte."""
    n, c, s = x.shape[0], x.shape[1], x.shape[2:].numel()
    return n * s * ((c + 7) // 8) if dense(x)[1] else n * c * ((s + 7) // 8)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """What statistics are computed and kept in: float32, and float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@functools.lru_cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors to fill; a few for the interpreter, so that it splits work at all."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def plan_for(x: Tensor, device: torch.device | None = None, heavy: bool = False) -> Plan:
    """The plan of a dense ``x`` (a meta tensor will do) on ``device``."""
    n, c, s = x.shape[0], x.shape[1], x.shape[2:].numel()
    sms = num_sms(device or x.device)
    return plan(n, c, s, last=dense(x)[1], itemsize=x.element_size(), sms=sms, heavy=heavy)
