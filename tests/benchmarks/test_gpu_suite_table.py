"""The tables of a GPU: targets beside what was reached, and nothing where there are no rows."""

import pytest

from benchmarks import table
from benchmarks.cases import CASES, gpu_memory_target
from benchmarks.gpu_table import gpu_section
from benchmarks.rows import keep, newest
from support.gpu_suite import GPU_ROW

CASE, T, DTYPE = "qwen3-0.6b", 4096, "bf16"
MIB = 2**20


def row(variant, ratio=None, *, skipped=None, time="2026-11-20T10:00:00+00:00", **measured):
    made = GPU_ROW | {
        "time": time,
        "case": CASE,
        "T": T,
        "dtype": DTYPE,
        "logits": "planted" if variant.endswith("/planted") else "random",
        "variant": variant,
        "skipped": skipped,
        "tests": {"passed": 1234, "skipped": 5},
    }
    if skipped is None:
        made |= {
            "backend": "triton" if variant.startswith("ours") else None,
            "median_ms": 1.8,
            "ratio": ratio,
            "tflops": 708.0,
            "peak_extra_bytes": None,
            "logp_error": None,
            "keep_rate": None,
            "state": {
                "before": {"clocks.sm": 1700.0, "clocks.max.sm": 1980.0, "temperature.gpu": 40.0},
                "after": {"clocks.sm": 1800.0, "clocks.max.sm": 1980.0, "temperature.gpu": 55.0},
            },
        }
    return made | measured


ROWS = [
    row("gemm", 1.0, peak_extra_bytes=1200 * MIB),
    row("gemm-frozen", 2.02, peak_extra_bytes=1200 * MIB),
    row("gemm-trainable", 3.05, peak_extra_bytes=1500 * MIB),
    row("ours-forward", 1.15, peak_extra_bytes=10 * MIB, logp_error=2e-6),
    row("ours-frozen", 2.41, peak_extra_bytes=300 * MIB, logp_error=2e-5),
    row("ours-trainable", 3.9, peak_extra_bytes=598 * MIB, logp_error=2e-6),
    row("trl-forward", 1.8, peak_extra_bytes=600 * MIB, logp_error=5e-3),
    row("trl-frozen", 3.5, peak_extra_bytes=900 * MIB, logp_error=5e-3),
    row("trl-trainable", skipped="OutOfMemoryError: CUDA out of memory"),
    row("ours-kto-frozen", 3.2),
    row("gemm/planted", 1.0),
    row("ours-frozen/planted", 2.3),
    row("ours-skip-frozen/planted", 1.6, keep_rate=0.20000000298),
    row("ours-trainable/planted", 3.0),
    row("ours-skip-trainable/planted", 2.0, keep_rate=0.199),
]


def section(rows, folder):
    keep(rows, folder)
    (made,) = newest(folder).values()
    return gpu_section(made)


def lines(text, *cells):
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [line for line in tables if line[: len(cells)] == list(cells)]


@pytest.fixture
def text(tmp_path):
    return section(ROWS, tmp_path)


UNIT = "1.80 ms, 708 TFLOP/s"
FROZEN, TRAINABLE = "forward + backward, frozen head", "forward + backward, trainable head"


def test_targets_beside_what_was_reached(text):
    times = lines(text, CASE, "4,096", UNIT)[:3]
    assert times == [
        [CASE, "4,096", UNIT, "forward", "1.00", "1.15", "1.15, met", "1.80", "", "1.57"],
        [CASE, "4,096", UNIT, FROZEN, "2.02", "2.40", "2.41, missed", "3.50"] + ["at least 1.4", "1.45, met"],
        [CASE, "4,096", UNIT, TRAINABLE, "3.05", "4.00", "3.90, met", "not run", "", ""],
    ]
    (header,) = lines(text, "head", "T", "GEMM", "pass", "bare GEMMs")
    assert header[-5:] == ["H100 target", "ours", "TRL", "TRL / ours: target", "TRL / ours"]


