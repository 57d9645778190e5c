"""The forward kernels: one pass over the vocabulary with running sums, and what makes the outputs of them.

``scan`` gives each program a block of rows and a part (split) of the vocabulary. It keeps, per row, the largest logit
and the sum of exponentials, and where asked for the sums behind the entropy and the mean; no atomics, so results repeat
bit for bit. ``combine`` adds the splits in fp64.

With PRODUCT (a frozen head that wants its unit gradient) the exponentials are also written to a workspace, relative to
a reference per row that is known beforehand: the target's own logit. fp32 and bf16 reach 2^127 above it; a row whose
largest logit is more than LIMIT above (``check_reference`` looks) has its block scanned again with that logit as the
reference.
"""

import triton
import triton.language as tl

from prefopt_kernels.ops.linear_logprob.triton_kernels.tiles import (
    LN_2,
    final_logits,
    parts_of,
    raw_logits,
    store_tile,
    transformed,
)

PARTIALS = 6  # rows of the partials: largest, total, low, target, spread, logits


@triton.jit
def fold(
    raw,
    column,
    row,
    state,
    targets,
    reference,
    bias_ptr,
    workspace,
    tile_max_ptr,
    T,
    V,
    first_row,
    workspace_stride,
    inner,
    outer,
    BLOCK_T: tl.constexpr,
    WIDTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    PRODUCT: tl.constexpr,
    TILE_MAX: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Take WIDTH columns of raw logits into the state of their rows."""
    largest, total, low, target, spread, logits = state
    cols = column + tl.arange(0, WIDTH)
    valid = (cols < V)[None, :]
    x, slope = final_logits(raw, bias_ptr, cols, V, inner, outer, BIAS, SOFTCAP)
    x = tl.where(valid, x, float("-inf"))
    tile_max = tl.max(x, 1)
    above = tl.maximum(largest, tile_max)
    if PRODUCT:
        zero = reference
    else:
        zero = tl.where(above > float("-inf"), above, 0.0)  # a bias of -inf may ban every id so far
        shrink = tl.exp2(largest - zero)  # 0 at the first tile, where largest is -inf
        if ENTROPY:
            moved = tl.where(largest > float("-inf"), (largest - zero) * (total + low), 0.0)
            spread = (spread + moved) * shrink
        total *= shrink
        low *= shrink
    p = tl.exp2(x - zero[:, None])
    if ENTROPY:
        spread += tl.sum(tl.where(p > 0, p * (x - zero[:, None]), 0.0), 1)
    if MEAN:
        logits += tl.sum(tl.where(valid, x, 0.0), 1)
    # Many small terms after a large one would all be rounded away: the sum keeps its rounding error.
    part = tl.sum(p, 1)
    grown = total + part
    taken = grown - total
    low += (total - (grown - taken)) + (part - taken)
    if PRODUCT and SOFTCAP:
        p *= slope
    inside = (targets >= column) & (targets < tl.minimum(column + WIDTH, V))
    if tl.max(inside.to(tl.int32), 0) > 0:  # seldom: one tile of a row has its target
        hit = cols[None, :] == targets[:, None]
        target = tl.where(inside, tl.max(tl.where(hit, x, float("-inf")), 1), target)
        if PRODUCT:
            p = tl.where(hit, 0.0, p)  # its own term is added in fp32, where 1 - p is exact
    if PRODUCT:
        tile = p.to(workspace.dtype if DESCRIPTOR else workspace.dtype.element_ty)
        store_tile(workspace, tile, row - first_row, column, workspace_stride, BLOCK_T, WIDTH, DESCRIPTOR)
    if TILE_MAX:
        rows = row + tl.arange(0, BLOCK_T)
        place = (column // WIDTH).to(tl.int64) * T + rows
        tl.store(tile_max_ptr + place, tile_max, mask=rows < T)
    return above, grown, low, target, spread, logits


@triton.jit
def scan(
    hidden,
    weight,
    low_hidden,
    low_weight,
    bias_ptr,
    targets_ptr,
    count_ptr,
    reference_ptr,
    again_ptr,
    partials_ptr,
    workspace,
    tile_max_ptr,
    T,
    V,
    first_row,
    tiles_per_split,
    splits,
    hidden_stride,
    weight_stride,
    workspace_stride,
    inner,
    outer,
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
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    PRODUCT: tl.constexpr,
    TILE_MAX: tl.constexpr,
    AGAIN: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, split = tl.program_id(0), tl.program_id(1)
    row = first_row + block * BLOCK_T
    if row >= tl.load(count_ptr):  # only rows that do not count
        return
    if AGAIN:
        if tl.load(again_ptr + block) == 0:
            return
    rows = row + tl.arange(0, BLOCK_T)
    targets = tl.load(targets_ptr + rows, mask=rows < T, other=-1)
    nothing = tl.zeros((BLOCK_T,), tl.float32)
    reference = nothing
    if PRODUCT:
        reference = tl.load(reference_ptr + rows, mask=rows < T, other=0.0)
    unseen = nothing + float("nan")  # a target that no tile has
    state = (nothing + float("-inf"), nothing, nothing, unseen, nothing, nothing)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(V, BLOCK_V))
    for tile in tl.range(first, last):
        column = tile * BLOCK_V
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
        # Halves one after the other: a whole tile of exponentials beside the logits does not fit the registers.
        parts = parts_of(raw, BLOCK_T, BLOCK_V, PARTS)
        for part in tl.static_range(PARTS):
            state = fold(
                parts[part],
                column + part * (BLOCK_V // PARTS),
                row,
                state,
                targets,
                reference,
                bias_ptr,
                workspace,
                tile_max_ptr,
                T,
                V,
                first_row,
                workspace_stride,
                inner,
                outer,
                BLOCK_T,
                BLOCK_V // PARTS,
                SOFTCAP,
                BIAS,
                ENTROPY,
                MEAN,
                PRODUCT,
                TILE_MAX,
                DESCRIPTOR,
            )
    for i in tl.static_range(6):
        place = (i * splits + split).to(tl.int64) * T + rows
        tl.store(partials_ptr + place, state[i], mask=rows < T)


@triton.jit
def target_logits(
    hidden_ptr,
    weight_ptr,
    low_hidden_ptr,
    low_weight_ptr,
    bias_ptr,
    targets_ptr,
    count_ptr,
    reference_ptr,
    T,
    V,
    hidden_stride,
    weight_stride,
    inner,
    outer,
    H: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_LOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The reference of each row: its target's logit, to the rounding of a plain dot product."""
    row = tl.program_id(0) * BLOCK_T
    if row >= tl.load(count_ptr):
        return
    rows = row + tl.arange(0, BLOCK_T)
    targets = tl.load(targets_ptr + rows, mask=rows < T, other=-1)
    known = (targets >= 0) & (targets < V)  # a target beyond V makes NaN in ``combine``, not a wild read
    raw = tl.zeros((BLOCK_T,), tl.float32)
    for k in tl.range(0, H, BLOCK_H):
        offs = k + tl.arange(0, BLOCK_H)
        mask = known[:, None] & (offs < H)[None, :]
        left = tl.load(hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride + offs[None, :], mask, 0.0)
        right = tl.load(weight_ptr + targets.to(tl.int64)[:, None] * weight_stride + offs[None, :], mask, 0.0)
        raw += tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)
    if LOW > 0:
        for k in tl.range(0, LOW, BLOCK_LOW):
            offs = k + tl.arange(0, BLOCK_LOW)
            mask = known[:, None] & (offs < LOW)[None, :]
            left = tl.load(low_hidden_ptr + rows.to(tl.int64)[:, None] * LOW + offs[None, :], mask, 0.0)
            right = tl.load(low_weight_ptr + targets.to(tl.int64)[:, None] * LOW + offs[None, :], mask, 0.0)
            raw += tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)
    if BIAS:
        raw += tl.load(bias_ptr + targets, mask=known, other=0.0)
    x, _slope = transformed(raw, inner, outer, SOFTCAP)
    tl.store(reference_ptr + rows, x, mask=rows < T)


