"""A call as the Triton kernels take it, and what launches them. Nothing here reads a value back from the device."""

import math
from typing import Any

import torch
from torch import Tensor

from prefopt_kernels.ops._launch import launch
from prefopt_kernels.ops.linear_kl.operands import Saved, Transforms, Upstream
from prefopt_kernels.ops.linear_kl.triton_kernels.gradient import COEFFICIENTS, kl_logit_gradients
from prefopt_kernels.ops.linear_kl.triton_kernels.scan import PARTIALS, kl_scan
from prefopt_kernels.ops.linear_logprob.operands import Operands
from prefopt_kernels.ops.linear_logprob.triton_kernels import config
from prefopt_kernels.ops.linear_logprob.triton_kernels.inputs import LOG2_E, Call, tiled

LN_2 = math.log(2)


def tiles_of_two(target: config.Target, dtype: torch.dtype, descriptors: bool, adapter: bool) -> config.Tiles:
    """Half the columns of linear_logprob's tiles at most: the accumulators of two products share the registers."""
    if dtype == torch.float32:
        return config.Tiles(config.FILTER_ROWS, 32, 16, 1, 8, 2)
    if descriptors and not adapter and target.capability < (10, 0):
        return config.Tiles(config.FILTER_ROWS, 128, 64, 2, 8, 2)
    return config.Tiles(config.FILTER_ROWS, 64, 32, 1, 8, 2)


