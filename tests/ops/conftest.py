"""Fixtures of the op tests: every backend of this machine, and the number of threads."""

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


@pytest.fixture(autouse=True)
def threads():
    """One thread, so that a busy machine does not slow thousands of small calls; a test may set another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)
