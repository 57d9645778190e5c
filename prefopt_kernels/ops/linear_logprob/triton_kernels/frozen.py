"""Scheme A: the unit gradient d logp / d hidden of a frozen head, made in the forward with two products.

Chunks of rows whose exponentials fit the workspace: scan (writes them), combine, product with the head, finish. The
whole vocabulary of a chunk is there before its product starts, so a filter knows the final probabilities.
"""

import torch
from torch import Tensor

from prefopt_kernels.ops._launch import launch
from prefopt_kernels.ops.linear_logprob.triton_kernels import config as choices
from prefopt_kernels.ops.linear_logprob.triton_kernels.forward import check_reference, target_logits
from prefopt_kernels.ops.linear_logprob.triton_kernels.inputs import LOG2_E, Call
from prefopt_kernels.ops.linear_logprob.triton_kernels.matmul import finish

REFERENCE_LIMIT = 60  # in powers of two; fp32 and bf16 overflow at 128


def fill_unit(call: Call, want: frozenset[str], grad_filter: float, out: dict[str, Tensor]) -> None:
    """Fill ``out``: every wanted output, and the unit gradient among them."""
    tiles, T = call.tiles, call.T
    columns = -(-call.V // tiles.block_v) * tiles.block_v
    row_bytes = columns * call.work_dtype.itemsize
    chunk_blocks = min(call.blocks, max(1, choices.WORKSPACE_BYTES // (row_bytes * tiles.block_t)))
    chunk = chunk_blocks * tiles.block_t
    workspace = call.empty(chunk, columns, dtype=call.work_dtype)
    partials = call.new_partials(chunk_blocks)
    reference, own, share = (call.empty(T) for _ in range(3))
    again = torch.zeros(chunk_blocks, dtype=torch.int32, device=call.device)
    product = call.empty(call.product_splits(chunk, call.H, columns), chunk, call.H)
    tile_max = call.new_tile_max() if grad_filter > 0 else None
    _target_logits(call, reference)
    for first_row in range(0, T, chunk):
        blocks = -(-min(chunk, T - first_row) // tiles.block_t)
        for marks in (None, again):  # the second pass ends at once where no reference had to move
            call.scan(
                want,
                partials,
                first_row,
                blocks,
                tile_max=tile_max,
                reference=reference,
                workspace=workspace,
                again=marks,
            )
            if marks is None:
                _check_reference(call, partials, reference, again, first_row, blocks)
        call.combine(want, partials, out, first_row, blocks, reference=reference, own=own, share=share)
        live = None
        if tile_max is not None:
            rows = slice(first_row, first_row + chunk)
            live = call.peaks(tile_max, call.rows_of(out["lse"]) * LOG2_E, rows) >= grad_filter
        call.product(
            workspace,
            call.weight,
            product,
            first_row=first_row,
            inner=columns,
            live=live,
        )
        _finish(call, product, own, share, out["unit"], first_row, blocks)


def _target_logits(call: Call, reference: Tensor) -> None:
    head = call.head()
    names = "count_ptr targets_ptr bias_ptr T V hidden_stride weight_stride".split()
    names += "inner outer H LOW BLOCK_LOW SOFTCAP BIAS".split()
    launch(
        target_logits,
        (-(-call.T // 16),),
        {name: head[name] for name in names}
        | {
            "hidden_ptr": call.hidden,
            "weight_ptr": call.weight,
            "low_hidden_ptr": call.low[0],
            "low_weight_ptr": call.low[1],
            "reference_ptr": reference,
            "BLOCK_T": 16,
            "BLOCK_H": 128,
        },
        num_warps=4,
        num_stages=1,
    )


def _check_reference(
    call: Call, partials: Tensor, reference: Tensor, again: Tensor, first_row: int, blocks: int
) -> None:
    launch(
        check_reference,
        (blocks,),
        {
            "partials_ptr": partials,
            "count_ptr": call.count,
            "reference_ptr": reference,
            "again_ptr": again,
            "T": call.T,
            "first_row": first_row,
            "splits": partials.shape[1],
            "LIMIT": REFERENCE_LIMIT,
            "BLOCK_T": call.tiles.block_t,
        },
        num_warps=4,
        num_stages=1,
    )


def _finish(
    call: Call,
    product: Tensor,
    own: Tensor,
    share: Tensor,
    unit: Tensor,
    first_row: int,
    blocks: int,
) -> None:
    splits, chunk, H = product.shape
    rows = blocks * call.tiles.block_t
    launch(
        finish,
        (-(-rows // 16), -(-H // 128)),
        {
            "product_ptr": product,
            "weight_ptr": call.weight,
            "targets_ptr": call.targets,
            "order_ptr": call.order,
            "count_ptr": call.count,
            "own_ptr": own,
            "share_ptr": share,
            "unit_ptr": unit,
            "M": chunk,
            "V": call.V,
            "H": H,
            "first_row": first_row,
            "splits": splits,
            "product_stride": product.stride(1),
            "weight_stride": call.weight.stride(0),
            "unit_stride": unit.stride(0),
            "BLOCK_T": 16,
            "BLOCK_H": 128,
        },
        num_warps=4,
        num_stages=1,
    )
