"""The generated tables: the newest rows, targets beside what was reached, nothing edited by hand."""

import json

import pytest

from benchmarks import tables
from benchmarks.rows import keep, newest
from benchmarks.tables import BEGIN, END, render, write_page

README = f"# Title\n\nBefore.\n\n{BEGIN}\n{END}\n\nAfter.\n"
GROUP = ("qwen3-0.6b", 512, "bf16")


def row(variant, *, time="2026-11-20T10:00:00+00:00", skipped=None, **measured):
    """A row with the fields that the tables read."""
    return {
        "run": time,
        "time": time,
        "device": "cpu-x",
        "cpu": "Some CPU",
        "instruction_set": ["avx2", "avx512f"],
        "threads": 2,
        "versions": {"torch": "2.13.0", "triton": None, "liger_kernel": "0.8.5"},
        "commit": "0123456789abcdef",
        "dirty": False,
        "case": GROUP[0],
        "T": GROUP[1],
        "dtype": GROUP[2],
        "variant": variant,
        "skipped": skipped,
        "backend": "cpu" if variant.startswith("ours") else None,
        "median_ms": 130.0,
        "ratio": None,
        "peak_extra_bytes": None,
        "logp_error": None,
    } | measured


ROWS = [
    row("gemm", ratio=1.0, peak_extra_bytes=300 * 2**20),
    row("ours-forward", ratio=0.97, peak_extra_bytes=20 * 2**20, logp_error=2e-6),
    row("torch-forward", ratio=2.25, peak_extra_bytes=900 * 2**20, logp_error=4e-3),
    row("trl-forward", skipped="trl is not installed"),
    row("ours-frozen", ratio=1.83, peak_extra_bytes=80 * 2**20, logp_error=2e-5),
    row("liger-kto-frozen", ratio=9.5),
    row("ours-kto-frozen", ratio=2.5),
]


def lines(text, *cells):
    """The table lines that start with these cells, each as its cells."""
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [line for line in tables if line[: len(cells)] == list(cells)]


@pytest.fixture
def written(tmp_path):
    """Writes the pages from ROWS and returns the exit status and README's text."""
    keep(ROWS, tmp_path)
    for page in (
        "README.md",
        "docs/integrations.md",
        "docs/recipes.md",
        *(f"prefopt_kernels/ops/{op}/README.md" for op in ("linear_kl", "sequence_loss")),
    ):
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(README, encoding="utf-8")

    def run(*arguments):
        status = tables.main(list(arguments), results=tmp_path, root=tmp_path)
        return status, (tmp_path / "README.md").read_text(encoding="utf-8")

    return run


def test_target_beside_reached(written):
    status, text = written()
    assert status == 0
    time, rest = lines(text, "qwen3-0.6b", "512", "bf16")[:3], None
    assert time == [
        ["qwen3-0.6b", "512", "bf16", "130 ms", "forward", "1.0", "0.97", "2.25", "not run", ""],
        ["qwen3-0.6b", "512", "bf16", "130 ms", "forward + backward, frozen head", "1.7"]
        + ["1.83, missed", "", "", ""],
        [
            "qwen3-0.6b",
            "512",
            "bf16",
            "130 ms",
            "KTO step, frozen head",
            "",
            "2.50",
            "",
            "",
            "9.50",
        ],
    ]
    # 64 MiB + 3 x 512 x 1024 x 4 bytes = 70 MiB
    rest = lines(text, "qwen3-0.6b", "512", "bf16")[3:]
    assert rest == [
        ["qwen3-0.6b", "512", "bf16", "forward", "70", "20", "900", "not run", ""]
        + ["1e-05", "2e-06", "4e-03", "not run"],
        ["qwen3-0.6b", "512", "bf16", "forward + backward, frozen head", "70", "80, missed"]
        + ["", "", "", "1e-05", "2e-05, missed", "", ""],
        ["qwen3-0.6b", "512", "bf16", "KTO step, frozen head"] + [""] * 9,
    ]


def test_says_where_the_numbers_come_from(written):
    _, text = written()
    assert (
        "Some CPU (avx2, avx512f), 2 threads, backend cpu; torch 2.13.0, liger-kernel 0.8.5; "
        "2026-11-20, commit 0123456." in text
    )
    assert "- qwen3-0.6b, T 512, bf16, trl-forward: not run, trl is not installed." in text


def test_uncommitted_changes_are_named(tmp_path):
    keep([row("ours-forward", ratio=1.0, dirty=True)], tmp_path)
    assert "commit 0123456 with uncommitted changes." in render(newest(tmp_path))


