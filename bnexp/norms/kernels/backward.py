"""The backward kernels: reduce, then dx; dx alone where a program holds all values of its channels.

With g = dy * activation'(z), xhat = (x - mean) * rstd, M values per channel (Ioffe, Szegedy 2015, sec. 3):

    dbias = sum g,  dweight = sum g * xhat,  dresidual = g
    dx = weight * rstd * (g - dbias / M - xhat * dweight / M)     with the batch's statistics
    dx = weight * rstd * g                                        with constant (running) statistics

z is recomputed from x. After a residual, backward reads relu's bits or the output of sigmoid and tanh instead; for the
other activations it reads the residual.
"""

import triton
import triton.language as tl

from bnexp.norms.kernels.blocks import activate, affine, channel_sum, channels, kernel, normalize, slope, tile, unpack


@triton.jit
def _load_channels(
    p_weight, p_bias, p_mean, p_rstd, i_group, chans, COLS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Indices and mask of the group's channels, their mean, rstd, scale and shift, each (1, W)."""
    o_c, m_c = channels(i_group, chans, COLS, LAST)
    b_mean = tl.load(p_mean + o_c, mask=m_c, other=0.0)
    b_rstd = tl.load(p_rstd + o_c, mask=m_c, other=0.0)
    b_scale, b_shift = affine(p_weight, p_bias, o_c, m_c, b_rstd)
    return o_c, m_c, b_mean, b_rstd, b_scale, b_shift


@triton.jit
def _load_tile(
    p_x, p_dy, p_saved, b_mean, b_scale, b_shift, i_tile, i_group, rows, inner, chans,
    ROWS: tl.constexpr, COLS: tl.constexpr, LAST: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """x and g = dy * activation'(z) of one tile, 0 outside its mask, with offsets and mask."""
    offsets, mask = tile(i_tile, i_group, rows, inner, chans, ROWS, COLS, LAST)
    b_x = tl.load(p_x + offsets, mask=mask, other=0.0).to(b_mean.dtype)
    b_dy = tl.load(p_dy + offsets, mask=mask, other=0.0)
    b_g = b_dy.to(b_x.dtype)
    if ACTIVATION == "relu":
        if p_saved is not None:
            o_bits, m_bits = tile(i_tile, i_group, rows, tl.cdiv(inner, 8), chans, ROWS, COLS // 8, LAST)
            keep = unpack(tl.load(p_saved + o_bits, mask=m_bits, other=0), ROWS, COLS)
        else:
            b_y = activate(normalize(b_x, b_mean, b_scale, b_shift), ACTIVATION)
            keep = (b_y.to(b_dy.dtype).to(b_x.dtype) <= 0.0) == 0  # dy has the type that y was rounded to
        b_g = tl.where(keep, b_g, 0.0)
    elif ACTIVATION == "sigmoid" or ACTIVATION == "tanh":
        if p_saved is not None:
            b_y = tl.load(p_saved + offsets, mask=mask, other=0.0).to(b_x.dtype)
        else:
            b_y = activate(normalize(b_x, b_mean, b_scale, b_shift), ACTIVATION)
        b_g *= b_y * (1.0 - b_y) if ACTIVATION == "sigmoid" else 1.0 - b_y * b_y
    elif ACTIVATION != "identity":
        b_z = normalize(b_x, b_mean, b_scale, b_shift)
        if p_saved is not None:
            b_z += tl.load(p_saved + offsets, mask=mask, other=0.0).to(b_x.dtype)
        b_g *= slope(b_z, ACTIVATION)
    return b_x, b_g, offsets, mask


@kernel
def reduce_kernel(
    p_x, p_dy, p_saved, p_weight, p_bias, p_mean, p_rstd, p_parts,
    rows, inner_v, chans, groups, programs, tiles, tiles_each,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Store (sum g, sum g * xhat) over the tiles of every program in ``parts`` (2, programs, C)."""
    pid = tl.program_id(0)
    i_group = pid % groups
    i_program = pid // groups
    inner = inner_v * VEC
    o_c, m_c, b_mean, b_rstd, b_scale, b_shift = _load_channels(
        p_weight, p_bias, p_mean, p_rstd, i_group, chans, COLS, LAST
    )
    b_dbias = tl.zeros_like(b_mean)
    b_dweight = tl.zeros_like(b_mean)
    start = i_program * tiles_each
    for i in range(0, tl.minimum(tiles_each, tiles - start)):
        b_x, b_g, _, _ = _load_tile(p_x, p_dy, p_saved, b_mean, b_scale, b_shift, start + i, i_group,
                                    rows, inner, chans, ROWS, COLS, LAST, ACTIVATION)  # fmt: skip
        b_dbias += channel_sum(b_g, LAST)
        b_dweight += channel_sum(b_g * (b_x - b_mean), LAST) * b_rstd

    o_part = i_program.to(tl.int64) * chans + o_c
    tl.store(p_parts + o_part, b_dbias, mask=m_c)
    tl.store(p_parts + programs.to(tl.int64) * chans + o_part, b_dweight, mask=m_c)


@triton.jit
def _store_dx(
    b_x, b_g, p_dx, p_dresidual, b_mean, b_rstd, b_scale, b_dbias, b_dweight, count, offsets, mask,
    BATCH: tl.constexpr,
):  # fmt: skip
    """Store dx of one tile and, given ``p_dresidual``, the residual's gradient."""
    if p_dresidual is not None:
        tl.store(p_dresidual + offsets, b_g.to(p_dresidual.dtype.element_ty), mask=mask)
    if BATCH:
        b_g = b_g - b_dbias / count - (b_x - b_mean) * (b_rstd * (b_dweight / count))
    tl.store(p_dx + offsets, (b_scale * b_g).to(p_dx.dtype.element_ty), mask=mask)


@kernel
def dx_kernel(
    p_x, p_dy, p_saved, p_weight, p_bias, p_mean, p_rstd, p_parts, p_dx, p_dresidual, p_dweight, p_dbias,
    p_count, num_parts, rows, inner_v, chans, groups, programs, tiles, tiles_each,
    BATCH: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Store dx, dresidual, dweight and dbias.

    The sums are those of all ``num_parts`` parts, and tiles follow in the reverse order of the reduction. Without parts
    the sums are taken over a program's only tile, which holds all values of its channels and stays in registers.
    M is the number of values per channel or, if ranks share their sums, the number at ``p_count``.
    """
    pid = tl.program_id(0)
    if p_parts is not None:
        pid = tl.num_programs(0) - 1 - pid
    i_group = pid % groups
    i_program = pid // groups
    inner = inner_v * VEC
    o_c, m_c, b_mean, b_rstd, b_scale, b_shift = _load_channels(
        p_weight, p_bias, p_mean, p_rstd, i_group, chans, COLS, LAST
    )
    if p_parts is not None:
        i_part = tl.arange(0, PARTS)[:, None]
        o_part = i_part.to(tl.int64) * chans + o_c
        m_part = (i_part < num_parts) & m_c
        size = num_parts.to(tl.int64) * chans
        b_dbias = tl.sum(tl.load(p_parts + o_part, mask=m_part, other=0.0), 0, keep_dims=True)
        b_dweight = tl.sum(tl.load(p_parts + size + o_part, mask=m_part, other=0.0), 0, keep_dims=True)
    else:
        b_x, b_g, offsets, mask = _load_tile(p_x, p_dy, p_saved, b_mean, b_scale, b_shift, i_group * 0, i_group,
                                             rows, inner, chans, ROWS, COLS, LAST, ACTIVATION)  # fmt: skip
        b_dbias = channel_sum(b_g, LAST)
        b_dweight = channel_sum(b_g * (b_x - b_mean), LAST) * b_rstd
    if i_program == 0:
        if p_dweight is not None:
            tl.store(p_dweight + o_c, b_dweight.to(p_dweight.dtype.element_ty), mask=m_c)
        if p_dbias is not None:
            tl.store(p_dbias + o_c, b_dbias.to(p_dbias.dtype.element_ty), mask=m_c)
    if p_count is not None:
        count = tl.load(p_count).to(b_mean.dtype)
    else:
        count = (rows.to(tl.int64) * (1 if LAST else inner)).to(b_mean.dtype)

    if p_parts is None:
        _store_dx(b_x, b_g, p_dx, p_dresidual, b_mean, b_rstd, b_scale, b_dbias, b_dweight, count,
                  offsets, mask, BATCH)  # fmt: skip
    else:
        start = i_program * tiles_each
        num_tiles = tl.minimum(tiles_each, tiles - start)
        for i in range(0, num_tiles):
            i_tile = start + num_tiles - 1 - i
            b_x, b_g, offsets, mask = _load_tile(p_x, p_dy, p_saved, b_mean, b_scale, b_shift, i_tile, i_group,
                                                 rows, inner, chans, ROWS, COLS, LAST, ACTIVATION)  # fmt: skip
            _store_dx(b_x, b_g, p_dx, p_dresidual, b_mean, b_rstd, b_scale, b_dbias, b_dweight, count,
                      offsets, mask, BATCH)  # fmt: skip
