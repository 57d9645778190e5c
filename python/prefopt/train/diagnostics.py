"""Warnings about a run, each with its reason and its remedy, once each."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass

SATURATED_REWARD = 10.0  # sigmoid'(10) is 5e-5: such a row has next to no gradient left
KL_LOGS = 20  # logs in a row, and optimizer steps, for which the reference point may be 0
FLAT_MARGIN = 1e-3  # reward units; sampling noise of the margin is far above it once anything is learnt
WEIGHT_RANGE = (1.0, 4 / 3)  # arXiv:2402.01306, eq. 8
NO_PARTNER_SHARE = 0.5
LOST = 0.25  # nats per token that desirable answers have lost against the reference model
LESS_LIKELY = 0.1  # likewise, where they have only fallen
MARGIN = 0.01  # reward units
ENTROPY_MOVED = (0.5, 0.25)  # nats, and share of the entropy at the start: the larger of the two
MOSTLY_FLAT = 0.5  # share of rows


class TrainingWarning(UserWarning):
    """The run will probably not train as intended."""


def collapse_signs(lost: float, entropy: float, start: float, flat: float) -> list[str]:
    """What shows that a model has collapsed; empty unless desirable answers fell far and another sign is there.

    Args:
        lost: nats per token that desirable answers have lost against the reference model.
        entropy, start: per token, now and at the start, nats.
        flat: share of rows with almost no gradient left.

    Example:
        >>> collapse_signs(0.36, entropy=2.5, start=1.88, flat=0.1)
        ['desirable answers lost 0.36 nats per token', 'the entropy went from 1.88 to 2.50 nats']
    """
    signs = [f"the entropy went from {start:.2f} to {entropy:.2f} nats"] if _moved(entropy, start) else []
    signs += [f"{100 * flat:.0f} % of the rows have almost no gradient left"] if flat > MOSTLY_FLAT else []
    return [f"desirable answers lost {lost:.2f} nats per token", *signs] if lost > LOST and signs else []


def _moved(entropy: float, start: float) -> bool:
    return abs(entropy - start) > max(ENTROPY_MOVED[0], ENTROPY_MOVED[1] * start)


@dataclass(frozen=True)
class Finding:
    """One diagnosis, as run.json keeps it."""

    name: str
    step: int
    reason: str
    remedy: str


class Diagnostics:
    """Watches the logged values; counters and findings are part of the checkpoint.

    Args:
        max_steps: of the run.
        fades: whether the gradient of a row that is very wrong goes to 0.

    Example:
        >>> import warnings
        >>> diagnostics = Diagnostics(max_steps=100)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     diagnostics.observe(7, {"rewards/chosen": -31.0, "rewards/rejected": -40.0})
        >>> diagnostics.findings[0].name
        'exploding_rewards'
    """

    def __init__(self, max_steps: int = 0, fades: bool = True):
        self.max_steps = max_steps
        self.fades = fades
        self.findings: list[Finding] = []
        self.zero_kl_logs = 0
        self.zero_kl_since: int | None = None
        self.still_logs = 0
        self.start_entropy: float | None = None
        self.last_sound_step = 0

    def state_dict(self) -> dict:
        """JSON-ready."""
        return vars(self) | {"findings": [asdict(finding) for finding in self.findings]}

    def load_state_dict(self, state: Mapping) -> None:
        """Continue from ``state_dict``, with this run's own ``max_steps``."""
        vars(self).update(state, max_steps=self.max_steps, fades=self.fades)
        self.findings = [Finding(**finding) for finding in state["findings"]]

    def add(self, name: str, step: int, reason: str, remedy: str) -> None:
        """Warn, and remember; a name is reported once."""
        if any(finding.name == name for finding in self.findings):
            return
        self.findings.append(Finding(name, step, reason, remedy))
        warnings.warn(f"step {step}: {reason}. {remedy}.", TrainingWarning, stacklevel=3)

    def observe_data(
        self, desirable: int, undesirable: int, desirable_weight: float, undesirable_weight: float
    ) -> None:
        """Before the first step: both labels there, and their weights in proportion."""
        if not desirable or not undesirable:
            missing = "undesirable" if desirable else "desirable"
            self.add(
                "one_class",
                0,
                f"The training data have no {missing} rows, so the loss only pushes likelihoods "
                f"{'up' if desirable else 'down'}",
                "Add rows of the other label; with desirable answers alone, method sft does the same for less",
            )
            return
        balance = desirable * desirable_weight / max(undesirable * undesirable_weight, 1e-12)
        low, high = WEIGHT_RANGE
        if not 0.95 * low <= balance <= 1.05 * high:
            suggested = undesirable * undesirable_weight / desirable
            self.add(
                "class_weights",
                0,
                f"{desirable} desirable and {undesirable} undesirable rows with weights {desirable_weight:g} and "
                f"{undesirable_weight:g} give the labels a weight of {balance:.2f} to 1",
                f"KTO's authors advise 1 to 1.33: set desirable_weight between {suggested:.2f} and "
                f"{suggested * high:.2f}, unless the tilt is meant",
            )

    def observe(self, step: int, logged: Mapping[str, float]) -> None:
        """One log of the training loop."""
        rewards = [logged[key] for key in ("rewards/chosen", "rewards/rejected") if key in logged]
        self._rewards(step, logged, rewards)
        if "kl" in logged:
            self._kl(step, logged["kl"])
        if "log_ratios/chosen" in logged:
            self._likelihoods(step, logged)

    @property
    def collapsed(self) -> bool:
        """Whether the model was found to collapse."""
        return any(finding.name == "collapsed" for finding in self.findings)

    def observe_partners(self, step: int, rows: float, without_partner: float) -> None:
        """How many of the rows since the last log had no mismatched completion."""
        if rows and without_partner / rows >= NO_PARTNER_SHARE:
            self.add(
                "no_partner",
                step,
                f"{without_partner:g} of {rows:g} rows had no row of another prompt in their optimizer step, so KTO's "
                "reference point rests on few rows or none",
                "Use a larger batch or more accumulation, or a sampler that does not put one prompt's answers together",
            )

    def _rewards(self, step: int, logged: Mapping[str, float], rewards: list[float]) -> None:
        if self.fades and any(abs(reward) > SATURATED_REWARD for reward in rewards):
            shown = ", ".join(f"{reward:.1f}" for reward in rewards)
            self.add(
                "exploding_rewards",
                step,
                f"Mean rewards are {shown}: that far from the reference the sigmoid is flat, and rows on the wrong "
                "side have almost no gradient",
                "Lower the learning rate (LoRA often 1e-5 to 5e-5, full fine-tuning 1e-6), or lower "
                "max_grad_norm, and restart from the reference",
            )
        still = bool(rewards) and not any(rewards)
        self.still_logs = self.still_logs + 1 if still and step > 1 else 0
        if self.still_logs >= 2 or (step > 1 and logged.get("grad_norm") == 0.0):
            rate = logged.get("learning_rate")
            why = (
                "the learning rate is 0"
                if rate == 0
                else "no gradient reaches the trainable parameters, or the steps are too small for their dtype"
            )
            self.add(
                "no_learning",
                step,
                f"After {step} steps the policy still equals the reference exactly, or its gradient is 0: {why}",
                "Check learning_rate and its warm-up, which parameters require a gradient, and that bf16 weights are "
                "not trained directly (train an adapter, or keep fp32 weights under bf16 autocast)",
            )
        margin = logged.get("rewards/margins")
        if margin is not None and step >= max(50, self.max_steps // 2) and abs(margin) < FLAT_MARGIN:
            self.add(
                "flat_margin",
                step,
                f"After {step} steps desirable and undesirable rows are still {abs(margin):.1g} apart in reward",
                "Raise the learning rate, check that the labels are right, or train longer",
            )

    def _likelihoods(self, step: int, logged: Mapping[str, float]) -> None:
        lost, entropy = -logged["log_ratios/chosen"], logged.get("entropy", 0.0)
        if self.start_entropy is None:
            self.start_entropy = entropy
        flat = logged.get("flat_rows", 0.0)
        signs = collapse_signs(lost, entropy, self.start_entropy, flat)
        if lost < LESS_LIKELY and not _moved(entropy, self.start_entropy):
            self.last_sound_step = step
        if signs:
            sound = f"step {self.last_sound_step}" if self.last_sound_step else "the model before training"
            self.add(
                "collapsed",
                step,
                f"The model is collapsing: {', '.join(signs)}",
                f"Go back to {sound}, and train with a quarter of the learning rate or less",
            )
        elif lost > LESS_LIKELY and logged.get("rewards/margins", 0.0) > MARGIN:
            self.add(
                "displaced",
                step,
                f"Desirable answers have lost {lost:.2f} nats per token against the reference model: the margin comes "
                "from undesirable answers that fall faster",
                "Lower the learning rate, and watch log_ratios/chosen",
            )

    def _kl(self, step: int, kl: float) -> None:
        if kl > 0.0 or step <= 1:
            self.zero_kl_logs, self.zero_kl_since = 0, None
            return
        self.zero_kl_since = step if self.zero_kl_since is None else self.zero_kl_since
        self.zero_kl_logs += 1
        if self.zero_kl_logs >= KL_LOGS and step - self.zero_kl_since >= KL_LOGS - 1:
            self.add(
                "kl_stuck",
                step,
                f"KTO's reference point has been 0 since step {self.zero_kl_since}: the policy finds other prompts' "
                "completions less likely than the reference does, and the mean is clamped at 0",
                "Harmless while rewards/chosen stays near 0 or rises; if it falls, lower the learning rate. With the "
                "point at 0 the loss is apo_zero's, which saves the passes over mismatched completions",
            )
