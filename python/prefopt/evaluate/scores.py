"""Scores with their uncertainty: shares by the binomial, everything else by a seeded bootstrap over questions or prompts."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from prefopt.report.score import CHANGE, Score
from prefopt.report.statistics import paired_difference, wilson

RESAMPLES = 2000


def share(outcomes: Sequence[float], **labels) -> Score:
    """The share of successes among outcomes of 0 and 1, with the binomial's standard error and Wilson's interval.

    The standard error is ``sqrt(p (1 - p) / (n - 1))``, as lm-evaluation-harness has it; None for a single outcome.

    Example:
        >>> score = share([1, 0, 0, 0, 0], task="t", metric="acc", model="run", chance=0.25)
        >>> score.value, score.stderr, score.at_chance
        (0.2, 0.2, True)
    """
    n, ups = len(outcomes), round(sum(outcomes))
    value = ups / n
    stderr = math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None
    low, high = wilson(ups, n)
    return Score(value=value, stderr=stderr, low=low, high=high, n=n, **labels)


def share_change(before: Sequence[float], after: Sequence[float], **labels) -> Score:
    """Difference of two shares on the same items, with Newcombe's paired interval; the chance line is no change."""
    change, low, high = paired_difference([x > 0 for x in before], [x > 0 for x in after])
    differences = np.subtract(after, before)
    n = len(differences)
    stderr = float(differences.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return Score(
        model=CHANGE, value=change, stderr=stderr, low=low, high=high, n=n, chance=0.0, **labels
    )


def bootstrap(
    statistic: Callable[[np.ndarray], float], groups: Sequence[int], *, seed: int, **labels
) -> Score:
    """A statistic of weighted rows, with standard error and 95 % percentile interval from resampling whole groups.

    Rows of one group (the answers to one prompt) are not independent, so they are drawn together.

    Args:
        statistic: (n,) int64 weights, how often each row was drawn -> value; may give NaN where the draw has none.
        groups: (n,) group of each row.
        seed: of the ``RESAMPLES`` draws.

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
    if len(drawn) < 2:  # a single group, or none that has the statistic: no spread to be seen
        return Score(
            value=value, stderr=None, low=-math.inf, high=math.inf, n=len(places), **labels
        )
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Score(
        value=value,
        stderr=float(drawn.std(ddof=1)),
        low=float(low),
        high=float(high),
        n=len(places),
        **labels,
    )


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
