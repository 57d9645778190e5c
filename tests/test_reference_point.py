"""The two estimators of KTO's reference point, in one process and in two."""

import math

import pytest
import torch
from torch import tensor

from prefopt_kernels.reference_point import EMAKL, MicrobatchKL, WindowKL
from support.gloo_ranks import LOG_RATIOS, reference_points, run_ranks

BOTH = pytest.mark.parametrize("estimator", [MicrobatchKL, WindowKL])


@BOTH
def test_mean_clamped_at_zero(estimator):
    kl = estimator()
    assert kl.value.shape == () and kl.value.item() == 0
    assert kl.estimate(tensor([1.0, 2.0, 6.0])).item() == 3
    assert kl.value.item() == 3
    # the clamp is of the mean, not of the rows: max(0, .) of the rows would give 2
    assert kl.estimate(tensor([4.0, -6.0])).item() == 0
    assert kl.value.item() == 0


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fp32_and_detached_whatever_comes_in(estimator, dtype):
    log_ratios = tensor([1.0, 256.0], dtype=dtype, requires_grad=True)
    estimate = estimator().estimate(log_ratios)
    assert estimate.dtype == torch.float32 and estimate.shape == ()
    assert not estimate.requires_grad
    assert estimate.item() == 128.5  # 257 has no bf16


@BOTH
def test_no_rows_is_a_reference_point_of_zero(estimator):
    kl = estimator()
    kl.estimate(tensor([5.0]))
    assert kl.estimate(torch.zeros(0)).item() == 0
    assert kl.value.item() == 0


@BOTH
def test_evaluation_leaves_the_value(estimator):
    kl = estimator()
    kl.estimate(tensor([5.0]))
    assert kl.estimate(tensor([7.0]), update=False).item() == 7
    assert kl.value.item() == 5


@BOTH
def test_a_nan_is_not_hidden(estimator):
    assert math.isnan(estimator().estimate(tensor([1.0, math.nan])).item())


@BOTH
def test_state_survives_a_checkpoint(estimator, tmp_path):
    kl = estimator()
    kl.estimate(tensor([1.0, 2.0]))
    torch.save(kl.state_dict(), tmp_path / "kl.pt")
    kl.estimate(tensor([9.0]))
    restored = estimator()
    restored.load_state_dict(torch.load(tmp_path / "kl.pt"))
    assert torch.equal(restored.value, tensor(1.5))


@BOTH
def test_state_dict_is_a_copy(estimator):
    kl = estimator()
    kl.estimate(tensor([4.0]))
    kl.state_dict()["value"].zero_()
    assert kl.value.item() == 4


@BOTH
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"^state has the keys \[\]; expected exactly \['value'\]"),
        ({"value": tensor(1.0), "step": 3}, r"^state has the keys \['step', 'value'\]"),
        ({"value": torch.zeros(2)}, r"^state\['value'\] is of shape \(2,\); expected a 0-dim"),
        ({"value": 1.0}, r"^state\['value'\] is 1.0; expected a 0-dim tensor"),
    ],
)
def test_bad_state_is_named(estimator, state, message):
    with pytest.raises(ValueError, match=message):
        estimator().load_state_dict(state)


@BOTH
@pytest.mark.parametrize(
    ("log_ratios", "error", "message"),
    [
        ([1.0], TypeError, "^log_ratios is a list; expected a tensor"),
        (tensor([1]), TypeError, "^log_ratios has dtype torch.int64; expected floating point"),
        (tensor(1.0), ValueError, r"^log_ratios has shape \(\); expected \(n,\)"),
        (torch.zeros(2, 2), ValueError, r"^log_ratios has shape \(2, 2\); expected \(n,\)"),
    ],
)
def test_bad_log_ratios_are_named(estimator, log_ratios, error, message):
    with pytest.raises(error, match=message):
        estimator().estimate(log_ratios)


@BOTH
def test_reads_no_value_of_a_tensor(estimator):
    # a meta tensor has no values: reading one, as a host synchronisation would, raises
    assert estimator().estimate(torch.zeros(3, device="meta")).shape == ()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(reference_points, tmp_path_factory.mktemp("ranks"))


def mean(values):
    return sum(values) / len(values)


def test_the_standard_error_is_that_of_the_windows_mean():
    rows = tensor([1.0, 3.0, 5.0, -2.0])
    for estimator in (WindowKL(), EMAKL(decay=0.5)):
        estimator.estimate(rows)
        torch.testing.assert_close(estimator.standard_error, rows.std() / 2)
        estimator.estimate(rows[:1])
        assert estimator.standard_error == 0
    ema = EMAKL()
    ema.estimate(torch.cat([rows, tensor([float("nan")])]))  # a row that is not finite is left out
    torch.testing.assert_close(ema.standard_error, rows.std() / 2)


@pytest.mark.parametrize("case", range(len(LOG_RATIOS)))
def test_two_ranks(two_ranks, case):
    rank_means = [mean(rows) for rows in LOG_RATIOS[case] if rows]
    together = LOG_RATIOS[case][0] + LOG_RATIOS[case][1]
    exact = {
        "micro-batch": max(0.0, mean(rank_means)) if rank_means else 0.0,
        "window": max(0.0, mean(together)) if together else 0.0,
    }
    for rank, results in enumerate(two_ranks):
        own = LOG_RATIOS[case][rank]
        exact["window of this rank"] = max(0.0, mean(own)) if own else 0.0
        for name, value in exact.items():
            one_packed_all_reduce = [(2,)] if name == "micro-batch" else [(3,)]  # with the squares
            assert results[case][name] == (value, value, one_packed_all_reduce), (rank, name)


def test_the_cases_tell_the_estimators_apart(two_ranks):
    assert two_ranks[0][1]["micro-batch"][0] == 4.5
    assert two_ranks[0][1]["window"][0] == 2.75
