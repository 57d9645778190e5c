"""What the tests of linear_logprob share: problems, their truth in fp64 and in plain torch, the backends."""

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from prefopt_kernels import TokenLogprobs, linear_logprob
from prefopt_kernels.ops import _extension
from prefopt_kernels.ops.linear_logprob import cpu as backend_cpu
from prefopt_kernels.ops.linear_logprob.checks import FLOATS, OUTPUTS
from prefopt_kernels.ops.linear_logprob.op import RESULTS
from support.numerics import FAMILIES, assert_as_good_as_torch

DTYPES = FLOATS
OPERANDS = ("hidden", "weight", "bias")
LORA_OPERANDS = (*OPERANDS, "A", "B")
DIFFERENTIABLE = ("logp", "lse", "entropy")
TRANSFORMS = {
    "plain": {},
    "scaled": {"logit_scale": 0.37, "temperature": 1.7},
    "negative": {"logit_scale": -1.3},
    "softcap": {"softcap": 30.0},
    "all": {"logit_scale": 1.2, "softcap": 7.5, "temperature": 0.6},
}


def want_of(entropy=False, mean_logit=False, is_top1=False, unit=False, tile_max=False) -> str:
    """The custom op's ``want``."""
    flags = (True, True, entropy, mean_logit, is_top1, unit, tile_max)
    return " ".join(name for name, flag in zip(RESULTS, flags, strict=True) if flag)


def backends() -> list[str]:
    """The backends that run here, the C++ one once for each instruction set: "reference", "cpu/generic", ..."""
    if _extension.why_not() is not None:
        return ["reference"]
    return ["reference", *(f"cpu/{isa}" for isa in backend_cpu.instruction_sets())]


@dataclass(frozen=True, eq=False)
class Problem:
    """One call of linear_logprob, and the weights of the outputs in the sum whose gradients are compared."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    transform: dict
    upstream: dict[str, Tensor]
    A: Tensor | None = None  # of a low-rank adapter on the head, with B and lora_scale
    B: Tensor | None = None
    lora_scale: float = 1.0

    @property
    def operands(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in LORA_OPERANDS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@lru_cache(maxsize=16)
def problem(
    family: str = "normal",
    T: int = 17,
    H: int = 65,
    V: int = 300,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    through: tuple[str, ...] = ("logp",),
    ignored: float = 0.2,
    seed: int = 0,
    transform: str = "plain",
) -> Problem:
    """Operands of a family in ``dtype``, about ``ignored`` of the targets negative, weights for ``through``."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, targets = FAMILIES[family](T, H, V, generator)
    offset = torch.randint(-8, 9, (V,), generator=generator) / 8  # exact in every dtype
    negative = torch.tensor([-100, -1, -7])[torch.arange(T) % 3]
    targets = torch.where(torch.rand(T, generator=generator) < ignored, negative, targets)
    return Problem(
        hidden.to(dtype),
        weight.to(dtype),
        targets,
        offset.to(dtype) if bias else None,
        TRANSFORMS[transform],
        {name: torch.randn(T, generator=generator) for name in through},
    )


def with_adapter(
    made: Problem, R: int, dtype: torch.dtype | None = None, *, scale: float = 0.7, seed: int = 0
) -> Problem:
    """The problem with a rank-``R`` adapter on its head whose part of a raw logit is about a third of the head's."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, dtype = made.hidden.float(), made.weight.float(), dtype or made.hidden.dtype
    A = torch.randn(R, hidden.shape[1], generator=generator) / max(1, hidden.shape[1]) ** 0.5
    B = torch.randn(len(weight), R, generator=generator)
    head, adapter = (hidden @ x for x in (weight.T, A.T @ B.T))
    if adapter.any():
        B *= head.norm() / (3 * scale * adapter.norm())
    return replace(made, A=A.to(dtype), B=B.to(dtype), lora_scale=scale)


def adapted(
    family: str = "normal",
    T: int = 17,
    H: int = 65,
    V: int = 300,
    R: int = 5,
    *,
    adapter: torch.dtype | None = None,
    **options,
) -> Problem:
    """A problem with bias and a rank-``R`` adapter; ``adapter`` is the dtype of A and B, None for that of hidden."""
    made = problem(family, T, H, V, **{"bias": True, "through": DIFFERENTIABLE, **options})
    return with_adapter(made, R, adapter)


@dataclass(frozen=True)
class Results:
    """Outputs, gradients by operand; of the truth also the sizes of the terms of each result.

    ``terms["is_top1"]`` is True where the target is at the top, or below it, by more than fp32 can confuse.
    """

    outputs: TokenLogprobs
    grads: dict[str, Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)


def formula(
    hidden,
    weight,
    targets,
    bias=None,
    A=None,
    B=None,
    *,
    lora_scale=1.0,
    logit_scale=1.0,
    softcap=None,
    temperature=1.0,
) -> tuple[TokenLogprobs, Tensor]:
    """All outputs, and the logits z (T, V), in the operands' precision: the definition, on all logits at once."""
    z = hidden @ (weight if A is None else weight + lora_scale * (B @ A)).T
    z = logit_scale * (z if bias is None else z + bias)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    lse = torch.logsumexp(z, 1)
    log_p = z - lse[:, None]
    z_target = z[torch.arange(len(z)), targets.long().clamp(min=0)]
    values = (z_target - lse, lse, -(log_p.exp() * log_p).sum(1), z.mean(1))
    counts = targets >= 0
    values = (torch.where(counts, value, 0) for value in values)
    return TokenLogprobs(*values, counts & (z_target >= z.amax(1))), z


