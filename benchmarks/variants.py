"""Who is measured, doing what: ours, plain torch, TRL and Liger, on the same inputs.

A variant runs one pass over the inputs and returns the (T,) log-probabilities, a KTO step the 0-dim loss.
"""

import importlib.util
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Case
from prefopt_kernels import linear_logprob
from prefopt_kernels.modules import FusedLinearKTOLoss

BETA = 0.1
SEQUENCE = 256  # tokens in each of the KTO step's sequences
TRL_VOCABULARY_CHUNK = 32_768  # what TRL's trainers pass
TILE = 128  # tokens and vocabulary columns of a tile of planted logits


@dataclass(frozen=True)
class Inputs:
    """What every variant reads. The head has standard deviation 0.02, as one is initialised.

    Hidden states are standard normal ("random" logits), or :func:`planted`.
    """

    case: Case
    hidden: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (T,)
    dlogp: Tensor  # (T,) fp32, an arbitrary upstream gradient
    ref_hidden: Tensor  # (T, H), of the KTO step's reference model, which shares the head
    labels: Tensor  # (B,)

    @property
    def B(self) -> int:
        return self.labels.shape[0]


def sequences(T: int) -> int:
    """B, the number of sequences that the KTO step makes of T tokens."""
    B = max(2, T // SEQUENCE)
    if T % B:
        raise ValueError(f"T is {T}; expected a multiple of {B}, the number of sequences")
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
    """The same numbers for the same arguments, in any process; ``logits`` is "random" or "planted"."""
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
    """Hidden states with a few likely tokens each, in a fifth of the tiles, and targets among them.

    A trained model's tokens are like this, and a kernel may then leave out most of the work: every block of
    TILE tokens has its likely tokens in a fifth of the vocabulary's tiles, each of them hit, and anywhere
    else a probability is below 1e-4 (heads of H 960 and more).
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


def ours(x: Inputs, hidden: Tensor, weight: Tensor, **options) -> Tensor:
    return linear_logprob(hidden, weight, x.targets, softcap=x.case.softcap, **options).logp


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def plain_torch(x: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    return all_logits(hidden, weight, x.targets, x.case.softcap)


def trl(x: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    temperature, scale, outputs = 1.0, 1.0, ()
    return ChunkedLogProbFunction.apply(
        hidden,
        weight,
        None,
        x.targets,
        temperature,
        TRL_VOCABULARY_CHUNK,
        x.case.softcap,
        scale,
        outputs,
    )[0]


def gemm(x: Inputs) -> None:
    with torch.no_grad():
        x.hidden @ x.weight.T  # noqa: B018  (the product is what is timed)


def forward(logp_of: Callable, x: Inputs) -> Tensor:
    with torch.no_grad():
        return logp_of(x, x.hidden, x.weight)


def forward_backward(logp_of: Callable, trainable: bool, x: Inputs) -> Tensor:
    hidden = x.hidden.detach().requires_grad_()
    weight = x.weight.detach().requires_grad_(trainable)
    logp = logp_of(x, hidden, weight)
    logp.backward(x.dlogp)
    return logp.detach()


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


def _always(case: Case) -> None:
    return None


def _trl_why_not(case: Case) -> str | None:
    return None if importlib.util.find_spec("trl") else "trl is not installed"


def _liger_why_not(case: Case) -> str | None:
    if not importlib.util.find_spec("liger_kernel"):
        return "liger-kernel is not installed"
    if case.softcap is not None:
        return "Liger's KTO loss has no softcap"
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        return "Liger's KTO loss is compiled by torch.compile, and no C++ compiler was found"
    return None


@dataclass(frozen=True)
class Variant:
    """One competitor at one pass."""

    who: str
    passed: str  # one of cases.PASSES, or "gemm"
    run: Callable[[Inputs], Tensor | None]
    why_not: Callable[[Case], str | None] = _always
    bytes_per_logit: int = 0  # of memory that grows with T x V, in fp32; to refuse before it is too late
    compiles: bool = False  # the first call at a size compiles, so memory is measured at the second


VARIANTS = {
    f"{variant.who}-{variant.passed}" if variant.who != variant.passed else variant.who: variant
    for variant in (
        Variant("gemm", "gemm", gemm, bytes_per_logit=4),
        Variant("ours", "forward", partial(forward, ours)),
        Variant("ours", "frozen", partial(forward_backward, ours, False)),
        Variant("ours", "trainable", partial(forward_backward, ours, True)),
        Variant("torch", "forward", partial(forward, plain_torch), bytes_per_logit=8),
        Variant("torch", "frozen", partial(forward_backward, plain_torch, False), bytes_per_logit=16),
        Variant("torch", "trainable", partial(forward_backward, plain_torch, True), bytes_per_logit=16),
        Variant("trl", "forward", partial(forward, trl), _trl_why_not),
        Variant("trl", "frozen", partial(forward_backward, trl, False), _trl_why_not),
        Variant("trl", "trainable", partial(forward_backward, trl, True), _trl_why_not),
        Variant("ours", "kto-frozen", partial(ours_kto, False)),
        Variant("liger", "kto-frozen", partial(liger_kto, False), _liger_why_not, compiles=True),
        Variant("ours", "kto-trainable", partial(ours_kto, True)),
        Variant("liger", "kto-trainable", partial(liger_kto, True), _liger_why_not, compiles=True),
    )
}


def why_not(variant: Variant, case: Case, T: int, available_bytes: int) -> str | None:
    """Why this machine cannot run the variant; None where it can."""
    needed = variant.bytes_per_logit * T * case.V
    if needed > 0.9 * available_bytes:
        return f"needs about {needed / 1e9:.1f} GB, {available_bytes / 1e9:.1f} GB are free"
    return variant.why_not(case)
