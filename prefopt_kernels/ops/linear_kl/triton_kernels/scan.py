"""One pass over the vocabulary with the logits of two models in registers.

``kl_scan`` keeps, per row, both models' largest logit and sum of exponentials, and the policy's sum of p (z - z').
"""

import triton
import triton.language as tl

from prefopt_kernels.ops.linear_kl.triton_kernels.logits import both_logits
from prefopt_kernels.ops.linear_logprob.triton_kernels.tiles import final_logits, parts_of

PARTIALS = 12  # rows of the partials, in the order in which ``kl_scan`` stores them


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
    x, _slope = final_logits(raw, bias_ptr, cols, V, inner, outer, BIAS, SOFTCAP)
    y, _slope = final_logits(ref_raw, ref_bias_ptr, cols, V, ref_inner, ref_outer, REF_BIAS, REF_SOFTCAP)
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