def backward(problem: Problem, outputs: TokenLogprobs) -> None:
    sum((getattr(outputs, name) * by).sum() for name, by in problem.upstream.items()).backward()


def leaves(problem: Problem, wanted: tuple[str, ...], dtype: torch.dtype | None = None):
    """Fresh copies of the operands; those in ``wanted`` ask for gradients."""
    copies = {name: x.to(dtype or x.dtype, copy=True) for name, x in problem.operands.items()}
    return {name: copy.requires_grad_(name in wanted) for name, copy in copies.items()}


def arguments_of(problem: Problem) -> dict:
    """What the formula takes beside the operands."""
    adapter = {} if problem.A is None else {"lora_scale": problem.lora_scale}
    return {"targets": problem.targets, **adapter, **problem.transform}


def detached(outputs: TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(*(None if value is None else value.detach() for value in outputs))


@lru_cache(maxsize=16)
def exact(problem: Problem) -> Results:
    """The truth: the formula and its derivatives in fp64."""
    x = leaves(problem, tuple(problem.operands), torch.float64)
    outputs, z = formula(**x, **arguments_of(problem))
    z.retain_grad()
    backward(problem, outputs)
    grads = {name: x[name].grad for name in x}
    return Results(detached(outputs), grads, terms_of(problem, x, z.detach(), z.grad))


def terms_of(
    problem: Problem, x: dict[str, Tensor], z: Tensor, dz: Tensor, cancels: Tensor | float = 0
) -> dict[str, Tensor]:
    """For each result the sum of the absolute values of what it is the sum of, in fp64; ``cancels``: more of dz."""
    counts = problem.targets >= 0
    size = {name: operand.detach().abs() for name, operand in x.items()}
    factor = abs(problem.transform.get("logit_scale", 1) / problem.transform.get("temperature", 1))
    head = size["weight"]
    if problem.A is not None:
        low_hidden = problem.lora_scale * (size["hidden"] @ size["A"].T)
        head = head + problem.lora_scale * (size["B"] @ size["A"])
    logits = (size["hidden"] @ head.T + size.get("bias", 0)) * factor
    p, top = z.softmax(1), z.amax(1)
    lse = top.abs() + (z.logsumexp(1) - top)
    target = z[torch.arange(len(z)), problem.targets.long().clamp(min=0)]
    outputs = {
        "logp": target.abs() + lse,  # z_y - lse
        "lse": lse,  # maximum + log of a sum
        "entropy": lse + (p * z.abs()).sum(1),  # lse - E[z]
        "mean_logit": logits.mean(1),
    }
    below = top - target
    clear = (below == 0) | (below > 4 * torch.finfo(torch.float32).eps * logits.amax(1))
    # onehot - p and log p + entropy cancel where p is near 1; exp makes the rounding of z, eps |z| / 2, a relative
    # error of p; the slope of the softcap is at most 1, and is rounded as a difference from 1.
    none = torch.zeros(())
    weights = sum(problem.upstream.get(name, none).abs() for name in ("logp", "entropy")) * counts
    dz = ((dz.abs() + weights[:, None] * p) * (1 + z.abs()) + cancels) * factor
    grads = {"hidden": dz @ head, "weight": dz.T @ size["hidden"], "bias": dz.sum(0)}
    if problem.A is not None:
        grads["A"] = problem.lora_scale * (dz @ size["B"]).T @ size["hidden"]
        grads["B"] = dz.T @ low_hidden
    outputs = {name: torch.where(counts, value, 0) for name, value in outputs.items()}
    return outputs | grads | {"is_top1": clear}


@lru_cache(maxsize=16)
def baseline(problem: Problem) -> Results:
    """What plain torch makes of the operands cast up to fp32; gradients rounded once, to the operands' dtype."""
    x = leaves(problem, tuple(problem.operands), torch.float32)
    outputs, _ = formula(**x, **arguments_of(problem))
    backward(problem, outputs)
    grads = {name: x[name].grad.to(operand.dtype) for name, operand in problem.operands.items()}
    return Results(detached(outputs), grads)


def ours(
    problem: Problem,
    wanted: tuple[str, ...] = (),
    backend: str = "auto",
    outputs: tuple[str, ...] = OUTPUTS,
    call=linear_logprob,
) -> Results:
    x = leaves(problem, wanted)
    operands = {name: x[name] for name in OPERANDS if name in x}
    if problem.A is not None:
        operands["lora"] = (x["A"], x["B"], problem.lora_scale)
    arguments = {"targets": problem.targets, **problem.transform, "outputs": outputs}
    values = call(**operands, **arguments, backend=backend)
    if wanted:
        backward(problem, values)
    return Results(detached(values), {name: x[name].grad for name in wanted})


def assert_same(results: Results, expected: Results) -> None:
    """Bit for bit, in all that ``expected`` has."""
    for name, value in expected.outputs._asdict().items():
        assert torch.equal(value, getattr(results.outputs, name)), name
    for name, grad in expected.grads.items():
        assert torch.equal(grad, results.grads[name]), name


def check(problems: Problem | list[Problem], results: Results | list[Results]) -> None:
    """Every value and gradient that is there, against the policy of numerics.py.

    Several small problems of one kind are judged together: one number alone says little about an error.
    """
    if isinstance(problems, Problem):
        problems, results = [problems], [results]
    triples = [(r, baseline(p), exact(p)) for p, r in zip(problems, results, strict=True)]

    def judge(name, value_of):
        made, plain, truth = (torch.cat([value_of(triple[i]).flatten() for triple in triples]) for i in range(3))
        terms = [triple[2].terms[name].flatten() for triple in triples if name in triple[2].terms]
        assert_as_good_as_torch(name, made, plain, truth, terms=torch.cat(terms) if terms else None)

    for problem, (result, _, truth) in zip(problems, triples, strict=True):
        ignored = problem.targets < 0
        for name, value in result.outputs._asdict().items():
            if value is None:
                continue
            assert value.shape == problem.targets.shape, name
            assert value.dtype == (torch.bool if name == "is_top1" else torch.float32), name
            assert (value[ignored] == 0).all(), f"{name} of a row that does not count"
        if result.outputs.is_top1 is not None:
            wrong = result.outputs.is_top1 != truth.outputs.is_top1
            assert not (wrong & truth.terms["is_top1"]).any(), "is_top1"
        for name, grad in result.grads.items():
            assert grad.dtype == problem.operands[name].dtype, f"d{name}"
            assert grad.shape == problem.operands[name].shape, f"d{name}"
        if "hidden" in result.grads:
            assert (result.grads["hidden"][ignored] == 0).all(), "dhidden of a row that does not count"
    for name in ("logp", "lse", "entropy", "mean_logit"):
        if getattr(results[0].outputs, name) is not None:
            judge(name, lambda r, name=name: getattr(r.outputs, name))
    for name in results[0].grads:
        judge(name, lambda r, name=name: r.grads[name])


def through_logp(**arguments) -> TokenLogprobs:
    """What a training step takes: a gradient through logp, numbers to log from the rest.

    An output that a compiled function returns with a gradient gets one, zeros if need be, and then the gradient that
    the forward has made for a frozen head does not do: the backward recomputes.
    """
    out = linear_logprob(**arguments)  # torch 2.11 does not trace _replace
    return TokenLogprobs(out.logp, out.lse.detach(), out.entropy.detach(), *out[3:])
