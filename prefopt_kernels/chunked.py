"""Gradients of a trainable head in three products with it instead of four.

The op computes the logits twice, because it needs d loss / d logp, which is known only after the forward. If the loss
of a sequence depends on that sequence alone, it is known once the sequence's logits are: each chunk of whole sequences
is processed from logits to loss to the gradients of hidden states and head, in the same memory. The backward only
scales these gradients by the gradient of the reduced loss. Plain torch on any device; modules.py selects this scheme.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prefopt_kernels.ops.linear_logprob import TokenLogprobs
from prefopt_kernels.ops.linear_logprob.transform import Transform

CHUNK_BYTES = 256 * 2**20  # of a chunk's fp32 logits

RowLoss = Callable[[Tensor, Tensor, slice], Tensor]


def chunked_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_seqlens: Tensor,
    loss_of: RowLoss,
    transform: Transform,
    outputs: Sequence[str] = (),
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[TokenLogprobs, tuple[Tensor | None, ...]]:
    """Log-probabilities, and the gradients of the sum of all losses, without a graph.

    Extra memory: twice the fp32 logits of a chunk (three times with a softcap); the head's gradient in fp32, the dtype
    of its sum; outside CUDA also the head in fp32. A sequence longer than a chunk is split into parts whose logits are
    computed twice. Synchronises with the device once, to read the lengths of the sequences.

    Args:
        hidden, weight, bias, targets: as :func:`prefopt_kernels.linear_logprob`.
        cu_seqlens: (B + 1,) first row of each sequence, and T last.
        loss_of: maps logp (n,) of the scored tokens, their ``cu_seqlens`` and the slice of sequences to the losses of
            these sequences; differentiable in logp, each loss a function of its own tokens.
        transform: transform of the logits.
        outputs: as :func:`prefopt_kernels.linear_logprob`.
        chunk_bytes: size of a chunk's fp32 logits.

    Returns:
        The result of ``linear_logprob``, and the gradients of ``hidden``, ``weight`` and ``bias`` in their dtypes, None
        where no gradient is required.
    """
    counts = targets >= 0
    bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))[cu_seqlens.long()]  # (B + 1,)
    ends = bounds.tolist()
    rows = torch.nonzero_static(counts, size=ends[-1]).squeeze(-1)  # (N,)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, bias, targets, transform, outputs)
        limit = max(1, chunk_bytes // (4 * weight.shape[0]))
        for first, last in _chunks(ends, limit):
            parts = rows[ends[first] : ends[last]].split(limit)
            logp = [head.softmax(part) for part in parts]
            inside = bounds[first : last + 1] - ends[first]
            with torch.enable_grad():
                chunk = torch.cat(logp).requires_grad_()
                losses = loss_of(chunk, inside, slice(first, last))
                (upstream,) = torch.autograd.grad(losses.sum(), chunk)  # (n,) d loss / d logp
            for part, by in zip(parts, upstream.split(limit), strict=True):
                if len(parts) > 1:
                    head.softmax(part)
                head.add_gradients(part, by)
        return head.tokens(), head.gradients()


class PrecomputedGradients(torch.autograd.Function):
    """``value`` with precomputed gradients; the backward scales them by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: tuple[Tensor | None, ...], *operands: Tensor | None) -> Tensor:
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if grad is None else grad * dvalue for grad in ctx.saved_tensors)
        return (None, None, *scaled)