@triton.jit
def check_reference(
    partials_ptr,
    count_ptr,
    reference_ptr,
    again_ptr,
    T,
    first_row,
    splits,
    LIMIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Raise the reference of rows whose largest logit is LIMIT above it, and mark their block."""
    block = tl.program_id(0)
    row = first_row + block * BLOCK_T
    if row >= tl.load(count_ptr):
        return
    rows = row + tl.arange(0, BLOCK_T)
    reference = tl.load(reference_ptr + rows, mask=rows < T, other=0.0)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    for split in tl.range(0, splits):
        place = tl.cast(split, tl.int64) * T + rows
        top = tl.maximum(top, tl.load(partials_ptr + place, mask=rows < T, other=float("-inf")))
    high = top > reference + LIMIT
    tl.store(reference_ptr + rows, tl.where(high, top, reference), mask=rows < T)
    tl.store(again_ptr + block, tl.max(high.to(tl.int32), 0))


@triton.jit
def combine(
    partials_ptr,
    order_ptr,
    count_ptr,
    reference_ptr,
    logp_ptr,
    lse_ptr,
    entropy_ptr,
    mean_ptr,
    top1_ptr,
    own_ptr,
    share_ptr,
    T,
    V,
    first_row,
    splits,
    factor,
    outer,
    BLOCK_T: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    TOP1: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Outputs of a row from its splits, in fp64, at the row's own place; with PRODUCT what ``finish`` multiplies by.

    ``own`` is the factor of W[target] in the unit gradient, (1 - p) dz/draw, and ``share`` that of the product.
    """
    row = first_row + tl.program_id(0) * BLOCK_T
    count = tl.load(count_ptr)
    if row >= count:
        return
    rows = row + tl.arange(0, BLOCK_T)
    counts = rows < count
    stride = tl.cast(splits, tl.int64) * T  # from one kind of partial to the next
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    for split in tl.range(0, splits):
        place = tl.cast(split, tl.int64) * T + rows
        top = tl.maximum(top, tl.load(partials_ptr + place, mask=counts, other=float("-inf")))
    zero = top
    if PRODUCT:
        zero = tl.load(reference_ptr + rows, mask=counts, other=0.0)
    total = tl.zeros((BLOCK_T,), tl.float64)
    spread = tl.zeros((BLOCK_T,), tl.float64)
    logits = tl.zeros((BLOCK_T,), tl.float64)
    target = tl.full((BLOCK_T,), float("nan"), tl.float32)
    for split in tl.range(0, splits):
        place = tl.cast(split, tl.int64) * T + rows
        part = tl.load(partials_ptr + stride + place, mask=counts, other=1.0).to(tl.float64)
        part += tl.load(partials_ptr + 2 * stride + place, mask=counts, other=0.0).to(tl.float64)
        seen = tl.load(partials_ptr + 3 * stride + place, mask=counts, other=0.0)
        target = tl.where(seen == seen, seen, target)  # NaN in the splits that do not have it
        moved = tl.zeros((BLOCK_T,), tl.float64)
        if not PRODUCT:
            largest = tl.load(partials_ptr + place, mask=counts, other=0.0)
            # a split without columns has no largest logit
            moved = tl.where(largest > float("-inf"), largest - zero, 0.0).to(tl.float64)
        shrink = tl.exp2(moved)
        total += shrink * part
        if ENTROPY:
            around = tl.load(partials_ptr + 4 * stride + place, mask=counts, other=0.0)
            spread += shrink * (around.to(tl.float64) + moved * part)
        if MEAN:
            logits += tl.load(partials_ptr + 5 * stride + place, mask=counts, other=0.0).to(tl.float64)
    log_sum = tl.log(total)
    logp = (target - zero).to(tl.float64) * LN_2 - log_sum
    places = tl.load(order_ptr + rows, mask=counts, other=0)
    tl.store(logp_ptr + places, logp.to(tl.float32), mask=counts)
    tl.store(lse_ptr + places, (zero.to(tl.float64) * LN_2 + log_sum).to(tl.float32), mask=counts)
    if ENTROPY:
        entropy = log_sum - spread / total * LN_2
        tl.store(entropy_ptr + places, entropy.to(tl.float32), mask=counts)
    if MEAN:
        tl.store(mean_ptr + places, (logits / V * LN_2).to(tl.float32), mask=counts)
    if TOP1:
        tl.store(top1_ptr + places, target >= top, mask=counts)
    if PRODUCT:
        own = (1.0 - tl.exp(logp)) * factor
        if SOFTCAP:
            t = target.to(tl.float64) / outer
            own *= 1.0 - t * t
        tl.store(own_ptr + rows, own.to(tl.float32), mask=counts)
        tl.store(share_ptr + rows, (factor / total).to(tl.float32), mask=counts)
