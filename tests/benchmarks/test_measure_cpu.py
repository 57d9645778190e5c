"""The CPU benchmark: turns, percentiles, memory and errors, and one small cell through the whole measurement."""

import json
import math
import sys

import pytest
import torch

from benchmarks.cases import CASES, GRID, memory_target
from benchmarks.measure_cpu import exact_logp, interleaved, main, measure, summary
from benchmarks.rows import origin
from benchmarks.variants import make_inputs
from support.peak_memory import peak_bytes, two_tensors

SMOKE = CASES["smoke"]


def test_the_calls_take_turns():
    order = []

    def call(name):
        order.append(name)
        return len(order)

    seconds, last = interleaved({name: lambda name=name: call(name) for name in "ab"}, rounds=2)
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 2, "b": 2}
    assert "".join(order) == "ba" + "ab" + "ba"  # the first round is not recorded
    assert last == {"a": 6, "b": 5}


def test_percentiles_in_milliseconds():
    measured = summary([0.001 * i for i in (5, 1, 3, 2, 4, 6)])
    assert {name: round(value, 9) for name, value in measured.items()} == {
        "median_ms": 3.5,
        "p20_ms": 2.0,
        "p80_ms": 5.0,
    }


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_counts_what_was_freed_again():
    size = 64 * 2**20
    measured = peak_bytes(two_tensors, size)
    # the larger of the two, and not their sum; reused pages and late counters are far below 8 MiB
    assert abs(measured - size) < 8 * 2**20


def test_exact_logp_is_in_fp64():
    x = make_inputs(SMOKE, 64, "bf16")
    rows = torch.tensor([0, 17, 63])
    z = x.hidden.double() @ x.weight.double().T
    for row, logp in zip(rows, exact_logp(x, rows), strict=True):
        assert logp.dtype == torch.float64
        by_hand = z[row, x.targets[row]] - math.log(sum(math.exp(v) for v in z[row].tolist()))
        # two orders of summation of V terms
        assert abs(logp.item() - by_hand.item()) <= SMOKE.V * torch.finfo(torch.float64).eps


@pytest.mark.slow
def test_a_cell_has_a_row_for_each_variant():
    where, threads = origin(), torch.get_num_threads()
    torch.set_num_threads(1)
    rows = measure(SMOKE, 64, "bf16", ["ours-forward"], 3, where)
    torch.set_num_threads(threads)
    assert [row["variant"] for row in rows] == ["gemm", "ours-forward"]
    unit, ours = rows
    for row in rows:
        assert json.loads(json.dumps(row)) == row and where.items() <= row.items()
        assert (row["case"], row["T"], row["H"], row["V"], row["dtype"]) == ("smoke", 64, SMOKE.H, SMOKE.V, "bf16")
        assert (row["threads"], row["rounds"], row["skipped"]) == (1, 3, None)
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert math.isclose(row["ratio"], row["median_ms"] / unit["median_ms"], rel_tol=1e-12)  # rounding of ms
        assert row["peak_extra_bytes"] > 0
    # bf16 logits of size 1 would carry an error near 1e-3
    assert ours["logp_error"] < 1e-5
    assert ours["backend"] in ("cpu", "reference")


def test_where_the_rows_come_from():
    where = origin()
    assert where["device"].startswith("cpu-") and where["cpu"]
    assert where["versions"]["torch"] == torch.__version__
    assert set(where) >= {"run", "instruction_set", "commit", "dirty"}


def test_bad_options_are_named(capsys):
    for words, message in (
        (["--rounds", "1"], "--rounds is 1; expected 2 or more"),
        (["--who", "x"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert message in capsys.readouterr().err


def test_the_grid_has_the_required_cases():
    assert {(case, T) for case, T, dtype in GRID if dtype == "bf16"} == {
        ("smollm2-360m", 512),
        ("smollm2-360m", 4096),
        ("qwen3-0.6b", 512),
        ("qwen3-0.6b", 4096),
    }


def test_memory_targets():
    case = CASES["qwen3-0.6b"]
    assert memory_target(case, 512, "bf16", "frozen") == (64 + 6) * 2**20
    head_gradient = 151_936 * 1024 * 2
    assert memory_target(case, 512, "bf16", "trainable") == (64 + 6) * 2**20 + head_gradient
    assert memory_target(case, 512, "bf16", "kto-frozen") is None
    assert memory_target(case, 512, "bf16", "trainable", gpu=True) == 300 * 2**20 + head_gradient
