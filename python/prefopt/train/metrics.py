"""What is logged, as sums and counts: added up on the device, reduced over ranks and read once per log.

A mean of means is wrong as soon as the micro-batches differ in their number of rows, of desirable rows or of tokens. So
nothing is divided before the log: every key below is one quotient of two sums over all rows since the last log. TRL
averages the values of the micro-batches instead; where those have equal counts the two agree.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from prefopt.train.methods import COMPONENTS

CLASSES = ("chosen", "rejected")  # desirable, undesirable: the names TRL logs under
PER_CLASS = ("rows", "rewards", "rewarded", "logps", "logits", "tokens", "log_ratios", "compared", "squared_rewards")
SCALARS = (
    "loss",
    "counted",  # rows, or pairs
    "steps",
    "kl",
    "kl_estimates",
    "kl_variance",
    "shift",
    "shift_gate",
    "shift_estimates",
    "pairs",
    "accuracies",
    "entropy",
    "kl_per_token",
    "kl_tokens",
    "flat_rows",
    "rows_with_slope",
    "num_tokens",
    "positions",  # of the policy's passes, and those with a token: of the run, not of a log
    "filled",
    "rows_without_partner",
    "gradient_norms",  # never logged: here so that one look at the sums sees any gradient that is not finite
    *(f"grad/{component}" for component in COMPONENTS),
)
SLOTS = (*SCALARS, *(f"{quantity}/{side}" for side in CLASSES for quantity in PER_CLASS))


@dataclass(frozen=True)
class RowMetrics:
    """A micro-batch of R rows, or of R pairs whose sequences are the chosen ones and then the rejected; detached."""

    losses: Tensor  # (R,) fp32, each row's or pair's part of the step's mean loss
    weights: Tensor  # (R,) fp32, the weight that it has there; 0 for a repeated row
    labels: Tensor  # (B,) bool; B is R, or 2 R for pairs
    rewards: Tensor | None  # (B,) fp32; None where the method has none
    logps: Tensor  # (B,) fp32, nats
    mean_logits: Tensor  # (B,) fp32, summed over the completion's tokens
    entropies: Tensor  # (B,) fp32, nats, summed likewise
    kls: Tensor | None  # (B,) fp32, nats, exact KL of policy and reference model, summed likewise
    log_ratios: Tensor | None  # (B,) fp32, nats, policy minus reference model
    flat: Tensor | None  # (B,) bool, with almost no gradient left
    completion_tokens: Tensor  # (B,) int64
    tokens: Tensor  # (B,) int64, prompt and completion
    positions: int = 0  # of the policy's pass
    filled: Tensor | float = 0.0  # 0-dim, those with a token
    gradient_components: Tensor | None = None  # (len(COMPONENTS), R) fp32, 1/nats


class MetricSums:
    """The sums since the last log, one fp64 vector on the device; nothing here waits for it until ``read``.

    Example:
        >>> import torch
        >>> from prefopt.train.metrics import MetricSums
        >>> sums = MetricSums(torch.device("cpu"))
        >>> sums.add_estimate(torch.tensor(3.0), rows_without_partner=1)
        >>> sums.add_estimate(torch.tensor(1.0))
        >>> quotients(sums.read(), loss_count=0)["kl"]
        2.0
    """

    def __init__(self, device: torch.device):
        # fp64 keeps token counts exact and sums of thousands of rows as good as their terms; Apple's GPUs lack it.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.vector = torch.zeros(len(SLOTS), dtype=dtype, device=device)

    def add_rows(self, rows: RowMetrics, world_size: int = 1) -> None:
        """Add one micro-batch; ``losses`` carry a factor ``world_size`` that DDP's mean takes out of the gradient."""
        counted = rows.weights > 0  # (R,)
        paired = len(rows.labels) == 2 * len(counted) > 0
        sequences = counted.repeat(2) if paired else counted  # (B,)
        dtype, ones = self.vector.dtype, torch.ones_like(rows.logps)
        rewards = torch.zeros_like(ones) if rows.rewards is None else rows.rewards
        columns = (
            ones,
            rewards,
            torch.full_like(ones, float(rows.rewards is not None)),
            rows.logps,
            rows.mean_logits,
            rows.completion_tokens,
            torch.zeros_like(ones) if rows.log_ratios is None else rows.log_ratios,
            torch.zeros_like(ones) if rows.log_ratios is None else rows.completion_tokens,
            rewards.to(dtype) ** 2,
        )
        quantities = torch.stack([column.to(dtype) for column in columns], dim=1)  # (B, 9)
        sides = torch.stack([sequences & rows.labels, sequences & ~rows.labels])  # (2, B)
        # where, not a product: a repeated row that is not finite must not reach the sums as 0 * inf
        per_class = torch.where(sides[:, :, None], quantities, 0).sum(1)  # (2, 9)
        scalars = {
            "loss": torch.where(counted, rows.losses, 0).sum() / world_size,
            "counted": counted.sum(),
            "entropy": torch.where(sequences, rows.entropies, 0).sum(),
            "num_tokens": torch.where(sequences, rows.tokens, 0).sum(),
            "positions": ones.new_tensor(rows.positions),
            "filled": torch.as_tensor(rows.filled),
        }
        if rows.kls is not None:
            scalars["kl_per_token"] = torch.where(sequences, rows.kls, 0).sum()
            scalars["kl_tokens"] = torch.where(sequences, rows.completion_tokens, 0).sum()
        if rows.flat is not None:
            scalars |= {"flat_rows": (sequences & rows.flat).sum(), "rows_with_slope": sequences.sum()}
        if paired and rows.rewards is not None:
            chosen, rejected = rewards.chunk(2)  # (P,)
            scalars["pairs"] = counted.sum()
            scalars["accuracies"] = (counted & (chosen > rejected)).sum()
        if rows.gradient_components is not None:
            sizes = torch.where(counted, rows.gradient_components.abs() * rows.weights, 0).sum(1)
            scalars |= {f"grad/{component}": size for component, size in zip(COMPONENTS, sizes, strict=True)}
        zero = self.vector.new_zeros(())
        head = torch.stack([scalars[name].to(dtype) if name in scalars else zero for name in SCALARS])
        self.vector += torch.cat([head, per_class.flatten()])

    def add_step(self, world_size: int = 1) -> None:
        """Count one optimizer step, of which every rank counts its part."""
        self.vector[SLOTS.index("steps")] += 1.0 / world_size

    def add_estimate(
        self, reference_point: Tensor, rows_without_partner: int = 0, variance: Tensor | float = 0.0
    ) -> None:
        """Count one estimate of the reference point, in nats, and the rows that had no part in it.

        ``variance``: the squared standard error of the estimate, divided by the number of processes.
        """
        for name, value in (
            ("kl", reference_point),
            ("kl_estimates", 1),
            ("rows_without_partner", rows_without_partner),
            ("kl_variance", variance),
        ):
            self.vector[SLOTS.index(name)] += value

    def add_shift(self, shift: Tensor, gate: float) -> None:
        """Count one estimate of BCO's shift, in reward units, and how far it was let in."""
        for name, value in (("shift", shift), ("shift_gate", gate), ("shift_estimates", 1)):
            self.vector[SLOTS.index(name)] += value

    def add_gradient(self, norm: Tensor | float) -> None:
        """Add a gradient norm."""
        self.vector[SLOTS.index("gradient_norms")] += norm

    def read(self) -> dict[str, float]:
        """All ranks' sums: one all-reduce, one wait for the device."""
        vector = self.vector
        if dist.is_available() and dist.is_initialized():
            vector = vector.clone()
            dist.all_reduce(vector)
        return dict(zip(SLOTS, vector.tolist(), strict=True))

    def reset(self) -> None:
        """Start over after a log."""
        self.vector.zero_()

    def load(self, values: Mapping[str, float]) -> None:
        """Continue from sums that ``read`` gave."""
        ordered = [values.get(name, 0.0) for name in SLOTS]  # a checkpoint of an earlier version has fewer
        self.vector.copy_(torch.tensor(ordered, dtype=self.vector.dtype))


