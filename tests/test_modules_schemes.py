"""Which scheme FusedLinearKTOLoss uses, and what it refuses."""

import warnings

import pytest
import torch
from torch import tensor

from prefopt_kernels import modules
from prefopt_kernels.modules import FusedLinearKTOLoss
from prefopt_kernels.parallel import dtensor as sharded_head
from test_modules import KL, H, T, V, batch, leaves, without
from test_modules_chunked import TRAINED, step


@pytest.fixture
def schemes(monkeypatch):
    """The scheme of each step that ran."""
    ran = []

    def spy(name, function):
        def call(*args, **kwargs):
            if torch.is_grad_enabled() or name == "chunked":
                ran.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(modules, "chunked_head", spy("chunked", modules.chunked_head))
    monkeypatch.setattr(sharded_head, "linear_logprob", spy("op", sharded_head.linear_logprob))
    return ran


@pytest.mark.parametrize("scheme", ["auto", "op", "chunked"])
def test_the_op_runs_without_a_gradient_for_the_head(scheme, schemes):
    step(scheme, leaves(batch(), ("hidden",)))
    module = FusedLinearKTOLoss(beta=0.3, scheme=scheme)
    with torch.no_grad():
        module(**leaves(batch(), TRAINED), kl_log_ratio=tensor(KL))
    assert schemes == ["op"]


def test_auto_on_the_cpu_is_the_op(schemes):
    step("auto", leaves(batch(), TRAINED))
    assert schemes == ["op"]


def test_auto_uses_chunks_and_warns_where_it_cannot(schemes, monkeypatch):
    monkeypatch.setattr(modules, "_chunks_pay", lambda hidden, backend: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step("auto", leaves(batch(), TRAINED))
    assert schemes == ["chunked"]
    module = FusedLinearKTOLoss(beta=0.3, reduction="none")
    with pytest.warns(UserWarning, match="four products instead of three: the reduction is 'none'"):
        module(**leaves(batch(), TRAINED), kl_log_ratio=tensor(KL))
    half = leaves(batch(torch.float16), TRAINED)
    with pytest.warns(UserWarning, match="four products instead of three: fp16"):
        step("auto", half)
    assert schemes == ["chunked", "op", "op"]


@pytest.mark.parametrize(
    ("place", "H", "backend", "environment", "pays"),
    [
        ("cuda", 4096, "auto", None, True),
        ("cuda", 4095, "auto", None, False),
        ("cuda", 4096, "triton", None, False),
        ("cuda", 4096, "auto", "reference", False),
        ("cuda", 4096, "auto", "auto", True),
        ("cpu", 4096, "auto", None, False),
    ],
)
def test_where_chunks_pay(place, H, backend, environment, pays, monkeypatch):
    class Hidden:  # as much of a tensor as the choice reads, on a device this machine may lack
        is_cuda, shape = place == "cuda", (1, H)

    monkeypatch.delenv("PREFOPT_BACKEND", raising=False)
    if environment is not None:
        monkeypatch.setenv("PREFOPT_BACKEND", environment)
    assert modules._chunks_pay(Hidden(), backend) is pays


@pytest.mark.parametrize(
    ("settings", "dtype", "reason"),
    [
        ({"reduction": "none"}, torch.float32, "the reduction is 'none'"),
        ({}, torch.float16, "fp16 gradients underflow"),
    ],
)
def test_unsupported_chunked_calls_are_refused(settings, dtype, reason):
    module = FusedLinearKTOLoss(beta=0.3, scheme="chunked", **settings)
    with pytest.raises(ValueError, match=f"^scheme 'chunked' cannot run this call: {reason}"):
        module(**leaves(batch(dtype), TRAINED), kl_log_ratio=tensor(KL))


def test_a_compiler_traces_the_op():
    """The scheme "chunked" is refused, because cu_seqlens cannot be read while tracing."""
    module = FusedLinearKTOLoss(beta=0.3, scheme="chunked")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="torch.compile traces the call"):
        compiled(**leaves(batch(), TRAINED), kl_log_ratio=tensor(KL))


def test_unknown_scheme():
    with pytest.raises(ValueError, match=r"^scheme is 'c'; expected one of \('auto', 'op',"):
        FusedLinearKTOLoss(beta=0.3, scheme="c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.full((T,), V)}, rf"targets\[0\] is {V} "),
        ({"weight": torch.zeros(V, H + 1, requires_grad=True)}, r"weight has shape \(13, 8\)"),
    ],
)
def test_invalid_operands(change, message):
    inputs = without(leaves(batch(), TRAINED), *change) | change
    with pytest.raises(ValueError, match=message):
        step("chunked", inputs)
