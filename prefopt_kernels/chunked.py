"""Gradients of a trainable head in three products with it instead of four.

The op computes the logits twice, because d loss / d logp comes only after every log-probability is known. Where
the loss of a sequence depends on that sequence alone, it is known as soon as the sequence's logits are: a chunk
of whole sequences goes from logits to loss and, in the same memory, to the gradients of hidden states and head
before the next chunk begins. The gradients wait in the graph for the one number that is still missing, the
gradient that reaches the reduced loss. Plain torch on any device; modules.py decides who takes this path.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prefopt_kernels.ops.linear_logprob import TokenLogprobs
from prefopt_kernels.ops.linear_logprob.transform import Transform

# of a chunk's fp32 logits
CHUNK_BYTES = 256 * 2**20

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

    Memory beside the results: twice the fp32 logits of a chunk (three times with a softcap); the head's gradient
    in fp32, in which it is summed; outside CUDA also the head in fp32. A sequence that is longer than a chunk is
    taken in parts whose logits are computed twice. Waits for the device once, to read where the sequences end.

    Args:
        hidden, weight, bias, targets: as :func:`prefopt_kernels.linear_logprob`.
        cu_seqlens: (B + 1,) row at which each sequence begins, and T last.
        loss_of: from logp (n,) of the tokens that count, their ``cu_seqlens`` and the slice of sequences, to
            the losses of these; differentiable in logp, each loss a function of its own tokens.
        transform: of the logits.
        outputs: as :func:`prefopt_kernels.linear_logprob`.
        chunk_bytes: of the fp32 logits of a chunk.

    Returns:
        What ``linear_logprob`` returns, and the gradients of ``hidden``, ``weight`` and ``bias`` in their dtypes,
        None for what asks for none.
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
            upstream = _gradient(loss_of, torch.cat(logp), inside, slice(first, last))
            for part, by in zip(parts, upstream.split(limit), strict=True):
                if len(parts) > 1:
                    head.softmax(part)
                head.add_gradients(part, by)
        return head.tokens(), head.gradients()


class PrecomputedGradients(torch.autograd.Function):
    """``value``, whose gradients are known: the backward multiplies them by what reaches it."""

    @staticmethod
    def forward(ctx, value: Tensor, grads: tuple[Tensor | None, ...], *operands):
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dvalue):
        scaled = (None if grad is None else grad * dvalue for grad in ctx.saved_tensors)
        return (None, None, *scaled)


def _chunks(ends: list[int], limit: int):
    """Ranges (first, last) of sequences with at most ``limit`` tokens that count; a longer sequence comes alone."""
    first, B = 0, len(ends) - 1
    while first < B:
        last = first + 1
        while last < B and ends[last + 1] - ends[first] <= limit:
            last += 1
        if ends[last] > ends[first]:
            yield first, last
        first = last


def _gradient(loss_of: RowLoss, logp: Tensor, bounds: Tensor, sequences: slice) -> Tensor:
    """(n,) d loss / d logp."""
    with torch.enable_grad():
        logp = logp.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(logp, bounds, sequences).sum(), logp)
    return grad


class _Head:
    """One call's products with the head, and what they are added to."""

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
        self.dtypes = {
            name: operand.dtype for name, operand in operands.items() if operand is not None and operand.requires_grad
        }
        # CUDA multiplies bf16 with sums and results in fp32; elsewhere torch has no such product
        self.mixed = hidden.is_cuda and hidden.dtype != torch.float32
        self.dtype = hidden.dtype if self.mixed else torch.float32  # of the products' operands
        self.hidden, self.weight = hidden, weight.to(self.dtype)
        self.bias = None if bias is None else bias.float()
        self.targets, self.transform = targets, transform
        self.values = {
            name: hidden.new_zeros(hidden.shape[0], dtype=torch.float32) for name in ("logp", "lse", *outputs)
        }
        self.grads = {
            name: torch.zeros(
                operands[name].shape,
                dtype=dtype if name == "hidden" else torch.float32,
                device=hidden.device,
            )
            for name, dtype in self.dtypes.items()
        }

    def softmax(self, rows: Tensor) -> Tensor:
        """(n,) logp; keeps for the gradients what :meth:`add_gradients` takes of these rows."""
        self.p = None  # the last part's memory, before the next one's logits are made
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
            # p is 0 long before: the bound keeps 0 * -inf out
            values["entropy"] = -z.sub_(lse[:, None]).clamp_(min=-1000).mul_(self.p).sum(1)
        for name, out in self.values.items():
            out[rows] = values[name]
        return self.logp

    def add_gradients(self, rows: Tensor, upstream: Tensor) -> None:
        """Adds the products of the raw logits' gradient; ``rows`` are those of the last softmax."""
        p, self.p = self.p, None
        target = self.targets[rows, None].long()
        # The target's own term in fp32, apart: where p is near 1, onehot - p rounded later would be rounding
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
        # one pass over p, rounded as it is written
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
        """Rounded once, to the operands' dtypes."""
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
