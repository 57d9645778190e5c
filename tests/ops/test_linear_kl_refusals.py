"""What linear_kl refuses: the documented type, the argument's name, what it got and what it expects."""

import pytest
import torch

from prefopt_kernels import linear_kl
from prefopt_kernels.ops import _extension
from prefopt_kernels.ops.linear_kl import op

T, H, V = 5, 4, 7


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """A backend that is reached is a failure: the call must have been refused before."""

    def reached(*_):
        raise AssertionError("a backend was called")

    for backend in op.BACKENDS.values():
        monkeypatch.setattr(backend, "forward", reached)


def operands(**changed):
    right = {
        "hidden": torch.randn(T, H),
        "weight": torch.randn(V, H),
        "targets": torch.tensor([0, 1, -100, 6, 3]),
        "bias": torch.randn(V),
        "ref_hidden": torch.randn(T, H + 1),
        "ref_weight": torch.randn(V, H + 1),
        "ref_bias": torch.randn(V),
    }
    return {**right, **changed}


def refused(error, message, **changed):
    with pytest.raises(error, match=message) as caught:
        linear_kl(**operands(**changed))
    assert type(caught.value) is error
    assert "\n" not in str(caught.value), "one sentence"


def meta(*shape):
    return torch.empty(shape, device="meta")


TYPES = {
    "hidden is None": ({"hidden": None}, r"hidden is a NoneType; expected a tensor of shape \(T, H\)"),
    "ref_hidden is None": ({"ref_hidden": None}, r"ref_hidden is a NoneType; expected a tensor of shape \(T, H\)"),
    "ref_weight is a module": ({"ref_weight": torch.nn.Linear(H, V)}, "ref_weight is a Linear; expected a tensor"),
    "ref_bias is a float": ({"ref_bias": 1.0}, r"ref_bias is a float; expected a tensor of shape \(V,\)"),
    "ref_hidden of another dtype": (
        {"ref_hidden": torch.zeros(T, H).half(), "ref_weight": torch.zeros(V, H).half(), "ref_bias": None},
        "ref_hidden has dtype torch.float16; expected that of hidden, torch.float32",
    ),
    "ref_weight of another dtype": (
        {"ref_weight": torch.zeros(V, H + 1).half()},
        "ref_weight has dtype torch.float16; expected that of ref_hidden, torch.float32",
    ),
    "ref_hidden of integers": ({"ref_hidden": torch.zeros(T, H + 1).int()}, "ref_hidden has dtype torch.int32"),
    "float targets": ({"targets": torch.zeros(T)}, "targets has dtype torch.float32; expected torch.int64"),
    "temperature of a pair is None": (
        {"temperature": (1.0, None)},
        r"temperature\[1\] is a NoneType; expected a finite number",
    ),
    "softcap is text": ({"softcap": "30"}, "softcap is a str; expected a finite number"),
    "lora is a tensor": ({"lora": torch.zeros(2)}, r"lora is a Tensor; expected \(A, B, scale\)"),
    "ref_lora is of two": ({"ref_lora": (1, 2)}, r"ref_lora is a tuple of 2; expected \(A, B, scale\)"),
}

VALUES = {
    "weight transposed": ({"weight": torch.zeros(H, V)}, r"weight has shape \(4, 7\); expected \(V, 4\)"),
    "ref_hidden of another length": (
        {"ref_hidden": torch.zeros(T + 1, H + 1)},
        r"targets has shape \(5,\); expected \(6,\), one id for each row of ref_hidden",
    ),
    "one head for two widths": (
        {"ref_weight": None},
        r"weight has shape \(7, 4\); expected \(V, 5\), because ref_hidden has shape \(5, 5\)",
    ),
    "another vocabulary": (
        {"ref_weight": torch.zeros(V + 1, H + 1), "ref_bias": None},
        r"ref_weight has shape \(8, 5\); expected 7 rows, the vocabulary of weight",
    ),
    "ref_bias of another length": ({"ref_bias": torch.zeros(3)}, r"ref_bias has shape \(3,\); expected \(7,\)"),
    "ref_weight elsewhere": ({"ref_weight": meta(V, H + 1)}, "ref_weight is on meta; expected cpu"),
    "the reference model elsewhere": (
        {"ref_hidden": meta(T, H + 1), "ref_weight": meta(V, H + 1), "ref_bias": None},
        "targets is on cpu; expected meta, where ref_hidden is",
    ),
    "three temperatures": ({"temperature": (1.0, 1.0, 1.0)}, r"temperature has 3 values; expected one, or a pair"),
    "temperature 0": ({"temperature": 0.0}, "temperature is 0.0; expected a finite number above 0"),
    "the reference model's softcap 0": ({"softcap": (None, 0.0)}, r"softcap\[1\] is 0.0; expected a finite number"),
    "logit_scale infinite": ({"logit_scale": (float("inf"), 1.0)}, r"logit_scale\[0\] is inf; expected a finite"),
    "outputs unknown": ({"outputs": ("kl",)}, r"outputs is \('kl',\); expected a sequence of names out of"),
    "ref_lora of another width": (
        {"ref_lora": (torch.zeros(2, H), torch.zeros(V, 2), 1.0)},
        r"ref_lora's A has shape \(2, 4\); expected \(2, 5\) with a rank of 1 or more",
    ),
    "backend unknown": ({"backend": "cpp"}, r"backend is 'cpp'; expected one of \['auto', "),
}


@pytest.mark.parametrize("case", TYPES)
def test_a_wrong_type(case):
    changed, message = TYPES[case]
    refused(TypeError, message, **changed)


@pytest.mark.parametrize("case", VALUES)
def test_a_wrong_value(case):
    changed, message = VALUES[case]
    refused(ValueError, message, **changed)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_target_outside_the_vocabulary(backend):
    targets = torch.tensor([0, -100, V, 6, 3])
    refused(ValueError, r"targets\[2\] is 7 \(largest 7\); expected ids below V = 7", targets=targets, backend=backend)


def test_a_backend_whose_library_is_missing(monkeypatch):
    monkeypatch.setattr(_extension, "why_not", lambda: "no C++ compiler")
    refused(RuntimeError, "^backend 'cpu' cannot run this call: no C.. compiler$", backend="cpu")


def test_operands_without_data_give_outputs_without_data():
    targets = torch.empty(T, dtype=torch.int64, device="meta")
    out = linear_kl(meta(T, H), meta(V, H), targets, meta(T, H), outputs=("is_top1",))
    assert all(value.shape == (T,) and value.device.type == "meta" for value in out if value is not None)
    assert out.is_top1.dtype == torch.bool


def test_a_right_call_reaches_a_backend():
    for changed in ({}, {"softcap": (None, 30.0), "temperature": (0.7, 1)}):
        with pytest.raises(AssertionError, match="a backend was called"):
            linear_kl(**operands(**changed))
