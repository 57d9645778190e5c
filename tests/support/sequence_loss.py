"""What the tests of sequence_loss share: problems, their truth by the textbook formulas in fp64, the backends."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from prefopt_kernels.ops.sequence_loss import SUMS, SequenceLoss, sequence_loss
from prefopt_kernels.ops.sequence_loss.op import BACKENDS
from support.numerics import assert_as_good_as_torch

BETA = 0.1
VALUE = {"loss_aversion": 2.25, "alpha": 0.88}
ODDS = {"odds_weight": 0.1, "odds_baseline": -0.5}
TK = "tversky-kahneman"
# Every method, and each component of enhanced_kto alone and together
CASES = {
    "kto": {"reference_point": 1.5},
    "kto, weights": {"reference_point": 1.5, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    "apo_zero": {"method": "apo_zero", "desirable_weight": 1.3},
    "bco": {"method": "bco", "shift": 0.4},
    "all off": {"method": "enhanced_kto", "reference_point": 1.5},
    "shift": {"shift": -0.3, "shift_gate": 0.6, "reference_point": 1.5},
    "shift at its bound": {"shift": 7.0, "shift_gate": 1.0, "shift_bound": 0.5},
    "loss aversion": {"loss_aversion": 2.25},
    "curvature": {"alpha": 0.5, "kappa": 0.3},
    "value": VALUE,
    "win weighting": {"win_weighting": TK},
    "win weighting, prelec": {"win_weighting": "prelec"},
    "decision weighting": {"decision_weighting": TK},
    "decision weighting, prelec": {"decision_weighting": "prelec", "decision_clip": (0.2, 5.0)},
    "decision mean": {"decision_weighting": TK, "decision_mean": 1.25},
    "odds": ODDS,
    "main bound": {"main_bound": 0.02, "desirable_weight": 1.3},
    "odds bound": {"odds_weight": 0.1, "odds_bound": 0.08},
    "value, win weighting": VALUE | {"win_weighting": "prelec", "main_bound": 0.03},
    "everything": {
        "reference_point": 1.5,
        "shift": 0.4,
        "shift_gate": 0.5,
        "desirable_weight": 1.3,
        "undesirable_weight": 0.7,
        "win_weighting": TK,
        "decision_weighting": TK,
        "main_bound": 0.03,
        "odds_bound": 0.2,
        **VALUE,
        **ODDS,
    },
}
SETTINGS = {
    name: {"method": "kto" if name.startswith("kto") else "enhanced_kto", "beta": BETA, **case}
    for name, case in CASES.items()
}
ENHANCED = [name for name, s in SETTINGS.items() if s["method"] == "enhanced_kto"]


def backends() -> list[str]:
    """The backends that run here, on the device that they are for."""
    return [name for name in BACKENDS if BACKENDS[name].why_not(torch.zeros(1, device=device(name))) is None]


def device(backend: str) -> str:
    """Where the tests run a backend: Triton on a GPU if there is one, else in its interpreter."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, eq=False)
class Problem:
    """The tensors of one call, and the weights of losses and logps in the sum whose gradient is compared."""

    logp: Tensor
    cu_seqlens: Tensor
    ref_logps: Tensor
    labels: Tensor
    lengths: Tensor | None
    by_loss: Tensor
    by_logps: Tensor

    def counts(self) -> Tensor:
        return self.cu_seqlens.diff() if self.lengths is None else self.lengths


