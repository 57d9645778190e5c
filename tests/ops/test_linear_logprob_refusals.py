"""What linear_logprob refuses: the documented type, the argument's name, what it got and what it expects."""

import math
import re

import pytest
import torch

from prefopt_kernels import explain, linear_logprob
from prefopt_kernels.ops import _extension
from prefopt_kernels.ops.linear_logprob import cpu as backend_cpu
from prefopt_kernels.ops.linear_logprob import reference as backend_reference
from prefopt_kernels.ops.linear_logprob.op import BACKENDS
from prefopt_kernels.ops.linear_logprob.triton_kernels import backend as backend_triton

T, H, V = 5, 4, 7


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """A backend that is reached is a failure: the call must have been refused before."""

    def reached(*_):
        raise AssertionError("a backend was called")

    for backend in (backend_reference, backend_cpu):
        monkeypatch.setattr(backend, "forward", reached)


def arguments(**changed):
    right = {
        "hidden": torch.randn(T, H),
        "weight": torch.randn(V, H),
        "targets": torch.tensor([0, 1, -100, 6, 3]),
        "bias": torch.randn(V),
    }
    return {**right, **changed}


def refused(error, message, **changed):
    with pytest.raises(error, match=message) as caught:
        linear_logprob(**arguments(**changed))
    assert type(caught.value) is error
    assert "\n" not in str(caught.value), "one sentence"


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def sparse(*shape):
    return torch.zeros(shape).to_sparse()


TYPES = {
    "hidden is None": (
        {"hidden": None},
        r"hidden is a NoneType; expected a tensor of shape \(T, H\)",
    ),
    "weight is a module": (
        {"weight": torch.nn.Linear(H, V)},
        r"weight is a Linear; expected a tensor of shape \(V, H\)",
    ),
    "targets is a list": (
        {"targets": [1, 2]},
        r"targets is a list; expected a tensor of shape \(T,\)",
    ),
    "bias is a float": ({"bias": 1.0}, r"bias is a float; expected a tensor of shape \(V,\)"),
    "complex": (
        {"hidden": torch.zeros(T, H, dtype=torch.complex64)},
        "hidden has dtype torch.complex64; expected one of torch.float32, torch.bfloat16, torch.float16",
    ),
    "integer hidden": (
        {"hidden": torch.zeros(T, H, dtype=torch.int64)},
        "hidden has dtype torch.int64; expected one of torch.float32",
    ),
    "float64": (
        {"hidden": torch.zeros(T, H, dtype=torch.float64)},
        "hidden has dtype torch.float64; expected one of torch.float32",
    ),
    "weight of another dtype": (
        {"weight": torch.zeros(V, H, dtype=torch.bfloat16)},
        "weight has dtype torch.bfloat16; expected that of hidden, torch.float32",
    ),
    "bias of another dtype": (
        {"bias": torch.zeros(V, dtype=torch.float16)},
        "bias has dtype torch.float16; expected that of hidden, torch.float32",
    ),
    "float targets": (
        {"targets": torch.zeros(T)},
        "targets has dtype torch.float32; expected torch.int64 or torch.int32",
    ),
    "bool targets": ({"targets": torch.zeros(T, dtype=torch.bool)}, "targets has dtype torch.bool"),
    "sparse weight": (
        {"weight": sparse(V, H)},
        "weight has layout torch.sparse_coo; expected a strided",
    ),
    "sparse hidden": (
        {"hidden": sparse(T, H)},
        "hidden has layout torch.sparse_coo; expected a strided",
    ),
    "logit_scale is text": ({"logit_scale": "1"}, "logit_scale is a str; expected a finite number"),
    "logit_scale is a tensor": (
        {"logit_scale": torch.ones(())},
        "logit_scale is a Tensor; expected a finite number",
    ),
    "temperature is None": ({"temperature": None}, "temperature is a NoneType; expected a finite number"),
    "softcap is a bool": ({"softcap": True}, "softcap is a bool; expected a finite number"),
}

