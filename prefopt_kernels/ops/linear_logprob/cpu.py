"""The C++ kernels of csrc/linear_logprob: allocates every buffer, calls them, combines the splits of the vocabulary."""

from functools import cache

import torch
from torch import Tensor

from prefopt_kernels.ops import _extension
from prefopt_kernels.ops.linear_logprob.operands import Operands, Saved, Upstream
from prefopt_kernels.ops.linear_logprob.transform import Transform

FILTERS_HEAD = False  # whether the backward uses tile_max


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    if hidden.device.type != "cpu":
        return f"hidden is on {hidden.device}, the C++ kernels run on the CPU"
    return _extension.why_not()


def instruction_sets() -> tuple[str, ...]:
    """Those of this machine that have kernels, best first."""
    reason = _extension.why_not()  # loads the library: an exported graph gets here without select_backend
    if reason is not None:
        raise RuntimeError(f"backend 'cpu' cannot run this call: {reason}")
    return tuple(torch.ops.prefopt_kernels_cpu.isas())


@cache
def instruction_set() -> str:
    return instruction_sets()[0]


def forward(operands: Operands, transform: Transform, want: frozenset[str], grad_filter: float) -> dict[str, Tensor]:
    """Every wanted output; nothing is filtered here."""
    hidden, T = operands.hidden, operands.hidden.shape[0]
    out = {name: hidden.new_zeros(T, dtype=torch.float32) for name in want}
    if "unit" in want:
        out["unit"] = hidden.new_zeros(hidden.shape)
    rows = (operands.targets >= 0).nonzero().squeeze(-1)  # (N,)
    if rows.numel():
        call = _Call(operands, transform, rows)
        for name, values in call.forward(want, out.get("unit")).items():
            out[name][rows] = values
    if "is_top1" in want:
        out["is_top1"] = out["is_top1"].bool()
    return out


def backward(
    operands: Operands, upstream: Upstream, saved: Saved, transform: Transform, need: frozenset[str]
) -> dict[str, Tensor]:
    rows = (operands.targets >= 0).nonzero().squeeze(-1)  # (N,)
    if not rows.numel():
        named = operands._asdict()
        return {name: named[name].new_zeros(named[name].shape) for name in need}
    return _Call(operands, transform, rows).backward(upstream, saved, need)


