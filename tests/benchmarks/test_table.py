"""README's table: the newest rows, target beside reached, and nothing typed by hand."""

import json

import pytest

from benchmarks import table
from benchmarks.pages import BEGIN, END, replace
from benchmarks.rows import keep, newest

README = f"# Title\n\nBefore.\n\n{BEGIN}\n{END}\n\nAfter.\n"
GROUP = ("qwen3-0.6b", 512, "bf16")


def row(variant, *, time="2026-11-20T10:00:00+00:00", skipped=None, **measured):
    """As benchmarks.measure makes one, with the fields that the table reads."""
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
    """A README after the table was written from ROWS, and a way to write it again."""
    keep(ROWS, tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(README, encoding="utf-8")

    def run(*arguments):
        status = table.main(list(arguments), results=tmp_path, readme=readme)
        return status, readme.read_text(encoding="utf-8")

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
    assert "commit 0123456 with uncommitted changes." in table.render(newest(tmp_path))


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


def test_no_rows_leave_nothing_between_the_markers(tmp_path):
    assert replace(README, table.render(newest(tmp_path))) == README


@pytest.mark.parametrize(
    "readme",
    ["no markers", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN * 2}{END}"],
)
def test_missing_markers_are_named(readme):
    with pytest.raises(ValueError, match="README.md must have <!-- benchmark:begin -->"):
        replace(readme, "")


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


def test_the_readme_of_this_checkout_is_generated():
    assert table.main(["--check"]) == 0