def test_the_newest_row_counts(written, tmp_path):
    keep([row("ours-frozen", time="2026-11-21T09:00:00+00:00", ratio=1.5)], tmp_path)
    keep([row("ours-forward", time="2026-11-19T09:00:00+00:00", ratio=5.0)], tmp_path)
    _, text = written()
    ratios = {line[4]: line[6] for line in lines(text, "qwen3-0.6b", "512", "bf16", "130 ms")}
    assert ratios["forward + backward, frozen head"] == "1.50"
    assert ratios["forward"] == "0.97"
    assert "2026-11-20, 2026-11-21, commit" in text


def test_the_rest_of_the_readme_stays(written):
    _, text = written()
    assert text.startswith(f"# Title\n\nBefore.\n\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\n\nAfter.\n")


def test_check_changes_nothing_and_fails_until_the_table_is_written(written):
    status, text = written("--check")
    assert (status, text) == (1, README)
    assert written()[0] == 0
    assert written("--check")[0] == 0
    assert written() == written()


def test_check_sees_a_typed_number(written, tmp_path):
    _, text = written()
    (tmp_path / "README.md").write_text(text.replace("1.83, missed", "1.63"), encoding="utf-8")
    assert written("--check")[0] == 1


@pytest.mark.parametrize("text", ["no markers", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN * 2}{END}"])
def test_missing_markers_are_named(text, tmp_path):
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="README.md must have <!-- benchmark:begin -->"):
        write_page(tmp_path / "README.md", "", "x", "rows", check=False)


