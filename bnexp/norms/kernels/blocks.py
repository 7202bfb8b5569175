"""Functions of the kernels: addresses of a tile, sums over its channels, scale and shift, the activation.

A tile is ROWS x COLS elements, contiguous along a row. With LAST every column is a channel, else the whole tile is one
channel. Values per channel have the shape (1, W), W = COLS with LAST and 1 without.
"""

import triton
import triton.language as tl

# Not specialized, so that one compiled kernel serves all sizes; VEC tells the compiler the divisor of addresses.
SIZES = ("rows", "inner_v", "chans", "groups", "programs", "num_parts", "tiles", "tiles_each")


def kernel(function):
    """``triton.jit`` with one compilation for all sizes."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in SIZES if name in names])


@triton.jit
def tile(i_tile, i_group, rows, inner, chans, ROWS: tl.constexpr, COLS: tl.constexpr, LAST: tl.constexpr):
    """Offsets (int64) and mask of tile ``i_tile`` of group ``i_group``, both (ROWS, COLS)."""
    i_tile = i_tile.to(tl.int64)
    i_group = i_group.to(tl.int64)
    if LAST:
        o_row = i_tile * ROWS + tl.arange(0, ROWS)[:, None]
        o_col = i_group * COLS + tl.arange(0, COLS)[None, :]
        offsets = o_row * inner + o_col
    else:
        tiles_across = tl.cdiv(inner, COLS)
        o_row = i_tile // tiles_across * ROWS + tl.arange(0, ROWS)[:, None]
        o_col = i_tile % tiles_across * COLS + tl.arange(0, COLS)[None, :]
        offsets = (o_row * chans + i_group) * inner + o_col
    return offsets, (o_row < rows) & (o_col < inner)


@triton.jit
def tile_count(
    i_tile, rows, inner,
    ROWS: tl.constexpr, COLS: tl.constexpr, LAST: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The number of values per channel in the tile."""
    if LAST:
        count = tl.minimum(ROWS, rows - i_tile.to(tl.int64) * ROWS)
    else:
        tiles_across = tl.cdiv(inner, COLS)
        num_rows = tl.minimum(ROWS, rows - i_tile.to(tl.int64) // tiles_across * ROWS)
        count = num_rows * tl.minimum(COLS, inner - i_tile.to(tl.int64) % tiles_across * COLS)
    return count.to(DTYPE)


@triton.jit
def channels(i_group, chans, COLS: tl.constexpr, LAST: tl.constexpr):
    """Indices and mask of the group's channels, both (1, W)."""
    W: tl.constexpr = COLS if LAST else 1
    o_c = i_group * W + tl.arange(0, W)[None, :]
    return o_c, o_c < chans


@triton.jit
def channel_sum(b_x, LAST: tl.constexpr):
    """(ROWS, COLS) summed to (1, W)."""
    return tl.sum(b_x, 0 if LAST else None, keep_dims=True)


@triton.jit
def moments(b_x, mask, count, LAST: tl.constexpr):
    """Mean and M2 = sum (x - mean)^2 of a tile that is 0 outside its mask, in two passes over its registers.

    The sum of the second pass is the rounding error of the first mean. With it, M2 of a constant channel is exactly 0.
    """
    b_mean = channel_sum(b_x, LAST) / count
    b_d = tl.where(mask, b_x - b_mean, 0.0)
    b_rest = channel_sum(b_d, LAST)
    b_m2 = channel_sum(b_d * b_d, LAST) - b_rest * (b_rest / count)
    # Not tl.maximum, which would turn NaN into 0.
    return b_mean + b_rest / count, tl.where(b_m2 < 0.0, 0.0, b_m2)


@triton.jit
def affine(p_weight, p_bias, o_c, m_c, b_rstd):
    """scale = rstd * weight and shift = bias, (1, W) each; a missing weight is 1, a missing bias 0."""
    b_scale = b_rstd
    b_shift = b_rstd * 0.0
    if p_weight is not None:
        b_scale = b_rstd * tl.load(p_weight + o_c, mask=m_c, other=0.0).to(b_rstd.dtype)
    if p_bias is not None:
        b_shift = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(b_rstd.dtype)
    return b_scale, b_shift


@triton.jit
def normalize(b_x, b_mean, b_scale, b_shift):
    """(x - mean) * scale + shift, by fma so that forward and backward round in the same way."""
    return tl.fma(b_x - b_mean, b_scale + tl.zeros_like(b_x), b_shift + tl.zeros_like(b_x))


@triton.jit
def activate(b_z, ACTIVATION: tl.constexpr):
    """The activation; NaN stays NaN."""
    if ACTIVATION == "relu":
        b_z = tl.where(b_z <= 0.0, 0.0, b_z)
    elif ACTIVATION == "sigmoid":
        b_e = tl.exp(-tl.abs(b_z))
        b_z = tl.where(b_z < 0.0, b_e, 1.0) / (1.0 + b_e)
    elif ACTIVATION == "tanh":
        b_e = tl.exp(-2.0 * tl.abs(b_z))
        b_t = (1.0 - b_e) / (1.0 + b_e)
        b_z = tl.where(b_z < 0.0, -b_t, b_t)
    elif ACTIVATION == "relu6":
        b_z = tl.where(b_z <= 0.0, 0.0, tl.where(b_z >= 6.0, 6.0, b_z))
    elif ACTIVATION == "silu":
        b_z = b_z / (1.0 + tl.exp(-b_z))
    elif ACTIVATION == "hardswish":
        b_z = tl.where(b_z <= -3.0, 0.0, tl.where(b_z >= 3.0, b_z, b_z * (b_z + 3.0) / 6.0))
    elif ACTIVATION == "gelu":
        b_z = b_z * 0.5 * (1.0 + tl.erf(b_z * 0.7071067811865476))
    return b_z


@triton.jit
def slope(b_z, ACTIVATION: tl.constexpr):
    """The derivative at the activation's input z, for the activations whose output does not determine it."""
    if ACTIVATION == "relu6":
        b_d = tl.where((b_z <= 0.0) | (b_z >= 6.0), 0.0, 1.0)
    elif ACTIVATION == "silu":
        b_s = 1.0 / (1.0 + tl.exp(-b_z))
        b_d = b_s * (1.0 + b_z * (1.0 - b_s))
    elif ACTIVATION == "hardswish":
        b_d = tl.where(b_z <= -3.0, 0.0, tl.where(b_z >= 3.0, 1.0, b_z / 3.0 + 0.5))
    else:  # gelu: P(z) + z p(z) of the standard normal distribution
        b_d = 0.5 * (1.0 + tl.erf(b_z * 0.7071067811865476)) + b_z * 0.3989422804014327 * tl.exp(-0.5 * b_z * b_z)
    return b_d


@triton.jit
def pack(b_keep, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) of booleans as (ROWS, COLS / 8) bytes."""
    b_bits = tl.reshape(b_keep.to(tl.int32), (ROWS, COLS // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(b_bits, 2).to(tl.uint8)


@triton.jit
def unpack(b_bytes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The inverse of :func:`pack`."""
    b_bits = b_bytes.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(b_bits & 1, (ROWS, COLS)) != 0