def test_skipping_is_judged_where_few_tiles_are_live(text, tmp_path):
    (frozen,) = lines(text, CASE, "4,096", UNIT, FROZEN, "2.40")
    assert frozen[5:] == ["2.30, met", "0.200", "1.50 up to 0.2 live", "1.60, missed"]
    (trainable,) = lines(text, CASE, "4,096", UNIT, TRAINABLE, "4.00")
    assert trainable[5:] == ["3.00, met", "0.199", "", "2.00"]
    more = [row("ours-frozen/planted", 2.3), row("ours-skip-frozen/planted", 1.6, keep_rate=0.4)]
    (frozen,) = lines(section(more, tmp_path / "more"), CASE, "4,096", "not run", FROZEN)
    assert frozen[-3:] == ["0.400", "1.50 up to 0.2 live", "1.60"]


def test_memory_and_error(text):
    forward, frozen, trainable = (lines(text, CASE, "4,096", title)[0] for title in ("forward", FROZEN, TRAINABLE))
    assert forward[3:] == ["300", "10, met", "600", "1e-05", "2e-06, met", "5e-03"]
    assert frozen[3:] == ["300", "300, met", "900", "1e-05", "2e-05, missed", "5e-03"]
    # 151,936 x 1,024 x 2 bytes are 296.75 MiB
    assert trainable[3:] == ["597", "598, missed", "not run", "1e-05", "2e-06, met", "not run"]
    assert gpu_memory_target(CASES[CASE], DTYPE, "kto-frozen") is None


def test_says_where_the_numbers_come_from(text):
    heading = text.splitlines()[0]
    assert heading == (
        "Some GPU (sm_90, 132 multiprocessors), driver 580.1, CUDA 13.0, backend triton; "
        "torch 2.11.0, triton 3.6.0; 2026-11-20, commit 0123456; op tests passed before it: 1,234. "
        "SM clock around the rounds 1,700 to 1,800 MHz, at most 1,980 to 1,980; "
        "40 to 55 degrees Celsius; unknown W."
    )
    assert "trl-trainable: not run, OutOfMemoryError: CUDA out of memory." in text
    assert lines(text, CASE, "4,096", UNIT, "KTO step, frozen head") == [
        [CASE, "4,096", UNIT, "KTO step, frozen head", "3.20"]
    ]


def test_without_nvidia_smi_the_clocks_are_unknown(tmp_path):
    none = {"before": None, "after": None}
    assert "Clocks unknown" in section([row("ours-forward", 1.1, state=none)], tmp_path)


def test_only_what_was_measured_has_a_table(tmp_path):
    made = section([row("gemm", 1.0), row("ours-forward", 1.2)], tmp_path)
    assert "TRL" not in made and "planted" not in made and "KTO" not in made
    assert section([row("gemm", skipped="OddError: no")], tmp_path / "b").count("|") == 0


def test_ours_that_did_not_run_is_no_number(tmp_path):
    rows = [row("gemm", 1.0), row("ours-forward", skipped="OddError: no"), row("trl-forward", 2.0)]
    made = section(rows, tmp_path)
    assert lines(made, CASE, "4,096", UNIT)[0][4:] == ["1.00", "1.15", "not run", "2.00", "", ""]
    assert "- qwen3-0.6b, T 4,096, bf16, ours-forward: not run, OddError: no." in made


def test_each_device_has_its_own_section(tmp_path):
    cpu = {name: value for name, value in row("ours-forward", 0.97).items() if name not in ("gpu", "tests")}
    cpu |= {"device": "cpu-x", "threads": 2, "backend": "cpu"}
    keep(ROWS, tmp_path)
    keep([cpu], tmp_path)
    made = table.render(newest(tmp_path))
    assert made.index("Some CPU ()") < made.index("Some GPU (sm_90")
    assert lines(made, CASE, "4,096", DTYPE, "", "forward", "1.0", "0.97")
    assert made.endswith("\n")
