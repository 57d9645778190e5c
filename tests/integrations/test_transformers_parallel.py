"""Causal LMs sharded over two gloo processes against the same model on one."""

import functools
import math
from types import SimpleNamespace

import accelerate
import pytest
from accelerate import ParallelismConfig
from torch import nn

from prefopt_kernels.integrations.transformers import adapters as transformers_adapters
from prefopt_kernels.integrations.transformers import (
    completion_logprobs,
    pack_completions,
    patch_forward,
)
from support import parallel_lm_ranks as ranks
from support.causal_lm import make
from support.gloo_ranks import run_ranks

# The stated contract for fp32, whatever the layout: nats, and a part of each gradient's norm.
TOLERANCE = 1e-5

slow = pytest.mark.slow  # two processes import torch, transformers and FSDP2, and train: 20 s


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    folders = {}
    for name in (ranks.TIED, ranks.UNTIED):
        folders[name] = str(tmp_path_factory.mktemp("model"))
        make(name).save_pretrained(folders[name])
    work = functools.partial(ranks.everything, folders=folders)
    return run_ranks(work, tmp_path_factory.mktemp("ranks"))


def assert_exact(worst: dict[str, float]) -> None:
    assert "loss" in worst and len(worst) > 10
    for name, error in worst.items():
        assert error < TOLERANCE, f"{name}: {error:.1e}"


UNTIED = [*ranks.LAYOUTS, "own, (2, 1)", "own, (1, 2)"]


@slow
@pytest.mark.parametrize(
    "layout",
    [(ranks.UNTIED, layout) for layout in UNTIED] + [(ranks.TIED, layout) for layout in ranks.TIED_LAYOUTS],
    ids=", ".join,
)
def test_fsdp2_layouts_train_as_one_process(layout, both):
    for found in both:
        assert_exact(found["fully sharded"][layout])


@slow
@pytest.mark.parametrize("name", [ranks.UNTIED, ranks.TIED])
def test_transformers_sharding_trains_as_one_process(name, both):
    for found in both:
        assert_exact(found["transformers' own"][name])


@slow
@pytest.mark.parametrize("name", [ranks.UNTIED, ranks.TIED])
def test_a_tensor_parallel_model_trains_as_one_process(name, both):
    for found in both:
        assert_exact(found["tensor parallel"][name][0])
    # of 97 rows, and none is gathered
    half = math.ceil(ranks.VOCAB / 2)
    assert [found["tensor parallel"][name][1:] for found in both] == [
        (half, 0),
        (ranks.VOCAB - half, half),
    ]


@slow
def test_two_forward_passes_before_the_backward_passes(both):
    for found in both:
        for name, error in found["scores"]["errors"].items():
            assert error < TOLERANCE, f"{name}: {error:.1e}"
        assert found["scores"]["kept"] == []  # a pass without a backward leaves the head sharded


@slow
def test_bf16_gradients_are_the_same_in_two_layouts(both):
    assert [found["bf16"] for found in both] == [0.0, 0.0]


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_context_parallel_is_refused(name, monkeypatch):
    model = make(ranks.UNTIED).train()
    batch = ranks.rows(0, 0)
    with patch_forward(model):
        config = ParallelismConfig()
        monkeypatch.setattr(config, name, 2)
        monkeypatch.setattr(accelerate.state, "is_initialized", lambda: True)
        state = SimpleNamespace(parallelism_config=config)
        monkeypatch.setattr(accelerate.state, "AcceleratorState", lambda: state)
        with pytest.raises(ValueError, match=f"parallelism_config has {name} 2, which shards every sequence"):
            model(**batch)
        packing = pack_completions(batch["input_ids"], batch["labels"] >= 0)
        with pytest.raises(ValueError, match=f"parallelism_config has {name} 2, which shards every sequence"):
            completion_logprobs(model, batch["input_ids"], None, packing)
        setattr(config, name, 1)
        assert model(**batch).logits is None


def test_trained_tokens_in_a_sharded_head_are_refused():
    """With an attribute of a DTensor, because a real one needs several processes."""
    layer = SimpleNamespace(base_layer=nn.Linear(2, 4, bias=False), disable_adapters=False)
    layer.active_adapters, layer.merged = ["default"], False
    layer.base_layer.weight.device_mesh = "a mesh"
    with pytest.raises(ValueError, match="trainable_token_indices applies to an lm_head that is sharded"):
        transformers_adapters._with_trained_tokens(layer)
