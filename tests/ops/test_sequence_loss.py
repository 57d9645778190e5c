"""sequence_loss on every backend: values and gradients against fp64, any packing, extreme numbers, determinism."""

import inspect
import math
from dataclasses import replace

import pytest
import torch

from prefopt_kernels.losses import (
    apo_zero_loss,
    bco_loss,
    enhanced_kto_loss,
    kto_loss,
)
from prefopt_kernels.modules import sequence_logps
from prefopt_kernels.ops import _extension, _launch, _sources
from prefopt_kernels.ops.sequence_loss import SUMS, sequence_loss
from prefopt_kernels.ops.sequence_loss.parameters import OFF, TENSORS, Form, Parameters
from prefopt_kernels.ops.sequence_loss.triton_kernels import backend as backend_triton
from support.sequence_loss import (
    BETA,
    CASES,
    SETTINGS,
    VALUE,
    Problem,
    backends,
    check,
    device,
    ours,
    problem,
)

EXTREME = (-1e6, -3e4, -300.0, -17.0, -1e-3, 0.0, 1e-3, 17.0, 300.0, 3e4, 1e6)


@pytest.fixture(params=backends())
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradient(case, backend):
    made = problem()
    check(made, SETTINGS[case], ours(made, SETTINGS[case], backend))


@pytest.mark.parametrize("through", [("losses",), ("logps",)], ids=str)
def test_gradient_through_one_output(through, backend):
    made = problem(seed=1)
    check(made, SETTINGS["everything"], ours(made, SETTINGS["everything"], backend, through), through)


@pytest.mark.parametrize(("B", "longest"), [(1, 5), (1, 3000), (2, 1), (129, 3), (1000, 4)])
def test_any_number_of_sequences(B, longest, backend):
    """One row, one token, a block of rows and one more, a thousand."""
    made = problem(B, longest=longest)
    check(made, SETTINGS["everything"], ours(made, SETTINGS["everything"], backend))


def test_lengths_are_the_differences_where_none_are_given(backend):
    made = problem(lengths=False)
    assert made.lengths is None
    result = ours(made, SETTINGS["everything"], backend)
    check(made, SETTINGS["everything"], result)
    given = replace(made, lengths=made.cu_seqlens.diff())
    outputs = ours(given, SETTINGS["everything"], backend).outputs
    assert all(torch.equal(a, b) for a, b in zip(outputs, result.outputs, strict=True))


def test_int32_and_strided_inputs_are_the_same_call(backend):
    made = problem()
    double = torch.stack([made.logp, made.logp], 1)
    other = replace(
        made,
        logp=double[:, 1],
        cu_seqlens=made.cu_seqlens.int(),
        lengths=made.lengths.int(),
        ref_logps=torch.stack([made.ref_logps] * 3, 1)[:, 1],
        labels=torch.stack([made.labels] * 3, 1)[:, 1],
    )
    left, right = (ours(each, SETTINGS["everything"], backend) for each in (made, other))
    for a, b in zip((*left.outputs, left.dlogp), (*right.outputs, right.dlogp), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["kto", "bco", "everything"])
def test_empty_sequences(case, backend):
    """At either end and between: an empty sequence has logps 0 and takes no token's place."""
    made = problem(6)
    take = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 0])  # the row that each one copies
    empty = torch.tensor([1, 0, 0, 1, 0, 1, 0, 0, 0, 1], dtype=torch.bool)
    counts = torch.where(empty, 0, made.cu_seqlens.diff()[take])
    names = ("ref_logps", "labels", "lengths", "by_loss", "by_logps")
    packed = replace(
        made,
        cu_seqlens=torch.cat([counts[:1] * 0, counts.cumsum(0)]),
        **{name: getattr(made, name)[take] for name in names},
    )
    settings = SETTINGS[case] | {"decision_mean": 1.25} if case == "everything" else SETTINGS[case]
    result, alone = ours(packed, settings, backend), ours(made, settings, backend)
    assert (result.outputs.logps[empty] == 0).all()
    for name in ("losses", "logps", "log_ratios", "rewards"):
        value = getattr(result.outputs, name)
        assert value.isfinite().all()
        assert torch.equal(value[~empty], getattr(alone.outputs, name)), name
    assert torch.equal(result.dlogp, alone.dlogp)


