"""What the tests of linear_kl share: two models' problems, their truth in fp64 and in plain torch."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from prefopt_kernels import TokenKL, linear_kl
from prefopt_kernels.ops.linear_logprob.checks import OUTPUTS
from support.linear_logprob import OPERANDS, Problem, arguments_of, formula, leaves, problem, terms_of, with_adapter
from support.numerics import assert_as_good_as_torch

DIFFERENTIABLE = ("logp", "lse", "kl", "entropy")
VALUES = ("logp", "ref_logp", "lse", "ref_lse", "kl", "entropy", "mean_logit")


@dataclass(frozen=True, eq=False)
class Pair:
    """One call of linear_kl: the policy's problem, whose ``upstream`` may name kl, and the reference model's."""

    policy: Problem
    ref: Problem
    shared: bool  # one head for both

    @property
    def counts(self) -> Tensor:
        return self.policy.targets >= 0


@lru_cache(maxsize=16)
def pair(
    family: str = "normal",
    T: int = 17,
    H: int = 65,
    V: int = 300,
    *,
    ref: str = "near",
    shared: bool = True,
    ref_H: int | None = None,
    ref_transform: str | None = None,
    rank: int = 0,
    ref_rank: int = 0,
    through: tuple[str, ...] = ("kl",),
    **options,
) -> Pair:
    """A policy's problem and a reference model "near" it, "far" from it, or the "same"; ``options`` of ``problem``."""
    policy = problem(family, T, H, V, through=through, **options)
    seed, dtype = options.get("seed", 0), policy.hidden.dtype
    other = problem(family, T, ref_H or H, V, **(options | {"seed": seed + 1000}))
    if ref_H is None and ref != "far":
        step = 0.0 if ref == "same" else 0.1
        named = {
            name: (x.float() + step * y.float().square().mean().sqrt() * y.float()).to(dtype)
            for name, x, y in (("hidden", policy.hidden, other.hidden), ("weight", policy.weight, other.weight))
            if x.numel()
        }
        other = replace(other, **named)
    other = replace(other, targets=policy.targets, upstream={})
    if ref_transform is not None:
        other = replace(other, transform=problem(family, 1, 1, 2, transform=ref_transform).transform)
    if shared or ref == "same":
        other = replace(other, weight=policy.weight if shared else policy.weight.clone(), bias=policy.bias)
    if rank:
        policy = with_adapter(policy, rank, seed=seed)
    if ref_rank:
        other = with_adapter(other, ref_rank, seed=seed + 1)
    return Pair(policy, other, shared)


@dataclass(frozen=True)
class Results:
    """Outputs, gradients by operand; of the truth also the sizes of the terms of each result."""

    outputs: TokenKL
    grads: dict[str, Tensor]
    terms: dict[str, Tensor] | None = None


def both(pair: Pair, x: dict[str, Tensor], dtype: torch.dtype) -> tuple[TokenKL, Tensor, Tensor]:
    """All outputs, and the logits of both models: the definition, on all logits at once."""
    out, z = formula(**x, **arguments_of(pair.policy))
    other, ref_z = formula(**leaves(pair.ref, (), dtype), **arguments_of(pair.ref))
    log_p, log_q = (logits.log_softmax(1) for logits in (z, ref_z))
    p = log_p.exp()
    kl = (p * torch.where(p > 0, log_p - log_q, 0)).sum(1)
    kl = torch.where(pair.counts, kl, 0)
    return TokenKL(out.logp, other.logp, out.lse, other.lse, kl, out.entropy, out.mean_logit, out.is_top1), z, ref_z


def backward(pair: Pair, outputs: TokenKL) -> None:
    sum((getattr(outputs, name) * by).sum() for name, by in pair.policy.upstream.items()).backward()


def detached(outputs: TokenKL) -> TokenKL:
    return TokenKL(*(None if value is None else value.detach() for value in outputs))


@lru_cache(maxsize=16)
def exact(pair: Pair) -> Results:
    """The truth: the formula and its derivatives in fp64."""
    x = leaves(pair.policy, tuple(pair.policy.operands), torch.float64)
    outputs, z, ref_z = both(pair, x, torch.float64)
    z.retain_grad()
    backward(pair, outputs)
    return Results(detached(outputs), {n: x[n].grad for n in x}, terms_of_kl(pair, x, z.detach(), z.grad, ref_z))


