"""sequence_logps against sums in fp64."""

import pytest
import torch
from torch import tensor

from prefopt_kernels.modules import sequence_logps

BOUNDS = [0, 4, 4, 9, 11]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_sequence_logps_sums_each_sequence(dtype):
    logp = torch.arange(1.0, 12.0).neg().requires_grad_()
    logps = sequence_logps(logp, tensor(BOUNDS, dtype=dtype))
    assert logps.dtype == torch.float32
    assert logps.tolist() == [-10.0, 0.0, -35.0, -21.0]
    (logps * tensor([1.0, 7.0, 2.0, 3.0])).sum().backward()
    assert logp.grad.tolist() == [1.0] * 4 + [2.0] * 5 + [3.0] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sequence_logps_rounds_once(dtype):
    generator = torch.Generator().manual_seed(0)
    logp = (-20 * torch.rand(10_000, generator=generator)).to(dtype)
    logps = sequence_logps(logp, tensor([0, 1, 10_000]))
    assert torch.equal(logps, tensor([logp[0].item(), logp[1:].double().sum().item()]))


def test_sequence_logps_of_no_tokens():
    logps = sequence_logps(torch.zeros(0, requires_grad=True), tensor([0, 0, 0]))
    assert logps.tolist() == [0.0, 0.0]
    logps.sum().backward()


def test_an_impossible_token_stays_in_its_sequence():
    logps = sequence_logps(tensor([-1.0, -torch.inf, -3.0, torch.nan, -5.0]), tensor([0, 1, 2, 3, 4, 5]))
    assert logps[[0, 2, 4]].tolist() == [-1.0, -3.0, -5.0]
    assert logps[1] == -torch.inf and logps[3].isnan()


def test_sequence_logps_does_not_synchronise():
    # a meta tensor has no values: reading one, as a host synchronisation would, raises
    logps = sequence_logps(torch.zeros(5, device="meta"), torch.zeros(3, device="meta").long())
    assert logps.shape == (2,)
