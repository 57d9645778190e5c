"""What the Triton kernels of linear_logprob share: a tile's load, its raw logits, the logit transform.

Logits are kept in units of log 2 (``x = z log2 e``), because the hardware's exponential is ``exp2``. A matrix comes as
a tensor descriptor (TMA, from sm_90) or as a pointer with a row stride; both read 0 outside of the matrix. Offsets of
rows are 64-bit: T x V and V x H pass 2^31.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    matrix,
    row,
    column,
    rows,
    columns,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    if DESCRIPTOR:
        tile = matrix.load([row, column])
    else:
        offs_r = row + tl.arange(0, BLOCK_ROWS)
        offs_c = column + tl.arange(0, BLOCK_COLUMNS)
        mask = (offs_r < rows)[:, None] & (offs_c < columns)[None, :]
        places = offs_r.to(tl.int64)[:, None] * stride + offs_c[None, :]
        tile = tl.load(matrix + places, mask=mask, other=0.0)
    return tile


@triton.jit
def store_tile(
    matrix,
    tile,
    row,
    column,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Into a workspace whose sides are multiples of the tile's: nothing to mask."""
    if DESCRIPTOR:
        matrix.store([row, column], tile)
    else:
        offs_r = (row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        offs_c = column + tl.arange(0, BLOCK_COLUMNS)
        tl.store(matrix + offs_r[:, None] * stride + offs_c[None, :], tile)


@triton.jit
def raw_logits(
    hidden,
    weight,
    low_hidden,
    low_weight,
    row,
    column,
    rows,
    V,
    hidden_stride,
    weight_stride,
    H: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_LOW: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_T, BLOCK_V) fp32 of ``hidden weight^T + low_hidden low_weight^T``; LOW = 0 is without the second."""
    z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for k in tl.range(0, H, BLOCK_H, num_stages=STAGES):
        left = load_tile(hidden, row, k, rows, H, hidden_stride, BLOCK_T, BLOCK_H, DESCRIPTOR)
        right = load_tile(weight, column, k, V, H, weight_stride, BLOCK_V, BLOCK_H, DESCRIPTOR)
        z = tl.dot(left, right.T, z, input_precision=PRECISION)
    return with_low(z, low_hidden, low_weight, row, column, rows, V, LOW, BLOCK_T, BLOCK_V, BLOCK_LOW, PRECISION)


@triton.jit
def with_low(
    z,
    low_hidden,
    low_weight,
    row,
    column,
    T,
    V,
    LOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``z + low_hidden low_weight^T``; LOW = 0 adds nothing."""
    if LOW > 0:
        for k in tl.range(0, LOW, BLOCK_LOW, num_stages=1):
            left = load_tile(low_hidden, row, k, T, LOW, LOW, BLOCK_T, BLOCK_LOW, False)
            right = load_tile(low_weight, column, k, V, LOW, LOW, BLOCK_V, BLOCK_LOW, False)
            z = tl.dot(left, right.T, z, input_precision=PRECISION)
    return z


@triton.jit
def tanh_and_slope(u):
    """tanh(u) and 1 - tanh(u)^2, both to a few ulp of themselves."""
    size = tl.abs(u)
    e = tl.exp2(size * (-2.0 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)  # cancels near 0, where the series takes over
    square = u * u
    series = 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    near = size + size * square * series
    t = tl.where(size < 0.25, near, far)
    slope = tl.where(size < 0.25, 1.0 - t * t, 4.0 * e / ((1.0 + e) * (1.0 + e)))
    return tl.where(u < 0, -t, t), slope


@triton.jit
def transformed(raw, inner, outer, SOFTCAP: tl.constexpr):
    """Logits in units of log 2 and, with a softcap, the slope ``1 - tanh^2``.

    ``inner`` is s / c and ``outer`` (c / tau) log2 e; without a softcap ``inner`` is (s / tau) log2 e.
    """
    if SOFTCAP:
        t, slope = tanh_and_slope(raw * inner)
        x = t * outer
    else:
        x = raw * inner
        slope = x  # not read
    return x, slope


@triton.jit
def final_logits(raw, bias_ptr, cols, V, inner, outer, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Transformed logits in units of log 2, and the softcap's slope."""
    if BIAS:
        raw += tl.load(bias_ptr + cols, mask=cols < V, other=0.0)[None, :]
    return transformed(raw, inner, outer, SOFTCAP)


@triton.jit
def parts_of(tile, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, PARTS: tl.constexpr):
    """The columns in 1, 2 or 4 equal parts, from left to right."""
    if PARTS == 1:  # with elif and else: Triton visits what follows an if, although its branch returns
        return (tile,)
    elif PARTS == 2:
        return halves(tile, BLOCK_T, BLOCK_V)
    else:
        left, right = halves(tile, BLOCK_T, BLOCK_V)
        a, b = halves(left, BLOCK_T, BLOCK_V // 2)
        c, d = halves(right, BLOCK_T, BLOCK_V // 2)
        return a, b, c, d


@triton.jit
def halves(tile, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    pair = tl.reshape(tile, (BLOCK_T, 2, BLOCK_V // 2))
    return tl.split(tl.permute(pair, (0, 2, 1)))
