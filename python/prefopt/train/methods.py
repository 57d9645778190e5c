"""Every method in one table: its data, its loss and its rewards. Its options are in prefopt/options.py.

CONTRIBUTING.md shows how to add one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt_kernels.losses import (
    apo_zero_loss,
    bco_loss,
    cpo_loss,
    dpo_loss,
    enhanced_kto_components,
    enhanced_kto_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    simpo_loss,
)

UNPAIRED, PAIRS, ANSWERS = "unpaired rows", "pairs", "desirable answers"

# Components of the gradient, in the order in which they are switched on; the first is what remains with all others off.
COMPONENTS = ("base", "shift", "value", "weighting", "odds")
NO_BOUND = 1e9  # reward units


@dataclass(frozen=True)
class Sequences:
    """A micro-batch of B sequences; of pairs the chosen ones first, then the rejected ones in the same order."""

    logps: Tensor  # (B,) fp32, nats, policy
    ref_logps: Tensor | None  # (B,) fp32, nats, reference model; None where the method has none
    labels: Tensor  # (B,) bool
    lengths: Tensor  # (B,) int64, tokens of the completion
    tokens: Tensor | None = None  # (T,) fp32, nats, of which logps are the sums

    def first(self, n: int) -> "Sequences":
        """The first n sequences."""
        ref_logps = None if self.ref_logps is None else self.ref_logps[:n]
        return Sequences(self.logps[:n], ref_logps, self.labels[:n], self.lengths[:n])  # without tokens

    @staticmethod
    def joined(parts: "Iterable[Sequences]") -> "Sequences":
        """The concatenation of micro-batches that all have a reference model, without tokens."""
        columns = zip(*((part.logps, part.reference, part.labels, part.lengths) for part in parts), strict=True)
        return Sequences(*map(torch.cat, columns))

    @property
    def reference(self) -> Tensor:
        """``ref_logps`` of a method with a reference model."""
        assert self.ref_logps is not None
        return self.ref_logps

    @property
    def unpaired(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, reference log-probabilities and labels."""
        return self.logps, self.reference, self.labels

    @property
    def pairs(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Log-probabilities, those of the reference (empty without one) and lengths: (chosen, rejected), each (P,)."""
        ref_logps = () if self.ref_logps is None else self.ref_logps.chunk(2)
        return self.logps.chunk(2), ref_logps, self.lengths.chunk(2)


@dataclass(frozen=True)
class Baselines:
    """What the rows of an optimizer step are compared with: constants to its gradient."""

    reference_point: Tensor | float = 0.0  # 0-dim, nats
    shift: Tensor | None = None  # 0-dim, reward units, before its bound
    gate: float = 1.0  # factor on the shift
    decision_mean: Tensor | None = None  # 0-dim


Options = Any  # a PreferenceConfig, in which the options of its method are not None
LossFunction = Callable[[Sequences, Baselines, Options], Tensor]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    ``loss`` returns (R,) fp32, the loss of R unpaired rows or pairs; None for a loss that is a mean over tokens only.
    ``rewards`` returns (B,) fp32, detached; None for a method without rewards. ``components`` returns
    (len(COMPONENTS), B) fp32, 1/nats, the components of d loss / d logps; None if there is only one. ``fused`` returns
    the keyword arguments of ``sequence_loss`` for ``loss``; None if that op does not have it.
    """

    title: str
    data: str  # UNPAIRED, PAIRS or ANSWERS
    loss: LossFunction | None
    rewards: Callable[[Sequences, Options], Tensor] | None
    needs_reference: bool = True
    # the log-ratio, in nats, around which the loss is steep, if it is flat far away on both sides
    center: Callable[[Baselines, Options], Tensor | float] | None = None
    # weight of the desirable answers' negative log-likelihood, a mean over the step's tokens
    nll_weight: Callable[[Options], float] = lambda args: 0.0
    components: Callable[[Sequences, Baselines, Options], Tensor | None] | None = None
    fused: Callable[[Baselines, Options], dict[str, Any]] | None = None


def _options(args: Options, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _kto_options(baselines: Baselines, args: Options) -> dict[str, Any]:
    options = _options(args, "beta", "desirable_weight", "undesirable_weight")
    return options | {"reference_point": baselines.reference_point}


def _kto(rows: Sequences, baselines: Baselines, args: Options) -> Tensor:
    return kto_loss(*rows.unpaired, **_kto_options(baselines, args))


def _z0(baselines: Baselines, args: Options) -> Tensor | float:
    return baselines.reference_point


def _apo_zero_options(baselines: Baselines, args: Options) -> dict[str, Any]:
    return _options(args, "beta", "desirable_weight", "undesirable_weight")


def _apo_zero(rows: Sequences, baselines: Baselines, args: Options) -> Tensor:
    return apo_zero_loss(*rows.unpaired, **_apo_zero_options(baselines, args))


def _enhanced_kto(rows: Sequences, baselines: Baselines, args: Options) -> Tensor:
    return enhanced_kto_loss(*rows.unpaired, rows.lengths, **_enhanced_kto_options(baselines, args))


def _enhanced_kto_gradients(rows: Sequences, baselines: Baselines, args: Options) -> Tensor:
    found = enhanced_kto_components(*rows.unpaired, rows.lengths, **_enhanced_kto_options(baselines, args))
    return torch.stack([found.kto, found.shift, found.value, found.weighting, found.odds])


def _enhanced_kto_options(baselines: Baselines, args: Options) -> dict[str, Any]:
    options = _options(args, "beta", "desirable_weight", "undesirable_weight", "loss_aversion", "alpha", "kappa")
    options |= {
        "odds_weight": args.odds_weight,
        "reference_point": baselines.reference_point,
        "main_bound": args.main_bound or None,
        "odds_bound": args.odds_bound or None,
    }
    if args.win_weighting != "off":
        options["win_weighting"] = args.win_weighting
    if args.decision_weighting != "off":
        options |= _options(args, "decision_weighting", "decision_clip")
        options["decision_mean"] = baselines.decision_mean
    if args.shift != "off":
        options |= {"shift": baselines.shift, "shift_gate": baselines.gate}
        options["shift_bound"] = args.shift_bound or NO_BOUND
    return options


def _enhanced_center(baselines: Baselines, args: Options) -> Tensor | float:
    if args.shift == "off":
        return baselines.reference_point
    return (1 - baselines.gate) * baselines.reference_point + _gated_shift(baselines, args) / args.beta


def _bco_options(baselines: Baselines, args: Options) -> dict[str, Any]:
    return {"beta": args.beta, "shift": _gated_shift(baselines, args)}


def _bco(rows: Sequences, baselines: Baselines, args: Options) -> Tensor:
    return bco_loss(*rows.unpaired, **_bco_options(baselines, args))


def _bco_gradients(rows: Sequences, baselines: Baselines, args: Options) -> Tensor | None:
    if baselines.shift is None:
        return None
    gradients: list[Tensor] = []
    for shift in (torch.zeros_like(baselines.shift), _gated_shift(baselines, args)):
        with torch.enable_grad():
            leaf = rows.logps.detach().requires_grad_()
            loss = bco_loss(leaf, rows.reference, rows.labels, beta=args.beta, shift=shift)
            gradients += torch.autograd.grad(loss.sum(), leaf)
    base, whole = gradients
    return torch.stack([base, whole - base, *[torch.zeros_like(base)] * (len(COMPONENTS) - 2)])


def _gated_shift(baselines: Baselines, args: Options) -> Tensor | float:
    """The shift, clamped to its bound, times its gate."""
    if baselines.shift is None:
        return 0.0
    bound = args.shift_bound
    return baselines.gate * (baselines.shift.clamp(-bound, bound) if bound else baselines.shift)


def _dpo(rows: Sequences, baselines: Baselines, args: Options) -> Tensor:
    logps, ref_logps, _ = rows.pairs
    return dpo_loss(*logps, *ref_logps, **_options(args, "beta", "label_smoothing", "robust"))


def _ipo(rows: Sequences, baselines: Baselines, args: Options) -> Tensor:
    logps, ref_logps, lengths = rows.pairs
    return ipo_loss(*logps, *ref_logps, *lengths, beta=args.beta)


def _cpo(rows: Sequences, baselines: Baselines, args: Options) -> Tensor:
    (chosen, rejected), _, (length, _) = rows.pairs
    return cpo_loss(
        chosen, rejected, length, beta=args.beta, alpha=0.0
    )  # the likelihood term is a mean over tokens: nll_weight


def _simpo(rows: Sequences, baselines: Baselines, args: Options) -> Tensor:
    logps, _, lengths = rows.pairs
    return simpo_loss(*logps, *lengths, beta=args.beta, gamma=args.gamma)


def _orpo(rows: Sequences, baselines: Baselines, args: Options) -> Tensor:
    logps, _, lengths = rows.pairs
    return orpo_loss(*logps, *lengths, odds_weight=args.odds_weight)


def _log_ratio(rows: Sequences, args: Options) -> Tensor:
    return args.beta * (rows.logps - rows.reference)


def _per_token(factor: Callable[[Options], float]) -> Callable[[Sequences, Options], Tensor]:
    return lambda rows, args: factor(args) * (rows.logps / rows.lengths.clamp(min=1))


METHODS: dict[str, Method] = {
    "kto": Method("KTO", UNPAIRED, _kto, _log_ratio, center=_z0, fused=_kto_options),
    "apo_zero": Method("APO-zero", UNPAIRED, _apo_zero, _log_ratio, center=lambda *_: 0.0, fused=_apo_zero_options),
    "enhanced_kto": Method(
        "Enhanced KTO",
        UNPAIRED,
        _enhanced_kto,
        _log_ratio,
        center=_enhanced_center,
        components=_enhanced_kto_gradients,
        fused=_enhanced_kto_options,
    ),
    "bco": Method("BCO", UNPAIRED, _bco, _log_ratio, components=_bco_gradients, fused=_bco_options),
    "dpo": Method("DPO", PAIRS, _dpo, _log_ratio),
    "ipo": Method("IPO", PAIRS, _ipo, _log_ratio),
    "cpo": Method(
        "CPO",
        PAIRS,
        _cpo,
        lambda rows, args: args.beta * rows.logps,
        needs_reference=False,
        nll_weight=lambda args: args.alpha,
    ),
    "simpo": Method("SimPO", PAIRS, _simpo, _per_token(lambda args: args.beta), needs_reference=False),
    "orpo": Method("ORPO", PAIRS, _orpo, _per_token(lambda args: args.odds_weight), needs_reference=False),
    "sft": Method("SFT", ANSWERS, None, None, needs_reference=False, nll_weight=lambda args: 1.0),
}
