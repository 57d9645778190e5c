"""Fixtures of the op tests: every backend of this machine, a number of threads."""

import pytest
import torch

from linear_logprob_testing import backends
from prefopt_kernels.ops.linear_logprob import backend_cpu


@pytest.fixture(params=backends())
def backend(request, monkeypatch) -> str:
    """The name of a backend; the C++ one comes once for each instruction set of this machine."""
    name, _, instruction_set = request.param.partition("/")
    if instruction_set:
        monkeypatch.setattr(backend_cpu, "instruction_set", lambda: instruction_set)
    return name


@pytest.fixture
def threads():
    """Sets the number of threads, for this test only."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
