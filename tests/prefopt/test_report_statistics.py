"""Intervals: against their defining equations, and their coverage."""

import math
import random

import pytest

from prefopt.report.statistics import Z, paired_difference, wilson


def is_close(a: float, b: float) -> bool:
    """Equal up to the fp64 rounding of a few dozen operations on numbers of the order of 1."""
    return math.isclose(a, b, rel_tol=0, abs_tol=64 * 2.0**-52)


@pytest.mark.parametrize(("successes", "n"), [(1, 3), (50, 192), (81, 263), (191, 192)])
def test_wilson_ends_solve_the_score_equation(successes, n):
    share = successes / n
    low, high = wilson(successes, n)
    assert low < share < high
    for end in (low, high):
        assert is_close((share - end) ** 2, Z**2 * end * (1 - end) / n)


def test_wilson_at_the_edges():
    assert wilson(0, 10)[0] == 0.0 and 0.2 < wilson(0, 10)[1] < 0.3
    assert is_close(wilson(10, 10)[1], 1.0) and 0.7 < wilson(10, 10)[0] < 0.8
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(10, 10)
    assert (round(low, 4), round(high, 4)) == (0.7225, 1.0)
    assert [round(end, 4) for end in wilson(1, 1)] == [0.2065, 1.0]


@pytest.mark.parametrize(("both", "first_only", "second_only"), [(0.3, 0.1, 0.5), (0.05, 0.02, 0.9)])
def test_paired_difference_covers_the_truth_in_95_percent(both, first_only, second_only):
    rng = random.Random(0)
    outcomes = [(True, True), (True, False), (False, True), (False, False)]
    weights = [both, first_only, second_only, 1 - both - first_only - second_only]
    truth, runs, held = second_only - first_only, 2000, 0
    for _ in range(runs):
        pairs = rng.choices(outcomes, weights, k=60)
        _, low, high = paired_difference(*zip(*pairs, strict=True))
        held += low <= truth <= high
    # Four standard errors of a coverage counted in 2,000 runs, and half a point for the method's own deviation.
    assert abs(held / runs - 0.95) < 4 * math.sqrt(0.95 * 0.05 / runs) + 0.005


def test_paired_difference_is_antisymmetric():
    rng = random.Random(1)
    before = [rng.random() < 0.4 for _ in range(50)]
    after = [rng.random() < 0.8 for _ in range(50)]
    change, low, high = paired_difference(before, after)
    back, back_low, back_high = paired_difference(after, before)
    assert low < change < high
    assert is_close(change, -back) and is_close(low, -back_high) and is_close(high, -back_low)


def test_the_pairing_counts():
    """The same two shares: the interval is narrower where the same items succeed both times."""
    before = [True] * 20 + [False] * 20
    aligned = [True] * 30 + [False] * 10
    _, low, high = paired_difference(before, aligned)
    _, low_crossed, high_crossed = paired_difference(before, aligned[::-1])
    assert high - low < 0.75 * (high_crossed - low_crossed)


def test_paired_difference_without_variation():
    change, low, high = paired_difference([False] * 8, [True] * 8)
    assert change == 1.0 and 0 < low < 1 and high == 1.0


@pytest.mark.parametrize(("n", "ups"), [(1, 1), (2, 1), (10, 5), (10, 0), (10, 10), (400, 200)])
def test_no_change_at_all_still_has_an_interval(n, ups):
    outcomes = [place < ups for place in range(n)]
    change, low, high = paired_difference(outcomes, outcomes)
    assert change == 0.0 and low < -0.002 and high > 0.002
    if (n, ups) == (10, 5):  # phi is (25 - 5) / 25, and both arms of Wilson's interval are 0.2634
        assert is_close(high, (0.5 - wilson(5, 10)[0]) * math.sqrt(2 * (1 - 0.8)))


@pytest.mark.parametrize("sides", [([], []), ([True], [True, False])])
def test_paired_difference_rejects_unequal_lengths(sides):
    with pytest.raises(ValueError, match="same length from 1"):
        paired_difference(*sides)