def margin_error(sums: dict[str, float]) -> dict[str, float]:
    """``rewards/margins_standard_error`` of independent rows; empty unless each class has two."""
    squared = 0.0
    for side in CLASSES:
        n = sums[f"rewarded/{side}"]
        if n < 2:
            return {}
        variance = (sums[f"squared_rewards/{side}"] - sums[f"rewards/{side}"] ** 2 / n) / (n - 1)
        squared += max(0.0, variance) / n
    return {"rewards/margins_standard_error": math.sqrt(squared)}


def quotients(
    sums: dict[str, float],
    loss_count: float,
    nll_weight: float = 0.0,
    components: Sequence[str] = (),
) -> dict[str, float]:
    """The logged values; a key is left out where nothing was counted for it.

    Args:
        sums: of ``MetricSums.read``.
        loss_count: what ``loss`` is divided by: the optimizer steps in training, the rows or pairs in evaluation.
        nll_weight: in evaluation, weight of the desirable answers' likelihood per token, which is no sum over rows.
        components: those of ``COMPONENTS`` that the method's gradient has.

    Returns:
        ``loss``; ``kl``, the reference point, with ``kl_standard_error`` where it is a mean over mismatched
        completions of a step (root mean square over the steps), and ``logps/*`` in nats, ``rewards/*`` as the
        method defines them, per row; ``entropy``, ``kl_per_token`` (nats) and ``logits/*`` (mean over the
        vocabulary) per completion token; ``rewards/margins``; of pairs ``rewards/accuracies``, the share with
        the chosen answer ahead; ``rows_without_partner``, a count; ``shift`` in reward units and
        ``shift_gate``; ``grad/*``, the share of each gradient component in the sum of their absolute values
        over rows.
    """
    logged = {}
    if loss_count:
        logged["loss"] = sums["loss"] / loss_count
    if nll_weight and sums["tokens/chosen"]:
        logged["loss"] -= nll_weight * sums["logps/chosen"] / sums["tokens/chosen"]
    if sums["kl_estimates"]:
        logged["kl"] = sums["kl"] / sums["kl_estimates"]
        logged["rows_without_partner"] = round(sums["rows_without_partner"])
    if sums["kl_variance"] and sums["steps"]:
        logged["kl_standard_error"] = math.sqrt(sums["kl_variance"] / sums["steps"])
    if sums["shift_estimates"]:
        for name in ("shift", "shift_gate"):
            logged[name] = sums[name] / sums["shift_estimates"]
    tokens = sum(sums[f"tokens/{side}"] for side in CLASSES)
    if tokens:
        logged["entropy"] = sums["entropy"] / tokens
    if sums["rows_with_slope"]:
        logged["flat_rows"] = sums["flat_rows"] / sums["rows_with_slope"]
    if sums["kl_tokens"]:
        logged["kl_per_token"] = sums["kl_per_token"] / sums["kl_tokens"]
    for quantity, count in (
        ("logits", "tokens"),
        ("logps", "rows"),
        ("rewards", "rewarded"),
        ("log_ratios", "compared"),
    ):
        for side in CLASSES:
            if sums[f"{count}/{side}"]:
                logged[f"{quantity}/{side}"] = sums[f"{quantity}/{side}"] / sums[f"{count}/{side}"]
    if "rewards/chosen" in logged and "rewards/rejected" in logged:
        logged["rewards/margins"] = logged["rewards/chosen"] - logged["rewards/rejected"]
    if sums["pairs"]:
        logged["rewards/accuracies"] = sums["accuracies"] / sums["pairs"]
    gradients = {f"grad/{name}": sums[f"grad/{name}"] for name in components}
    whole = sum(gradients.values())
    if whole:
        logged |= {name: size / whole for name, size in gradients.items()}
    return logged
