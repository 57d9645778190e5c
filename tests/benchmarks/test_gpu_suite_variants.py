"""Who the GPU suite measures: the same numbers from each that runs on a CPU, and logits that are mostly dead."""

import functools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import prefopt_kernels.ops.linear_logprob as op_folder
from benchmarks.cases import CASES, Case
from benchmarks.gpu_table import TITLES
from benchmarks.gpu_variants import PEERS, absent, chosen, gpu_variants, keep_rate, quack
from benchmarks.measure import exact_logp
from benchmarks.variants import TILE, make_inputs, planted

SMOKE = CASES["smoke"]
VARIANTS = gpu_variants("reference")
HERE = [peer for peer in ("ours", "torch", "trl", "torch-lce") if peer not in absent()]


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


@pytest.mark.parametrize("trainable", [False, True])
def test_the_kto_steps_are_ours_on_the_named_backend(trainable):
    name = "kto-trainable" if trainable else "kto-frozen"
    x = make_inputs(SMOKE, 64, "fp32")
    assert 0 < VARIANTS[f"ours-{name}"].run(x).item() < 1
    with pytest.raises(ValueError, match="no-such"):
        gpu_variants("no-such")[f"ours-{name}"].run(x)


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
    # what benchmarks.gpu_variants.GRAD_FILTER leaves in, by the definition of the share
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
    names = list(chosen(VARIANTS, "random", ["trl", "compile", "quack"], everything=True))
    passes = ("forward", "frozen", "trainable")
    assert names[:3] == ["gemm", "gemm-frozen", "gemm-trainable"]
    assert set(names[3:]) == {
        *(f"{who}-{passed}" for who in ("ours", "trl", "compile", "quack") for passed in passes),
        "ours-kto-frozen",
        "ours-kto-trainable",
    }
    fewer = chosen(VARIANTS, "random", ["trl", "compile", "quack", "liger"], everything=False)
    assert {variant.who for variant in fewer.values()} == {"gemm", "ours", "trl", "liger"}
    assert not any("kto" in name for name in fewer)
    assert list(chosen(VARIANTS, "planted", list(PEERS), everything=True)) == [
        *("gemm", "gemm-frozen", "gemm-trainable"),
        *("ours-skip-frozen", "ours-skip-trainable"),
        *("ours-frozen", "ours-trainable"),
        *("cce-frozen", "cce-trainable"),
    ]


def test_every_peer_has_variants_and_a_title():
    assert {variant.who for variant in VARIANTS.values()} == {"gemm", "ours", "ours-skip", *PEERS}
    assert set(TITLES) == set(PEERS)


def test_a_peer_without_softcap_says_so():
    capped = Case("capped", "no model", 64, 1000, softcap=30.0)
    without = {v.who for v in VARIANTS.values() if v.why_not(capped) is not None}
    assert without == {"torch-lce", "liger-sm90", "quack"} | {"liger"}  # Liger: its KTO loss only
    assert VARIANTS["liger-frozen"].why_not(capped) is None
    assert all(VARIANTS[f"torch-lce-{p}"].why_not(SMOKE) is None for p in ("forward", "frozen"))


def test_absent_peers_are_named_with_the_reason(monkeypatch):
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    monkeypatch.setitem(PEERS, "cce", "no_such_package")
    reasons = absent()
    assert reasons["cce"] == "no-such-package is not installed"
    assert reasons["torch-lce"].startswith(f"torch {torch.__version__} has no chunked")
    assert not {"torch", "compile"} & set(reasons)


def test_only_the_sum_is_asked_of_quack(monkeypatch):
    asked = {}

    def chunked_linear_cross_entropy(hidden, weight, targets, *, reduction):
        asked["reduction"] = reduction
        logp = (hidden @ weight.T).log_softmax(1)
        return -logp.gather(1, targets[:, None]).sum()

    module = ModuleType("quack.linear_cross_entropy")
    module.chunked_linear_cross_entropy = chunked_linear_cross_entropy
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", module)
    assert quack(True, make_inputs(SMOKE, 64, "fp32")) is None
    assert asked == {"reduction": "sum"}
    assert VARIANTS["quack-forward"].run(make_inputs(SMOKE, 64, "fp32")) is None


def test_the_keep_rate_asks_the_triton_backend(monkeypatch):
    seen = {}

    def answer(hidden, weight, targets, bias=None, **options):
        seen.update(options, T=targets.shape[0])
        return 0.5

    monkeypatch.setattr(op_folder, "backend_triton", SimpleNamespace(keep_rate=answer), raising=False)
    assert keep_rate(make_inputs(SMOKE, 64, "fp32")) == 0.5
    assert seen == {"grad_filter": 2**-12, "softcap": None, "T": 64}
