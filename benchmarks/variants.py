"""The implementations that are compared, on the same inputs.

A variant runs one pass over the inputs. It returns the (T,) log-probabilities, or the 0-dim loss of a KTO step, or None
(the bare GEMMs, and quack, which only has the sum of the log-probabilities).
"""

import importlib.util
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import DTYPES, KL_PASSES, KTO_PASSES, PASSES, Case
from prefopt_kernels import linear_kl, linear_logprob
from prefopt_kernels.modules import FusedLinearKTOLoss

BETA = 0.1
SEQUENCE = 256  # tokens in each of the KTO step's sequences
TRL_VOCABULARY_CHUNK = 32_768  # what TRL's trainers pass
GRAD_FILTER = 2.0**-12  # CCE's default for bf16
TILE = 128  # tokens and vocabulary columns of a tile of planted logits


@dataclass(frozen=True)
class Inputs:
    """Inputs of a variant. Head weights are normal with standard deviation 0.02."""

    case: Case
    hidden: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (T,)
    dlogp: Tensor  # (T,) fp32, upstream gradient
    ref_hidden: Tensor  # (T, H), of the KTO step's reference model, which shares the head
    labels: Tensor  # (B,)

    @property
    def B(self) -> int:
        return self.labels.shape[0]


def sequences(T: int) -> int:
    """B, the number of sequences that the KTO step makes of T tokens."""
    B = max(2, T // SEQUENCE)
    if T < 1 or T % B:
        raise ValueError(f"T is {T}; expected a positive multiple of {B}, the number of sequences")
    return B


def make_inputs(
    case: Case,
    T: int,
    dtype: str,
    seed: int = 0,
    *,
    device: str = "cpu",
    logits: str = "random",
) -> Inputs:
    """Draw the inputs, the same ones for the same arguments; ``logits`` is "random" or "planted" (:func:`planted`)."""
    generator = torch.Generator(device).manual_seed(seed)
    randn = partial(torch.randn, generator=generator, device=device)
    B = sequences(T)
    hidden = randn(T, case.H).to(DTYPES[dtype])
    weight = randn(case.V, case.H).mul_(0.02).to(DTYPES[dtype])
    targets = torch.randint(case.V, (T,), generator=generator, device=device)
    if logits == "planted":
        hidden, targets = planted(T, weight, generator)
    return Inputs(
        case=case,
        hidden=hidden,
        weight=weight,
        targets=targets,
        dlogp=randn(T),
        ref_hidden=randn(T, case.H).to(DTYPES[dtype]),
        labels=torch.arange(B, device=device) % 2 == 0,
    )


def planted(T: int, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hidden states with peaked distributions, as in a trained model, and targets among the likely tokens.

    Every block of TILE tokens has its likely tokens in a fifth of the vocabulary's tiles, with at least one in each of
    them. All other probabilities are below 1e-4 (for H of 960 and more), so a kernel can skip the other tiles.
    """
    (V, _), device = weight.shape, weight.device
    tiles = V // TILE
    live = max(1, tiles // 5)
    likely = math.ceil(live / TILE)  # likely tokens for each hidden state
    blocks = math.ceil(T / TILE)
    order = torch.rand(blocks, tiles, generator=generator, device=device).argsort(1)[:, :live]
    turn = torch.arange(TILE * likely, device=device) % live
    columns = TILE * order[:, turn].view(blocks * TILE, likely)[:T]  # (T, likely)
    columns += torch.randint(TILE, (T, likely), generator=generator, device=device)
    hidden = torch.zeros(T, weight.shape[1], device=device)
    for i in range(likely):
        row = weight[columns[:, i]].float()
        # along the i-th token's row of the head, so that its logit is 24 - i / 2 and noise
        hidden += (24 - 0.5 * i) * row / row.square().sum(1, keepdim=True)
    return hidden.to(weight.dtype), columns[:, 0].contiguous()


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@cache
def _compiled():
    import torch._dynamo

    # Passes, softcap and sizes need more than the default limit of 8, past which dynamo silently runs uncompiled.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(all_logits, fullgraph=True)


# Log-probabilities of each implementation: (inputs, hidden (T, H), weight (V, H)) -> (T,)


def ours(x: Inputs, hidden: Tensor, weight: Tensor, **options) -> Tensor:
    return linear_logprob(hidden, weight, x.targets, softcap=x.case.softcap, **options).logp


def plain_torch(x: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    return all_logits(hidden, weight, x.targets, x.case.softcap)


def compiled_torch(x: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    return _compiled()(hidden, weight, x.targets, x.case.softcap)


def torch_lce(x: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # chunked; without options all logits are materialised
    loss = F.linear_cross_entropy(hidden, weight, x.targets, reduction="none", options=options)
    return -loss.float()


def trl(x: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    temperature, scale, outputs = 1.0, 1.0, ()
    return ChunkedLogProbFunction.apply(
        *(hidden, weight, None, x.targets, temperature, TRL_VOCABULARY_CHUNK, x.case.softcap, scale, outputs)
    )[0]


def liger(x: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    softcap = x.case.softcap
    return -liger_fused_linear_cross_entropy(hidden, weight, x.targets, reduction="none", softcap=softcap)


def liger_sm90(x: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    temperature, ignore_index, tiles_per_cluster, entropy = 1.0, -100, 1, False
    return -LigerFusedScaledCrossEntropySM90Function.apply(
        hidden, weight, x.targets, temperature, ignore_index, tiles_per_cluster, entropy
    )


def cce(x: Inputs, hidden: Tensor, weight: Tensor, **options) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, x.targets, softcap=x.case.softcap, reduction="none", **options)


# Passes


def gemm(x: Inputs) -> None:
    with torch.no_grad():
        x.hidden @ x.weight.T  # noqa: B018  (the product is what is timed)


def gemms(trainable: bool, x: Inputs) -> None:
    """The fewest products of a forward and backward pass: 2, or 3 with a trainable head."""
    with torch.no_grad():
        logits = x.hidden @ x.weight.T  # (T, V)
        logits @ x.weight  # noqa: B018
        if trainable:
            logits.T @ x.hidden  # noqa: B018


def forward(logp_of: Callable, x: Inputs) -> Tensor:
    with torch.no_grad():
        return logp_of(x, x.hidden, x.weight)


def forward_backward(logp_of: Callable, trainable: bool, x: Inputs) -> Tensor:
    hidden = x.hidden.detach().requires_grad_()
    weight = x.weight.detach().requires_grad_(trainable)
    logp = logp_of(x, hidden, weight)
    logp.backward(x.dlogp)
    return logp.detach()


def quack(passed: str, x: Inputs) -> None:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    backward = passed != "forward"
    hidden = x.hidden.detach().requires_grad_(backward)
    weight = x.weight.detach().requires_grad_(passed == "trainable")
    with torch.set_grad_enabled(backward):
        loss = chunked_linear_cross_entropy(hidden, weight, x.targets, reduction="sum")
    if backward:
        loss.backward()


def ours_kto(trainable: bool, x: Inputs, **options) -> Tensor:
    module = FusedLinearKTOLoss(beta=BETA, softcap=x.case.softcap, **options)
    T, device = x.hidden.shape[0], x.hidden.device
    loss, _ = module(
        x.hidden.detach().requires_grad_(),
        x.weight.detach().requires_grad_(trainable),
        x.targets,
        torch.arange(0, T + 1, T // x.B, device=device),
        x.labels,
        ref_hidden=x.ref_hidden,
        ref_weight=x.weight,
        reference_point=torch.full((), 0.5, device=device),
    )
    loss.backward()
    return loss.detach()


def liger_kto(trainable: bool, x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    loss, _ = LigerFusedLinearKTOLoss(beta=BETA, use_ref_model=True)(
        x.hidden.detach().view(x.B, -1, x.case.H).requires_grad_(),
        x.weight.detach().requires_grad_(trainable),
        x.targets.view(x.B, -1),
        preference_labels=x.labels,
        ref_input=x.ref_hidden.view(x.B, -1, x.case.H),
        ref_weight=x.weight,
        kl=torch.full((), 0.5, device=x.hidden.device),
    )
    loss.backward()
    return loss.detach()


# The KL between the two models of the KTO step, which share the head: (T,) in nats, or None where it is not computed.


def kl_leaves(x: Inputs, passed: str) -> tuple[Tensor, Tensor]:
    """Hidden states and head, with the gradients that a pass of KL_PASSES takes."""
    hidden = x.hidden.detach().requires_grad_(passed != "kl-forward")
    return hidden, x.weight.detach().requires_grad_(passed == "kl-trainable")


def ours_kl(passed: str, x: Inputs) -> Tensor:
    hidden, weight = kl_leaves(x, passed)
    keep = passed == "kl-logp"
    out = linear_kl(hidden, weight, x.targets, x.ref_hidden, softcap=x.case.softcap, keep_unit=keep)
    if passed != "kl-forward":
        (out.logp if passed == "kl-logp" else out.kl).backward(x.dlogp)
    return out.kl.detach()


def two_calls(passed: str, x: Inputs) -> None:
    """The log-probabilities of both models alone: the products of linear_kl, without the KL."""
    hidden, weight = kl_leaves(x, passed)
    logp = linear_logprob(hidden, weight, x.targets, softcap=x.case.softcap).logp
    linear_logprob(x.ref_hidden, x.weight, x.targets, softcap=x.case.softcap)
    if passed != "kl-forward":
        logp.backward(x.dlogp)


def torch_kl(passed: str, x: Inputs) -> Tensor:
    hidden, weight = kl_leaves(x, passed)

    def log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        return (logits if x.case.softcap is None else x.case.softcap * torch.tanh(logits / x.case.softcap)).log_softmax(
            -1
        )

    log_p = log_softmax(hidden, weight)
    with torch.no_grad():
        log_q = log_softmax(x.ref_hidden, x.weight)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if passed != "kl-forward":
        (log_p.gather(-1, x.targets[:, None]).squeeze(-1) if passed == "kl-logp" else kl).backward(x.dlogp)
    return kl.detach()


def liger_kl(passed: str, x: Inputs) -> None:
    """The sum of the KL alone, whose gradients Liger computes in its forward: one upstream gradient for all tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    hidden, weight = kl_leaves(x, passed)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    loss(hidden, weight, x.ref_hidden, x.weight, x.targets).backward()


@dataclass(frozen=True)
class Variant:
    """One implementation at one pass."""

    who: str
    passed: str  # one of cases.PASSES, cases.KTO_PASSES or cases.KL_PASSES, or "gemm"
    run: Callable[[Inputs], Tensor | None]
    no_softcap: str | None = None  # what has no softcap, as the start of a sentence
    bytes_per_logit: int = 0  # memory that grows with T x V, in fp32; checked against the free memory beforehand
    compiles: bool = False  # compiles at the first call of each size, so memory is measured at the second

    @property
    def name(self) -> str:
        return self.who if self.who == self.passed else f"{self.who}-{self.passed}"

    def why_not(self, case: Case, T: int = 0, available_bytes: float = math.inf) -> str | None:
        """Why the variant cannot run here; None if it can."""
        needed = self.bytes_per_logit * T * case.V
        if needed > 0.9 * available_bytes:
            return f"needs about {needed / 1e9:.1f} GB, {available_bytes / 1e9:.1f} GB are free"
        if self.no_softcap and case.softcap is not None:
            return f"{self.no_softcap} has no softcap"
        reason = PEERS[self.who]() if self.who in PEERS else None
        if reason is None and self.who == "liger" and self.passed in KTO_PASSES:
            if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
                return "Liger's KTO loss is compiled by torch.compile, and no C++ compiler was found"
        return reason


def _installed(package: str) -> Callable[[], str | None]:
    """A check that returns why a package cannot be used."""
    return lambda: None if importlib.util.find_spec(package) else f"{package.replace('_', '-')} is not installed"


def _torch_lce_why_not() -> str | None:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked torch.nn.functional.linear_cross_entropy"


# The peers by the name of their option, and why they cannot be measured in this environment.
PEERS: dict[str, Callable[[], str | None]] = {
    "torch": lambda: None,
    "compile": lambda: None,
    "torch-lce": _torch_lce_why_not,
    "trl": _installed("trl"),
    "liger": _installed("liger_kernel"),
    "liger-sm90": _installed("liger_kernel"),
    "cce": _installed("cut_cross_entropy"),
    "cce-exact": _installed("cut_cross_entropy"),
    "quack": _installed("quack"),
}


def three_passes(who: str, logp_of: Callable, no_softcap: str | None = None, **fields) -> list[Variant]:
    """The variants of one implementation: forward, and forward and backward with the head frozen and trainable."""
    runs = (
        partial(forward, logp_of),
        partial(forward_backward, logp_of, False),
        partial(forward_backward, logp_of, True),
    )
    return [Variant(who, passed, run, no_softcap, **fields) for passed, run in zip(PASSES, runs, strict=True)]


def kto_steps(**options) -> list[Variant]:
    """Our KTO step beside Liger's."""
    return [
        variant
        for trainable, passed in enumerate(KTO_PASSES)
        for variant in (
            Variant("ours", passed, partial(ours_kto, bool(trainable), **options)),
            Variant("liger", passed, partial(liger_kto, bool(trainable)), "Liger's KTO loss", compiles=True),
        )
    ]


def cpu_variants() -> dict[str, Variant]:
    """What `make bench` measures."""
    torch_forward, *torch_backward = three_passes("torch", plain_torch)
    variants = [
        Variant("gemm", "gemm", gemm, bytes_per_logit=4),
        *three_passes("ours", ours),
        replace(torch_forward, bytes_per_logit=8),
        *(replace(variant, bytes_per_logit=16) for variant in torch_backward),
        *three_passes("trl", trl),
        *kto_steps(),
    ]
    return {variant.name: variant for variant in variants}


def kl_variants() -> dict[str, Variant]:
    """What `python -m benchmarks.measure_cpu --op linear_kl` measures."""
    variants = [
        Variant("gemm", "gemm", gemm, bytes_per_logit=4),
        *(Variant("ours", passed, partial(ours_kl, passed)) for passed in KL_PASSES),
        *(Variant("two-calls", passed, partial(two_calls, passed)) for passed in KL_PASSES[:2]),
        *(Variant("torch", passed, partial(torch_kl, passed), bytes_per_logit=24) for passed in KL_PASSES),
        *(Variant("liger", p, partial(liger_kl, p), "Liger's JSD loss", compiles=True) for p in KL_PASSES[2:]),
    ]
    return {variant.name: variant for variant in variants}


def gpu_variants(backend: str = "triton") -> dict[str, Variant]:
    """What the GPU benchmark measures, in the order of first calls; ours with the named backend."""
    skip = partial(ours, backend=backend, grad_filter=GRAD_FILTER)
    variants = [
        Variant("gemm", "gemm", gemm),
        Variant("gemm", "frozen", partial(gemms, False)),
        Variant("gemm", "trainable", partial(gemms, True)),
        *three_passes("ours-skip", skip)[1:],
        *three_passes("ours", partial(ours, backend=backend)),
        *three_passes("torch", plain_torch),
        *three_passes("trl", trl),
        *three_passes("torch-lce", torch_lce, "torch.nn.functional.linear_cross_entropy"),
        *three_passes("liger", liger),
        *three_passes("liger-sm90", liger_sm90, "Liger's SM90 kernel"),
        *three_passes("cce", cce),
        *three_passes("cce-exact", partial(cce, filter_eps=None)),
        *three_passes("compile", compiled_torch, compiles=True),
        *kto_steps(backend=backend),
        *(
            Variant("quack", passed, partial(quack, passed), "quack's linear_cross_entropy", compiles=True)
            for passed in PASSES
        ),
    ]
    return {variant.name: variant for variant in variants}


def gpu_group(variants: dict[str, Variant], logits: str, peers: list[str], everything: bool) -> dict[str, Variant]:
    """The variants of one (case, T, logits).

    Args:
        variants: of :func:`gpu_variants`.
        logits: with "planted" only those whose work depends on the probabilities, in passes with a backward.
        peers: keys of PEERS; ours and the bare GEMMs are always included.
        everything: include the KTO steps and the variants that compile for each size.
    """

    def included(variant: Variant) -> bool:
        if variant.who not in ("gemm", "ours", "ours-skip", *peers):
            return False
        if not everything and (variant.compiles or variant.passed in KTO_PASSES):
            return False
        if logits == "planted":
            return variant.who in ("gemm", "ours", "ours-skip", "cce") and variant.passed in ("gemm", *PASSES[1:])
        return variant.who != "ours-skip"

    return {name: variant for name, variant in variants.items() if included(variant)}
