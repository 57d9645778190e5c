"""What every loss promises: its dtype, finite values and gradients, bounds, and no look at a tensor's values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from support.losses import LOSSES, call, inputs, value_and_gradients

every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
def test_one_value_per_row_in_fp32(name):
    loss = call(name, inputs(name))
    assert loss.shape == (5,) and loss.dtype == torch.float32


@every_loss
def test_fp64_stays_fp64_and_is_what_fp32_rounds(name):
    fp64 = call(name, inputs(name, torch.float64))
    assert fp64.dtype == torch.float64
    # arguments of exponentials stay below 20 here: (16 + 2 * 20) roundings of values of size one and above
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(call(name, inputs(name)).double(), fp64, rtol=56 * eps, atol=56 * eps)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_first(name, dtype):
    narrow = inputs(name, dtype)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in narrow.items()}
    loss = call(name, narrow)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, call(name, wide))


@every_loss
def test_gradcheck(name):
    tensors = inputs(name, torch.float64)
    # every sequence but the labels and lengths, reference model included; the decision weight is detached
    change = {"decision_weighting": None} if name == "enhanced_kto" else {}
    keys = [key for key, value in tensors.items() if value.is_floating_point()]
    leaves = [tensors[key].requires_grad_() for key in keys]
    # -7.25 twice makes u exactly 0, where loss aversion has a kink: move it
    with torch.no_grad():
        leaves[0][2] -= 0.5
    assert torch.autograd.gradcheck(
        lambda *moved: call(name, tensors | dict(zip(keys, moved, strict=True)), **change), leaves
    )


@every_loss
def test_a_nan_stays_alone(name):
    tensors = inputs(name)
    first = next(iter(tensors))
    tensors[first][1] = math.nan
    loss, gradients = value_and_gradients(name, tensors)
    assert loss.isnan().tolist() == [False, True, False, False, False]
    for gradient in gradients.values():
        assert gradient[[0, 2, 3, 4]].isfinite().all()


@every_loss
def test_no_rows(name):
    empty = {key: value[:0] for key, value in inputs(name).items()}
    loss, gradients = value_and_gradients(name, empty)
    assert loss.shape == (0,) and all(g.shape == (0,) for g in gradients.values())


@every_loss
def test_reads_no_value_of_a_tensor(name):
    # a meta tensor has no values: reading one, as a host synchronisation would, raises
    tensors = {key: value.to("meta") for key, value in inputs(name).items()}
    assert call(name, tensors).shape == (5,)


@every_loss
def test_compiles_without_a_graph_break(name):
    torch.compiler.reset()
    function, _, settings = LOSSES[name]
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    # a number that changes from call to call is a symbol to the compiler from the second one on
    for factor in (1.0, 0.75, 0.5):
        changed = {k: factor * v if type(v) is float else v for k, v in settings.items()}
        ours = compiled(**inputs(name), **changed)
        exact = function(**inputs(name, torch.float64), **changed)
        # a symbol's arithmetic may round in another order than Python's
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(ours.double(), exact, rtol=56 * eps, atol=56 * eps)


@every_loss
def test_each_row_is_on_its_own(name):
    # but for the mean of the decision weights
    change = {"decision_mean": 1.0} if name == "enhanced_kto" else {}
    together = call(name, inputs(name), **change)
    alone = [call(name, {key: value[i : i + 1] for key, value in inputs(name).items()}, **change) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


logps = st.one_of(
    st.floats(-1e6, 0, width=32),
    st.floats(-100, 0, width=32),
    st.sampled_from([0.0, -1e-30, -1e-9, -1e-6, -1e-4, -9.9e-5, -1e-3, -30.0, -1e6, 1e6]),
)
lengths = st.sampled_from([0, 1, 2, 100, 10_000])
ODDS_SLOPE = 1 / -math.expm1(-1e-4)  # where log-odds go on along their tangent

# name: largest |d loss / d logps| of a row, by the tokens of the sequence; None where there is no bound
BOUNDS = {
    "kto": lambda T: 0.1 / 4,
    "apo_zero": lambda T: 0.1 / 4,
    "bco": lambda T: 0.1,
    # weight 1.25, decision weight 4, slope .138, loss aversion; then the odds
    "enhanced_kto": lambda T: 1.25 * 4 * 0.1 * 2.25 * 0.138 + 0.1 * ODDS_SLOPE / T,
    "dpo": lambda T: 0.1,
    "dpo smoothed": lambda T: 0.1 * 0.8,
    "dpo robust": lambda T: 0.1 * 0.8 / 0.6,
    "ipo": None,
    "cpo": lambda T: 0.1 + 0.5 / T,
    "simpo": lambda T: 2.0 / T,
    "orpo": lambda T: (1 + 0.5 * ODDS_SLOPE) / T,
    "sft": lambda T: 1 / T,
}


@every_loss
@given(data=st.data())
def test_finite_and_bounded_for_every_finite_input(name, data):
    tensors = {}
    for key in LOSSES[name][1]:
        values = {"labels": st.booleans()}.get(key, lengths if "lengths" in key else logps)
        tensors[key] = tensor(data.draw(st.lists(values, min_size=2, max_size=2), label=key))
    loss, gradients = value_and_gradients(name, tensors)
    assert loss.isfinite().all()
    for key, gradient in gradients.items():
        assert gradient.isfinite().all(), key
        if BOUNDS[name] is None:
            continue
        T = tensors.get(key.replace("logps", "lengths"), torch.ones(2)).clamp(min=1)
        # each factor of the product rounds once, and so does their sum
        slack = 1 + 16 * torch.finfo(torch.float32).eps
        assert (gradient.abs() <= BOUNDS[name](T) * slack).all(), key


def bad(name, message, error=ValueError, **change):
    return pytest.param(name, change, error, message, id=f"{name}-{message.split(';')[0]}")


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        bad("dpo", "chosen_logps is a list; expected a tensor", TypeError, chosen_logps=[1.0]),
        bad(
            "dpo",
            "rejected_logps has shape (4,); expected that of chosen_logps, (5,)",
            rejected_logps=torch.zeros(4),
        ),
        bad("dpo", "chosen_logps has shape (5, 1); expected (P,)", chosen_logps=torch.zeros(5, 1)),
        bad(
            "ipo",
            "ref_chosen_logps has dtype torch.int64; expected floating",
            TypeError,
            ref_chosen_logps=torch.arange(5),
        ),
        bad(
            "ipo",
            "chosen_lengths has dtype torch.float32; expected integers",
            TypeError,
            chosen_lengths=torch.ones(5),
        ),
        bad(
            "simpo",
            "rejected_lengths has shape (1,); expected (5,), as",
            rejected_lengths=tensor([1]),
        ),
        bad("orpo", "chosen_lengths is a int; expected a tensor", TypeError, chosen_lengths=3),
        bad(
            "cpo",
            "chosen_lengths is on meta; expected cpu",
            chosen_lengths=torch.ones(5, dtype=torch.int64, device="meta"),
        ),
        bad("sft", "logps has shape (); expected (B,)", logps=tensor(1.0)),
        bad("dpo", "beta is 0; expected a finite number above 0", beta=0),
        bad("dpo", "label_smoothing is 0.5; expected a number in [0, 0.5)", label_smoothing=0.5),
        bad("dpo", "label_smoothing is -0.1; expected a number in [0,", label_smoothing=-0.1),
        bad("ipo", "beta is nan; expected a finite number above 0", beta=math.nan),
        bad("cpo", "alpha is -1; expected a finite number, 0 or above", alpha=-1),
        bad("simpo", "gamma is -0.5; expected a finite number, 0 or above", gamma=-0.5),
        bad("simpo", "beta is a str; expected a finite number above 0", TypeError, beta="2"),
        bad("orpo", "odds_weight is inf; expected a finite number", odds_weight=math.inf),
        bad("bco", "shift is nan; expected a finite number", shift=math.nan),
        bad("bco", "shift has dtype torch.int64; expected floating", TypeError, shift=tensor(1)),
        bad("bco", "shift has shape (2,); expected () or (5,)", shift=torch.zeros(2)),
        bad("bco", "beta is -1; expected a finite number above 0", beta=-1),
    ],
)
def test_bad_arguments_are_named(name, change, error, message):
    tensors = inputs(name)
    settings = {key: change[key] for key in change if key not in tensors}
    tensors |= {key: change[key] for key in change if key in tensors}
    with pytest.raises(error) as caught:
        call(name, tensors, **settings)
    assert str(caught.value).startswith(message)