class _Call:
    """The operands of one call as the kernels take them: N rows that count, rows of unit stride, fp32 bias."""

    def __init__(self, operands: Operands, transform: Transform, rows: Tensor):
        hidden, weight, targets, bias, low_hidden, low_weight = operands
        self.rows = rows  # (N,)
        self.targets = targets[rows].long()  # (N,)
        self.hidden = _unit_stride(hidden)
        self.weight = _unit_stride(weight)
        if self.weight.stride(0) < weight.shape[1]:  # rows that overlap, such as an expanded one
            self.weight = self.weight.clone(memory_format=torch.contiguous_format)
        self.bias = None if bias is None else bias.float().contiguous()
        self.low_hidden = None if low_hidden is None else low_hidden[rows].contiguous()  # (N, R)
        self.low_weight = None if low_weight is None else _unit_stride(low_weight)
        self.transform = transform
        self.isa = instruction_set()
        self.operands = (self.hidden, self.rows, self.weight, self.targets)
        self.raw_logits = (*self.operands, self.bias, self.low_hidden, self.low_weight)
        self.transform_numbers = (transform.scale, transform.softcap or 0.0, transform.temperature)

    def plan(self, product: bool) -> list[int]:
        N, R = self.rows.numel(), 0 if self.low_hidden is None else self.low_hidden.shape[1]
        return torch.ops.prefopt_kernels_cpu.linear_logprob_plan(self.hidden, self.weight, N, R, product, self.isa)

    def forward(self, want: frozenset[str], unit: Tensor | None) -> dict[str, Tensor]:
        """Each output for the N rows; fills ``unit`` in place."""
        N, V = self.rows.numel(), self.weight.shape[0]
        padded_tokens, padded_hidden, splits, groups, workspace_bytes, *_backward = self.plan(unit is not None)
        partials = self._empty(6, splits, padded_tokens)
        product = None if unit is None else self._empty(splits, N, padded_hidden)
        torch.ops.prefopt_kernels_cpu.linear_logprob_forward(
            *self.raw_logits,
            *self.transform_numbers,
            "entropy" in want,
            "mean_logit" in want,
            partials,
            product,
            torch.empty(workspace_bytes, dtype=torch.uint8),
            splits,
            groups,
            self.isa,
        )
        # each (splits, N); fp64 costs nothing at this size and keeps log(1 + 1e-6) exact
        largest, total, low, spread, logits, target = partials[:, :, :N].double()
        total = total + low
        top = largest.amax(0)  # (N,)
        share = (largest - top).exp()  # (splits, N)
        log_sum = (share * total).sum(0).log()  # (N,), 0 or more
        z_target = target.sum(0)
        values = {"logp": (z_target - top) - log_sum, "lse": top + log_sum}
        if "entropy" in want:  # lse - E[z]
            shifted = share * (spread + (largest - top) * total)
            values["entropy"] = log_sum - shifted.sum(0) * (-log_sum).exp()
        if "mean_logit" in want:
            values["mean_logit"] = logits.sum(0) / V
        if "is_top1" in want:
            values["is_top1"] = z_target >= top
        if unit is not None:
            factor = self.transform.scale / self.transform.temperature
            share = (largest - values["lse"]).exp() * factor
            own = self.transform.slope_at(z_target) * -torch.expm1(values["logp"])  # (N,)
            torch.ops.prefopt_kernels_cpu.linear_logprob_finish_unit(
                *self.operands,
                product,
                share.float(),
                own.float(),
                unit,
                self.isa,
            )
        return {name: value.float() for name, value in values.items()}

    def backward(self, upstream: Upstream, saved: Saved, need: frozenset[str]) -> dict[str, Tensor]:
        dlogp, dlse, dentropy = upstream
        N, (V, H), dtype = self.rows.numel(), self.weight.shape, self.weight.dtype
        padded_tokens, padded_hidden, *_forward, parts, chunk, workspace_bytes = self.plan("hidden" in need)
        coefficients = torch.zeros(5, padded_tokens)
        coefficients[0] = torch.finfo(torch.float32).max  # lse of the padding: its p is 0
        for row, values in enumerate((saved.lse, None, dlogp, dentropy, saved.entropy)):
            if values is not None:
                coefficients[row, :N] = values[self.rows]
        coefficients[1] = -coefficients[2]
        if dlse is not None:
            coefficients[1, :N] += dlse[self.rows]
        target_ids = torch.full((padded_tokens,), -1, dtype=torch.int32)
        target_ids[:N] = self.targets
        dhidden = self._empty(parts, N, padded_hidden) if "hidden" in need else None
        grads = {}
        if "weight" in need:
            grads["weight"] = torch.empty(V, H, dtype=dtype)
        if "bias" in need:
            grads["bias"] = self._empty(V)
        dlow_hidden = None
        if "low_hidden" in need:
            dlow_hidden = self._empty(parts, self.low_hidden.shape[1], padded_tokens)
        if "low_weight" in need:
            grads["low_weight"] = torch.empty(self.low_weight.shape, dtype=self.low_weight.dtype)
        torch.ops.prefopt_kernels_cpu.linear_logprob_backward(
            *self.raw_logits,
            *self.transform_numbers,
            coefficients,
            target_ids,
            dentropy is not None,
            dhidden,
            grads.get("weight"),
            grads.get("bias"),
            dlow_hidden,
            grads.get("low_weight"),
            torch.empty(workspace_bytes, dtype=torch.uint8),
            parts,
            chunk,
            self.isa,
        )
        if "hidden" in need:
            grads["hidden"] = self.hidden.new_zeros(self.hidden.shape)
            grads["hidden"][self.rows] = self._sum(dhidden)[:, :H].to(dtype)
        if "low_hidden" in need:
            grads["low_hidden"] = self.low_hidden.new_zeros(saved.lse.shape[0], self.low_hidden.shape[1])
            grads["low_hidden"][self.rows] = self._sum(dlow_hidden)[:, :N].T
        if "bias" in need:
            grads["bias"] = grads["bias"].to(dtype)
        return grads

    @staticmethod
    def _sum(parts: Tensor) -> Tensor:
        """Over the parts of the vocabulary, in place in the first."""
        for part in parts[1:]:
            parts[0] += part
        return parts[0]

    @staticmethod
    def _empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32)


def _unit_stride(matrix: Tensor) -> Tensor:
    # not contiguous(): torch calls a matrix of one column contiguous whatever its strides
    return matrix if matrix.stride(1) == 1 else matrix.clone(memory_format=torch.contiguous_format)
