"""The interval of a mean: against its definition and published quantiles."""

import math
import statistics

import pytest

from prefopt.report.statistics import Z
from studies.bco_stability.intervals import mean_interval, student_t


def is_close(a: float, b: float) -> bool:
    """Equal up to the fp64 rounding of a few dozen operations on numbers of the order of 1."""
    return math.isclose(a, b, rel_tol=0, abs_tol=64 * 2.0**-52)


def test_mean_interval():
    values = [0.2, -0.4, 1.1, 0.7, 0.05]
    mean, low, high = mean_interval(values)
    assert is_close(mean, statistics.mean(values))
    error = statistics.stdev(values) / math.sqrt(5)
    assert (high - mean) / error == pytest.approx(2.776445105, abs=1e-8)
    assert is_close(mean - low, high - mean)
    with pytest.raises(ValueError, match="two or more, got 1"):
        mean_interval([1.0])


def test_equal_values_have_no_interval():
    assert mean_interval([0.1] * 3) == (pytest.approx(0.1), -math.inf, math.inf)


@pytest.mark.parametrize(
    ("degrees", "quantile"),  # from published tables of Student's t
    [(1, 12.70620474), (2, 4.30265273), (3, 3.18244631), (9, 2.26215716), (30, 2.04227246)],
)
def test_quantiles_of_students_t(degrees, quantile):
    assert student_t(degrees) == pytest.approx(quantile, abs=5e-9)


def test_student_t_becomes_normal():
    # the first term of its expansion in 1 / degrees
    assert student_t(10_000) - Z == pytest.approx((Z**3 + Z) / 4 / 10_000, rel=1e-3)