@pytest.mark.parametrize("case", ["kto", "everything"])
def test_no_tokens_at_all(case, backend):
    rows = torch.zeros(2)
    made = Problem(
        torch.zeros(0),
        torch.tensor([0, 0, 0]),
        rows,
        torch.tensor([True, False]),
        None,
        rows + 1,
        rows + 1,
    )
    result = ours(made, SETTINGS[case], backend)
    assert result.outputs.logps.tolist() == [0, 0]
    assert result.outputs.losses.isfinite().all()
    assert result.dlogp.shape == (0,)


def grid(values=EXTREME) -> Problem:
    """Every log-ratio of ``values`` under both labels, one token each; logps is the log-ratio where negative."""
    ratios = torch.tensor(values).repeat(2)
    logp = ratios.clamp(max=0)
    B = len(ratios)
    labels = torch.arange(B) < B // 2
    one = torch.ones(B)
    return Problem(logp, torch.arange(B + 1), logp - ratios, labels, None, one, 0 * one)


@pytest.mark.parametrize("case", CASES)
def test_extreme_log_ratios(case, backend):
    """Finite everywhere, and what losses/*.py makes of these rows in fp64."""
    made, settings = grid(), SETTINGS[case]
    out = ours(made, settings, backend)
    assert all(value.isfinite().all() for value in (*out.outputs, out.dlogp))
    losses, slopes = by_the_losses(made, settings)
    # In fp32, u has a few roundings, which the loss (BCO's is as large as u) and the slope repeat: |u slope| is below
    # 1, and the slope's own steps are a dozen.
    eps = torch.finfo(torch.float32).eps
    assert ((out.outputs.losses - losses).abs() <= 16 * eps * losses.abs().clamp(min=1)).all()
    assert ((out.dlogp - slopes).abs() <= 16 * eps * slopes.abs().clamp(min=BETA)).all()


def by_the_losses(made: Problem, settings: dict):
    """losses/*.py in fp64 with autograd's slopes."""
    settings = dict(settings)
    method = settings.pop("method")
    logps = made.logp.double().requires_grad_()  # one token for each sequence
    rows = {"logps": logps, "ref_logps": made.ref_logps.double(), "labels": made.labels}
    if method == "enhanced_kto":
        settings.setdefault("reference_point", 0.0)
        rows["lengths"] = made.counts()
    function = {
        "kto": kto_loss,
        "apo_zero": apo_zero_loss,
        "bco": bco_loss,
        "enhanced_kto": enhanced_kto_loss,
    }[method]
    losses = function(**rows, **settings)
    return losses.detach(), torch.autograd.grad(losses.sum(), logps)[0]


def test_a_good_row_is_not_rounded_to_zero(backend):
    """1 - sigmoid(30) is 0 in fp32; sigmoid(-30) is 9.4e-14, and so is the slope over beta."""
    made = grid((300.0,))
    for case in ("apo_zero", "bco"):
        settings = {"method": case, "beta": BETA}
        out = ours(made, settings, backend)
        exact = 1 / (1 + math.exp(30)) if case == "apo_zero" else math.log1p(math.exp(-30))
        # an error of eps in u = 30 is one of 30 eps in exp(-u); beta, r and the rest round a few times
        assert out.outputs.losses[0].item() == pytest.approx(exact, rel=70 * 2.0**-23)
        assert out.dlogp[0].item() == pytest.approx(-BETA * exact, rel=70 * 2.0**-23)


def test_a_policy_that_is_the_reference_model_gets_full_slopes(backend):
    """u = 0 exactly, where every run starts and where textbook powers give NaN."""
    made = problem(8)
    logps = sequence_logps(made.logp, made.cu_seqlens)
    made = replace(made, ref_logps=logps, by_logps=torch.zeros(8), by_loss=torch.ones(8))
    settings = {"method": "enhanced_kto", "beta": BETA, **VALUE}
    out = ours(made, settings, backend)
    sign = torch.where(made.labels, -1.0, 1.0)
    expected = (sign * BETA / 4).repeat_interleave(made.cu_seqlens.diff())
    torch.testing.assert_close(out.dlogp, expected, rtol=4 * 2.0**-23, atol=0)