def _chunks(ends: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Ranges (first, last) of sequences with at most ``limit`` scored tokens; a longer one is a range by itself."""
    first, B = 0, len(ends) - 1
    while first < B:
        last = first + 1
        while last < B and ends[last + 1] - ends[first] <= limit:
            last += 1
        if ends[last] > ends[first]:
            yield first, last
        first = last


def _has_mixed_products(hidden: Tensor) -> bool:
    """Whether products of half-precision operands have fp32 results, which torch supports on CUDA only."""
    return hidden.is_cuda and hidden.dtype != torch.float32


class _Head:
    """Products with the head in one call, and their accumulators."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: Transform,
        outputs: Sequence[str],
    ):
        operands = {"hidden": hidden, "weight": weight, "bias": bias}
        trained = {name: each for name, each in operands.items() if each is not None and each.requires_grad}
        self.dtypes = {name: each.dtype for name, each in trained.items()}
        self.mixed = _has_mixed_products(hidden)
        self.dtype = hidden.dtype if self.mixed else torch.float32  # of the products' operands
        self.hidden, self.weight = hidden, weight.to(self.dtype)
        self.bias = None if bias is None else bias.float()
        self.targets, self.transform = targets, transform
        self.values = {
            name: hidden.new_zeros(hidden.shape[0], dtype=torch.float32) for name in ("logp", "lse", *outputs)
        }
        self.grads = {
            name: torch.zeros(each.shape, dtype=each.dtype if name == "hidden" else torch.float32, device=each.device)
            for name, each in trained.items()
        }
        self.p: Tensor | None = None  # softmax of the last rows

    def softmax(self, rows: Tensor) -> Tensor:
        """(n,) logp; stores what :meth:`add_gradients` needs for these rows."""
        self.p = None  # free the memory before the next logits are allocated
        z = self._product(self._rows(rows), self.weight.T)  # (n, V)
        if self.bias is not None:
            z += self.bias
        scale, softcap, temperature = self.transform
        if softcap is None and scale != temperature:
            z *= scale / temperature
        if softcap is not None:
            z.mul_(scale / softcap).tanh_().mul_(softcap / temperature)
        self.slope = self.transform.slope_at(z)
        top, at = z.max(1)
        target = self.targets[rows, None].long()
        z_target = z.gather(1, target).squeeze(1)
        self.p = torch.softmax(z, 1)
        log_sum = -self.p.gather(1, at[:, None]).squeeze(1).log()
        self.logp = (z_target - top) - log_sum
        lse = top + log_sum
        values = {"logp": self.logp, "lse": lse, "is_top1": (z_target >= top).float()}
        if "mean_logit" in self.values:
            values["mean_logit"] = z.mean(1)
        if "entropy" in self.values:
            # p underflows to 0 long before the bound, which avoids 0 * -inf
            values["entropy"] = -z.sub_(lse[:, None]).clamp_(min=-1000).mul_(self.p).sum(1)
        for name, out in self.values.items():
            out[rows] = values[name]
        return self.logp

    def add_gradients(self, rows: Tensor, upstream: Tensor) -> None:
        """Add the products with the raw logits' gradient; ``rows`` are those of the last softmax."""
        p, self.p = self.p, None
        assert p is not None
        target = self.targets[rows, None].long()
        # The target's term separately in fp32: 1 - p by expm1 is exact where p is near 1
        own = (-upstream * torch.expm1(self.logp))[:, None]
        if isinstance(self.slope, Tensor):
            own *= self.slope.gather(1, target)
            p *= self.slope
        else:
            own *= self.slope
            upstream = upstream * self.slope
        p.scatter_(1, target, 0.0)
        if "bias" in self.grads:
            self.grads["bias"].addmv_(p.T, -upstream).index_add_(0, target.squeeze(1), own.squeeze(1))
        # one pass over p, rounded on the write
        dz = torch.empty_like(p, dtype=self.dtype) if self.mixed else p
        torch.mul(p, -upstream[:, None], out=dz)
        dz.scatter_(1, target, own.to(dz.dtype))
        if "hidden" in self.grads:
            self.grads["hidden"][rows] = self._product(dz, self.weight).to(self.dtypes["hidden"])
        if "weight" in self.grads:
            self._add_product(self.grads["weight"], dz.T, self._rows(rows))

    def tokens(self) -> TokenLogprobs:
        if "is_top1" in self.values:
            self.values["is_top1"] = self.values["is_top1"].bool()
        return TokenLogprobs(**self.values)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """The sums, rounded once to the operands' dtypes."""
        return tuple(
            self.grads.pop(name).to(self.dtypes[name]) if name in self.grads else None
            for name in ("hidden", "weight", "bias")
        )

    def _rows(self, rows: Tensor) -> Tensor:
        return self.hidden[rows].to(self.dtype)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out_dtype=torch.float32) if self.mixed else a @ b

    def _add_product(self, to: Tensor, a: Tensor, b: Tensor) -> None:
        if self.mixed:
            torch.addmm(to, a, b, out_dtype=torch.float32, out=to)
        else:
            to.addmm_(a, b)
