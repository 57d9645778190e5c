"""Fixtures of the op tests: every backend of this machine, and the number of threads."""

import pytest
import torch

from prefopt_kernels.ops.linear_logprob import cpu as backend_cpu
from support.linear_logprob import backends
from support.triton_backend import ON_GPU

# Test files that also run the Triton kernels in the interpreter, which is too slow for all of them. A test marked
# `compiled_only` is too slow for it, or is not about Triton; its reason says what covers the kernels instead.
INTERPRETED = tuple(f"linear_logprob_{name}" for name in ("special", "layouts", "values", "autograd"))


def pytest_generate_tests(metafunc):
    module = metafunc.module
    own = hasattr(module, "backend") or any(
        "backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
    )
    if "backend" in metafunc.fixturenames and not own:
        interpreted = module.__name__.endswith(INTERPRETED) and not ON_GPU
        interpreted &= metafunc.definition.get_closest_marker("compiled_only") is None
        names = [*backends(), "triton"] if interpreted else backends()
        metafunc.parametrize("backend", names, indirect=True)


def pytest_collection_modifyitems(config, items):
    """Triton's interpreter multiplies bf16 wrongly and the backend refuses it: a case of bf16 is not run there."""

    def refused(item) -> bool:
        given = getattr(item, "callspec", None)
        return given is not None and (given.params.get("backend"), given.params.get("dtype")) == (
            "triton",
            torch.bfloat16,
        )

    left_out = [] if ON_GPU else [item for item in items if refused(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not refused(item)]


@pytest.fixture
def backend(request, monkeypatch) -> str:
    """The name of a backend; the C++ one comes once for each instruction set of this machine."""
    name, _, instruction_set = request.param.partition("/")
    if instruction_set:
        monkeypatch.setattr(backend_cpu, "instruction_set", lambda: instruction_set)
    return name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except RuntimeError as error:
        if "Triton's interpreter" in str(error):  # it refuses bf16
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def threads():
    """One thread, so that a busy machine does not slow thousands of small calls; a test may set another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)