@lru_cache(maxsize=16)
def problem(B: int = 60, *, longest: int = 40, lengths: bool = True, seed: int = 0) -> Problem:
    """B sequences of 1 to ``longest`` tokens, an eighth of which do not count; log-ratios of +-15 nats."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, longest + 1, (B,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), rows.cumsum(0)])
    T = int(cu_seqlens[-1])
    ends = torch.zeros(T, dtype=torch.bool)
    ends[cu_seqlens[1:] - 1] = True  # every sequence has a token that counts
    ignored = (torch.rand(T, generator=generator) < 0.125) & ~ends & lengths
    # Mean log-probabilities from -0.1 to -3, so that decision weights come from both sides of 1
    level = torch.empty(B).uniform_(-2.3, 1.1, generator=generator).exp()
    logp = -level.repeat_interleave(rows) * torch.rand(T, generator=generator) * 2 - 1e-3
    logp[ignored] = 0.0
    sums = torch.zeros(B).index_add(0, torch.arange(B).repeat_interleave(rows), logp)
    counting = torch.zeros(B, dtype=torch.int64).index_add(
        0, torch.arange(B).repeat_interleave(rows), (~ignored).long()
    )
    return Problem(
        logp,
        cu_seqlens,
        sums + 15 * torch.randn(B, generator=generator),
        torch.rand(B, generator=generator) < 0.5,
        counting if lengths else None,
        torch.randn(B, generator=generator),
        torch.randn(B, generator=generator),
    )


@dataclass(frozen=True)
class Results:
    outputs: SequenceLoss
    dlogp: Tensor | None


def ours(problem: Problem, settings: dict, backend: str, through=("losses", "logps"), call=sequence_loss) -> Results:
    """The call and the gradient of sum(by_loss losses) + sum(by_logps logps), or of the part ``through``."""
    place = device(backend)
    logp = problem.logp.to(place, copy=True).requires_grad_(bool(through))
    rows = (problem.cu_seqlens, problem.ref_logps, problem.labels, problem.lengths)
    out = call(logp, *(None if row is None else row.to(place) for row in rows), **settings, backend=backend)
    if through:
        weights = {"losses": problem.by_loss, "logps": problem.by_logps}
        sum((getattr(out, name) * weights[name].to(place)).sum() for name in through).backward()
    return Results(
        SequenceLoss(*(value.detach().cpu() for value in out)),
        logp.grad.cpu() if through else None,
    )


def weighted(p: Tensor, weighting: str | None, rest: Tensor | None = None) -> Tensor:
    """W(p); ``rest`` is 1 - p where the caller has it with more digits."""
    if weighting is None:
        return p
    if weighting == "prelec":
        return torch.exp(-((-torch.log(p)) ** 0.65))
    rest = 1 - p if rest is None else rest
    return p**0.61 / (p**0.61 + rest**0.61) ** (1 / 0.61)


def formula(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    lengths: Tensor,
    *,
    method: str,
    beta: float,
    reference_point: float = 0.0,
    shift: float = 0.0,
    shift_gate: float = 0.0,
    shift_bound: float = 10.0,
    loss_aversion: float = 1.0,
    alpha: float = 1.0,
    kappa: float = 0.1,
    win_weighting: str | None = None,
    decision_weighting: str | None = None,
    decision_clip: tuple[float, float] = (0.5, 2.0),
    decision_mean: float | None = None,
    odds_weight: float = 0.0,
    odds_baseline: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    main_bound: float = float("inf"),
    odds_bound: float = float("inf"),
) -> dict[str, Tensor]:
    """losses and slopes as textbooks write them, in the dtype of ``logps``, and the sizes of their terms.

    Good for |u| below about 15, which is what the problems have.
    """
    logps = logps.detach().requires_grad_()
    s = torch.where(labels, 1.0, -1.0).to(logps.dtype)
    r = logps - ref_logps
    zero = torch.zeros_like(r)
    weight = torch.where(labels, desirable_weight * s, -undesirable_weight * s)
    if method == "bco":
        main = torch.log(1 + torch.exp(-s * (beta * r - shift)))
        terms = main
    else:
        bounded = min(max(shift, -shift_bound), shift_bound)
        u = s * beta * (r - ((1 - shift_gate) * reference_point + shift_gate * bounded / beta))
        a = torch.sign(u) * kappa / alpha * ((1 + u.abs() / kappa) ** alpha - 1)
        win = weighted(1 / (1 + torch.exp(-a)), win_weighting, 1 / (1 + torch.exp(a)))
        even = weighted(zero + 0.5, win_weighting)
        value = (win - even) * torch.where(u >= 0, 1.0, loss_aversion)
        if decision_weighting is not None:
            c = torch.exp(logps.detach() / lengths)
            omega = (weighted(c, decision_weighting) / c).clamp(*decision_clip)
            weight = weight * omega / (omega.mean() if decision_mean is None else decision_mean)
        main = weight * ((1 - even) - value)
        terms = weight * ((1 - even) + value.abs())
    (slope,) = torch.autograd.grad(main.sum(), logps)
    slope = slope.clamp(-main_bound, main_bound)
    losses, sizes = main, slope.abs()
    if odds_weight > 0:
        c = torch.exp(logps / lengths)
        odds = odds_weight * torch.log(1 + torch.exp(-s * (torch.log(c / (1 - c)) - odds_baseline)))
        (odds_slope,) = torch.autograd.grad(odds.sum(), logps)
        odds_slope = odds_slope.clamp(-odds_bound / lengths, odds_bound / lengths)
        losses, slope = losses + odds, slope + odds_slope
        terms, sizes = terms + odds, sizes + odds_slope.abs()
    return {
        "losses": losses.detach(),
        "slopes": slope,
        "terms of losses": terms.detach(),
        "terms of slopes": sizes,
    }


def check(problem: Problem, settings: dict, results: Results, through=("losses", "logps")) -> None:
    """Every value and the gradient, against the policy of numerics.py; ``logps`` against one rounding."""
    out = results.outputs
    B = problem.ref_logps.shape[0]
    own = torch.arange(B).repeat_interleave(problem.cu_seqlens.diff())
    logp = problem.logp.double()
    exact = torch.zeros(B, dtype=torch.float64).index_add(0, own, logp)
    # fp64 sums of n terms err by n 2^-53 of the sum of their sizes; then one rounding to fp32
    sums_err = problem.logp.shape[0] * 2.0**-53 * torch.zeros(B).double().index_add(0, own, logp.abs())
    error = (out.logps.double() - exact).abs()
    assert (error <= 2.0**-24 * exact.abs() * (1 + 1e-9) + sums_err).all(), "logps"

    # From here on the logps are given: a row's numbers are functions of the fp32 sums.
    rows = (problem.labels, problem.counts())
    truth = formula(out.logps.double(), problem.ref_logps.double(), *rows, **settings)
    plain = formula(out.logps, problem.ref_logps, *rows, **settings)
    judge = assert_as_good_as_torch
    judge("losses", out.losses, plain["losses"], truth["losses"], terms=truth["terms of losses"])
    ratios = out.logps.double() - problem.ref_logps.double()
    judge("log_ratios", out.log_ratios, out.logps - problem.ref_logps, ratios)
    rewards = settings["beta"] * ratios
    judge("rewards", out.rewards, settings["beta"] * out.log_ratios, rewards)
    for label, side in (("desirable", problem.labels), ("undesirable", ~problem.labels)):
        expected = {"count": side.double(), "rewards": out.rewards, "logps": out.logps}
        for name, each in (expected | {"losses": out.losses}).items():
            got = out.sums[SUMS.index(f"{label}/{name}")]
            each = each.double()[side]
            # fp64 sums of B numbers that are known exactly
            assert (got - each.sum()).abs() <= B * 2.0**-53 * each.abs().sum(), f"{label}/{name}"
    if results.dlogp is not None:
        by_loss = problem.by_loss * ("losses" in through)
        by_logps = problem.by_logps * ("logps" in through)
        gradient = {
            name: (by_loss.to(made["slopes"].dtype) * made["slopes"] + by_logps)[own]
            for name, made in (("plain", plain), ("truth", truth))
        }
        sizes = (by_loss.abs() * truth["terms of slopes"] + by_logps.abs())[own]
        judge("dlogp", results.dlogp, gradient["plain"], gradient["truth"], terms=sizes)