def terms_of_kl(pair: Pair, x: dict[str, Tensor], z: Tensor, dz: Tensor, ref_z: Tensor) -> dict[str, Tensor]:
    """As ``terms_of``, with those of kl = E[z - z'] - lse + lse', and of its gradient p (z - z' - E[z - z'])."""
    ref_x = leaves(pair.ref, (), torch.float64)
    ref_terms = terms_of(pair.ref, ref_x, ref_z, torch.zeros_like(ref_z))
    p, upstream = z.softmax(1), pair.policy.upstream
    size = z.abs() + ref_z.abs()
    mean = (p * size).sum(1)
    by_kl = upstream["kl"].abs() * pair.counts if "kl" in upstream else torch.zeros(len(z))
    cancels = by_kl[:, None] * p * (size + mean[:, None])
    terms = terms_of(pair.policy, x, z, dz, cancels)
    gap = z - ref_z
    gap = torch.where(p > 0, gap - (p * gap).sum(1, keepdim=True), 0)  # the rounding of z is a relative error of p
    kl = mean + (p * gap.abs() * z.abs()).sum(1) + terms["lse"] + ref_terms["lse"]
    kl = torch.where(pair.counts, kl, 0)
    return terms | {"kl": kl, "ref_logp": ref_terms["logp"], "ref_lse": ref_terms["lse"]}


@lru_cache(maxsize=16)
def baseline(pair: Pair) -> Results:
    """What plain torch makes of the operands cast up to fp32; gradients rounded once, to the operands' dtype."""
    x = leaves(pair.policy, tuple(pair.policy.operands), torch.float32)
    outputs, *_ = both(pair, x, torch.float32)
    backward(pair, outputs)
    return Results(detached(outputs), {name: x[name].grad.to(y.dtype) for name, y in pair.policy.operands.items()})


def arguments(pair: Pair, x: dict[str, Tensor]) -> dict:
    """What linear_kl takes, with ``x`` the policy's operands."""
    policy, ref = pair.policy, pair.ref
    defaults = {"logit_scale": 1.0, "softcap": None, "temperature": 1.0}
    transforms = {name: (policy.transform.get(name, by), ref.transform.get(name, by)) for name, by in defaults.items()}
    if policy.transform == ref.transform:
        transforms = policy.transform
    named = {name: x[name] for name in OPERANDS if name in x} | {"targets": policy.targets, "ref_hidden": ref.hidden}
    if not pair.shared:
        named |= {"ref_weight": ref.weight, "ref_bias": ref.bias}
    if policy.A is not None:
        named["lora"] = (x["A"], x["B"], policy.lora_scale)
    if ref.A is not None:
        named["ref_lora"] = (ref.A, ref.B, ref.lora_scale)
    return named | transforms


def ours(
    pair: Pair,
    wanted: tuple[str, ...] = (),
    backend: str = "auto",
    outputs: tuple[str, ...] = OUTPUTS,
    call=linear_kl,
    **options,
) -> Results:
    x = leaves(pair.policy, wanted)
    values = call(**arguments(pair, x), outputs=outputs, backend=backend, **options)
    if wanted:
        backward(pair, values)
    return Results(detached(values), {name: x[name].grad for name in wanted})


def check(pairs: Pair | list[Pair], results: Results | list[Results]) -> None:
    """Every value and gradient that is there, against the policy of numerics.py; small problems are judged together."""
    if isinstance(pairs, Pair):
        pairs, results = [pairs], [results]
    triples = [(r, baseline(p), exact(p)) for p, r in zip(pairs, results, strict=True)]

    def judge(name, value_of):
        made, plain, truth = (torch.cat([value_of(triple[i]).flatten() for triple in triples]) for i in range(3))
        terms = torch.cat([truth.terms[name].flatten() for *_, truth in triples])
        assert_as_good_as_torch(name, made, plain, truth, terms=terms)

    for made, (result, _, truth) in zip(pairs, triples, strict=True):
        for name, value in result.outputs._asdict().items():
            if value is not None:
                assert value.shape == made.counts.shape and not value[~made.counts].any(), name
                assert value.dtype == (torch.bool if name == "is_top1" else torch.float32), name
        if result.outputs.is_top1 is not None:
            wrong = result.outputs.is_top1 != truth.outputs.is_top1
            assert not (wrong & truth.terms["is_top1"]).any(), "is_top1"
        for name, grad in result.grads.items():
            operand = made.policy.operands[name]
            assert (grad.dtype, grad.shape) == (operand.dtype, operand.shape), f"d{name}"
        if "hidden" in result.grads:
            assert not result.grads["hidden"][~made.counts].any(), "dhidden of a row that does not count"
    for name in VALUES:
        if getattr(results[0].outputs, name) is not None:
            judge(name, lambda r, name=name: getattr(r.outputs, name))
    for name in results[0].grads:
        judge(name, lambda r, name=name: r.grads[name])


def assert_same(results: Results, expected: Results) -> None:
    """Bit for bit, in all that ``expected`` has."""
    for name, value in expected.outputs._asdict().items():
        if value is not None:
            assert torch.equal(value, getattr(results.outputs, name)), name
    for name, grad in expected.grads.items():
        assert torch.equal(grad, results.grads[name]), name