class TwoModels:
    """The policy and the reference model as the kernels take them."""

    def __init__(self, policy: Operands, ref: Operands, transforms: Transforms):
        self.policy, self.ref = Call(policy, transforms.policy), Call(ref, transforms.ref)
        descriptors = self.policy.descriptors and self.ref.descriptors
        adapter = policy.low_hidden is not None or ref.low_hidden is not None
        tiles = tiles_of_two(self.policy.target, self.policy.dtype, descriptors, adapter)
        for call in (self.policy, self.ref):
            call.descriptors, call.tiles = descriptors, tiles
        self.same_head = ref.weight is policy.weight

    def arguments(self) -> dict[str, Any]:
        """The arguments that describe both models' logits."""
        ref = self.ref.head()
        names = ("hidden", "weight", "low_hidden", "low_weight", "bias_ptr", "hidden_stride", "weight_stride")
        named = {f"ref_{name}": ref[name] for name in (*names, "inner", "outer")}
        named |= {f"REF_{name}": ref[name] for name in ("H", "LOW", "SOFTCAP", "BIAS")}
        return self.policy.head() | named | {"SAME_HEAD": self.same_head}

    def forward(self, want: frozenset[str]) -> dict[str, Tensor]:
        call = self.policy
        out = call.outputs(want)
        if call.T == 0:
            return out
        tiles, parts = call.tiles, -(-call.V // call.tiles.block_v)
        splits = config.splits(call.target, call.blocks, parts)
        partials = call.zeros(PARTIALS, splits, call.T)
        launch(
            kl_scan,
            (call.blocks, splits),
            self.arguments()
            | {
                "partials_ptr": partials,
                "tiles_per_split": -(-parts // splits),
                "splits": splits,
                "ENTROPY": "entropy" in want,
                "MEAN": "mean_logit" in want,
            },
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        found = _combined(partials.double(), call.V)
        for name, value in out.items():
            ignored = call.ignored
            value.copy_(call.to_places(found[name].masked_fill(ignored, 0).to(value.dtype)))
        return out

    def backward(self, upstream: Upstream, saved: Saved, need: frozenset[str]) -> dict[str, Tensor]:
        """Chunks of the vocabulary whose logit gradients fit the workspace, as in linear_logprob."""
        call, named = self.policy, self.policy.operands._asdict()
        grads = {name: torch.zeros_like(named[name], memory_format=torch.contiguous_format) for name in need}
        if call.T == 0:
            return grads
        tiles, rows = call.tiles, call.blocks * call.tiles.block_t
        unit = max(tiles.block_v, config.FILTER_ROWS)
        chunk = max(1, config.WORKSPACE_BYTES // (rows * call.work_dtype.itemsize * unit)) * unit
        chunk = min(chunk, -(-call.V // unit) * unit)
        workspace = call.empty(rows, chunk, dtype=call.work_dtype)
        coefficients = self._coefficients(upstream, saved)
        rights = {"hidden": call.weight, "weight": call.hidden}
        if call.operands.low_hidden is not None and call.operands.low_weight is not None:
            rights["low_hidden"] = call.operands.low_weight.to(call.dtype).contiguous()
            rights["low_weight"] = call.rows_of(call.operands.low_hidden).to(call.dtype)
        sums: dict[str, Tensor] = {
            name: call.zeros(call.product_splits(call.T, rights[name].shape[1], chunk), call.T, rights[name].shape[1])
            for name in ("hidden", "low_hidden")
            if name in need
        }
        for first in range(0, call.V, chunk):
            last = min(first + chunk, call.V)
            column_sums = call.zeros(call.blocks, chunk) if "bias" in need else None
            self._logit_gradients(coefficients, workspace, column_sums, upstream, first, last)
            width = -(-(last - first) // tiles.block_v) * tiles.block_v
            for name, total in sums.items():
                call.product(workspace, rights[name], total, first_inner=first, inner=width, add=first > 0)
            for name in sorted(need & {"weight", "low_weight"}):
                part = grads[name][first:last].unsqueeze(0)
                call.product(workspace, rights[name], part, inner=call.T, transposed=True)
            if column_sums is not None:
                grads["bias"][first:last] = column_sums.sum(0)[: last - first].to(call.dtype)
        for name, total in sums.items():
            grads[name] = call.to_places(total.sum(0).to(grads[name].dtype))
        return grads

    def _coefficients(self, upstream: Upstream, saved: Saved) -> Tensor:
        """(COEFFICIENTS, T); zero, and an lse of infinity, for rows that do not count."""
        call = self.policy
        coefficients = call.zeros(COEFFICIENTS, call.T)
        coefficients[0] = (call.rows_of(saved.lse) * LOG2_E).masked_fill_(call.ignored, math.inf)
        if upstream.logp is not None:
            coefficients[2] = call.rows_of(upstream.logp)
            coefficients[1] = -coefficients[2]
        if upstream.lse is not None:
            coefficients[1] += call.rows_of(upstream.lse)
        if upstream.entropy is not None and saved.entropy is not None:
            coefficients[3], coefficients[4] = call.rows_of(upstream.entropy), call.rows_of(saved.entropy)
        coefficients[5] = call.rows_of(upstream.kl)
        coefficients[6] = call.rows_of(saved.lse - saved.ref_lse + saved.kl) * LOG2_E
        return coefficients

    def _logit_gradients(
        self,
        coefficients: Tensor,
        workspace: Tensor,
        column_sums: Tensor | None,
        upstream: Upstream,
        first: int,
        last: int,
    ) -> None:
        call, tiles = self.policy, self.policy.tiles
        parts = -(-(last - first) // tiles.block_v)
        splits = config.splits(call.target, call.blocks, parts)
        launch(
            kl_logit_gradients,
            (call.blocks, splits),
            self.arguments()
            | {
                "coefficients_ptr": coefficients,
                "workspace": tiled(workspace, tiles.block_t, tiles.block_v // tiles.parts, call.descriptors),
                "column_sums_ptr": column_sums,
                "first_column": first,
                "last_column": last,
                "tiles_per_split": -(-parts // splits),
                "workspace_stride": workspace.stride(0),
                "factor": call.factor,
                "THROUGH_ENTROPY": upstream.entropy is not None,
                "COLUMN_SUMS": column_sums is not None,
            },
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def _combined(partials: Tensor, vocabulary: int) -> dict[str, Tensor]:
    """Every output (T,) in nats from the partials (PARTIALS, splits, T) in units of log 2, all in fp64."""
    largest, total, low, target, spread, logits, gap, gap_low, ref_largest, ref_total, ref_low, ref_target = partials
    top, sums, log_sum, shrink = _softmax(largest, total + low)
    ref_top, _sums, ref_log_sum, _shrink = _softmax(ref_largest, ref_total + ref_low)
    moved = torch.where(shrink > 0, largest - top, 0)
    target, ref_target = (_only(value) for value in (target, ref_target))
    gaps = torch.where(gap.isinf(), gap, gap + gap_low).masked_fill(shrink == 0, 0)  # infinite: banned by the reference
    mean_gap = (gaps * shrink).sum(0) / sums * LN_2
    spreads = (shrink * (spread + moved * (total + low))).sum(0)
    return {
        "logp": (target - top) * LN_2 - log_sum,
        "lse": top * LN_2 + log_sum,
        "ref_logp": (ref_target - ref_top) * LN_2 - ref_log_sum,
        "ref_lse": ref_top * LN_2 + ref_log_sum,
        "kl": mean_gap - (top - ref_top) * LN_2 - (log_sum - ref_log_sum),
        "entropy": log_sum - spreads / sums * LN_2,
        "mean_logit": logits.sum(0) / vocabulary * LN_2,
        "is_top1": target >= top,
    }


def _softmax(largest: Tensor, totals: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over the splits: the largest logit, the sum of exponentials, its logarithm, and the factor of each split."""
    top = largest.amax(0)
    shrink = torch.where(largest > -math.inf, (largest - top).exp2(), 0)  # 0: a split without columns
    sums = (shrink * totals).sum(0)
    return top, sums, sums.log(), shrink


def _only(values: Tensor) -> Tensor:
    """(T,) from (splits, T), of which one is not NaN; NaN where the target is no token id."""
    found = values.isnan().logical_not()
    return torch.where(found.any(0), values.nan_to_num(0.0, math.inf, -math.inf).sum(0), math.nan)
