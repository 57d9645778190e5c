"""The parts of prospect theory in log space: value curvature and probability weighting, with their slopes.

Tversky and Kahneman 1992 and Prelec 1998. Every function is finite, and so is its autograd derivative,
for every finite input; the plain formulas give NaN at u = 0 and where a sigmoid rounds to 0 or 1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TVERSKY_KAHNEMAN = "tversky-kahneman"
PRELEC = "prelec"
WEIGHTINGS = (TVERSKY_KAHNEMAN, PRELEC)
GAMMA = 0.61  # Tversky and Kahneman 1992, gains
PRELEC_EXPONENT = 0.65  # Prelec 1998
_FAR = 15.0  # logits above: log(softplus(-a)) by its series, whose next term is below 1e-13


def curved(u: Tensor, alpha: float, kappa: float) -> Tensor:
    r"""(B,) :math:`\mathrm{sign}(u) \frac\kappa\alpha [(1 + |u|/\kappa)^\alpha - 1]`: odd, slope 1 at 0.

    :math:`|u|` is written with ``where``: the derivative of ``abs`` and ``sign`` at exactly 0 is 0, and
    0 is where every row of a run starts.
    """
    sign = torch.where(u >= 0, 1.0, -1.0).to(u.dtype)
    return sign * (kappa / alpha) * torch.expm1(alpha * torch.log1p(sign * u / kappa))


def curved_slope(u: Tensor, alpha: float, kappa: float) -> Tensor:
    """(B,) derivative of :func:`curved`, in (0, 1]."""
    return torch.exp((alpha - 1) * torch.log1p(u.abs() / kappa))


def missed(a: Tensor, weighting: str | None) -> Tensor:
    """(B,) 1 - W(sigmoid(a)): the weighted probability that is missing from a win, in [0, 1]."""
    if weighting is None:
        return torch.sigmoid(-a)
    return -torch.expm1(_log_weighted_win(a, weighting))


def missed_slope(a: Tensor, weighting: str | None) -> Tensor:
    """(B,) minus the derivative of :func:`missed`: at most 1/4, .138 (Tversky-Kahneman), .173 (Prelec)."""
    if weighting is None:
        return torch.sigmoid(a) * torch.sigmoid(-a)
    win = torch.exp(_log_weighted_win(a, weighting))
    if weighting == TVERSKY_KAHNEMAN:
        return win * (torch.sigmoid(-GAMMA * a) - (1 - GAMMA) * torch.sigmoid(-a))
    rest = (PRELEC_EXPONENT - 1) * _log_surprise(a) + F.logsigmoid(-a)
    return win * PRELEC_EXPONENT * torch.exp(rest)


def missed_at_zero(weighting: str | None) -> float:
    """1 - W(1/2)."""
    if weighting is None:
        return 0.5
    if weighting == TVERSKY_KAHNEMAN:
        power = 0.5**GAMMA
        return 1 - power / (2 * power) ** (1 / GAMMA)
    return 1 - math.exp(-(math.log(2) ** PRELEC_EXPONENT))


@torch.no_grad()
def decision_weight(mean_logps: Tensor, weighting: str, clip: tuple[float, float]) -> Tensor:
    """(B,) w(c) / c for c = exp(mean log-probability), clipped: the weight of an outcome drawn from c."""
    m = mean_logps.clamp(max=0.0)
    if weighting == TVERSKY_KAHNEMAN:
        log_weight = GAMMA * m - torch.logaddexp(GAMMA * m, GAMMA * torch.log(-torch.expm1(m))) / GAMMA
    else:
        log_weight = -((-m) ** PRELEC_EXPONENT)
    return torch.exp(log_weight - m).clamp(*clip)


def _log_weighted_win(a: Tensor, weighting: str) -> Tensor:
    """(B,) log W(p) for p = sigmoid(a)."""
    if weighting == TVERSKY_KAHNEMAN:
        # log of p^g / (p^g + q^g)^(1/g)
        p, q = GAMMA * F.logsigmoid(a), GAMMA * F.logsigmoid(-a)
        return p - torch.logaddexp(p, q) / GAMMA
    return -torch.exp(PRELEC_EXPONENT * _log_surprise(a))  # log of exp(-(-log p)^alpha)


def _log_surprise(a: Tensor) -> Tensor:
    """(B,) log(-log sigmoid(a)), also where sigmoid(a) rounds to 1."""
    far = a.clamp(min=_FAR)
    near = torch.log(-F.logsigmoid(a.clamp(max=_FAR)))
    return torch.where(a < _FAR, near, -far - torch.exp(-far) / 2)
