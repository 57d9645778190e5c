"""The products of the gradients: a workspace of exponentials or of logit gradients, times the head or the hidden
states.

``product`` multiplies tiles in the order of their index and sums in fp32, each split of the inner dimension for itself,
so results repeat bit for bit. With LISTED it visits only the tiles that a gradient filter left, by a list made
beforehand.
"""

import triton
import triton.language as tl

from prefopt_kernels.ops.linear_logprob.triton_kernels.tiles import load_tile


@triton.jit
def product(
    left,
    right,
    out_ptr,
    list_ptr,
    live_ptr,
    count_ptr,
    M,
    N,
    K,
    first_row,
    first_inner,
    right_rows,
    left_stride,
    right_stride,
    out_stride,
    entries,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LISTED: tl.constexpr,
    ADD: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[split] = left right`` over a part of K; ``left`` is (M, K), or (K, M) with TRANSPOSED.

    Row k of ``right`` is ``first_inner + k``. Not transposed, M are rows of tokens and those from ``count`` on are left
    out; transposed, K are. LISTED: row block m visits the ``live[m]`` first of the TILE-wide parts of K in ``list[m]``.
    """
    block_n, block_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = block_m * BLOCK_M
    count = tl.load(count_ptr) - first_row
    if TRANSPOSED:
        K = tl.minimum(K, count)
    else:
        if row >= count:
            return
    steps = tl.cdiv(K, BLOCK_K)
    if LISTED:
        steps = tl.load(live_ptr + block_m) * (TILE // BLOCK_K)
    steps_per_split = tl.cdiv(steps, tl.num_programs(2))
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, steps)
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    place = out_ptr + (tl.cast(split, tl.int64) * M + offs_m)[:, None] * out_stride + offs_n[None, :]
    if ADD:
        total = tl.load(place, mask=inside, other=0.0)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        k = step * BLOCK_K
        if LISTED:
            tile = tl.load(list_ptr + tl.cast(block_m, tl.int64) * entries + k // TILE)
            k = tile * TILE + k % TILE
        if TRANSPOSED:
            a = load_tile(left, k, row, K, M, left_stride, BLOCK_K, BLOCK_M, DESCRIPTOR).T
        else:
            a = load_tile(left, row, k, M, K, left_stride, BLOCK_M, BLOCK_K, DESCRIPTOR)
        b = load_tile(
            right,
            first_inner + k,
            block_n * BLOCK_N,
            right_rows,
            N,
            right_stride,
            BLOCK_K,
            BLOCK_N,
            DESCRIPTOR,
        )
        total = tl.dot(a, b.to(a.dtype), total, input_precision=PRECISION)
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def finish(
    product_ptr,
    weight_ptr,
    targets_ptr,
    order_ptr,
    count_ptr,
    own_ptr,
    share_ptr,
    unit_ptr,
    M,
    V,
    H,
    first_row,
    splits,
    product_stride,
    weight_stride,
    unit_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """unit[t] = own_t W[target_t] - share_t (sum of the product's splits), at the row's own place."""
    offs_m = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # row of the chunk
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    count = tl.load(count_ptr)
    if first_row + tl.program_id(0) * BLOCK_T >= count:
        return
    rows = first_row + offs_m
    counts = rows < count
    inside = counts[:, None] & (offs_h < H)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for split in tl.range(0, splits):
        place = (tl.cast(split, tl.int64) * M + offs_m)[:, None] * product_stride + offs_h[None, :]
        total += tl.load(product_ptr + place, mask=inside, other=0.0)
    targets = tl.load(targets_ptr + rows, mask=counts, other=0)
    known = inside & (targets < V)[:, None]  # else own is NaN
    head = tl.load(weight_ptr + targets.to(tl.int64)[:, None] * weight_stride + offs_h[None, :], known, 0.0)
    own = tl.load(own_ptr + rows, mask=counts, other=0.0)
    share = tl.load(share_ptr + rows, mask=counts, other=0.0)
    unit = own[:, None] * head.to(tl.float32) - share[:, None] * total
    places = tl.load(order_ptr + rows, mask=counts, other=0)
    tl.store(
        unit_ptr + places.to(tl.int64)[:, None] * unit_stride + offs_h[None, :],
        unit.to(unit_ptr.dtype.element_ty),
        mask=inside,
    )
