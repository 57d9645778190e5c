"""A fixture for tests that patch TRL."""

import os

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["CI"] = "1"  # TRL's trainers ping a server when they are built, unless this is set

import pytest
import trl.trainer.utils as utils

OWN = (utils._ChunkedLogProbFunction, utils._use_triton)


@pytest.fixture(autouse=True)
def unpatched():
    """TRL has its own two functions before and after each test."""
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == OWN
    yield
    found = (utils._ChunkedLogProbFunction, utils._use_triton)
    utils._ChunkedLogProbFunction, utils._use_triton = OWN
    assert found == OWN
