"""Choose the tier of kernels for a shape and how it is cut into programs.

Two layouts cover every input. Channels first, (N, C, S): a channel is N rows of S neighbours. Channels last,
(R, C) with R = N * S, also every (N, C): a channel is a column, and a program takes a strip of columns.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_SIZE = 8192  # elements a program holds at a time in the two-launch tier: 32 for each of 256 threads
ON_CHIP = 16384  # elements a program of the local tier keeps in float32 registers without spilling
STRIP_BYTES = {"two-launch": 128, "local": 32}  # width of a channels-last strip: a cache line, a sector
MAX_PROGRAMS = 128  # per group of channels; a program of the second launch reads one partial result of each
MIN_VALUES = 100  # least values per channel divided by the squared number of programs, see choose_tiling


@dataclass(frozen=True)
class Tiling:
    """The tier and the cut for one shape: ``programs`` programs for each of ``groups`` groups of channels.

    A program takes ``tiles_each`` of its group's ``tiles`` tiles of ``rows`` x ``cols`` elements; ``vec`` is
    the largest power of two up to 16 that divides the contiguous dimension, so many values load at once.
    """

    tier: str
    last: bool
    rows: int
    cols: int
    groups: int
    programs: int
    tiles: int
    tiles_each: int
    vec: int
    warps: int
    reason: str


def choose_tiling(n: int, c: int, s: int, *, last: bool, itemsize: int, sms: int, heavy: bool = False) -> Tiling:
    """Choose the tier and the tiles for N samples, C channels and S positions of ``itemsize`` bytes.

    **local** where all values of a channel (strip) fit into the registers of one program, so that x is read
    once; **two-launch** (statistics, then apply) everywhere else. With ``heavy`` a value takes twice the registers
    and a thread gets half as many values.
    """
    num_rows, num_cols = (n * s, c) if last else (n, s)
    values = n * s
    vec = math.gcd(num_cols, 16)
    share = (4 if itemsize == 8 else 1) * (2 if heavy else 1)  # float64: two registers, and slow exp
    on_chip = ON_CHIP // share

    def strip(tier: str) -> int:
        """Columns of a channels-last tile; at least 8, because eight of relu's mask bits share a byte."""
        return max(8, min(power_of_2(num_cols), STRIP_BYTES[tier] // itemsize))

    rows, cols = power_of_2(num_rows), strip("local") if last else max(8, power_of_2(num_cols))
    if rows * cols <= on_chip:
        tier = "local"
        reason = f"{rows} x {cols} tile holds a channel's {values} values, at most {on_chip} fit on chip"
    else:
        tier = "two-launch"
        reason = f"{rows} x {cols} tile for a channel's {values} values, only {on_chip} fit on chip"
        tile = TILE_SIZE // share
        cols = strip("two-launch") if last else _columns(num_cols, tile)
        rows = min(power_of_2(num_rows), max(1, tile // cols))
    groups = -(-c // cols) if last else c
    tiles = -(-num_rows // rows) * (1 if last else -(-num_cols // cols))
    # Every program of the second launch reads the partial results of all programs of its group, P^2 reads a
    # channel beside the channel's values: P <= sqrt(values / 100) keeps them near a twentieth of the traffic.
    programs = min(tiles, MAX_PROGRAMS, -(-8 * sms // groups), max(1, math.isqrt(values // MIN_VALUES)))
    tiles_each = -(-tiles // programs)
    programs = -(-tiles // tiles_each)
    warps = min(16, max(1, rows * cols * share // 1024))  # 32 elements a thread leave registers to compute with
    return Tiling(tier, last, rows, cols, groups, programs, tiles, tiles_each, vec, warps, reason)


def power_of_2(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def _columns(num_cols: int, tile: int) -> int:
    """The largest power of two with which at most an eighth of the lanes lie beyond the ends of rows."""
    widest = max(8, min(1024, tile, power_of_2(num_cols)))
    cols = widest
    while cols >= 64:
        if 8 * num_cols >= 7 * cols * -(-num_cols // cols):
            return cols
        cols //= 2
    return widest


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """``x`` in one of the two layouts, copied only if it has neither, and whether channels come last."""
    if x.movedim(1, -1).is_contiguous() and (x.shape[2:].numel() == 1 or not x.is_contiguous()):
        return x, True
    if x.is_contiguous():
        return x, False
    last = x.shape[2:].numel() == 1 or (x.stride(1) == 1 and x.shape[1] > 1)
    return like(x, last), last


def like(x: Tensor | None, last: bool) -> Tensor | None:
    """``x`` with its channels last or first; None and flat bits stay as they are."""
    if x is None or x.dim() == 1:
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


def mask_bytes(x: Tensor) -> int:
    """Bytes of relu's mask for a dense ``x``: one bit per element, every row of columns padded to a byte."""
    n, c, s = x.shape[0], x.shape[1], x.shape[2:].numel()
    return n * s * ((c + 7) // 8) if dense(x)[1] else n * c * ((s + 7) // 8)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The type that statistics are computed and kept in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@functools.lru_cache
def num_sms(device: torch.device) -> int:
    """The number of multiprocessors of a GPU; 4 on a CPU, so that the interpreter splits the work too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def tiling_for(x: Tensor, device: torch.device | None = None, heavy: bool = False) -> Tiling:
    """The tiling of a dense ``x``, a meta tensor too, on ``device``."""
    n, c, s = x.shape[0], x.shape[1], x.shape[2:].numel()
    sms = num_sms(device or x.device)
    return choose_tiling(n, c, s, last=dense(x)[1], itemsize=x.element_size(), sms=sms, heavy=heavy)
