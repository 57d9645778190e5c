"""Causal LMs whose head is spread over two gloo processes against the same model on one."""

import functools
import math

import pytest

import parallel_lm_ranks as ranks
from causal_lm_testing import make
from gloo_ranks import run_ranks

# The stated contract for fp32, whatever the layout: nats, and a part of each gradient's norm.
TOLERANCE = 1e-5

pytestmark = pytest.mark.slow  # two processes import torch, transformers and FSDP2: 15 s


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


@pytest.mark.parametrize(
    "layout",
    [(ranks.UNTIED, layout) for layout in UNTIED]
    + [(ranks.TIED, layout) for layout in ranks.TIED_LAYOUTS],
    ids=", ".join,
)
def test_every_layout_of_fsdp2_trains_as_one_process(layout, both):
    for found in both:
        assert_exact(found["fully sharded"][layout])


@pytest.mark.parametrize("name", [ranks.UNTIED, ranks.TIED])
def test_what_transformers_shards_while_loading_trains_as_one_process(name, both):
    for found in both:
        assert_exact(found["transformers' own"][name])


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


def test_scores_with_forward_passes_before_the_backward_passes(both):
    for found in both:
        for name, error in found["scores"]["errors"].items():
            assert error < TOLERANCE, f"{name}: {error:.1e}"
        assert found["scores"]["kept"] == []  # a pass without a backward leaves the head sharded


def test_the_precision_is_that_of_fsdp2(both):
    assert [found["bf16"] for found in both] == [0.0, 0.0]
