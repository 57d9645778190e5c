"""Scores with their uncertainty: shares by Wilson, everything else by a seeded bootstrap over questions or prompts.

Values that are all equal have no standard error. The interval of a share is then Wilson's, and any other interval is
infinite: one of width 0 would claim certainty.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from prefopt.report.score import CHANGE, RUN, Score
from prefopt.report.statistics import paired_difference, wilson

RESAMPLES = 2000


def share(outcomes: Sequence[float], **labels: Any) -> Score:
    """The share of successes among independent outcomes of 0, 1/2 (a tie) or 1, with Wilson's interval.

    The standard error is that of the mean, for outcomes of 0 and 1 ``sqrt(p (1 - p) / (n - 1))``, as
    lm-evaluation-harness computes it; None if all outcomes are equal.

    Example:
        >>> score = share([1, 0, 0, 0, 0], task="t", metric="acc", model="run", chance=0.25)
        >>> score.value, round(score.stderr, 12), score.at_chance
        (0.2, 0.2, True)
    """
    n, ups = len(outcomes), float(sum(outcomes))
    low, high = wilson(ups, n)
    return Score(value=ups / n, stderr=_error(outcomes), low=low, high=high, n=n, **labels)


def share_change(before: Sequence[float], after: Sequence[float], **labels: Any) -> Score:
    """Difference of two shares on the same items, with Newcombe's paired interval; the chance line is no change."""
    change, low, high = paired_difference([x > 0 for x in before], [x > 0 for x in after])
    stderr, n = _error(np.subtract(after, before)), len(after)
    return Score(model=CHANGE, value=change, stderr=stderr, low=low, high=high, n=n, chance=0.0, **labels)


def wins(before: Sequence[float], after: Sequence[float], **labels: Any) -> Score:
    """The share of items on which ``after`` succeeds and ``before`` does not, ties counting half.

    It is ``(1 + change) / 2`` of ``share_change``, and so are its error and interval; the chance line is 0.5.
    """
    change = share_change(before, after, **labels)
    stderr = None if change.stderr is None else change.stderr / 2
    ends = {name: (1 + getattr(change, name)) / 2 for name in ("value", "low", "high")}
    return replace(change, model=RUN, stderr=stderr, chance=0.5, **ends)


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    groups: Sequence[int],
    *,
    seed: int,
    independent: int | None = None,
    **labels: Any,
) -> Score:
    """A statistic of weighted rows, with standard error and 95 % percentile interval from resampling whole groups.

    Rows of one group (the answers to one prompt) are not independent, so they are drawn together.

    Args:
        statistic: (n,) int64 weights (how often each row was drawn) -> value, or NaN if it is undefined.
        groups: (n,) group of each row.
        seed: of the ``RESAMPLES`` draws.
        independent: number of independent outcomes of a share, for Wilson's interval if all draws are equal (default:
            the number of groups).

    Example:
        >>> values = np.array([1.0, 2.0, 3.0, 4.0])
        >>> score = bootstrap(mean_of(values), range(4), seed=0, task="t", metric="m", model="run", unit="nats")
        >>> score.value, 0.4 < score.stderr < 0.7, score.low < 2.5 < score.high
        (2.5, True, True)
    """
    places = np.unique(np.asarray(groups), return_inverse=True)[1]
    count = int(places.max()) + 1
    value = float(statistic(np.ones(len(places), dtype=np.int64)))
    random = np.random.default_rng(seed)
    drawn = np.array(
        [
            statistic(np.bincount(random.integers(count, size=count), minlength=count)[places])
            for _ in range(RESAMPLES if count > 1 else 0)
        ]
    )
    drawn = drawn[np.isfinite(drawn)]
    stderr = _error(drawn, of_mean=False)
    if stderr is not None:
        low, high = map(float, np.quantile(drawn, [0.025, 0.975]))
    elif labels.get("unit", "share") == "share" and labels["model"] != CHANGE and 0 <= value <= 1:
        count = count if independent is None else independent
        low, high = wilson(value * count, count)
    else:
        low, high = -math.inf, math.inf
    return Score(value=value, stderr=stderr, low=low, high=high, n=len(places), **labels)


def _error(values: ArrayLike, of_mean: bool = True) -> float | None:
    """The standard deviation of the values, or of their mean; None for fewer than two, or if all are equal."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2 or np.ptp(array) <= 1e-12 * np.abs(array).max():
        return None
    return float(array.std(ddof=1) / math.sqrt(len(array) if of_mean else 1))


def mean_of(values: np.ndarray, sizes: np.ndarray | None = None) -> Callable[[np.ndarray], float]:
    """The statistic ``sum(w values) / sum(w sizes)``; sizes 1 give the mean, numbers of tokens a mean per token."""
    sizes = np.ones(len(values)) if sizes is None else sizes

    def statistic(weights: np.ndarray) -> float:
        total = float(weights @ sizes)
        return float(weights @ values) / total if total else math.nan

    return statistic


def difference_of_means(values: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], float]:
    """The statistic mean(values where label) - mean(values elsewhere)."""
    up, down = mean_of(values * labels, labels * 1.0), mean_of(values * ~labels, ~labels * 1.0)
    return lambda weights: up(weights) - down(weights)


def auc_of(values: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], float]:
    """The statistic P(a row with the label has the higher value), ties counting half (the area under the ROC curve).

    Example:
        >>> auc_of(np.array([3.0, 1.0, 2.0]), np.array([True, False, True]))(np.ones(3))
        1.0
    """
    order = np.argsort(values, kind="stable")
    ties = np.unique(values[order], return_inverse=True)[1]
    labelled = labels[order]

    def statistic(weights: np.ndarray) -> float:
        weights = weights[order]
        up = np.bincount(ties, weights * labelled)  # weight of each distinct value, by label
        down = np.bincount(ties, weights * ~labelled)
        pairs = up.sum() * down.sum()
        below = np.cumsum(down) - down
        return float(up @ (below + down / 2) / pairs) if pairs else math.nan

    return statistic