def test_log_odds_go_on_along_their_tangent(backend):
    """A mean log-probability above -1e-4, up to 0: finite, and a slope of 10,000.5 / T until the bound."""
    logp = torch.tensor([0.0, -5e-5, -9.9e-5])
    one = torch.ones(3)
    made = Problem(logp, torch.arange(4), logp, one < 0, None, one, 0 * one)
    settings = {"method": "enhanced_kto", "beta": BETA, "odds_weight": 1.0}
    out = ours(made, settings, backend)
    m = logp.double()
    edge = torch.tensor(-1e-4, dtype=torch.float64)
    tangent = -1 / torch.expm1(edge)
    odds = edge - torch.log(-torch.expm1(edge)) + tangent * (m - edge)
    exact = 0.5 + torch.log1p(torch.exp(odds))
    slope = BETA / 4 + torch.sigmoid(odds) * tangent
    # 1e-4 is rounded to fp32 by who computes in fp32: an error of 2^-24 in expm1, and 9 + 1 roundings of odds of 9
    torch.testing.assert_close(out.outputs.losses.double(), exact, rtol=8 * 2.0**-23, atol=0)
    torch.testing.assert_close(out.dlogp.double(), slope, rtol=16 * 2.0**-23, atol=0)
    bounded = ours(made, settings | {"odds_bound": 0.2}, backend)
    assert torch.equal(bounded.outputs.losses, out.outputs.losses)
    torch.testing.assert_close(bounded.dlogp, 0 * one + BETA / 4 + 0.2, rtol=4 * 2.0**-23, atol=0)


@pytest.mark.parametrize("name", TENSORS)
def test_a_number_and_a_tensor_are_the_same(name, backend):
    made = problem()
    number = 0.75
    settings = SETTINGS["everything"] | {name: number}
    left = ours(made, settings, backend)
    for dtype in (torch.float32, torch.float64):
        tensor = torch.tensor(number, dtype=dtype, device=device(backend), requires_grad=True)
        right = ours(made, settings | {name: tensor}, backend)
        for a, b in zip((*left.outputs, left.dlogp), (*right.outputs, right.dlogp), strict=True):
            assert torch.equal(a, b)
        assert tensor.grad is None


def test_a_closed_gate_keeps_out_a_shift_that_is_nan(backend):
    made = problem()
    nan = torch.tensor(math.nan, device=device(backend))
    closed = {"shift": nan, "shift_gate": torch.zeros((), device=device(backend))}
    out = ours(made, SETTINGS["everything"] | closed, backend)
    check(made, SETTINGS["everything"] | {"shift": 0.0, "shift_gate": 0.0}, out)


@pytest.mark.parametrize("case", ["kto", "bco", "everything"])
def test_a_nan_stays_in_its_row(case, backend):
    """Also past the mean of the decision weights; the sums of its class have it, the other's do not."""
    made, settings = problem(), SETTINGS[case]
    row = int(made.labels.nonzero()[3])
    begin, end = made.cu_seqlens[row : row + 2].tolist()
    logp = made.logp.clone()
    logp[begin] = math.nan
    out = ours(replace(made, logp=logp), settings, backend)
    rest = torch.arange(60) != row
    for value in out.outputs[:4]:
        assert value.isnan().tolist() == (~rest).tolist()
    inside = torch.zeros(len(logp), dtype=torch.bool)
    inside[begin:end] = True
    assert torch.equal(out.dlogp.isnan(), inside)
    nan_sums = [name for name, value in zip(SUMS, out.outputs.sums, strict=True) if value.isnan()]
    assert nan_sums == ["desirable/rewards", "desirable/logps", "desirable/losses"]
    if case != "everything":  # there the row is missing from the mean
        clean = ours(made, settings, backend)
        assert torch.equal(out.outputs.losses[rest], clean.outputs.losses[rest])


def test_the_same_call_gives_the_same_bits(backend, threads):
    """Repeated, and whatever the number of threads: a sequence's sum belongs to one of them."""
    made = problem(600, longest=300) if backend != "triton" else problem(40, longest=1500)
    results = []
    for number in (1, 1, 2, 4):
        threads(number)
        results.append(ours(made, SETTINGS["everything"], backend))
    if backend == "reference":  # torch's own sums over the rows depend on the threads
        results = results[:2]
    for other in results[1:]:
        first = results[0]
        for a, b in zip((*first.outputs, first.dlogp), (*other.outputs, other.dlogp), strict=True):
            assert torch.equal(a, b)


