"""What a row's reward is compared with: KTO's reference point z0 in nats, BCO's shift in reward units.

z0 is the mean log-ratio of mismatched completions (a prompt with another prompt's completion), clamped at
0 last: how far the policy has drifted on those is the baseline that KTO subtracts from every row
(arXiv:2402.01306, section 4.1). BCO's shift is a mean of the rows' own rewards (arXiv:2404.04656). Both are
constants to the gradient. An estimator is fed once per micro-batch or window, sums over the ranks of a
process group in one all-reduce, never waits for a device, and keeps its state in ``state_dict``.
"""

from prefopt_kernels.reference_point.kl import EMAKL, MicrobatchKL, WindowKL
from prefopt_kernels.reference_point.schedule import ShiftSchedule
from prefopt_kernels.reference_point.shift import CumulativeShift, EMAShift, WindowShift

__all__ = [
    "EMAKL",
    "CumulativeShift",
    "EMAShift",
    "MicrobatchKL",
    "ShiftSchedule",
    "WindowKL",
    "WindowShift",
]
