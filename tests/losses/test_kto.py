"""kto_loss against numbers written by hand, its closed-form gradient in fp64, and its limits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from prefopt_kernels.losses import kto_loss

LOGPS = [-10.0, -42.5, -7.25, -300.0, -3.0]
REF_LOGPS = [-12.0, -40.0, -7.25, -280.0, -33.0]
LABELS = [True, False, False, True, False]
Z0 = 1.5


def rows(dtype=torch.float32):
    return tensor(LOGPS, dtype=dtype), tensor(REF_LOGPS, dtype=dtype), tensor(LABELS)


def trl_row(logp, ref_logp, label, beta, kl, desirable_weight, undesirable_weight):
    """One row as TRL 1.16 writes it, in Python's own arithmetic."""
    log_ratio = logp - ref_logp
    if label:
        return desirable_weight * (1 - 1 / (1 + math.exp(-beta * (log_ratio - kl))))
    return undesirable_weight * (1 - 1 / (1 + math.exp(-beta * (kl - log_ratio))))


def assert_within_rounding(ours, exact, u_max, largest=0.0):
    """Eight operations, and sigmoid, which turns an error of u into one up to |u| times as large.

    Torch's derivative of s = sigmoid is s * (1 - s): where s is near 1 the second factor has an absolute
    error of eps, so gradients are also given eps of the largest factor before them.
    """
    eps = torch.finfo(ours.dtype).eps
    rtol = (8 + 2 * u_max) * eps
    torch.testing.assert_close(ours, exact.to(ours.dtype), rtol=rtol, atol=eps * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.25), (0.0, 1.0)])
