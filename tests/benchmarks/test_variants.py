"""The variants: the same numbers from each that runs on a CPU, planted logits, and the variants of a GPU group."""

import functools
import sys
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import CASES, PASSES, Case
from benchmarks.measure_cpu import exact_logp
from benchmarks.tables import GPU_PEERS
from benchmarks.variants import PEERS, TILE, cpu_variants, gpu_group, gpu_variants, make_inputs, planted

SMOKE = CASES["smoke"]
VARIANTS = gpu_variants("reference")
HERE = ["ours"] + [peer for peer in ("torch", "trl", "torch-lce") if PEERS[peer]() is None]


@pytest.mark.parametrize("who", HERE)
@pytest.mark.parametrize("passed", ["forward", "frozen", "trainable"])
def test_each_computes_the_same(who, passed):
    # fp32, where each keeps fp32 logits, of size 1: a few hundred roundings at most
    x = make_inputs(SMOKE, 64, "fp32")
    logp = VARIANTS[f"{who}-{passed}"].run(x)
    exact = exact_logp(x, torch.arange(64))
    assert (logp - exact).abs().max() <= 300 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("passed", ["frozen", "trainable"])
def test_a_filter_changes_no_value(passed):
    x = make_inputs(SMOKE, 256, "fp32", logits="planted")
    skip, exact = (VARIANTS[f"{who}-{passed}"].run(x) for who in ("ours-skip", "ours"))
    assert torch.equal(skip, exact)


@pytest.mark.slow
def test_both_kto_steps_compute_the_same():
    x, variants = make_inputs(SMOKE, 64, "fp32"), cpu_variants()
    losses = {who: variants[f"{who}-kto-frozen"].run(x).item() for who in ("ours", "liger")}
    # beta x 0.25 x the rounding of two sums of 32 log-probabilities near -7, with room
    assert abs(losses["ours"] - losses["liger"]) <= 250 * torch.finfo(torch.float32).eps
    assert VARIANTS["ours-kto-trainable"].run(x).item() == pytest.approx(losses["ours"], rel=1e-5)
    with pytest.raises(ValueError, match="no-such"):
        gpu_variants("no-such")["ours-kto-frozen"].run(x)


def test_bare_products_are_those_of_the_pass():
    x = make_inputs(SMOKE, 64, "fp32")
    for name, products in {"gemm": 1, "gemm-frozen": 2, "gemm-trainable": 3}.items():
        with FlopCounterMode(display=False) as counted:
            assert VARIANTS[name].run(x) is None
        assert counted.get_total_flops() == products * 2 * 64 * SMOKE.H * SMOKE.V


