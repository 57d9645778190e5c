"""BCO's shifts and the averaged KL against plain Python, in one process and in two; state and evaluation."""

import math

import pytest
import torch
from torch import tensor

from prefopt_kernels.reference_point import EMAKL, CumulativeShift, EMAShift, WindowShift
from support.gloo_ranks import run_ranks
from support.shift_ranks import WINDOWS, shifts

SHIFTS = {"cumulative": CumulativeShift, "window": WindowShift, "ema": EMAShift}
every_shift = pytest.mark.parametrize("estimator", SHIFTS.values(), ids=SHIFTS)
every = pytest.mark.parametrize("estimator", [*SHIFTS.values(), EMAKL], ids=[*SHIFTS, "kl"])
REWARDS, LABELS = tensor([1.0, 3.0, -5.0]), tensor([True, True, False])


def estimate(estimator, rewards, labels, **update):
    """A call of either kind: the KL takes no labels."""
    rows = (rewards,) if isinstance(estimator, EMAKL) else (rewards, labels)
    return estimator.estimate(*rows, **update)


def test_cumulative_is_the_mean_of_every_row_ever_seen():
    generator = torch.Generator().manual_seed(0)
    shift, seen = CumulativeShift(), []
    for n in (2, 16, 1, 7, 16):
        rewards = 5 * torch.randn(n, generator=generator)
        seen += rewards.tolist()
        value = shift.estimate(rewards, torch.rand(n, generator=generator) < 0.5)
        # each update rounds four times, five updates, rewards below 16
        assert value.item() == pytest.approx(sum(seen) / len(seen), abs=20 * 2**-24 * 16)
    assert shift.count.item() == len(seen)


def test_window_is_half_the_sum_of_the_class_means():
    # class means 2 and -5, whatever the share of the classes
    shift = WindowShift()
    assert shift.estimate(REWARDS, LABELS).item() == -1.5
    many = torch.cat([REWARDS[:1] + 1, REWARDS[2:].repeat(9)])
    assert shift.estimate(many, tensor([True] + [False] * 9)).item() == -1.5


def test_ema_is_corrected_for_its_start_per_class():
    decay, shift = 0.75, EMAShift(decay=0.75)
    desirable, undesirable = [4.0, 8.0, None, 2.0], [-4.0, None, -8.0, 0.0]
    for t in range(4):
        rows = [(x, y) for x, y in ((desirable[t], True), (undesirable[t], False)) if x is not None]
        value = shift.estimate(tensor([x for x, _ in rows]), tensor([y for _, y in rows]))
        means = []
        for series in (desirable, undesirable):
            past = [x for x in series[: t + 1] if x is not None]
            weights = [decay ** (len(past) - 1 - i) for i in range(len(past))]
            means.append(sum(w * x for w, x in zip(weights, past, strict=True)) / sum(weights))
        # four updates of at most four roundings, numbers below 16
        assert value.item() == pytest.approx(sum(means) / 2, abs=16 * 2**-24 * 16)


def test_ema_of_the_kl_is_clamped_after_the_average():
    kl = EMAKL(decay=0.5)
    assert kl.estimate(tensor([-6.0, -2.0])).item() == 0
    # (-4 * .25 + 6 * .5) / .75: clamping each window first would give 4
    assert kl.estimate(tensor([6.0])).item() == pytest.approx(2 / 0.75, rel=4 * 2**-24)
    with pytest.raises(ValueError, match=r"^decay is 1; expected a number in \[0, 1\)"):
        EMAKL(decay=1)


def test_without_decay_ema_is_the_window():
    window, ema = WindowShift(), EMAShift(decay=0.0)
    for scale in (1.0, -2.0, 8.0):
        expected = window.estimate(scale * REWARDS, LABELS)
        assert torch.equal(ema.estimate(scale * REWARDS, LABELS), expected)


@every
def test_fp32_and_detached_whatever_comes_in(estimator):
    for dtype in (torch.float64, torch.bfloat16):
        rewards = tensor([256.0, 1.0, 258.0], dtype=dtype, requires_grad=True)
        value = estimate(estimator(), rewards, tensor([True, True, False]))
        assert value.dtype == torch.float32 and value.shape == () and not value.requires_grad
        # 515 and 128.5 have no bf16
        expected = (128.5 + 258) / 2 if estimator in (WindowShift, EMAShift) else 515 / 3
        assert value.item() == pytest.approx(expected, rel=4 * 2**-23)


@every
def test_zero_before_anything_is_seen(estimator):
    one = estimator()
    assert one.value.item() == 0
    none = torch.zeros(0)
    assert estimate(one, none, none.bool()).item() == 0
    assert estimate(one, none, none.bool(), update=False).item() == 0


@every_shift
def test_one_class_alone(estimator):
    one = estimator()
    value = one.estimate(tensor([4.0]), tensor([True])).item()
    assert value == (4 if estimator is CumulativeShift else 0)  # the others wait for both classes


@every
def test_rows_that_are_not_finite_are_left_out(estimator):
    bad = tensor([math.nan, 1.0, 3.0, -math.inf, -5.0, math.inf])
    labels = tensor([True, True, True, False, False, True])
    one, other = estimator(), estimator()
    assert torch.equal(estimate(one, bad, labels), estimate(other, REWARDS, LABELS))
    # and a window of nothing else leaves the average where it was
    before = one.state_dict()
    estimate(one, bad[[0, 3]], labels[[0, 3]])
    for name, value in one.state_dict().items():
        assert torch.equal(value, before[name]), name


