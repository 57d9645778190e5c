"""ShiftSchedule: when the gate opens, how fast, and that it goes on from a checkpoint."""

import math

import pytest

from prefopt_kernels.reference_point import ShiftSchedule


def gates(schedule, steps, margins=()):
    result = []
    for step in steps:
        schedule.update(step, margins[step] if step < len(margins) else None)
        result.append(schedule.gate())
    return result


def test_opens_after_the_step_and_ramps_linearly():
    schedule = ShiftSchedule(start_step=3, ramp_steps=4)
    assert schedule.gate() == 0
    assert gates(schedule, range(9)) == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]


def test_without_a_ramp_it_opens_at_once():
    assert gates(ShiftSchedule(start_step=2), range(4)) == [0, 0, 1, 1]


def test_skipped_steps_count():
    assert gates(ShiftSchedule(start_step=10, ramp_steps=10), [0, 15, 20, 25]) == [0, 0, 0.5, 1]


def test_opens_at_a_plateau():
    # the average goes on rising for a while after the margin has stopped, ever more slowly
    margins = [0.1 * step for step in range(20)] + [2.0] * 100
    schedule = ShiftSchedule(patience=5, min_gain=0.05)
    opened = gates(schedule, range(120), margins).index(1.0)
    average = weight = 0.0
    best, best_step = -math.inf, 0
    for step, margin in enumerate(margins):
        average, weight = 0.9 * average + 0.1 * margin, 0.9 * weight + 0.1
        if average / weight > best + 0.05:
            best, best_step = average / weight, step
        if step - best_step == 5:
            break
    assert opened == step and 20 < opened < 60


def test_a_rising_margin_is_no_plateau():
    schedule = ShiftSchedule(patience=3, min_gain=0.05)
    assert set(gates(schedule, range(100), [0.1 * step for step in range(100)])) == {0}


def test_the_step_comes_first_if_it_does():
    margins = [0.1 * step for step in range(50)]
    schedule = ShiftSchedule(start_step=7, patience=3)
    assert gates(schedule, range(50), margins).index(1.0) == 7


def test_a_margin_that_is_missing_or_not_finite_is_left_out():
    plain, holed = ShiftSchedule(patience=3), ShiftSchedule(patience=3)
    for step in range(30):
        plain.update(step, 1.0 if step % 3 == 0 else None)
        holed.update(step, (1.0, math.nan, -math.inf)[step % 3])
        assert plain.gate() == holed.gate()
    assert plain.started_at == 9  # the fourth margin, the third without a gain


def test_goes_on_from_a_checkpoint():
    margins = [min(0.1 * step, 2.0) for step in range(60)]
    settings = {"patience": 4, "min_gain": 0.05, "ramp_steps": 8}
    whole = gates(ShiftSchedule(**settings), range(60), margins)
    assert 0 < whole.index(1.0) < 59
    for cut in (1, 25, whole.index(1.0) - 3, 59):
        first = ShiftSchedule(**settings)
        gates(first, range(cut), margins)
        second = ShiftSchedule(**settings)
        second.load_state_dict(first.state_dict())
        assert second.gate() == first.gate()
        assert gates(second, range(cut, 60), margins) == whole[cut:]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "^start_step and patience are both None; expected at least one"),
        ({"start_step": -1}, ValueError, "^start_step is -1; expected 0 or above"),
        ({"start_step": 1.5}, TypeError, "^start_step is a float; expected an integer"),
        ({"start_step": 1, "ramp_steps": -2}, ValueError, "^ramp_steps is -2; expected 0"),
        ({"start_step": 1, "ramp_steps": None}, TypeError, "^ramp_steps is a NoneType"),
        ({"patience": 0}, ValueError, "^patience is 0; expected 1 or above"),
        ({"patience": 1, "min_gain": -1}, ValueError, "^min_gain is -1; expected a finite"),
        ({"patience": 1, "min_gain": "x"}, TypeError, "^min_gain is a str; expected a finite number"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ShiftSchedule(**arguments)


def test_a_step_never_falls_and_a_state_is_whole():
    schedule = ShiftSchedule(start_step=1)
    schedule.update(5)
    with pytest.raises(ValueError, match="^step is 4; expected 5 or above"):
        schedule.update(4)
    with pytest.raises(ValueError, match=r"^state has the keys \['step'\]; expected exactly"):
        schedule.load_state_dict({"step": 3})
