"""Both passes over the vocabulary with the logits of two models in registers.

``kl_scan`` keeps, per row, both models' largest logit and sum of exponentials, and the policy's sum of p (z - z').
``kl_logit_gradients`` computes both logits again and writes the gradient of the loss in the policy's raw logits into a
workspace. Tiles, transforms and units (log 2) as in linear_logprob.
"""

import triton
import triton.language as tl

from prefopt_kernels.ops.linear_logprob.triton_kernels.tiles import (
    LN_2,
    load_tile,
    parts_of,
    raw_logits,
    store_tile,
    transformed,
)

PARTIALS = 12  # rows of the partials, in the order in which ``kl_scan`` stores them
COEFFICIENTS = 7  # per row: lse / log 2, factor of p, dlogp, dentropy, entropy, dkl, E[z - z'] / log 2


@triton.jit
def both_logits(
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
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The raw logits of both models, (BLOCK_T, BLOCK_V) fp32 each; SAME_HEAD loads a tile of the head for both."""
    if SAME_HEAD:
        z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        ref_z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for k in tl.range(0, H, BLOCK_H, num_stages=STAGES):
            right = load_tile(weight, column, k, V, H, weight_stride, BLOCK_V, BLOCK_H, DESCRIPTOR)
            left = load_tile(hidden, row, k, T, H, hidden_stride, BLOCK_T, BLOCK_H, DESCRIPTOR)
            z = tl.dot(left, right.T, z, input_precision=PRECISION)
            left = load_tile(ref_hidden, row, k, T, H, ref_hidden_stride, BLOCK_T, BLOCK_H, DESCRIPTOR)
            ref_z = tl.dot(left, right.T, ref_z, input_precision=PRECISION)
        z = with_low(z, low_hidden, low_weight, row, column, T, V, LOW, BLOCK_T, BLOCK_V, BLOCK_LOW, PRECISION)
        ref_z = with_low(
            ref_z, ref_low_hidden, ref_low_weight, row, column, T, V, REF_LOW, BLOCK_T, BLOCK_V, BLOCK_LOW, PRECISION
        )
    else:
        z = raw_logits(
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
        ref_z = raw_logits(
            ref_hidden,
            ref_weight,
            ref_low_hidden,
            ref_low_weight,
            row,
            column,
            T,
            V,
            ref_hidden_stride,
            ref_weight_stride,
            REF_H,
            REF_LOW,
            BLOCK_T,
            BLOCK_V,
            BLOCK_H,
            BLOCK_LOW,
            STAGES,
            DESCRIPTOR,
            PRECISION,
        )
    return z, ref_z


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
    """z + low_hidden low_weight^T."""
    if LOW > 0:
        for k in tl.range(0, LOW, BLOCK_LOW, num_stages=1):
            left = load_tile(low_hidden, row, k, T, LOW, LOW, BLOCK_T, BLOCK_LOW, False)
            right = load_tile(low_weight, column, k, V, LOW, LOW, BLOCK_V, BLOCK_LOW, False)
            z = tl.dot(left, right.T, z, input_precision=PRECISION)
    return z


@triton.jit
def finished(raw, bias_ptr, cols, V, inner, outer, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Transformed logits in units of log 2, and the softcap's slope."""
    if BIAS:
        raw += tl.load(bias_ptr + cols, mask=cols < V, other=0.0)[None, :]
    return transformed(raw, inner, outer, SOFTCAP)


@triton.jit
def add_exactly(total, low, part):
    """``total + low`` and ``part``, with what the addition rounds away in ``low``."""
    grown = total + part
    taken = grown - total
    return grown, low + (total - (grown - taken)) + (part - taken)


@triton.jit
def softmax_step(x, largest, total, low):
    """Logits x (rows, columns) into a row's maximum and sum; also p, its zero, and the factor of what came before."""
    above = tl.maximum(largest, tl.max(x, 1))
    zero = tl.where(above > float("-inf"), above, 0.0)  # a bias of -inf may ban every id so far
    shrink = tl.exp2(largest - zero)  # 0 at the first tile, where largest is -inf
    p = tl.exp2(x - zero[:, None])
    total, low = add_exactly(total * shrink, low * shrink, tl.sum(p, 1))
    return above, total, low, p, zero, shrink


@triton.jit
def target_logit(x, target, targets, column, cols, V, WIDTH: tl.constexpr):
    """``target``, or the target's logit where this tile has it."""
    inside = (targets >= column) & (targets < tl.minimum(column + WIDTH, V))
    if tl.max(inside.to(tl.int32), 0) > 0:
        hit = cols[None, :] == targets[:, None]
        target = tl.where(inside, tl.max(tl.where(hit, x, float("-inf")), 1), target)
    return target


@triton.jit
def fold(
    raw,
    ref_raw,
    column,
    state,
    targets,
    bias_ptr,
    ref_bias_ptr,
    V,
    inner,
    outer,
    ref_inner,
    ref_outer,
    WIDTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    REF_SOFTCAP: tl.constexpr,
    REF_BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Take WIDTH columns of both models' raw logits into the state of their rows."""
    largest, total, low, target, spread, logits, gap, gap_low, ref_largest, ref_total, ref_low, ref_target = state
    cols = column + tl.arange(0, WIDTH)
    valid = (cols < V)[None, :]
    x, _slope = finished(raw, bias_ptr, cols, V, inner, outer, BIAS, SOFTCAP)
    y, _slope = finished(ref_raw, ref_bias_ptr, cols, V, ref_inner, ref_outer, REF_BIAS, REF_SOFTCAP)
    x = tl.where(valid, x, float("-inf"))
    y = tl.where(valid, y, float("-inf"))
    ref_target = target_logit(y, ref_target, targets, column, cols, V, WIDTH)
    target = target_logit(x, target, targets, column, cols, V, WIDTH)
    ref_largest, ref_total, ref_low, _p, _zero, _shrink = softmax_step(y, ref_largest, ref_total, ref_low)
    before, before_total, before_low = largest, total, low
    largest, total, low, p, zero, shrink = softmax_step(x, largest, total, low)
    # 0 where p is 0: whatever the logits of a token that the policy bans
    part = tl.sum(tl.where(p > 0, p * (x - y), 0.0), 1)
    kept = shrink > 0
    gap, gap_low = add_exactly(tl.where(kept, gap * shrink, 0.0), tl.where(kept, gap_low * shrink, 0.0), part)
    if ENTROPY:
        moved = tl.where(before > float("-inf"), (before - zero) * (before_total + before_low), 0.0)
        spread = (spread + moved) * shrink + tl.sum(tl.where(p > 0, p * (x - zero[:, None]), 0.0), 1)
    if MEAN:
        logits += tl.sum(tl.where(valid, x, 0.0), 1)
    return largest, total, low, target, spread, logits, gap, gap_low, ref_largest, ref_total, ref_low, ref_target


@triton.jit
def kl_scan(
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
    partials_ptr,
    T,
    V,
    tiles_per_split,
    splits,
    hidden_stride,
    weight_stride,
    ref_hidden_stride,
    ref_weight_stride,
    inner,
    outer,
    ref_inner,
    ref_outer,
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
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of rows and a part (split) of the vocabulary: partials (PARTIALS, splits, T)."""
    block, split = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_T
    if row >= tl.load(count_ptr):  # only rows that do not count
        return
    rows = row + tl.arange(0, BLOCK_T)
    targets = tl.load(targets_ptr + rows, mask=rows < T, other=-1)
    nothing = tl.zeros((BLOCK_T,), tl.float32)
    bottom, unseen = nothing + float("-inf"), nothing + float("nan")  # unseen: a target that no tile has
    sums = (nothing, nothing, nothing, nothing)
    state = (bottom, nothing, nothing, unseen) + sums + (bottom, nothing, nothing, unseen)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(V, BLOCK_V))
    for tile in tl.range(first, last):
        column = tile * BLOCK_V
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
        parts, ref_parts = (raw,), (ref_raw,)
        if PARTS > 1:
            parts = parts_of(raw, BLOCK_T, BLOCK_V, PARTS)
            ref_parts = parts_of(ref_raw, BLOCK_T, BLOCK_V, PARTS)
        for part in tl.static_range(PARTS):
            state = fold(
                parts[part],
                ref_parts[part],
                column + part * (BLOCK_V // PARTS),
                state,
                targets,
                bias_ptr,
                ref_bias_ptr,
                V,
                inner,
                outer,
                ref_inner,
                ref_outer,
                BLOCK_V // PARTS,
                SOFTCAP,
                BIAS,
                REF_SOFTCAP,
                REF_BIAS,
                ENTROPY,
                MEAN,
            )
    for i in tl.static_range(12):
        place = (i * splits + split).to(tl.int64) * T + rows
        tl.store(partials_ptr + place, state[i], mask=rows < T)


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
    x, slope = finished(raw, bias_ptr, cols, V, inner, outer, BIAS, SOFTCAP)
    y, _slope = finished(ref_raw, ref_bias_ptr, cols, V, ref_inner, ref_outer, REF_BIAS, REF_SOFTCAP)
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
        parts, ref_parts = (raw,), (ref_raw,)
        if PARTS > 1:
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