def test_rows_are_appended(tmp_path):
    path = keep(ROWS[:1], tmp_path)
    assert path == tmp_path / "cpu-x" / "2026-11-20.jsonl"
    first = path.read_text(encoding="utf-8")
    keep(ROWS[1:2], tmp_path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(first)
    assert [json.loads(line) for line in text.splitlines()] == ROWS[:2]


def test_a_broken_row_is_named(tmp_path):
    path = keep(ROWS, tmp_path)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"case": \n')
    with pytest.raises(ValueError, match=rf"{path.name}:{len(ROWS) + 1} is not a JSON object"):
        newest(tmp_path)


def test_the_pages_of_this_checkout_are_generated():
    assert tables.main(["--check"]) == 0


# Trainers


def test_the_trainers_table_has_the_newest_rows(tmp_path):
    for name, speed in (("kto", 10.0), ("dpo", 20.0)):
        for time, factor in (("2026-11-20T11:00:00", 4.0), ("2026-11-20T10:00:00", 3.0)):
            shape = {"op": f"trl_{name}_step", "T": 1024, "layers": 2, "rows": 4, "backend": None}
            rows = [
                row("trl-trainable", time=time, ratio=1.0, tokens_per_second=speed),
                row("ours-trainable", time=time, ratio=1 / factor, tokens_per_second=factor * speed),
                row("prefopt-trainable", time=time, ratio=0.2, tokens_per_second=5 * speed),
            ]
            keep([one | shape for one in rows[: 3 if name == "kto" else 2]], tmp_path)
    text = tables.trainers(tmp_path)
    assert "Some CPU (avx2, avx512f), 2 threads; torch 2.13.0, liger-kernel 0.8.5; 2026-11-20, commit 0123456." in text
    assert "| qwen3-0.6b | KTO | 2 | 4 | 1,024 | bf16 | 10 | 40 | 50 | 4.0 | 5.0 |" in text
    assert "| qwen3-0.6b | DPO | 2 | 4 | 1,024 | bf16 | 20 | 80 |  | 4.0 |  |" in text
    assert text.count("| qwen3-0.6b |") == 2  # the older rows are not shown


# A GPU

GPU = {
    "device": "some-gpu",
    "gpu": {"name": "Some GPU", "architecture": "sm_90", "multiprocessors": 132, "driver": "580.1", "cuda": "13.0"},
    "tests": {"passed": 1234, "failed": 2, "error": 0, "skipped": 5, "finished": True},
    "T": 4096,
    "median_ms": 1.8,
    "tflops": 708.0,
    "state": {
        "before": {"clocks.sm": 1700.0, "clocks.max.sm": 1980.0, "temperature.gpu": 40.0},
        "after": {"clocks.sm": 1800.0, "clocks.max.sm": 1980.0, "temperature.gpu": 55.0},
    },
}
MIB = 2**20
GPU_ROWS = [
    row("gemm", ratio=1.0, **GPU),
    row("gemm-frozen", ratio=2.02, **GPU),
    row("ours-forward", ratio=1.15, peak_extra_bytes=10 * MIB, logp_error=2e-6, **GPU),
    row("ours-frozen", ratio=2.41, peak_extra_bytes=300 * MIB, logp_error=2e-5, **GPU),
    row("ours-trainable", ratio=3.9, peak_extra_bytes=598 * MIB, logp_error=2e-6, **GPU),
    row("trl-frozen", ratio=3.5, peak_extra_bytes=900 * MIB, logp_error=5e-3, **GPU),
    row("trl-trainable", skipped="OutOfMemoryError: CUDA out of memory", **GPU),
    row("gemm/planted", ratio=1.0, **GPU),
    row("ours-frozen/planted", ratio=2.3, **GPU),
    row("ours-skip-frozen/planted", ratio=1.6, keep_rate=0.20000000298, **GPU),
    row("ours-trainable/planted", ratio=3.0, **GPU),
    row("ours-skip-trainable/planted", ratio=2.0, keep_rate=0.4, **GPU),
]
START = ["qwen3-0.6b", "4,096", "bf16", "1.80 ms, 708 TFLOP/s"]
FROZEN, TRAINABLE = "forward + backward, frozen head", "forward + backward, trainable head"


def test_the_steps_table_sets_each_way_beside_the_first_and_trl_patched(tmp_path):
    step = {"model": "a model", "lengths": "short-512", "windows": 1, "peak_extra_bytes": 20 * 2**20}
    speeds = {"trl": 100.0, "trl-patched": 200.0, "ours-padded": 210.0, "ours-exact": 500.0}
    rows = [
        row(who, op="kto_step", tokens_per_second=speed, ratio=200.0 / speed, **step) for who, speed in speeds.items()
    ]
    rows += [row("ours-padded", op="enhanced_kto_step", tokens_per_second=150.0, ratio=1.0, **step)]
    rows += [row("ours-cut", op="enhanced_kto_step", tokens_per_second=300.0, ratio=0.5, **step)]
    keep(rows, tmp_path)
    text = tables.steps(tmp_path)
    found = [line[3:] for line in lines(text, "kto", "a model", "short-512")]
    assert found == [
        ["TRL", "100", "1.00", "0.50", "20"],
        ["TRL patched", "200", "2.00", "1.00", "20"],
        ["micro-batches of the data loader, padded", "210", "2.10", "1.05", "20"],
        ["cut by length, `kl_estimator: exact`", "500", "5.00", "2.50", "20"],
    ]
    found = [line[3:] for line in lines(text, "enhanced_kto", "a model", "short-512")]
    assert found == [
        ["micro-batches of the data loader, padded", "150", "1.00", "", "20"],
        ["cut by length", "300", "2.00", "", "20"],
    ]


def test_the_losses_table_has_the_time_of_one_call(tmp_path):
    shape = {"method": "kto", "sequences": 16, "tokens": 256, "calls": 200}
    keep(
        [row("plain", median_ms=50.0, ratio=1.0, **shape), row("sequence_loss", median_ms=75.0, ratio=1.5, **shape)],
        tmp_path,
    )
    assert lines(tables.losses(tmp_path), "kto") == [["kto", "16", "256", "250", "375", "1.50"]]


def test_a_gpu_has_its_targets_peers_and_planted_logits(tmp_path):
    keep(GPU_ROWS, tmp_path)
    keep(ROWS, tmp_path)
    text = render(newest(tmp_path))
    assert text.index("Some CPU (") < text.index("Some GPU (sm_90")
    assert lines(text, *START) == [
        [*START, "forward", "1.15", "1.15", "", "", ""],
        [*START, FROZEN, "2.40", "2.41, missed", "2.02", "3.50", "1.45"],
        [*START, TRAINABLE, "4.00", "3.90", "", "not run", ""],
        [*START, FROZEN, "2.30", "0.200", "1.60, missed", ""],
        [*START, TRAINABLE, "3.00", "0.400", "2.00", ""],  # a target only where few tiles are kept
    ]
    # the head's gradient has 151,936 x 1,024 x 2 bytes, 296.75 MiB
    assert lines(text, *START[:3], TRAINABLE) == [
        [*START[:3], TRAINABLE, "597", "598, missed", "not run", "1e-05", "2e-06", "not run"]
    ]
    assert "- qwen3-0.6b, T 4,096, bf16, trl-trainable: not run, OutOfMemoryError: CUDA out of memory." in text


def test_the_heading_of_a_gpu(tmp_path):
    keep(GPU_ROWS, tmp_path)
    assert render(newest(tmp_path)).splitlines()[0] == (
        "Some GPU (sm_90, 132 multiprocessors), driver 580.1, CUDA 13.0, backend cpu; torch 2.13.0, "
        "liger-kernel 0.8.5; 2026-11-20, commit 0123456; op tests: 1,234 passed, 2 failed. SM clock 1,700 to 1,800 "
        "MHz, maximum 1,980 to 1,980 MHz; 40 to 55 degrees Celsius; unknown W."
    )
    keep([one | {"state": {"before": {}, "after": {}}} for one in GPU_ROWS], tmp_path / "b")
    assert "Clocks unknown (no nvidia-smi)." in render(newest(tmp_path / "b"))
