"""Losses, rewards and gradient components of a micro-batch, by the functions of its method."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefopt.train.config import PreferenceConfig
from prefopt.train.methods import COMPONENTS, Baselines, Sequences
from prefopt_kernels.losses import sft_loss
from prefopt_kernels.ops.sequence_loss import sequence_loss

FLAT = 0.05  # of the largest gradient factor


class Objective:
    """The loss of ``args.method``.

    Args:
        args: the configuration, with the method's options filled in.
    """

    def __init__(self, args: PreferenceConfig):
        self.args, self.method = args, args.spec
        self.nll_weight = self.method.nll_weight(args)

    @property
    def components(self) -> tuple[str, ...]:
        """Those of ``COMPONENTS`` that the method's gradient has; empty for a gradient of one component."""
        if self.args.method == "enhanced_kto":
            return COMPONENTS
        return COMPONENTS[:2] if (self.args.shift or "off") != "off" else ()

    def losses(self, rows: Sequences, baselines: Baselines) -> Tensor:
        """(R,) fp32, the loss of R unpaired rows or pairs; 0 for a method whose loss is ``nll`` alone."""
        if self.method.loss is None:
            return torch.zeros_like(rows.logps)
        if self.method.fused is None or rows.tokens is None:
            return self.method.loss(rows, baselines, self.args)
        bounds = pad(rows.lengths.cumsum(0), (1, 0))
        return sequence_loss(
            rows.tokens,
            bounds,
            rows.reference,
            rows.labels,
            rows.lengths,
            method=self.args.method,
            backend=self.args.backend,
            **self.method.fused(baselines, self.args),
        ).losses

    def nll(self, rows: Sequences, count: int) -> Tensor:
        """(R,) nats per token of each desirable answer, for ``count`` rows or pairs."""
        return sft_loss(rows.logps[:count], rows.lengths[:count])

    def rewards(self, rows: Sequences) -> Tensor | None:
        """(B,) fp32 of detached ``rows``; None for a method without rewards."""
        return None if self.method.rewards is None else self.method.rewards(rows, self.args)

    def flat(self, rows: Sequences, baselines: Baselines) -> Tensor | None:
        """(B,) bool: where a sigmoid has less than ``FLAT`` of its largest slope; None for a loss without one."""
        if self.method.center is None:
            return None
        assert self.args.beta is not None
        u = self.args.beta * (rows.logps - rows.reference - self.method.center(baselines, self.args))
        return 4 * torch.sigmoid(u) * torch.sigmoid(-u) < FLAT

    def gradient_components(self, rows: Sequences, baselines: Baselines) -> Tensor | None:
        """(len(COMPONENTS), B) fp32 of detached ``rows``, 1/nats; None for a gradient of one component."""
        return None if self.method.components is None else self.method.components(rows, baselines, self.args)