@every
def test_evaluation_changes_nothing(estimator):
    one = estimator()
    estimate(one, REWARDS, LABELS)
    before = one.state_dict()
    value = estimate(one, 100 * REWARDS, LABELS, update=False)
    for name, tensor_before in before.items():
        assert torch.equal(getattr(one, name), tensor_before), name
    # the averages answer with what they are; the window's has only this window to go by
    expected = -150 if estimator is WindowShift else before["value"].item()
    assert value.item() == expected


@every
def test_state_survives_a_checkpoint(estimator, tmp_path):
    one = estimator()
    estimate(one, REWARDS, LABELS)
    torch.save(one.state_dict(), tmp_path / "shift.pt")
    restored = estimator()
    restored.load_state_dict(torch.load(tmp_path / "shift.pt", weights_only=True))
    for rewards in (2 * REWARDS, REWARDS[:1]):
        labels = LABELS[: len(rewards)]
        assert torch.equal(estimate(restored, rewards, labels), estimate(one, rewards, labels))
    assert restored.state_dict().keys() == one.state_dict().keys()


@every
def test_state_dict_is_a_copy(estimator):
    one = estimator()
    value = estimate(one, REWARDS + 9, LABELS).item()
    for kept in one.state_dict().values():
        kept.zero_()
    assert one.value.item() == value != 0


@every
def test_bad_state_is_named(estimator):
    one = estimator()
    with pytest.raises(ValueError, match=r"^state has the keys \['step'\]; expected exactly \["):
        one.load_state_dict({"step": tensor(1.0)})
    state = one.state_dict() | {"value": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"^state\['value'\] is of shape \(3,\); expected a 0-dim"):
        one.load_state_dict(state)
    if estimator is EMAShift:
        state = one.state_dict() | {"numerator": torch.zeros(())}
        with pytest.raises(ValueError, match=r"'numerator'\] is of shape \(\); .*of shape \(2,\)"):
            one.load_state_dict(state)


@every
def test_reads_no_value_of_a_tensor(estimator):
    # a meta tensor has no values: reading one, as a host synchronisation would, raises
    rows = torch.zeros(3, device="meta")
    one = estimator()
    assert estimate(one, rows, rows.bool()).device.type == "meta"
    assert estimate(one, rows, rows.bool(), update=False).shape == ()


@every_shift
@pytest.mark.parametrize(
    ("rewards", "labels", "error", "message"),
    [
        ([1.0], LABELS, TypeError, "^rewards is a list; expected a tensor"),
        (tensor([1]), LABELS, TypeError, "^rewards has dtype torch.int64; expected floating"),
        (tensor(1.0), LABELS, ValueError, r"^rewards has shape \(\); expected \(n,\)"),
        (REWARDS, [True], TypeError, "^labels is a list; expected a tensor"),
        (REWARDS, REWARDS, TypeError, "^labels has dtype torch.float32; expected torch.bool"),
        (REWARDS, LABELS[:1], ValueError, r"^labels has shape \(1,\); expected \(3,\)"),
    ],
)
def test_bad_rows_are_named(estimator, rewards, labels, error, message):
    with pytest.raises(error, match=message):
        estimator().estimate(rewards, labels)


@pytest.mark.parametrize("estimator", [EMAShift, EMAKL])
def test_a_bad_decay_is_named(estimator):
    with pytest.raises(ValueError, match=r"^decay is -0.1; expected a number in \[0, 1\)"):
        estimator(decay=-0.1)
    with pytest.raises(TypeError, match="^decay is a str; expected a number"):
        estimator(decay="0.9")


def in_python():
    """The estimators over both ranks' rows together, in Python's arithmetic."""
    total = count = 0.0
    window = ema = kl = 0.0
    sums = {True: [0.0, 0.0], False: [0.0, 0.0], "kl": [0.0, 0.0]}
    for ranks in WINDOWS:
        rows = [
            (x, bool(y)) for rewards, labels in ranks for x, y in zip(rewards, labels, strict=True) if math.isfinite(x)
        ]
        total, count = total + sum(x for x, _ in rows), count + len(rows)
        means = {}
        for key in (True, False, "kl"):
            members = [x for x, y in rows if key in ("kl", y)]
            if members:
                means[key] = sum(members) / len(members)
                N, D = sums[key]
                sums[key] = [0.5 * N + 0.5 * means[key], 0.5 * D + 0.5]
        if True in means and False in means:
            window = (means[True] + means[False]) / 2
        if sums[True][1] and sums[False][1]:
            ema = sum(N / D for N, D in (sums[True], sums[False])) / 2
        if sums["kl"][1]:
            kl = max(0.0, sums["kl"][0] / sums["kl"][1])
        yield {"cumulative": total / count, "window": window, "ema": ema, "kl": kl}


def test_two_ranks(tmp_path):
    shapes = {"cumulative": (2,), "window": (2, 2), "ema": (2, 2), "kl": (3,)}
    for results in run_ranks(shifts, tmp_path):
        for window, (row, exact) in enumerate(zip(results, in_python(), strict=True)):
            for name, (value, kept, calls) in row.items():
                # five windows of at most six roundings, numbers below 16
                assert value == kept == pytest.approx(exact[name], abs=30 * 2**-24 * 16), (
                    window,
                    name,
                )
                assert calls == [shapes[name]], "sums and counts go in one all-reduce"
