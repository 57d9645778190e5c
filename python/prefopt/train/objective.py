"""From log-probabilities of a micro-batch to the loss of its rows or pairs, their rewards, and what pulls on them."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from prefopt.train.config import PreferenceConfig
from prefopt.train.methods import ANSWERS
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
    sft_loss,
    simpo_loss,
)

# Parts of the gradient, in the order in which they are switched on; the first is what is left with all others off.
PULLS = ("base", "shift", "value", "weighting", "odds")
NO_BOUND = 1e9  # reward units


@dataclass(frozen=True)
class Sequences:
    """A micro-batch, one entry a sequence; of pairs the chosen ones first, then the rejected ones in the same order."""

    logps: Tensor  # (B,) fp32, nats, policy
    ref_logps: Tensor | None  # (B,) reference; None where the method has none
    labels: Tensor  # (B,) bool
    lengths: Tensor  # (B,) int64, tokens of the completion

    def first(self, n: int) -> "Sequences":
        """The first n of rated rows."""
        ref_logps = None if self.ref_logps is None else self.ref_logps[:n]
        return Sequences(self.logps[:n], ref_logps, self.labels[:n], self.lengths[:n])

    @staticmethod
    def joined(parts: "list[Sequences]") -> "Sequences":
        """One after the other, of parts that all have a reference."""
        columns = ([getattr(part, field.name) for part in parts] for field in fields(Sequences))
        return Sequences(*map(torch.cat, columns))


@dataclass(frozen=True)
class Baselines:
    """What the rows of an optimizer step are compared with: constants to its gradient."""

    reference_point: Tensor | None = None  # 0-dim, nats
    shift: Tensor | None = None  # 0-dim, reward units, before its bound
    gate: float = 1.0  # of the shift
    decision_mean: Tensor | None = None  # 0-dim


class Objective:
    """The loss of ``args.method``.

    Args:
        args: the configuration, with the method's options filled in.
    """

    def __init__(self, args: PreferenceConfig):
        self.args = args
        self.answers_alone = args.spec.data == ANSWERS
        # Weight of the likelihood per token of the desirable answers, which is a mean over the whole step's tokens.
        self.nll_weight = {"sft": 1.0, "cpo": args.alpha}.get(args.method, 0.0)

    @property
    def parts(self) -> tuple[str, ...]:
        """Which of ``PULLS`` the method has; none of a method of one part."""
        if self.args.method == "enhanced_kto":
            return PULLS
        return PULLS[:2] if (self.args.shift or "off") != "off" else ()

    def losses(self, rows: Sequences, baselines: Baselines) -> Tensor:
        """(R,) fp32 of the R rated rows or pairs: what is averaged over rows; 0 for sft, which has no such part."""
        args, beta = self.args, self.args.beta
        rated = (rows.logps, rows.ref_logps, rows.labels)
        if args.method == "kto":
            point = baselines.reference_point
            return kto_loss(*rated, beta=beta, reference_point=point, **self._class_weights())
        if args.method == "apo_zero":
            return apo_zero_loss(*rated, beta=beta, **self._class_weights())
        if args.method == "bco":
            return bco_loss(*rated, beta=beta, shift=self._moved(baselines))
        if args.method == "enhanced_kto":
            return enhanced_kto_loss(*rated, rows.lengths, **self._settings(baselines))
        if args.method == "sft":
            return torch.zeros_like(rows.logps)
        logps, lengths = rows.logps.chunk(2), rows.lengths.chunk(2)  # 2 of (P,)
        if args.method == "cpo":
            return cpo_loss(*logps, lengths[0], beta=beta, alpha=0.0)
        if args.method == "simpo":
            return simpo_loss(*logps, *lengths, beta=beta, gamma=args.gamma)
        if args.method == "orpo":
            return orpo_loss(*logps, *lengths, odds_weight=args.odds_weight)
        ref_logps = rows.ref_logps.chunk(2)
        if args.method == "ipo":
            return ipo_loss(*logps, *ref_logps, *lengths, beta=beta)
        options = {"label_smoothing": args.label_smoothing, "robust": args.robust}
        return dpo_loss(*logps, *ref_logps, beta=beta, **options)

    def nll(self, rows: Sequences, count: int) -> Tensor:
        """(R,) nats per token of each desirable answer, for ``count`` rows or pairs."""
        return sft_loss(rows.logps[:count], rows.lengths[:count])

    def rewards(self, rows: Sequences) -> Tensor | None:
        """(B,) detached: beta times the log-ratio; without a reference model, times what the loss compares; None for sft."""
        args, logps = self.args, rows.logps.detach()
        if self.answers_alone:
            return None
        if args.spec.needs_reference:
            return args.beta * (logps - rows.ref_logps)
        if args.method == "cpo":
            return args.beta * logps
        factor = args.odds_weight if args.method == "orpo" else args.beta
        return factor * (logps / rows.lengths.clamp(min=1))

    def pulls(self, rows: Sequences, baselines: Baselines) -> Tensor | None:
        """(len(PULLS), B) parts of d loss / d logps, detached; None where there is but one."""
        if self.args.method == "enhanced_kto":
            settings = self._settings(baselines)
            parts = enhanced_kto_components(rows.logps.detach(), rows.ref_logps, rows.labels, rows.lengths, **settings)
            return torch.stack([parts.kto, parts.shift, parts.value, parts.weighting, parts.odds])
        if baselines.shift is None:
            return None
        base, whole = (
            self._bco_pull(rows, shift) for shift in (torch.zeros_like(baselines.shift), self._moved(baselines))
        )
        rest = [torch.zeros_like(base)] * (len(PULLS) - 2)
        return torch.stack([base, whole - base, *rest])

    def _bco_pull(self, rows: Sequences, shift: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = rows.logps.detach().requires_grad_()
            loss = bco_loss(leaf, rows.ref_logps, rows.labels, beta=self.args.beta, shift=shift)
            return torch.autograd.grad(loss.sum(), leaf)[0]

    def _moved(self, baselines: Baselines) -> Tensor | float:
        """BCO's shift as far as it is let in."""
        if baselines.shift is None:
            return 0.0
        bound = self.args.shift_bound
        shift = baselines.shift.clamp(-bound, bound) if bound else baselines.shift
        return baselines.gate * shift

    def _class_weights(self) -> dict[str, float]:
        args = self.args
        return {
            "desirable_weight": args.desirable_weight,
            "undesirable_weight": args.undesirable_weight,
        }

    def _settings(self, baselines: Baselines) -> dict:
        """Keyword arguments of ``enhanced_kto_loss``."""
        args = self.args
        settings = self._class_weights() | {
            "beta": args.beta,
            "reference_point": baselines.reference_point,
            "loss_aversion": args.loss_aversion,
            "alpha": args.alpha,
            "kappa": args.kappa,
            "odds_weight": args.odds_weight,
            "main_bound": args.main_bound or None,
            "odds_bound": args.odds_bound or None,
        }
        if args.win_weighting != "off":
            settings["win_weighting"] = args.win_weighting
        if args.decision_weighting != "off":
            settings |= {
                "decision_weighting": args.decision_weighting,
                "decision_clip": tuple(args.decision_clip),
                "decision_mean": baselines.decision_mean,
            }
        if args.shift != "off":
            settings |= {"shift": baselines.shift, "shift_gate": baselines.gate}
            settings["shift_bound"] = args.shift_bound or NO_BOUND
        return settings
