"""The C++ ops check every tensor that they get, so that a wrong caller cannot write outside of a buffer."""

import pytest
import torch

from prefopt_kernels.ops import _extension
from prefopt_kernels.ops.linear_logprob import cpu

pytestmark = pytest.mark.skipif(_extension.why_not() is not None, reason=f"no kernels: {_extension.why_not()}")

T, H, V = 3, 4, 5


def forward(**changed: torch.Tensor) -> None:
    tensors = {
        "hidden": torch.ones(T, H),
        "weight": torch.ones(V, H),
        "targets": torch.tensor([0, 1, -100]),
        "bias": None,
        "low_hidden": None,
        "low_weight": None,
    } | {name: value for name, value in changed.items() if name not in ("logp", "unit")}
    outputs = [changed.get("logp", torch.zeros(T)), torch.zeros(T), None, None, None, changed.get("unit")]
    _extension.ops().linear_logprob_forward(*tensors.values(), 1.0, 0.0, 1.0, *outputs, cpu.instruction_set())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logp": torch.zeros(T - 1)}, "logp has the wrong shape"),
        ({"logp": torch.zeros(T, dtype=torch.float64)}, "logp has the wrong dtype"),
        ({"logp": torch.zeros(2 * T)[::2]}, "logp is not contiguous"),
        ({"unit": torch.zeros(T, H + 1)}, "unit has the wrong shape"),
        ({"weight": torch.ones(V, H + 1)}, "weight has the wrong shape"),
        ({"weight": torch.ones(V, H).half()}, "weight is not of hidden's dtype"),
        ({"hidden": torch.ones(H, T).T}, "rows of hidden are not contiguous"),
        ({"targets": torch.tensor([0, V, 1])}, "a target is not below the size of the vocabulary"),
        ({"low_hidden": torch.ones(T, 2)}, "low_hidden and low_weight come together"),
    ],
)
def test_a_wrong_tensor_is_refused(changed, message):
    with pytest.raises(RuntimeError, match=message):
        forward(**changed)


def test_a_right_call_runs():
    logp = torch.zeros(T)
    forward(logp=logp)
    torch.testing.assert_close(logp.exp(), torch.tensor([1 / V, 1 / V, 1]))


def test_sequence_loss_checks_its_offsets():
    offsets = torch.tensor([0, 7])
    with pytest.raises(RuntimeError, match="cu_seqlens does not go from 0 to the number of tokens"):
        _extension.ops().sequence_loss_backward(torch.ones(1), None, offsets, torch.ones(1), torch.zeros(5))


def kl_forward(**changed: torch.Tensor) -> None:
    tensors = {
        "hidden": torch.ones(T, H),
        "weight": torch.ones(V, H),
        "targets": torch.tensor([0, 1, -100]),
        **dict.fromkeys(("bias", "low_hidden", "low_weight")),
        "ref_hidden": torch.ones(T, H + 1),
        "ref_weight": torch.ones(V, H + 1),
        **dict.fromkeys(("ref_bias", "ref_low_hidden", "ref_low_weight")),
    }
    outputs = {name: torch.zeros(T) for name in ("logp", "ref_logp", "lse", "ref_lse", "kl")}
    numbers = changed.get("numbers", [1.0, 0.0, 1.0] * 2)
    tensors, outputs = ({name: changed.get(name, value) for name, value in x.items()} for x in (tensors, outputs))
    optional = (None, None, None, None)
    arguments = (*tensors.values(), numbers, *outputs.values(), *optional, cpu.instruction_set())
    _extension.ops().linear_kl_forward(*arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kl": torch.zeros(T - 1)}, "kl has the wrong shape"),
        ({"ref_lse": torch.zeros(2 * T)[::2]}, "ref_lse is not contiguous"),
        ({"ref_weight": torch.ones(V + 1, H + 1)}, "the two models differ in dtype, tokens or vocabulary"),
        ({"ref_hidden": torch.ones(T, H + 1).half(), "ref_weight": torch.ones(V, H + 1).half()}, "the two models"),
        ({"ref_hidden": torch.ones(T + 1, H + 1)}, "targets has the wrong shape"),
        ({"numbers": [1.0] * 5}, "numbers has the wrong size"),
    ],
)
def test_a_wrong_tensor_of_two_models_is_refused(changed, message):
    kl_forward()
    with pytest.raises(RuntimeError, match=message):
        kl_forward(**changed)