VALUES = {
    "hidden of three dimensions": (
        {"hidden": torch.zeros(2, T, H)},
        r"hidden has shape \(2, 5, 4\); expected \(T, H\)",
    ),
    "hidden of one dimension": (
        {"hidden": torch.zeros(H)},
        r"hidden has shape \(4,\); expected \(T, H\)",
    ),
    "weight of one dimension": (
        {"weight": torch.zeros(H)},
        r"weight has shape \(4,\); expected \(V, H\)",
    ),
    "targets of two dimensions": (
        {"targets": torch.zeros(1, T, dtype=torch.int64)},
        r"targets has shape \(1, 5\); expected \(T,\)",
    ),
    "bias of two dimensions": (
        {"bias": torch.zeros(1, V)},
        r"bias has shape \(1, 7\); expected \(V,\)",
    ),
    "weight transposed": (
        {"weight": torch.zeros(H, V)},
        r"weight has shape \(4, 7\); expected \(V, 4\), because hidden has shape \(5, 4\)",
    ),
    "no vocabulary": (
        {"weight": torch.zeros(0, H), "bias": None},
        r"weight has shape \(0, H\); expected a vocabulary of at least one token",
    ),
    "targets of another length": (
        {"targets": torch.zeros(T + 1, dtype=torch.int64)},
        r"targets has shape \(6,\); expected \(5,\), one id for each row of hidden",
    ),
    "bias of another length": (
        {"bias": torch.zeros(V - 1)},
        r"bias has shape \(6,\); expected \(7,\), one for each token id",
    ),
    "weight elsewhere": (
        {"weight": meta(V, H)},
        "weight is on meta; expected cpu, where hidden is",
    ),
    "targets elsewhere": (
        {"targets": meta(T, dtype=torch.int64)},
        "targets is on meta; expected cpu, where hidden is",
    ),
    "bias elsewhere": ({"bias": meta(V)}, "bias is on meta; expected cpu, where hidden is"),
    "logit_scale infinite": (
        {"logit_scale": math.inf},
        "logit_scale is inf; expected a finite number",
    ),
    "logit_scale NaN": ({"logit_scale": math.nan}, "logit_scale is nan; expected a finite number"),
    "temperature 0": ({"temperature": 0}, "temperature is 0; expected a finite number above 0"),
    "temperature negative": (
        {"temperature": -1.0},
        "temperature is -1.0; expected a finite number above 0",
    ),
    "softcap 0": ({"softcap": 0.0}, "softcap is 0.0; expected a finite number above 0"),
    "softcap infinite": ({"softcap": math.inf}, "softcap is inf; expected a finite number above 0"),
    "outputs is text": (
        {"outputs": "entropy"},
        r"outputs is 'entropy'; expected a sequence of names out of \('entropy', 'mean_logit', 'is_top1'\)",
    ),
    "outputs unknown": (
        {"outputs": ("entropy", "logp")},
        r"outputs is \('entropy', 'logp'\); expected",
    ),
    "backend unknown": (
        {"backend": "cpp"},
        r"backend is 'cpp'; expected one of \['auto', 'cpu', 'triton', 'reference'\]",
    ),
}


@pytest.mark.parametrize("case", TYPES)
def test_a_wrong_type(case):
    changed, message = TYPES[case]
    refused(TypeError, message, **changed)


@pytest.mark.parametrize("case", VALUES)
def test_a_wrong_value(case):
    changed, message = VALUES[case]
    refused(ValueError, message, **changed)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("wrong", [V, V + 1, 2**31 - 1])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_target_outside_the_vocabulary(backend, wrong, dtype):
    targets = torch.tensor([0, -100, wrong, 6, 3], dtype=dtype)
    message = rf"targets\[2\] is {wrong} \(largest {wrong}\); expected ids below V = 7, or negative ids"
    refused(ValueError, message, targets=targets, backend=backend)


def test_a_target_beyond_32_bits():
    """Not taken for the id that its lower half would be."""
    refused(ValueError, "targets.0. is 4294967297", targets=torch.tensor([2**32 + 1] * T))


@pytest.mark.parametrize("name", ["logit_scale", "temperature", "softcap"])
def test_a_number_that_does_not_fit_fp32(name):
    """1e39 is infinite and 1e-46 is 0 where the logits are computed, so both are refused like these."""
    refused(ValueError, f"{name} is .*; expected a finite number", **{name: 1e39})
    refused(ValueError, f"{name} is .*; expected", **{name: 10**400})
    if name != "logit_scale":  # a scale of 0 is a finite number
        refused(ValueError, f"{name} is .*; expected a finite number above 0", **{name: 1e-46})


def test_a_backend_whose_library_is_missing(monkeypatch):
    monkeypatch.setattr(_extension, "why_not", lambda: "no C++ compiler")
    refused(RuntimeError, "^backend 'cpu' cannot run this call: no C.. compiler$", backend="cpu")


def test_auto_takes_the_reference_where_the_library_is_missing(monkeypatch):
    monkeypatch.setattr(_extension, "why_not", lambda: "no C++ compiler")
    monkeypatch.setattr(backend_triton, "why_not", lambda hidden, weight: "no GPU")
    with pytest.raises(AssertionError, match="a backend was called"):
        linear_logprob(**arguments())
    found = explain(torch.zeros(T, H), torch.zeros(V, H))
    assert found["cpu"] == "no C++ compiler" and found["reference"] is None


def test_a_backend_of_another_device():
    """Operands without data have no C++ kernel, and say so."""
    elsewhere = {"hidden": meta(T, H), "weight": meta(V, H), "bias": meta(V)}
    targets = meta(T, dtype=torch.int64)
    message = "backend 'cpu' cannot run this call: hidden is on meta, the C.. kernels run on the CPU"
    refused(RuntimeError, message, backend="cpu", targets=targets, **elsewhere)


def test_operands_without_data_give_outputs_without_data():
    out = linear_logprob(meta(T, H), meta(V, H), meta(T, dtype=torch.int64), outputs=("is_top1",))
    assert out.logp.shape == (T,) and out.logp.device.type == "meta"
    assert out.is_top1.dtype == torch.bool


def test_explain_names_every_backend():
    found = explain(torch.zeros(T, H), torch.zeros(V, H))
    assert list(found) == list(BACKENDS) == ["cpu", "triton", "reference"]
    assert found["cpu"] == _extension.why_not() and found["reference"] is None
    assert "on meta" in explain(meta(T, H), meta(V, H))["cpu"]


def test_a_right_call_reaches_a_backend():
    """The arguments that every refusal here starts from are right."""
    with pytest.raises(AssertionError, match="a backend was called"):
        linear_logprob(**arguments())


def test_every_message_names_the_argument():
    for changed, message in (*TYPES.values(), *VALUES.values()):
        name = re.match(r"\w+", message).group()
        assert name in changed