@functools.cache
def planted_probabilities(T: int, H: int, V: int):
    """(T, V) probabilities under planted logits, and the targets."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(V, H, generator=generator).mul_(0.02)
    hidden, targets = planted(T, weight.bfloat16(), generator)
    return (hidden.double() @ weight.double().T).softmax(1), targets


@pytest.mark.parametrize(("T", "V"), [(256, 20 * TILE), (300, 41 * TILE + 17), (128, 700 * TILE)])
def test_planted_logits_are_alive_in_a_fifth_of_the_tiles(T, V):
    p, targets = planted_probabilities(T, 960, V)
    tiles = V // TILE
    block = p[:TILE, : tiles * TILE].reshape(-1, tiles, TILE).amax((0, 2))  # (tiles,)
    assert (block > 2**-12).sum() == tiles // 5
    assert block[block <= 2**-12].max() < 1e-4
    # few tokens share the mass, and the target is one of them
    assert p.gather(1, targets[:, None]).min() > 2**-12
    assert p.topk(8).values.sum(1).min() > 0.99


def test_the_filter_keeps_what_was_planted():
    # the share of tiles that benchmarks.variants.GRAD_FILTER keeps
    p, _ = planted_probabilities(256, 960, 20 * TILE)
    live = p.view(2, TILE, 20, TILE).amax((1, 3)) > 2**-12
    assert live.float().mean() == pytest.approx(0.2, abs=1e-6)


def test_random_logits_are_the_same_as_ever():
    x, y = make_inputs(SMOKE, 64, "fp32"), make_inputs(SMOKE, 64, "fp32", logits="random")
    assert torch.equal(x.hidden, y.hidden) and torch.equal(x.targets, y.targets)
    z = make_inputs(SMOKE, 64, "fp32", logits="planted")
    assert torch.equal(x.weight, z.weight) and not torch.equal(x.hidden, z.hidden)
    assert torch.equal(z.hidden, make_inputs(SMOKE, 64, "fp32", logits="planted").hidden)


def test_a_group_has_ours_the_unit_and_the_peers_asked_for():
    names = list(gpu_group(VARIANTS, "random", ["trl", "compile", "quack"], everything=True))
    assert names[:3] == ["gemm", "gemm-frozen", "gemm-trainable"]
    assert set(names[3:]) == {
        *(f"{who}-{passed}" for who in ("ours", "trl", "compile", "quack") for passed in PASSES),
        *("ours-kto-frozen", "ours-kto-trainable"),
    }
    fewer = gpu_group(VARIANTS, "random", ["trl", "compile", "quack", "liger"], everything=False)
    assert {variant.who for variant in fewer.values()} == {"gemm", "ours", "trl", "liger"}
    assert not any("kto" in name for name in fewer)
    assert list(gpu_group(VARIANTS, "planted", list(PEERS), everything=True)) == [
        *("gemm", "gemm-frozen", "gemm-trainable", "ours-skip-frozen", "ours-skip-trainable"),
        *("ours-frozen", "ours-trainable", "cce-frozen", "cce-trainable"),
    ]


def test_every_peer_has_variants_and_a_title():
    assert {variant.who for variant in VARIANTS.values()} == {"gemm", "ours", "ours-skip", *PEERS}
    assert set(GPU_PEERS) == set(PEERS)


def test_a_peer_without_softcap_has_a_reason(monkeypatch):
    for peer in PEERS:
        monkeypatch.setitem(PEERS, peer, lambda: None)
    capped = Case("capped", "no model", 64, 1000, softcap=30.0)
    without = {name for name, v in VARIANTS.items() if v.why_not(capped) is not None}
    assert without == {
        *(f"{who}-{passed}" for who in ("torch-lce", "liger-sm90", "quack") for passed in PASSES),
        *("liger-kto-frozen", "liger-kto-trainable"),
    }
    assert VARIANTS["liger-kto-frozen"].why_not(capped) == "Liger's KTO loss has no softcap"
    assert VARIANTS["torch-lce-frozen"].why_not(SMOKE) is None


def test_what_needs_too_much_memory_has_a_reason():
    case, variants = CASES["qwen3-0.6b"], cpu_variants()
    reason = variants["torch-frozen"].why_not(case, 4096, available_bytes=4 * 10**9)
    assert reason == "needs about 10.0 GB, 4.0 GB are free"
    assert variants["torch-frozen"].why_not(case, 4096, available_bytes=20 * 10**9) is None
    assert variants["ours-frozen"].why_not(case, 4096, available_bytes=4 * 10**9) is None


def test_absent_peers_have_a_reason(monkeypatch):
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    assert PEERS["torch-lce"]().startswith(f"torch {torch.__version__} has no chunked")
    assert PEERS["torch"]() is None and PEERS["compile"]() is None


def test_quack_computes_the_sum(monkeypatch):
    reductions = []

    def chunked_linear_cross_entropy(hidden, weight, targets, *, reduction):
        reductions.append(reduction)
        logp = (hidden @ weight.T).log_softmax(1)
        return -logp.gather(1, targets[:, None]).sum()

    module = ModuleType("quack.linear_cross_entropy")
    module.chunked_linear_cross_entropy = chunked_linear_cross_entropy
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", module)
    for passed in PASSES:
        assert VARIANTS[f"quack-{passed}"].run(make_inputs(SMOKE, 64, "fp32")) is None
    assert reductions == ["sum"] * 3
