"""Who is measured on a GPU: ours, bare GEMMs, torch's own ways, and the peers that are installed.

A variant runs one pass and returns the (T,) log-probabilities. quack has the sum of them only, so its
backward is the easier one with the same gradient for every token; it returns nothing. A KTO step returns
its loss.
"""

import importlib.util
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.variants import (
    VARIANTS,
    Inputs,
    Variant,
    all_logits,
    forward,
    forward_backward,
    gemm,
    ours,
    ours_kto,
    plain_torch,
    trl,
)

GRAD_FILTER = 2.0**-12  # what CCE takes for bf16

# The peers by the option that names them: what must be importable for each.
PEERS = {
    "torch": None,
    "compile": None,
    "torch-lce": None,
    "trl": "trl",
    "liger": "liger_kernel",
    "liger-sm90": "liger_kernel",
    "cce": "cut_cross_entropy",
    "cce-exact": "cut_cross_entropy",
    "quack": "quack",
}
# Those whose work depends on how peaked the probabilities are, and the unit: measured at planted logits too.
PEAKED = ("gemm", "ours", "ours-skip", "cce")


def absent() -> dict[str, str]:
    """The peers that cannot be measured in this environment, with the reason."""
    reasons = {
        peer: f"{module.replace('_', '-')} is not installed"
        for peer, module in PEERS.items()
        if module is not None and importlib.util.find_spec(module) is None
    }
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        reasons["torch-lce"] = f"torch {torch.__version__} has no chunked torch.nn.functional.linear_cross_entropy"
    return reasons


def gpu_variants(backend: str = "triton") -> dict[str, Variant]:
    """All variants in the order in which a group makes their first calls; ours with the named backend."""
    run = partial(ours, backend=backend)
    skip = partial(ours, backend=backend, grad_filter=GRAD_FILTER)
    of_three = {
        "ours": (run, None),
        "torch": (plain_torch, None),
        "trl": (trl, None),
        "torch-lce": (torch_lce, "torch.nn.functional.linear_cross_entropy has no softcap"),
        "liger": (liger, None),
        "liger-sm90": (liger_sm90, "Liger's SM90 kernel has no softcap"),
        "cce": (cce, None),
        "cce-exact": (partial(cce, filter_eps=None), None),
        "compile": (compiled_torch, None),
    }
    variants = [
        Variant("gemm", "gemm", gemm),
        Variant("gemm", "frozen", partial(gemms, False)),
        Variant("gemm", "trainable", partial(gemms, True)),
        Variant("ours-skip", "frozen", partial(forward_backward, skip, False)),
        Variant("ours-skip", "trainable", partial(forward_backward, skip, True)),
    ]
    for who, (logp_of, no_softcap) in of_three.items():
        variants += [
            Variant(who, passed, call, partial(_softcap_why_not, no_softcap), compiles=who == "compile")
            for passed, call in (
                ("forward", partial(forward, logp_of)),
                ("frozen", partial(forward_backward, logp_of, False)),
                ("trainable", partial(forward_backward, logp_of, True)),
            )
        ]
    variants += [
        Variant("ours", "kto-frozen", partial(ours_kto, False, backend=backend)),
        Variant("ours", "kto-trainable", partial(ours_kto, True, backend=backend)),
        VARIANTS["liger-kto-frozen"],
        VARIANTS["liger-kto-trainable"],
    ]
    no_softcap = partial(_softcap_why_not, "quack's linear_cross_entropy has no softcap")
    variants += [
        Variant("quack", "forward", quack_forward, no_softcap, compiles=True),
        Variant("quack", "frozen", partial(quack, False), no_softcap, compiles=True),
        Variant("quack", "trainable", partial(quack, True), no_softcap, compiles=True),
    ]
    return {v.who if v.who == v.passed else f"{v.who}-{v.passed}": v for v in variants}


def chosen(variants: dict[str, Variant], logits: str, peers: list[str], everything: bool) -> dict[str, Variant]:
    """The variants of a group.

    Args:
        logits: "planted" leaves PEAKED, without their forward, which has no gradient to skip.
        peers: keys of PEERS; ours and the bare GEMMs are always there.
        everything: with the KTO steps and those that compile anew at each size.
    """
    named = {"gemm", "ours", "ours-skip", *peers}

    def wanted(v: Variant) -> bool:
        extra = v.compiles or v.passed.startswith("kto")
        if v.who not in named or (extra and not everything):
            return False
        if logits == "planted":
            return v.who in PEAKED and v.passed in ("gemm", "frozen", "trainable")
        return v.who != "ours-skip"

    return {name: v for name, v in variants.items() if wanted(v)}


def gemms(trainable: bool, x: Inputs) -> None:
    """The fewest products that a pass can be made of: 2 F, with a trainable head 3 F."""
    with torch.no_grad():
        logits = x.hidden @ x.weight.T  # (T, V)
        logits @ x.weight  # noqa: B018  (the products are what is timed)
        if trainable:
            logits.T @ x.hidden  # noqa: B018  (the products are what is timed)


@cache
def _compiled():
    import torch._dynamo

    # Past the limit of 8 it would run uncompiled without a word; passes, softcap and sizes make more.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(all_logits, fullgraph=True)


def compiled_torch(x: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    return _compiled()(hidden, weight, x.targets, x.case.softcap)


def torch_lce(x: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # in chunks; without options it makes all logits
    loss = F.linear_cross_entropy(hidden, weight, x.targets, reduction="none", options=options)
    return -loss.float()


def liger(x: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    softcap = x.case.softcap
    return -liger_fused_linear_cross_entropy(hidden, weight, x.targets, reduction="none", softcap=softcap)


def liger_sm90(x: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import (
        LigerFusedScaledCrossEntropySM90Function,
    )

    temperature, ignore_index, tiles_per_cluster, entropy = 1.0, -100, 1, False
    return -LigerFusedScaledCrossEntropySM90Function.apply(
        hidden, weight, x.targets, temperature, ignore_index, tiles_per_cluster, entropy
    )


def cce(x: Inputs, hidden: Tensor, weight: Tensor, **options) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, x.targets, softcap=x.case.softcap, reduction="none", **options)


def _quack_sum(x: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, x.targets, reduction="sum")


def quack_forward(x: Inputs) -> None:
    with torch.no_grad():
        _quack_sum(x, x.hidden, x.weight)


def quack(trainable: bool, x: Inputs) -> None:
    hidden = x.hidden.detach().requires_grad_()
    _quack_sum(x, hidden, x.weight.detach().requires_grad_(trainable)).backward()


def keep_rate(x: Inputs) -> float:
    """Share of the tiles that GRAD_FILTER leaves in."""
    from prefopt_kernels.ops.linear_logprob.triton_kernels import backend as backend_triton

    return backend_triton.keep_rate(x.hidden, x.weight, x.targets, grad_filter=GRAD_FILTER, softcap=x.case.softcap)


def _softcap_why_not(reason: str | None, case: Case) -> str | None:
    return reason if case.softcap is not None else None
