"""What a backend of linear_kl takes beside the Operands of the policy and of the reference model."""

from typing import NamedTuple

from torch import Tensor

from prefopt_kernels.ops.linear_logprob.transform import Transform


class Transforms(NamedTuple):
    """The logit transforms of the two models."""

    policy: Transform
    ref: Transform


class Upstream(NamedTuple):
    """d loss / d output, each (T,) fp32, or None where the output was not used."""

    logp: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    kl: Tensor


class Saved(NamedTuple):
    """What the forward leaves for the backward, each (T,) fp32."""

    lse: Tensor
    ref_lse: Tensor
    kl: Tensor
    entropy: Tensor | None  # where it was an output