def test_equals_trls_formula(dtype, weights):
    loss = kto_loss(
        *rows(dtype),
        beta=0.1,
        reference_point=Z0,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    exact = [trl_row(*row, 0.1, Z0, *weights) for row in zip(LOGPS, REF_LOGPS, LABELS, strict=True)]
    assert loss.dtype == dtype
    assert_within_rounding(loss, tensor(exact, dtype=torch.float64), u_max=2.85)


def test_numbers_worked_by_hand():
    # u = +-0.1 * (12 - 2) = +-1, and sigmoid(-1) = 0.26894142, sigmoid(1) = 0.73105858
    logps, ref_logps = tensor([-8.0, -8.0]), tensor([-20.0, -20.0])
    loss = kto_loss(logps, ref_logps, tensor([True, False]), beta=0.1, reference_point=2.0)
    assert [round(x, 6) for x in loss.tolist()] == [0.268941, 0.731059]


def test_gradient_is_the_closed_form():
    logps, ref_logps, labels = rows(torch.float64)
    logps.requires_grad_()
    kto_loss(
        logps,
        ref_logps,
        labels,
        beta=0.3,
        reference_point=Z0,
        desirable_weight=1.2,
        undesirable_weight=0.7,
    ).sum().backward()
    exact = []
    for logp, ref_logp, label in zip(LOGPS, REF_LOGPS, LABELS, strict=True):
        s, weight = (1, 1.2) if label else (-1, 0.7)
        sigma = 1 / (1 + math.exp(-s * 0.3 * (logp - ref_logp - Z0)))
        sigma_of_minus = 1 / (1 + math.exp(s * 0.3 * (logp - ref_logp - Z0)))
        exact.append(-s * weight * 0.3 * sigma * sigma_of_minus)
    assert_within_rounding(logps.grad, tensor(exact, dtype=torch.float64), 8.55, largest=1.2 * 0.3)


def test_gradcheck():
    logps, ref_logps, labels = rows(torch.float64)

    def loss(logps, ref_logps):
        return kto_loss(logps, ref_logps, labels, beta=0.2, reference_point=Z0, desirable_weight=3)

    assert torch.autograd.gradcheck(loss, (logps.requires_grad_(), ref_logps.requires_grad_()))


def test_half_the_weight_where_policy_and_reference_agree():
    logps, _, labels = rows()
    loss = kto_loss(
        logps,
        logps,
        labels,
        beta=0.1,
        reference_point=0.0,
        desirable_weight=2.0,
        undesirable_weight=0.5,
    )
    assert loss.tolist() == [1.0, 0.25, 0.25, 1.0, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [1e3, 1e6])
def test_finite_far_away(dtype, distance):
    logps = tensor([distance, -distance, distance, -distance], dtype=dtype, requires_grad=True)
    labels = tensor([True, True, False, False])
    loss = kto_loss(
        logps,
        torch.zeros(4, dtype=dtype),
        labels,
        beta=1.0,
        reference_point=0.0,
        desirable_weight=1.25,
    )
    assert loss.tolist() == [0.0, 1.25, 1.0, 0.0]
    loss.sum().backward()
    assert logps.grad.tolist() == [0.0] * 4


def test_does_not_round_a_good_row_to_zero():
    # 1 - sigmoid(30) is 0 in fp32; sigmoid(-30) is 9.4e-14
    logps = tensor([300.0], requires_grad=True)
    loss = kto_loss(logps, torch.zeros(1), tensor([True]), beta=0.1, reference_point=0.0)
    loss.backward()
    exact = tensor([1 / (1 + math.exp(30))], dtype=torch.float64)
    assert_within_rounding(loss.detach(), exact, u_max=30)
    assert_within_rounding(logps.grad, -0.1 * exact, u_max=30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_the_subtraction(dtype):
    # exact in either dtype, while their difference, -255.6, is not
    logps, ref_logps = tensor([-256.0], dtype=dtype), tensor([-0.4375], dtype=dtype)
    assert (logps - ref_logps).float() != logps.float() - ref_logps.float()
    arguments = {"labels": tensor([True]), "beta": 0.01, "reference_point": 0.0}
    loss = kto_loss(logps, ref_logps, **arguments)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, kto_loss(logps.float(), ref_logps.float(), **arguments))
    too_late = kto_loss((logps - ref_logps).float(), torch.zeros(1), **arguments)
    assert not torch.equal(loss, too_late)


def test_reference_point_as_number_scalar_tensor_or_one_per_row():
    logps, ref_logps, labels = rows()
    number = kto_loss(logps, ref_logps, labels, beta=0.1, reference_point=Z0)
    scalar = kto_loss(logps, ref_logps, labels, beta=0.1, reference_point=tensor(Z0))
    per_row = kto_loss(logps, ref_logps, labels, beta=0.1, reference_point=torch.full((5,), Z0))
    assert torch.equal(number, scalar) and torch.equal(number, per_row)
    moved = kto_loss(logps, ref_logps, labels, beta=0.1, reference_point=tensor([Z0, 9.0, Z0, Z0, Z0]))
    assert (moved != number).tolist() == [False, True, False, False, False]


def test_reference_point_is_a_constant_to_the_gradient():
    logps, ref_logps, labels = rows()
    logps.requires_grad_()
    z0 = (logps - ref_logps).mean().clamp(min=0)
    loss = kto_loss(logps, ref_logps, labels, beta=0.1, reference_point=z0)
    (through_z0,) = torch.autograd.grad(loss.sum(), z0, allow_unused=True)
    assert through_z0 is None


def test_a_nan_row_stays_alone():
    logps, ref_logps, labels = rows()
    logps[1] = math.nan
    loss = kto_loss(logps, ref_logps, labels, beta=0.1, reference_point=Z0)
    assert loss.isnan().tolist() == [False, True, False, False, False]


def test_no_rows():
    empty = torch.zeros(0)
    loss = kto_loss(empty, empty, empty.bool(), beta=0.1, reference_point=0.0)
    assert loss.shape == (0,)


log_ratios = st.floats(-1e6, 1e6, width=32)
# not subnormal: below 1e-38 a product keeps no relative precision
weights = st.one_of(st.just(0.0), st.floats(2**-20, 100, width=32))
betas = st.floats(2**-10, 16, width=32)


@given(r=log_ratios, z0=st.floats(0, 1e4, width=32), beta=betas, weight=weights)
def test_bounded_and_complementary(r, z0, beta, weight):
    logps = tensor([r, r], requires_grad=True)
    loss = kto_loss(
        logps,
        torch.zeros(2),
        tensor([True, False]),
        beta=beta,
        reference_point=z0,
        desirable_weight=weight,
        undesirable_weight=weight,
    )
    eps = torch.finfo(torch.float32).eps
    assert (loss >= 0).all() and (loss <= weight).all()
    # sigmoid(-u) + sigmoid(u) = 1; two sigmoids, two products and the sum each round once
    assert abs(loss.sum().item() - weight) <= 4 * eps * weight
    loss.sum().backward()
    assert logps.grad.isfinite().all()
    # |gradient| <= weight beta / 4, rounding four times on the way
    assert (logps.grad.abs() <= weight * beta / 4 * (1 + 4 * eps)).all()


@given(r=log_ratios, step=st.floats(0, 1e5, width=32), beta=betas, label=st.booleans())
def test_a_desirable_row_gains_by_more_probability_and_another_by_less(r, step, beta, label):
    logps = tensor([r, r + step])
    below, above = kto_loss(logps, torch.zeros(2), tensor([label, label]), beta=beta, reference_point=0.0)
    assert above <= below if label else above >= below


def bad(message, error=ValueError, **change):
    return pytest.param(change, error, message, id=message.split(";")[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        bad("logps is a list; expected a tensor of shape (B,)", TypeError, logps=[1.0]),
        bad("logps has shape (5, 1); expected (B,)", logps=torch.zeros(5, 1)),
        bad("ref_logps has shape (4,); expected that of logps, (5,)", ref_logps=torch.zeros(4)),
        bad("ref_logps has shape (); expected (B,)", ref_logps=torch.zeros(())),
        bad("labels has shape (2,); expected that of logps, (5,)", labels=tensor([True, False])),
        bad("logps has dtype torch.int64; expected floating", TypeError, logps=torch.arange(5)),
        bad("labels has dtype torch.int64; expected torch.bool", TypeError, labels=torch.arange(5)),
        bad(
            "labels is on meta; expected cpu, where logps is",
            labels=torch.zeros(5, dtype=torch.bool, device="meta"),
        ),
        bad("beta is 0; expected a finite number above 0", beta=0),
        bad("beta is -0.1; expected a finite number above 0", beta=-0.1),
        bad("beta is nan; expected a finite number above 0", beta=math.nan),
        bad("beta is inf; expected a finite number above 0", beta=math.inf),
        bad("beta is a Tensor; expected a finite number above 0", TypeError, beta=tensor(0.1)),
        bad("beta is a bool; expected a finite number above 0", TypeError, beta=True),
        bad("desirable_weight is -1; expected a finite number, 0 or above", desirable_weight=-1),
        bad("undesirable_weight is inf; expected a finite", undesirable_weight=math.inf),
        bad("reference_point is nan; expected a finite number", reference_point=math.nan),
        bad("reference_point is a NoneType; expected a finite", TypeError, reference_point=None),
        bad("reference_point has shape (1,); expected () or (5,)", reference_point=torch.zeros(1)),
        bad("reference_point has dtype torch.int64", TypeError, reference_point=tensor(1)),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    logps, ref_logps, labels = rows()
    arguments = {"logps": logps, "ref_logps": ref_logps, "labels": labels}
    arguments |= {"beta": 0.1, "reference_point": 0.0} | change
    with pytest.raises(error) as caught:
        kto_loss(**arguments)
    assert str(caught.value).startswith(message)


def test_reads_no_value_of_a_tensor():
    # a meta tensor has no values: reading one, as a host synchronisation would, raises
    logps = torch.zeros(5, device="meta")
    loss = kto_loss(
        logps,
        logps,
        logps.bool(),
        beta=0.1,
        reference_point=torch.zeros((), device="meta"),
    )
    assert loss.shape == (5,)


def test_compiles_without_a_graph_break():
    logps, ref_logps, labels = rows()
    compiled = torch.compile(kto_loss, fullgraph=True, backend="eager")
    arguments = {"beta": 0.1, "reference_point": tensor(Z0)}
    assert torch.equal(
        compiled(logps, ref_logps, labels, **arguments),
        kto_loss(logps, ref_logps, labels, **arguments),
    )
