"""Log-odds of a completion's mean token probability, finite up to probability 1."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NEAREST = -1e-4  # nats per token; above, log-odds go on along their tangent
LARGEST_SLOPE = -1 / math.expm1(NEAREST)  # 10,000.5: d log-odds / d mean log-probability


def log_odds(mean_logps: Tensor) -> Tensor:
    r"""(B,) :math:`o = m - \log(1 - e^m)`, continued above m = -1e-4 by its tangent.

    :math:`1 - e^m` goes to 0 as m does, and with it the sum's logarithm to :math:`-\infty`. A clamp
    would stop the gradient of exactly the rows that the odds ratio is to push down.
    """
    m = mean_logps.clamp(max=NEAREST)
    # Not mean_logps - m: its two derivatives, 10,000 each, would cancel and leave their rounding.
    beyond = F.relu(mean_logps - NEAREST)
    return m - torch.log(-torch.expm1(m)) + LARGEST_SLOPE * beyond


def log_odds_slope(mean_logps: Tensor) -> Tensor:
    """(B,) derivative of :func:`log_odds`, :math:`1 / (1 - e^m)`: from 1 to 10,000.5."""
    return -1 / torch.expm1(mean_logps.clamp(max=NEAREST))
