"""The low-rank operand of the head in the Triton kernels: W + scale B A, without forming it."""

from dataclasses import replace

import pytest
import torch

from prefopt_kernels import linear_logprob
from support.linear_logprob import Results, baseline, exact, problem
from support.numerics import assert_as_good_as_torch
from support.triton_backend import TRITON_DTYPES, there

T, H, V, SCALE = 33, 72, 1000, 1.5


def adapter(rank: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(rank, H, generator=generator) / H**0.5
    B = torch.randn(V, rank, generator=generator) / rank**0.5
    return A.to(dtype), B.to(dtype)


def merged(made, A, B) -> tuple[Results, Results]:
    """Truth and plain fp32 for the head with its adapter, with gradients of A and B by the chain rule."""
    truths = []
    for judge, dtype in ((exact, torch.float64), (baseline, torch.float32)):
        a, b = A.to(dtype), B.to(dtype)
        head = made.weight.to(dtype) + SCALE * b @ a
        whole = judge(replace(made, hidden=made.hidden.to(dtype), weight=head))
        extra = {"A": SCALE * b.T @ whole.grads["weight"], "B": SCALE * whole.grads["weight"] @ a.T}
        terms = dict(whole.terms)
        if terms:
            terms["A"] = SCALE * b.abs().T @ terms["weight"]
            terms["B"] = SCALE * terms["weight"] @ a.abs().T
        truths.append(replace(whole, grads=whole.grads | extra, terms=terms))
    return tuple(truths)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("adapter_is_fp32", [True, False])
@pytest.mark.parametrize("rank", [1, 16, 37])
@pytest.mark.parametrize("trained", [("hidden", "A", "B"), ("hidden", "weight", "A", "B")], ids=str)
def test_against_the_merged_head(trained, rank, adapter_is_fp32, dtype):
    made = problem("normal", T, H, V, dtype=dtype, transform="all", through=("logp", "entropy"))
    A, B = adapter(rank, torch.float32 if adapter_is_fp32 else dtype)
    named = {"hidden": made.hidden, "weight": made.weight, "A": A, "B": B}
    x = {name: there(value).detach().clone().requires_grad_(name in trained) for name, value in named.items()}
    outputs = linear_logprob(
        x["hidden"],
        x["weight"],
        there(made.targets),
        **made.transform,
        lora=(x["A"], x["B"], SCALE),
        outputs=("entropy", "mean_logit"),
        backend="triton",
    )
    sum((getattr(outputs, name) * there(by)).sum() for name, by in made.upstream.items()).backward()
    truth, plain = merged(made, A, B)
    for name in ("logp", "lse", "entropy", "mean_logit"):
        values = [getattr(o, name).detach().cpu() for o in (outputs, plain.outputs, truth.outputs)]
        assert_as_good_as_torch(name, *values, terms=truth.terms[name])
    for name in trained:
        # The products of the gradients take operands of hidden's dtype, whatever the adapter's.
        grad, plain_grad = x[name].grad.cpu().to(dtype), plain.grads[name].to(dtype)
        assert_as_good_as_torch(f"d{name}", grad, plain_grad, truth.grads[name], terms=truth.terms[name])


def test_a_frozen_adapter_takes_the_unit_gradient():
    made = problem("normal", T, H, V)
    A, B = adapter(16, torch.float32)
    hidden = there(made.hidden).clone().requires_grad_()
    operands = (hidden, there(made.weight), there(made.targets))
    out = linear_logprob(*operands, lora=(there(A), there(B), SCALE), backend="triton")
    (out.logp * there(made.upstream["logp"])).sum().backward()
    truth, plain = merged(made, A, B)
    grads = hidden.grad.cpu(), plain.grads["hidden"], truth.grads["hidden"]
    assert_as_good_as_torch("dhidden", *grads, terms=truth.terms["hidden"])
