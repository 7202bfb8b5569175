"""The forward kernels: statistics, then apply; apply alone where a program holds all values of its channels.

Everything is computed in float32 (float64 for float64 inputs), which is the type of mean, rstd and the workspace.
``momentum`` is annotated, because triton passes a float as float32 otherwise. Chan, Golub, LeVeque (1979): Updating
Formulae and a Pairwise Algorithm for Computing Sample Variances.
"""

import triton
import triton.language as tl

from bnexp.norms.kernels.blocks import activate, affine, channels, kernel, moments, normalize, pack, tile, tile_count


@kernel
def statistics_kernel(
    p_x, p_parts, p_counter, rows, inner_v, chans, groups, programs, tiles, tiles_each,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Store (count, mean, M2) over the tiles of every program in ``parts`` (3, programs, C); count the batch."""
    pid = tl.program_id(0)
    i_group = pid % groups
    i_program = pid // groups
    inner = inner_v * VEC
    DTYPE: tl.constexpr = p_parts.dtype.element_ty
    W: tl.constexpr = COLS if LAST else 1
    if p_counter is not None and pid == 0:
        tl.store(p_counter, tl.load(p_counter) + 1)

    b_count = tl.zeros((1, 1), DTYPE)
    b_mean = tl.zeros((1, W), DTYPE)
    b_m2 = tl.zeros((1, W), DTYPE)
    start = i_program * tiles_each
    for i in range(0, tl.minimum(tiles_each, tiles - start)):
        i_tile = start + i
        offsets, mask = tile(i_tile, i_group, rows, inner, chans, ROWS, COLS, LAST)
        b_x = tl.load(p_x + offsets, mask=mask, other=0.0).to(DTYPE)
        count = tile_count(i_tile, rows, inner, ROWS, COLS, LAST, DTYPE)
        b_tile_mean, b_tile_m2 = moments(b_x, mask, count, LAST)
        # Chan's update of (count, mean, M2) by those of one more tile, always in the order of the tiles.
        b_share = count / (b_count + count)
        b_d = b_tile_mean - b_mean
        b_m2 += b_tile_m2 + b_d * b_d * (b_count * b_share)
        b_mean += b_d * b_share
        b_count += count

    o_c, m_c = channels(i_group, chans, COLS, LAST)
    o_part = i_program.to(tl.int64) * chans + o_c
    size = programs.to(tl.int64) * chans
    tl.store(p_parts + o_part, b_count + tl.zeros((1, W), DTYPE), mask=m_c)
    tl.store(p_parts + size + o_part, b_mean, mask=m_c)
    tl.store(p_parts + size * 2 + o_part, b_m2, mask=m_c)


@triton.jit
def _combine_parts(p_parts, o_c, m_c, chans, programs, PARTS: tl.constexpr):
    """Count, mean and M2 over the parts of all programs: Chan's formula for many sets, relative to the first mean."""
    i_part = tl.arange(0, PARTS)[:, None]
    o_part = i_part.to(tl.int64) * chans + o_c
    m_part = (i_part < programs) & m_c
    size = programs.to(tl.int64) * chans
    b_n = tl.load(p_parts + o_part, mask=m_part, other=0.0)
    b_first = tl.load(p_parts + size + o_c, mask=m_c, other=0.0)
    b_d = tl.where(m_part, tl.load(p_parts + size + o_part, mask=m_part, other=0.0) - b_first, 0.0)
    b_m2 = tl.load(p_parts + size * 2 + o_part, mask=m_part, other=0.0)
    b_count = tl.where(m_c, tl.sum(b_n, 0, keep_dims=True), 2.0)  # 2: keeps lanes beyond C from 0 / 0
    b_shift = tl.sum(b_n * b_d, 0, keep_dims=True) / b_count
    b_d = tl.where(m_part, b_d - b_shift, 0.0)
    return b_count, b_first + b_shift, tl.sum(b_m2 + b_n * b_d * b_d, 0, keep_dims=True)


@triton.jit
def _move_running(p_running_mean, p_running_var, p_counter, momentum, o_c, m_c, b_count, b_mean, b_m2):
    """Move the running statistics towards the batch's mean and unbiased variance M2 / (count - 1)."""
    new = tl.full((1, 1), momentum, b_mean.dtype)
    if p_counter is not None:  # momentum=None: the cumulative average
        new = 1.0 / tl.load(p_counter).to(b_mean.dtype)
    b_old = tl.load(p_running_mean + o_c, mask=m_c, other=0.0).to(b_mean.dtype)
    tl.store(p_running_mean + o_c, b_old * (1.0 - new) + b_mean * new, mask=m_c)
    b_old = tl.load(p_running_var + o_c, mask=m_c, other=0.0).to(b_mean.dtype)
    tl.store(p_running_var + o_c, b_old * (1.0 - new) + b_m2 / (b_count - 1.0) * new, mask=m_c)


@triton.jit
def _finish(
    b_x, p_residual, p_y, p_bits, b_mean, b_scale, b_shift, offsets, mask,
    i_tile, i_group, rows, inner, chans,
    ROWS: tl.constexpr, COLS: tl.constexpr, LAST: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Store y = activation(normalize(x) + residual) of one tile and, given ``p_bits``, relu's mask as bits."""
    b_z = normalize(b_x, b_mean, b_scale, b_shift)
    if p_residual is not None:
        b_z += tl.load(p_residual + offsets, mask=mask, other=0.0).to(b_z.dtype)
    b_y = activate(b_z, ACTIVATION).to(p_y.dtype.element_ty)
    tl.store(p_y + offsets, b_y, mask=mask)
    if p_bits is not None:
        # After rounding, as torch does; "not (y <= 0)" lets the gradient of NaN pass.
        b_bits = pack((b_y.to(b_x.dtype) <= 0.0) == 0, ROWS, COLS)
        o_bits, m_bits = tile(i_tile, i_group, rows, tl.cdiv(inner, 8), chans, ROWS, COLS // 8, LAST)
        tl.store(p_bits + o_bits, b_bits, mask=m_bits)


@kernel
def apply_kernel(
    p_x, p_residual, p_y, p_bits, p_weight, p_bias, p_mean, p_rstd, p_parts, p_running_mean, p_running_var,
    p_counter, momentum: tl.float64, rows, inner_v, chans, groups, programs, tiles, tiles_each,
    EPS: tl.constexpr, PARTS: tl.constexpr, SOURCE: tl.constexpr, CUMULATIVE: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Store y, and mean and rstd for backward, in one pass over x. SOURCE is where mean and rstd come from:

    * tile: a program's only tile, which holds all values of its channels and stays in registers (training);
    * parts: the results of ``statistics_kernel`` (training);
    * running: the running statistics (evaluation);
    * given: ``p_mean`` and ``p_rstd``.

    After ``statistics_kernel`` programs and tiles run in reverse order, so that the values read last, which may still
    be in the L2 cache, are read first.
    """
    pid = tl.program_id(0)
    if SOURCE != "tile":
        pid = tl.num_programs(0) - 1 - pid
    i_group = pid % groups
    i_program = pid // groups
    inner = inner_v * VEC
    DTYPE: tl.constexpr = p_mean.dtype.element_ty
    o_c, m_c = channels(i_group, chans, COLS, LAST)
    if SOURCE == "tile":
        i_tile = i_group * 0
        offsets, mask = tile(i_tile, i_group, rows, inner, chans, ROWS, COLS, LAST)
        b_x = tl.load(p_x + offsets, mask=mask, other=0.0).to(DTYPE)
        b_count = tile_count(i_tile, rows, inner, ROWS, COLS, LAST, DTYPE)
        b_mean, b_m2 = moments(b_x, mask, b_count, LAST)
        # With CUMULATIVE every program reads the counter, so the host has raised it before the launch.
        if p_counter is not None and not CUMULATIVE and pid == 0:
            tl.store(p_counter, tl.load(p_counter) + 1)
    elif SOURCE == "parts":
        b_count, b_mean, b_m2 = _combine_parts(p_parts, o_c, m_c, chans, programs, PARTS)
    elif SOURCE == "running":
        b_mean = tl.load(p_running_mean + o_c, mask=m_c, other=0.0).to(DTYPE)
        b_rstd = 1.0 / tl.sqrt(tl.load(p_running_var + o_c, mask=m_c, other=0.0).to(DTYPE) + EPS)
    else:
        b_mean = tl.load(p_mean + o_c, mask=m_c, other=0.0)
        b_rstd = tl.load(p_rstd + o_c, mask=m_c, other=0.0)

    if SOURCE == "tile" or SOURCE == "parts":
        b_rstd = 1.0 / tl.sqrt(b_m2 / b_count + EPS)
        if i_program == 0 and p_running_mean is not None:
            _move_running(p_running_mean, p_running_var, p_counter if CUMULATIVE else None, momentum,
                          o_c, m_c, b_count, b_mean, b_m2)  # fmt: skip
    if SOURCE != "given" and i_program == 0:
        tl.store(p_mean + o_c, b_mean, mask=m_c)
        tl.store(p_rstd + o_c, b_rstd, mask=m_c)

    b_scale, b_shift = affine(p_weight, p_bias, o_c, m_c, b_rstd)
    if SOURCE == "tile":
        _finish(b_x, p_residual, p_y, p_bits, b_mean, b_scale, b_shift, offsets, mask, i_tile, i_group,
                rows, inner, chans, ROWS, COLS, LAST, ACTIVATION)  # fmt: skip
    else:
        start = i_program * tiles_each
        num_tiles = tl.minimum(tiles_each, tiles - start)
        for i in range(0, num_tiles):
            i_tile = start + num_tiles - 1 - i
            offsets, mask = tile(i_tile, i_group, rows, inner, chans, ROWS, COLS, LAST)
            b_x = tl.load(p_x + offsets, mask=mask, other=0.0).to(DTYPE)
            _finish(b_x, p_residual, p_y, p_bits, b_mean, b_scale, b_shift, offsets, mask, i_tile, i_group,
                    rows, inner, chans, ROWS, COLS, LAST, ACTIVATION)  # fmt: skip
