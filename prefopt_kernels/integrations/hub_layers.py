"""Layers of an exported kernel for ``kernelize`` of Hugging Face ``kernels``.

Each replaces a layer of the same name and signature in a model. ``kernels`` requires layers without state and without a
constructor; see :mod:`prefopt_kernels.integrations.hub_kernels`.
"""

from torch import Tensor, nn

from prefopt_kernels.ops.linear_logprob import linear_logprob


class LinearLogprob(nn.Module):
    """``log_softmax(hidden @ weight.T)`` at the targets, by :func:`prefopt_kernels.linear_logprob`.

    Example:
        >>> import torch
        >>> from prefopt_kernels.integrations.hub_layers import LinearLogprob
        >>> LinearLogprob()(torch.eye(2), torch.zeros(4, 2), torch.tensor([3, -100])).exp()
        tensor([0.2500, 1.0000])
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """(T,) fp32 nats from hidden states (T, H), a head (V, H) and targets (T,); 0 where a target is negative."""
        return linear_logprob(hidden, weight, targets).logp
