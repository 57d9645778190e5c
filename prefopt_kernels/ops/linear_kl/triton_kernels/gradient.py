"""The backward kernel: both models' logits once more, and the gradient of the loss in the policy's raw logits."""

import triton
import triton.language as tl

from prefopt_kernels.ops.linear_kl.triton_kernels.logits import both_logits
from prefopt_kernels.ops.linear_logprob.triton_kernels.tiles import LN_2, final_logits, parts_of, store_tile

COEFFICIENTS = 7  # per row: lse / log 2, factor of p, dlogp, dentropy, entropy, dkl, E[z - z'] / log 2


@triton.jit
def part_gradients(
    raw,
    ref_raw,
    column,
    row,
    coefficients,
    targets,
    bias_ptr,
    ref_bias_ptr,
    workspace,
    column_sums_ptr,
    count,
    V,
    first_column,
    workspace_stride,
    inner,
    outer,
    ref_inner,
    ref_outer,
    factor,
    BLOCK_T: tl.constexpr,
    WIDTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    REF_SOFTCAP: tl.constexpr,
    REF_BIAS: tl.constexpr,
    THROUGH_ENTROPY: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    lse, weight_of_p, dlogp, dentropy, entropy, dkl, mean_gap = coefficients
    cols = column + tl.arange(0, WIDTH)
    valid = (cols < V)[None, :]
    x, slope = final_logits(raw, bias_ptr, cols, V, inner, outer, BIAS, SOFTCAP)
    y, _slope = final_logits(ref_raw, ref_bias_ptr, cols, V, ref_inner, ref_outer, REF_BIAS, REF_SOFTCAP)
    log_p = tl.where(valid, x - lse[:, None], -10000.0)  # finite, and exp2 of it is 0
    p = tl.exp2(log_p)
    gap = tl.where(p > 0, x - y - mean_gap[:, None], 0.0) * LN_2
    dz = p * (weight_of_p[:, None] + dkl[:, None] * gap)
    if THROUGH_ENTROPY:
        # where p is 0, a log p of -inf would make NaN
        dz -= p * dentropy[:, None] * (tl.maximum(log_p, -10000.0) * LN_2 + entropy[:, None])
    inside = (targets >= column) & (targets < tl.minimum(column + WIDTH, V))
    if tl.max(inside.to(tl.int32), 0) > 0:
        dz += tl.where(cols[None, :] == targets[:, None], dlogp[:, None], 0.0)
    if SOFTCAP:
        dz *= slope
    rows = row + tl.arange(0, BLOCK_T)
    dz = tl.where((rows < count)[:, None], dz * factor, 0.0)  # an infinite row of a head makes NaN of a row of zeros
    if COLUMN_SUMS:
        place = (row // BLOCK_T).to(tl.int64) * workspace_stride + (cols - first_column)
        tl.store(column_sums_ptr + place, tl.sum(dz, 0))
    tile = dz.to(workspace.dtype if DESCRIPTOR else workspace.dtype.element_ty)
    store_tile(workspace, tile, row, column - first_column, workspace_stride, BLOCK_T, WIDTH, DESCRIPTOR)


@triton.jit
def kl_logit_gradients(
    hidden,
    weight,
    low_hidden,
    low_weight,
    bias_ptr,
    ref_hidden,
    ref_weight,
    ref_low_hidden,
    ref_low_weight,
    ref_bias_ptr,
    targets_ptr,
    count_ptr,
    coefficients_ptr,
    workspace,
    column_sums_ptr,
    T,
    V,
    first_column,
    last_column,
    tiles_per_split,
    hidden_stride,
    weight_stride,
    ref_hidden_stride,
    ref_weight_stride,
    workspace_stride,
    inner,
    outer,
    ref_inner,
    ref_outer,
    factor,
    H: tl.constexpr,
    LOW: tl.constexpr,
    REF_H: tl.constexpr,
    REF_LOW: tl.constexpr,
    SAME_HEAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_LOW: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    REF_SOFTCAP: tl.constexpr,
    REF_BIAS: tl.constexpr,
    THROUGH_ENTROPY: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns [first_column, last_column) of the (T, V) gradient in the policy's raw logits."""
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
        tl.load(coefficients_ptr + 5 * T + rows, mask=mask, other=0.0),
        tl.load(coefficients_ptr + 6 * T + rows, mask=mask, other=0.0),
    )
    WIDTH: tl.constexpr = BLOCK_V // PARTS
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(last_column - first_column, BLOCK_V))
    for tile in tl.range(first, last):
        column = first_column + tile * BLOCK_V
        raw, ref_raw = both_logits(
            hidden,
            weight,
            low_hidden,
            low_weight,
            ref_hidden,
            ref_weight,
            ref_low_hidden,
            ref_low_weight,
            row,
            column,
            T,
            V,
            hidden_stride,
            weight_stride,
            ref_hidden_stride,
            ref_weight_stride,
            H,
            LOW,
            REF_H,
            REF_LOW,
            SAME_HEAD,
            BLOCK_T,
            BLOCK_V,
            BLOCK_H,
            BLOCK_LOW,
            STAGES,
            DESCRIPTOR,
            PRECISION,
        )
        parts = parts_of(raw, BLOCK_T, BLOCK_V, PARTS)
        ref_parts = parts_of(ref_raw, BLOCK_T, BLOCK_V, PARTS)
        for part in tl.static_range(PARTS):
            part_gradients(
                parts[part],
                ref_parts[part],
                column + part * WIDTH,
                row,
                coefficients,
                targets,
                bias_ptr,
                ref_bias_ptr,
                workspace,
                column_sums_ptr,
                count,
                V,
                first_column,
                workspace_stride,
                inner,
                outer,
                ref_inner,
                ref_outer,
                factor,
                BLOCK_T,
                WIDTH,
                SOFTCAP,
                BIAS,
                REF_SOFTCAP,
                REF_BIAS,
                THROUGH_ENTROPY,
                COLUMN_SUMS,
                DESCRIPTOR,
            )
