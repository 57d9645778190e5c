"""Gradients from recomputed logits: a trainable head, an adapter on it, or gradients through lse and entropy.

Chunks of the vocabulary whose logit gradients fit the workspace: each row of the head is then complete after one
product over all tokens and is written once, and the hidden states' sums stay in fp32 over the chunks.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefopt_kernels.ops._launch import launch
from prefopt_kernels.ops.linear_logprob.operands import FILTER_TILE, Saved, Upstream
from prefopt_kernels.ops.linear_logprob.triton_kernels import config as choices
from prefopt_kernels.ops.linear_logprob.triton_kernels.gradient import COEFFICIENTS, logit_gradients
from prefopt_kernels.ops.linear_logprob.triton_kernels.inputs import LOG2_E, Call, tiled

HIDDEN_SIDE, HEAD_SIDE = ("hidden", "low_hidden"), ("weight", "bias", "low_weight")


def gradients(call: Call, upstream: Upstream, saved: Saved, need: frozenset[str]) -> dict[str, Tensor]:
    named = call.operands._asdict()
    grads = {name: torch.zeros_like(named[name], memory_format=torch.contiguous_format) for name in need}
    if call.T == 0:
        return grads
    filters = _Filters(call, upstream, saved, need)
    tiles, rows = call.tiles, call.blocks * call.tiles.block_t
    unit = max(tiles.block_v, choices.FILTER_ROWS)  # of ids, for tiles and for products by ids
    unit_bytes = rows * call.work_dtype.itemsize * unit
    chunk = max(1, choices.WORKSPACE_BYTES // unit_bytes) * unit
    chunk = min(chunk, -(-call.V // unit) * unit)
    workspace = call.empty(rows, chunk, dtype=call.work_dtype)
    coefficients = _coefficients(call, upstream, saved)
    rights = {"hidden": call.weight, "weight": call.hidden}
    if call.operands.low_hidden is not None and call.operands.low_weight is not None:
        rights["low_hidden"] = call.operands.low_weight.to(call.dtype).contiguous()
        rights["low_weight"] = call.rows_of(call.operands.low_hidden).to(call.dtype)
    sums = {
        name: call.zeros(call.product_splits(call.T, rights[name].shape[1], chunk), call.T, rights[name].shape[1])
        for name in HIDDEN_SIDE
        if name in need
    }
    for first in range(0, call.V, chunk):
        last = min(first + chunk, call.V)
        column_sums = call.zeros(call.blocks, chunk) if "bias" in need else None
        _logit_gradients(call, coefficients, workspace, column_sums, filters, upstream, first, last)
        width = -(-(last - first) // tiles.block_v) * tiles.block_v
        for name, total in sums.items():
            live = filters.live(filters.hidden, first, last)
            call.product(
                workspace,
                rights[name],
                total,
                first_inner=first,
                inner=width,
                add=first > 0,
                live=live,
            )
        for name in ("weight", "low_weight"):
            if name in need:
                live = filters.live(filters.head, first, last)
                call.product(
                    workspace,
                    rights[name],
                    grads[name][first:last].unsqueeze(0),
                    inner=call.T,
                    transposed=True,
                    live=None if live is None else _by_ids(live),
                )
        if column_sums is not None:
            grads["bias"][first:last] = column_sums.sum(0)[: last - first].to(call.dtype)
    for name, total in sums.items():
        grads[name] = call.to_places(total.sum(0).to(named[name].dtype))
    return grads


class _Filters:
    """Which tiles the gradients may skip, by the largest probability in each."""

    def __init__(self, call: Call, upstream: Upstream, saved: Saved, need: frozenset[str]):
        allowed = upstream.entropy is None  # its gradient has terms p log p that a bound on p does not bound
        self.hidden = saved.grad_filter if allowed else 0.0
        self.head = saved.head_grad_filter if allowed else 0.0
        self.peak, self.write, self.least = None, False, 0.0
        if allowed and saved.tile_max is not None:
            self.peak = call.peaks(saved.tile_max, call.rows_of(saved.lse) * LOG2_E)
            sides = ((HIDDEN_SIDE, self.hidden), (HEAD_SIDE, self.head))
            self.least = min(filter_ for side, filter_ in sides if need & set(side))
        elif self.hidden > 0 and need & set(HIDDEN_SIDE):
            self.peak, self.write = call.zeros(call.blocks, -(-call.V // FILTER_TILE)), True
            self.head = 0.0

    def live(self, least: float, first: int, last: int) -> Tensor | None:
        """(row blocks, tiles) of the columns [first, last); None is all."""
        if self.peak is None or least == 0:
            return None
        return self.peak[:, first // FILTER_TILE : -(-last // FILTER_TILE)] >= least


def _by_ids(live: Tensor) -> Tensor:
    """(blocks of token ids as wide as one of rows, row blocks) from (row blocks, tiles)."""
    per_block = choices.FILTER_ROWS // FILTER_TILE
    live = pad(live, (0, -live.shape[1] % per_block))
    return live.view(live.shape[0], -1, per_block).any(-1).T.contiguous()


def _coefficients(call: Call, upstream: Upstream, saved: Saved) -> Tensor:
    """(COEFFICIENTS, T) as ``logit_gradients`` reads them; zero, and an lse of infinity, for rows that do not count."""
    coefficients = call.zeros(COEFFICIENTS, call.T)
    coefficients[0] = (call.rows_of(saved.lse) * LOG2_E).masked_fill_(call.ignored, math.inf)
    if upstream.logp is not None:
        coefficients[2] = call.rows_of(upstream.logp)
        coefficients[1] = -coefficients[2]
    if upstream.lse is not None:
        coefficients[1] += call.rows_of(upstream.lse)
    if upstream.entropy is not None:
        assert saved.entropy is not None  # an output that has a gradient
        coefficients[3] = call.rows_of(upstream.entropy)
        coefficients[4] = call.rows_of(saved.entropy)
    return coefficients


def _logit_gradients(
    call: Call,
    coefficients: Tensor,
    workspace: Tensor,
    column_sums: Tensor | None,
    filters: _Filters,
    upstream: Upstream,
    first: int,
    last: int,
) -> None:
    tiles = call.tiles
    parts = -(-(last - first) // tiles.block_v)
    splits = choices.splits(call.target, call.blocks, parts)
    launch(
        logit_gradients,
        (call.blocks, splits),
        call.head()
        | {
            "coefficients_ptr": coefficients,
            "peak_ptr": filters.peak,
            "workspace": tiled(workspace, tiles.block_t, tiles.block_v // tiles.parts, call.descriptors),
            "column_sums_ptr": column_sums,
            "tiles": -(-call.V // FILTER_TILE),
            "first_column": first,
            "last_column": last,
            "tiles_per_split": -(-parts // splits),
            "workspace_stride": workspace.stride(0),
            "factor": call.factor,
            "least": filters.least,
            "THROUGH_ENTROPY": upstream.entropy is not None,
            "COLUMN_SUMS": column_sums is not None,
            "PEAK": filters.write,
            "SKIP": filters.least > 0,
            "TOGETHER": max(tiles.parts, choices.FILTER_ROWS // FILTER_TILE),
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
