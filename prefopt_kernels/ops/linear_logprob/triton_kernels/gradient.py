"""The backward kernel: logits once more, and the gradient of the loss in the raw logits into a workspace.

With p = exp(z - lse): d logp = onehot - p, d lse = p, d entropy = -p (log p + entropy); times dz/draw.
"""

import triton
import triton.language as tl

from prefopt_kernels.ops.linear_logprob.triton_kernels.tiles import (
    LN_2,
    final_logits,
    parts_of,
    raw_logits,
    store_tile,
)

COEFFICIENTS = 5  # per row: lse / log 2, factor of p, dlogp, dentropy, entropy


@triton.jit
def part_gradients(
    raw,
    column,
    row,
    coefficients,
    targets,
    bias_ptr,
    workspace,
    column_sums_ptr,
    peak_ptr,
    count,
    V,
    tiles,
    first_column,
    workspace_stride,
    inner,
    outer,
    factor,
    BLOCK_T: tl.constexpr,
    WIDTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    THROUGH_ENTROPY: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
    PEAK: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    lse, weight_of_p, dlogp, dentropy, entropy = coefficients
    cols = column + tl.arange(0, WIDTH)
    valid = (cols < V)[None, :]
    x, slope = final_logits(raw, bias_ptr, cols, V, inner, outer, BIAS, SOFTCAP)
    log_p = tl.where(valid, x - lse[:, None], -10000.0)  # finite, and exp2 of it is 0
    p = tl.exp2(log_p)
    if THROUGH_ENTROPY:
        # where p is 0, a log p of -inf would make NaN
        spread = tl.maximum(log_p, -10000.0) * LN_2 + entropy[:, None]
        dz = p * (weight_of_p[:, None] - dentropy[:, None] * spread)
    else:
        dz = p * weight_of_p[:, None]
    block = row // BLOCK_T
    inside = (targets >= column) & (targets < tl.minimum(column + WIDTH, V))
    has_target = tl.max(inside.to(tl.int32), 0) > 0
    if has_target:
        hit = cols[None, :] == targets[:, None]
        dz += tl.where(hit, dlogp[:, None], 0.0)
    if SOFTCAP:
        dz *= slope
    rows = row + tl.arange(0, BLOCK_T)
    counts = (rows < count)[:, None]
    # an infinite row of the head makes NaN of a row of zeros
    dz = tl.where(counts, dz * factor, 0.0)
    if COLUMN_SUMS:
        place = tl.cast(block, tl.int64) * workspace_stride + (cols - first_column)
        tl.store(column_sums_ptr + place, tl.sum(dz, 0))
    if PEAK:
        peak = tl.max(tl.where(counts, p, 0.0))
        place = tl.cast(block, tl.int64) * tiles + column // WIDTH
        tl.store(peak_ptr + place, tl.where(has_target, 1.0, peak), mask=column < V)
    tile = dz.to(workspace.dtype if DESCRIPTOR else workspace.dtype.element_ty)
    store_tile(workspace, tile, row, column - first_column, workspace_stride, BLOCK_T, WIDTH, DESCRIPTOR)


@triton.jit
def logit_gradients(
    hidden,
    weight,
    low_hidden,
    low_weight,
    bias_ptr,
    targets_ptr,
    coefficients_ptr,
    count_ptr,
    peak_ptr,
    workspace,
    column_sums_ptr,
    T,
    V,
    tiles,
    first_column,
    last_column,
    tiles_per_split,
    hidden_stride,
    weight_stride,
    workspace_stride,
    inner,
    outer,
    factor,
    least,
    H: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_LOW: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    THROUGH_ENTROPY: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
    PEAK: tl.constexpr,
    SKIP: tl.constexpr,
    TOGETHER: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns [first_column, last_column) of the (T, V) gradient; SKIP leaves out tiles whose peak is below least."""
    block, split = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_T
    count = tl.load(count_ptr)
    if row >= count:
        return
    rows = row + tl.arange(0, BLOCK_T)
    mask = rows < T
    targets = tl.load(targets_ptr + rows, mask=mask, other=-1)
    coefficients = (
        tl.load(coefficients_ptr + rows, mask=mask, other=float("inf")),  # p is 0 there
        tl.load(coefficients_ptr + T + rows, mask=mask, other=0.0),
        tl.load(coefficients_ptr + 2 * T + rows, mask=mask, other=0.0),
        tl.load(coefficients_ptr + 3 * T + rows, mask=mask, other=0.0),
        tl.load(coefficients_ptr + 4 * T + rows, mask=mask, other=0.0),
    )
    WIDTH: tl.constexpr = BLOCK_V // PARTS
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(last_column - first_column, BLOCK_V))
    for tile in tl.range(first, last):
        column = first_column + tile * BLOCK_V
        live = True
        if SKIP:
            # together with what a product by ids takes at a time, so that it meets nothing unwritten
            first_tile = column // (WIDTH * TOGETHER) * TOGETHER
            offs = first_tile + tl.arange(0, TOGETHER)
            places = tl.cast(block, tl.int64) * tiles + offs
            live = tl.max(tl.load(peak_ptr + places, mask=offs < tiles, other=0.0), 0) >= least
        if live:
            raw = raw_logits(
                hidden,
                weight,
                low_hidden,
                low_weight,
                row,
                column,
                T,
                V,
                hidden_stride,
                weight_stride,
                H,
                LOW,
                BLOCK_T,
                BLOCK_V,
                BLOCK_H,
                BLOCK_LOW,
                STAGES,
                DESCRIPTOR,
                PRECISION,
            )
            parts = parts_of(raw, BLOCK_T, BLOCK_V, PARTS)
            for part in tl.static_range(PARTS):
                part_gradients(
                    parts[part],
                    column + part * WIDTH,
                    row,
                    coefficients,
                    targets,
                    bias_ptr,
                    workspace,
                    column_sums_ptr,
                    peak_ptr,
                    count,
                    V,
                    tiles,
                    first_column,
                    workspace_stride,
                    inner,
                    outer,
                    factor,
                    BLOCK_T,
                    WIDTH,
                    SOFTCAP,
                    BIAS,
                    THROUGH_ENTROPY,
                    COLUMN_SUMS,
                    PEAK,
                    DESCRIPTOR,
                )
