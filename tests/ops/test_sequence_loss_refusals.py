"""What sequence_loss refuses: the documented type, the argument's name, what it got and what it expects."""

import math
import re

import pytest
import torch

from prefopt_kernels import _backends
from prefopt_kernels.ops import _extension
from prefopt_kernels.ops.sequence_loss import sequence_loss
from prefopt_kernels.ops.sequence_loss.op import BACKENDS
from prefopt_kernels.ops.sequence_loss.triton_kernels import backend as backend_triton

ENHANCED = {"method": "enhanced_kto"}


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """A backend that is reached is a failure: the call must have been refused before."""

    def reached(*_):
        raise AssertionError("a backend was called")

    for backend in BACKENDS.values():
        monkeypatch.setattr(backend, "forward", reached)


def arguments(**changed):
    right = {
        "logp": torch.zeros(5),
        "cu_seqlens": torch.tensor([0, 2, 5]),
        "ref_logps": torch.zeros(2),
        "labels": torch.tensor([True, False]),
        "lengths": torch.tensor([2, 3]),
        "beta": 0.1,
    }
    return {**right, **changed}


def meta(value):
    return torch.as_tensor(value).to("meta")


def bad(message, error=ValueError, **changed):
    return pytest.param(changed, error, message, id=message[:60])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        bad("logp is a list; expected a tensor of shape (T,)", TypeError, logp=[0.0]),
        bad("logp has shape (5, 1); expected (T,)", logp=torch.zeros(5, 1)),
        bad("logp has dtype torch.bfloat16; expected torch.float32", TypeError, logp=torch.zeros(5).bfloat16()),
        bad("logp has dtype torch.float64; expected torch.float32", TypeError, logp=torch.zeros(5).double()),
        bad("logp has layout torch.sparse_coo; expected a strided", TypeError, logp=torch.zeros(5).to_sparse()),
        bad("cu_seqlens is a tuple; expected a tensor of shape (B + 1,)", TypeError, cu_seqlens=(0, 5)),
        bad(
            "cu_seqlens has dtype torch.float32; expected torch.int64 or torch.int32",
            TypeError,
            cu_seqlens=torch.tensor([0.0, 5.0]),
        ),
        bad("cu_seqlens has shape (1,); expected (B + 1,) with at least one sequence", cu_seqlens=torch.tensor([0])),
        bad("cu_seqlens is on meta; expected cpu, where logp is", cu_seqlens=meta([0, 2, 5])),
        bad(
            "cu_seqlens runs from 0 to 4; expected from 0 to T = 5, the rows of logp",
            cu_seqlens=torch.tensor([0, 2, 4]),
        ),
        bad(
            "cu_seqlens runs from 1 to 5; expected from 0 to T = 5, the rows of logp",
            cu_seqlens=torch.tensor([1, 2, 5]),
        ),
        bad(
            "cu_seqlens[2] is 1, below cu_seqlens[1] = 3; expected non-decreasing values",
            cu_seqlens=torch.tensor([0, 3, 1, 5]),
            **{
                n: torch.zeros(3, dtype=d)
                for n, d in (("ref_logps", torch.float32), ("labels", torch.bool), ("lengths", torch.int64))
            },
        ),
        bad("ref_logps has shape (3,); expected (2,)", ref_logps=torch.zeros(3)),
        bad("ref_logps has dtype torch.float16; expected torch.float32", TypeError, ref_logps=torch.zeros(2).half()),
        bad("labels has shape (2, 1); expected (2,)", labels=torch.ones(2, 1) > 0),
        bad("labels has dtype torch.int64; expected torch.bool", TypeError, labels=torch.tensor([1, 0])),
        bad("lengths has dtype torch.float32; expected torch.int64 or torch.int32", TypeError, lengths=torch.ones(2)),
        bad("lengths has shape (1,); expected (2,)", lengths=torch.tensor([5])),
        bad("lengths has -1; expected numbers of tokens, 0 or above", lengths=torch.tensor([2, -1])),
        bad("reference_point is on meta; expected cpu, where logp is", reference_point=meta(1.0)),
        bad("reference_point has shape (2,); expected ()", reference_point=torch.zeros(2)),
        bad("reference_point is nan; expected a finite number or a 0-dim tensor", reference_point=math.nan),
        bad("reference_point is a str; expected a finite number", TypeError, reference_point="0"),
        bad(
            "method is 'kot'; expected one of ('kto', 'apo_zero', 'bco', 'enhanced_kto'); did you mean 'kto'?",
            method="kot",
        ),
        bad("method is None; expected one of", method=None),
        bad("beta is 0; expected a finite number above 0", beta=0),
        bad("beta is a Tensor; expected a finite number above 0", TypeError, beta=torch.tensor(0.1)),
        bad("alpha is 1.5; expected a number in (0, 1]", alpha=1.5, **ENHANCED),
        bad("alpha is 0; expected a number in (0, 1]", alpha=0, **ENHANCED),
        bad("kappa is -1; expected a finite number above 0", kappa=-1, **ENHANCED),
        bad("loss_aversion is inf; expected a finite number above 0", loss_aversion=math.inf, **ENHANCED),
        bad("shift_gate is 1.1; expected a number in [0, 1]", shift_gate=1.1, **ENHANCED),
        bad("shift_bound is 0; expected a finite number above 0", shift_bound=0, **ENHANCED),
        bad("shift has dtype torch.int64; expected floating point", TypeError, shift=torch.tensor(1), **ENHANCED),
        bad(
            "win_weighting is 'prelek'; expected None or one of ('tversky-kahneman', 'prelec'); did you mean 'prelec'?",
            win_weighting="prelek",
            **ENHANCED,
        ),
        bad(
            "decision_weighting is 'tk'; expected None or one of ('tversky-kahneman', 'prelec')",
            decision_weighting="tk",
            **ENHANCED,
        ),
        bad(
            "decision_clip is (-1, 0.5); expected (low, high) with 0 < low <= high", decision_clip=(-1, 0.5), **ENHANCED
        ),
        bad(
            "decision_clip is (2.0, 0.5); expected (low, high) with 0 < low <= high",
            decision_clip=(2.0, 0.5),
            **ENHANCED,
        ),
        bad("decision_clip is 2; expected (low, high)", TypeError, decision_clip=2, **ENHANCED),
        bad("decision_mean is 0; expected a finite number above 0", decision_mean=0, **ENHANCED),
        bad("odds_weight is -0.1; expected a finite number, 0 or above", odds_weight=-0.1, **ENHANCED),
        bad(
            "odds_baseline is a NoneType; expected a finite number or a 0-dim tensor",
            TypeError,
            odds_baseline=None,
            **ENHANCED,
        ),
        bad("desirable_weight is -1; expected a finite number, 0 or above", desirable_weight=-1),
        bad("main_bound is 0; expected a finite number above 0", main_bound=0, **ENHANCED),
        bad("odds_bound is -2; expected a finite number above 0", odds_bound=-2, **ENHANCED),
        bad("shift is 0.5; expected 0.0, because method 'kto' does not take it", shift=0.5),
        bad("alpha is 0.88; expected 1.0, because method 'bco' does not take it", alpha=0.88, method="bco"),
        bad(
            "reference_point is 1.0; expected 0.0, because method 'apo_zero' does not take it",
            reference_point=1.0,
            method="apo_zero",
        ),
        bad(
            "reference_point is a tensor; expected 0.0, because method 'bco'",
            reference_point=torch.tensor(0.0),
            method="bco",
        ),
        bad("desirable_weight is 2.0; expected 1.0, because method 'bco'", desirable_weight=2.0, method="bco"),
        bad(
            "backend is 'trition'; expected one of ['auto', 'cpu', 'triton', 'reference']; did you mean 'triton'?",
            backend="trition",
        ),
    ],
)
def test_refused(changed, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        sequence_loss(**arguments(**changed))
    assert type(caught.value) is error
    assert "\n" not in str(caught.value), "one sentence"


def test_what_is_right_is_not_refused():
    with pytest.raises(AssertionError, match="a backend was called"):
        sequence_loss(**arguments())


def select_backend(logp, backend="auto"):
    return _backends.select_backend(BACKENDS, backend, logp)


def test_a_named_backend_that_cannot_run_says_why():
    logp = torch.zeros(5)
    for name in ("cpu", "triton"):
        with pytest.raises(RuntimeError, match=f"'{name}' cannot run this call: logp is on meta"):
            select_backend(logp.to("meta"), name)
    assert select_backend(logp.to("meta")) == "reference"


def test_the_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("PREFOPT_BACKEND", "reference")
    assert select_backend(torch.zeros(5)) == "reference"
    monkeypatch.setenv("PREFOPT_BACKEND", "cpu")
    monkeypatch.setattr(_extension, "why_not", lambda: "no C++ compiler")
    with pytest.raises(RuntimeError, match="no C.. compiler"):
        select_backend(torch.zeros(5))
    assert select_backend(torch.zeros(5), "reference") == "reference", "a name is stronger"


def test_the_order_of_auto(monkeypatch):
    logp = torch.zeros(5)
    monkeypatch.setattr(_extension, "why_not", lambda: None)
    assert select_backend(logp) == "cpu"
    monkeypatch.setattr(_extension, "why_not", lambda: "no compiler")
    monkeypatch.setattr(backend_triton, "INTERPRETED", False)
    assert select_backend(logp) == "reference"
    with pytest.raises(RuntimeError, match="'cpu' cannot run this call: no compiler"):
        select_backend(logp, "cpu")


def test_where_triton_runs(monkeypatch):
    logp = torch.zeros(5)
    monkeypatch.setattr(backend_triton, "MISSING", None)
    monkeypatch.setattr(backend_triton, "INTERPRETED", True)
    assert backend_triton.why_not(logp) is None
    monkeypatch.setattr(backend_triton, "INTERPRETED", False)
    assert "logp is on cpu" in backend_triton.why_not(logp)
    assert "TRITON_INTERPRET=1" in backend_triton.why_not(logp)
    monkeypatch.setattr(backend_triton, "MISSING", "triton cannot be imported: no")
    assert backend_triton.why_not(logp) == "triton cannot be imported: no"


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_old_devices_are_refused(capability, refused, monkeypatch):
    class OnCuda:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(backend_triton, "MISSING", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = backend_triton.why_not(OnCuda())
    assert reason == ("cuda:0 is sm_75, the Triton kernels need sm_80 or newer" if refused else None)
