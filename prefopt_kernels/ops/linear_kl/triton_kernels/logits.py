"""The logits of two models for one tile of rows and token ids. Tiles and units (log 2) as in linear_logprob."""

import triton
import triton.language as tl

from prefopt_kernels.ops.linear_logprob.triton_kernels.tiles import load_tile, raw_logits, with_low


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
