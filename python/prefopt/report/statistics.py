"""Intervals of shares and of their differences."""

import math
from collections.abc import Sequence

Z = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (Wilson 1927); (0, 1) where n is 0.

    ``successes`` may count an outcome as a half: the variance of a mean of values from 0 to 1 is at most that of a
    share.

    Example:
        >>> low, high = wilson(5, 10)
        >>> round(low, 4), round(high, 4)
        (0.2366, 0.7634)
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = share + Z**2 / (2 * n)
    spread = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    low = max(0.0, (centre - spread) / scale) if successes > 0 else 0.0  # exact, where rounding is not
    high = min(1.0, (centre + spread) / scale) if successes < n else 1.0
    return low, high


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """Difference of two shares measured on the same items, with Newcombe's 95 % score interval.

    Both Wilson intervals are combined by squaring and adding, with the correlation of the pairs (Newcombe 1998,
    Statistics in Medicine 17:2635, method 8). Where an outcome never varies, the correlation counts as 0. Where no item
    changes it would be 1, and the interval could have width 0; there it has the continuity correction of his method 10.

    Args:
        before, after: (n,) outcomes of the same n items; n from 1.

    Returns:
        difference after - before, lower and upper end, each from -1 to 1.

    Example:
        >>> paired_difference([False, False], [True, False])[0]
        0.5
    """
    n = len(before)
    if n == 0 or n != len(after):
        raise ValueError(f"before and after must have the same length from 1, got {n} and {len(after)}")
    ups_before, ups_after = sum(before), sum(after)
    both = sum(a and b for a, b in zip(before, after, strict=True))
    neither = n - ups_before - ups_after + both
    spread = ups_before * (n - ups_before) * ups_after * (n - ups_after)
    crossed = (ups_before - both) * (ups_after - both)
    covariance = float(both * neither - crossed)
    if ups_before == both == ups_after:
        covariance = max(0.0, covariance - n / 2)
    phi = covariance / math.sqrt(spread) if spread else 0.0
    p, q = ups_after / n, ups_before / n
    (p_low, p_high), (q_low, q_high) = wilson(ups_after, n), wilson(ups_before, n)

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return p - q, p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)


def percent(share: float) -> str:
    """A share with one digit after the point, or three if it would round to 0 or 100 % but is neither.

    Example:
        >>> percent(0.417), percent(1.0), percent(0.00038)
        ('41.7 %', '100.0 %', '0.038 %')
    """
    digits = 3 if 0 < min(share, 1 - share) < 0.0005 else 1
    return f"{100 * share:.{digits}f} %"


def number(value: float) -> str:
    """Four digits after the point below 1, three significant digits otherwise."""
    return f"{value:.4f}" if 0.0001 <= abs(value) < 1 else f"{value:,.3g}" if value else "0"
