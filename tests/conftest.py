"""What every test shares: no network, a drawing backend without a screen, poisoned memory for the ops."""

import gc
import os

# Set before any test module imports the libraries that read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is first imported: its kernels then run in the interpreter, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says aloud that it found no GPU

OPS = Path(__file__).parent / "ops"


def pytest_collection_finish() -> None:
    """Keep imported modules out of garbage collection: accelerate collects at every start of a training, 0.6 s each."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nan_poison(request):
    """In tests/ops, ``torch.empty`` comes filled with NaN, so that a row nobody wrote is seen."""
    if OPS not in request.path.parents:
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
