"""The interval of a mean."""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean, stdev


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of two independent values or more, with the ends of its 95 % interval by Student's t.

    The ends are infinite where all values are equal: their spread says nothing about the error of the mean.

    Example:
        >>> mean_interval([1.0, 2.0, 3.0])[0], mean_interval([1.0, 1.0, 1.0])
        (2.0, (1.0, -inf, inf))
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"values must be two or more, got {n}")
    mean, deviation = fmean(values), stdev(values)
    if deviation <= 1e-12 * max(map(abs, values)):  # equal but for rounding
        return mean, -math.inf, math.inf
    reach = student_t(n - 1) * deviation / math.sqrt(n)
    return mean, mean - reach, mean + reach


@lru_cache
def student_t(degrees: int) -> float:
    """The quantile of a two-sided 95 % interval of Student's t, for whole degrees of freedom from 1.

    Found by bisection of the probability that |t| stays below it, a finite sum (Abramowitz and Stegun 26.7.3 and
    26.7.4).

    Example:
        >>> round(student_t(9), 4)
        2.2622
    """

    def inside(t: float) -> float:
        angle = math.atan2(t, math.sqrt(degrees))
        cosine, odd = math.cos(angle), degrees % 2
        term = total = 0.0 if degrees == 1 else cosine if odd else 1.0
        for power in range(2 + odd, degrees - 1, 2):
            term *= cosine**2 * (power - 1) / power
            total += term
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, 16.0  # 12.71 for one degree of freedom
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return high