def test_long_sums_keep_what_fp32_loses(backend):
    """100,000 tokens of -0.1: a running fp32 sum is off by 100 times the last digit."""
    logp = torch.full((100_000,), -0.1)
    out = sequence_loss(
        logp.to(device(backend)),
        torch.tensor([0, 100_000], device=device(backend)),
        torch.tensor([-9990.0], device=device(backend)),
        torch.tensor([True], device=device(backend)),
        beta=BETA,
        backend=backend,
    )
    exact = logp.double().sum()
    assert abs(out.logps.double().cpu() - exact).item() <= 2.0**-24 * abs(exact)


def test_autocast_changes_nothing(backend):
    made = problem()
    plain = ours(made, SETTINGS["everything"], backend)
    with torch.autocast(device(backend), torch.bfloat16):
        cast = ours(made, SETTINGS["everything"], backend)
    for a, b in zip((*plain.outputs, plain.dlogp), (*cast.outputs, cast.dlogp), strict=True):
        assert torch.equal(a, b)


def test_everything_off_is_kto(backend):
    made = problem()
    kto = ours(made, SETTINGS["kto"], backend)
    off = ours(made, SETTINGS["all off"], backend)
    for a, b in zip((*kto.outputs, kto.dlogp), (*off.outputs, off.dlogp), strict=True):
        assert torch.equal(a, b)


def test_the_reference_is_the_losses_bit_for_bit():
    made = problem()
    logps = sequence_logps(made.logp, made.cu_seqlens).requires_grad_()
    for case in ("kto", "everything"):
        settings = dict(SETTINGS[case])
        function = {"kto": kto_loss, "enhanced_kto": enhanced_kto_loss}[settings.pop("method")]
        rows = {"logps": logps, "ref_logps": made.ref_logps, "labels": made.labels}
        if function is enhanced_kto_loss:
            rows["lengths"] = made.lengths
        losses = function(**rows, **settings)
        (slopes,) = torch.autograd.grad((losses * made.by_loss).sum(), logps)
        out = ours(made, SETTINGS[case], "reference", ("losses",))
        assert torch.equal(out.outputs.losses, losses)
        # by_loss enters autograd at one end of the chain or the other
        own = torch.arange(60).repeat_interleave(made.cu_seqlens.diff())
        torch.testing.assert_close(out.dlogp, slopes[own], rtol=16 * 2.0**-23, atol=1e-9)


def test_nothing_reads_a_tensor_of_the_device():
    """Meta tensors have no values: the Triton backend's whole path, launches recorded, waits for nothing."""
    made = problem()
    settings = SETTINGS["everything"] | dict.fromkeys(TENSORS, torch.ones((), device="meta"))
    rows = (made.logp, made.cu_seqlens, made.ref_logps, made.labels, made.lengths)
    logp, *rest = (row.to("meta") for row in rows)
    with _launch.recording() as launches:
        out = backend_forward(logp, rest, settings)
        backend_triton.backward(out[0], out[1], rest[0], out[5], logp.shape[0])
    assert [launch.grid for launch in launches] == [(60,), (1,), (60,)]


def backend_forward(logp, rest, settings):
    form = Form(settings["method"], settings["win_weighting"], settings["decision_weighting"])
    numbers = OFF | settings | {"decision_low": 0.5, "decision_high": 2.0}
    return backend_triton.forward(logp, *rest, form, Parameters(*(numbers[name] for name in Parameters._fields)))


def test_the_defaults_are_off():
    signature = inspect.signature(sequence_loss).parameters
    assert {name: signature[name].default for name in OFF} == OFF
    taken = inspect.signature(enhanced_kto_loss).parameters
    keywords = {name for name, p in taken.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords == {"beta", *OFF}
    for name in keywords - {"beta", "reference_point"}:
        assert taken[name].default == OFF[name], name


def test_the_kernels_are_among_what_is_tested():
    """Where they can be built or imported, a failure to do so is a failure, and not a shorter list of backends."""
    if _sources.build_choice() != "none" and _sources.why_not_compile() is None:
        assert _extension.why_not() is None
        assert "cpu" in backends()
    if backend_triton.MISSING is None:
        assert "triton" in backends()
