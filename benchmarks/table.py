"""The table in README.md, generated from the newest result rows.

python -m benchmarks.table             rewrites it
python -m benchmarks.table --check     exits with 1 if it would change
"""

import argparse
import sys
from pathlib import Path

from benchmarks.cases import (
    CASES,
    DTYPES,
    LOGP_ERROR_TARGET,
    PASSES,
    TIME_TARGETS,
    memory_target,
)
from benchmarks.origin import ROOT
from benchmarks.rows import RESULTS, newest

README = ROOT / "README.md"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
PEERS = ("torch", "trl", "liger")
TITLES = {"torch": "plain torch", "trl": "TRL", "liger": "Liger"}
PASS_TITLES = {
    "forward": "forward",
    "frozen": "forward + backward, frozen head",
    "trainable": "forward + backward, trainable head",
    "kto-frozen": "KTO step, frozen head",
    "kto-trainable": "KTO step, trainable head",
}


def render(devices: dict[str, dict[tuple, dict]]) -> str:
    """Markdown for all devices; empty where there are no rows."""
    return "\n".join(_device(rows) for _, rows in sorted(devices.items()))


def _device(rows: dict[tuple, dict]) -> str:
    groups = sorted({key[:3] for key in rows}, key=_group_order)
    times = [
        _time_line(rows, group, passed)
        for group in groups
        for passed in PASSES
        if (*group, f"ours-{passed}") in rows
    ]
    rest = [
        _rest_line(rows, group, passed)
        for group in groups
        for passed in PASSES
        if (*group, f"ours-{passed}") in rows
    ]
    peers = [TITLES[peer] for peer in PEERS]
    return "\n".join(
        [
            _heading(list(rows.values())),
            "",
            "Time in units of the bare `hidden @ weight.T` of the same rounds, whose own time stands in the",
            "fourth column.",
            "",
            _table(["head", "T", "dtype", "GEMM", "pass", "target", "ours", *peers], times),
            "",
            "Peak memory above the inputs in MiB, and the largest error of a token's log-probability in nats",
            "against fp64 of the same inputs.",
            "",
            _table(
                ["head", "T", "dtype", "pass", "MiB: target", "ours", *peers]
                + ["error: target", "ours", *peers[:2]],
                rest,
            ),
            "",
            *_skipped(rows),
        ]
    )


def _heading(rows: list[dict]) -> str:
    """Machine, threads, backend, versions, days and commits, each of them that a row names."""
    rows = sorted(rows, key=lambda row: row["time"])

    def every(write) -> str:
        return ", ".join(dict.fromkeys(filter(None, map(write, rows))))

    def commit(row: dict) -> str:
        changed = " with uncommitted changes" if row["dirty"] else ""
        return f"{(row['commit'] or 'unknown')[:7]}{changed}"

    versions = ", ".join(
        f"{package.replace('_', '-')} {version}"
        for package, version in rows[-1]["versions"].items()
        if version is not None
    )
    machine = f"{rows[-1]['cpu']} ({', '.join(rows[-1]['instruction_set'])})"
    return (
        f"{machine}, {every(lambda row: str(row['threads']))} threads, "
        f"backend {every(lambda row: row.get('backend'))}; {versions}; "
        f"{every(lambda row: row['time'][:10])}, commit {every(commit)}."
    )


def _time_line(rows: dict, group: tuple, passed: str) -> list[str]:
    case, T, dtype = group
    ours = rows[(*group, f"ours-{passed}")]
    target = TIME_TARGETS.get((passed, dtype))
    gemm = rows.get((*group, "gemm"))
    return [
        *(case, f"{T:,}", dtype),
        "" if gemm is None else f"{gemm['median_ms']:,.0f} ms",
        PASS_TITLES[passed],
        "" if target is None else f"{target:.1f}",
        _against(target, ours.get("ratio"), _ratio),
        *(_cell(rows.get((*group, f"{peer}-{passed}")), "ratio", _ratio) for peer in PEERS),
    ]


def _rest_line(rows: dict, group: tuple, passed: str) -> list[str]:
    case, T, dtype = group
    ours = rows[(*group, f"ours-{passed}")]
    memory = memory_target(CASES[case], T, dtype, passed)
    error = None if passed.startswith("kto") else LOGP_ERROR_TARGET
    peers = [rows.get((*group, f"{peer}-{passed}")) for peer in PEERS]
    return [
        *(case, f"{T:,}", dtype, PASS_TITLES[passed]),
        "" if memory is None else _mib(memory),
        _against(memory, ours.get("peak_extra_bytes"), _mib),
        *(_cell(peer, "peak_extra_bytes", _mib) for peer in peers),
        "" if error is None else _error(error),
        _against(error, ours.get("logp_error"), _error),
        *(_cell(peer, "logp_error", _error) for peer in peers[:2]),
    ]


def _against(target: float | None, reached: float | None, write) -> str:
    if reached is None:
        return ""
    return (
        f"{write(reached)}, missed" if target is not None and reached > target else write(reached)
    )


def _cell(row: dict | None, field: str, write) -> str:
    if row is None:
        return ""
    if row["skipped"] is not None:
        return "not run"
    return "" if row[field] is None else write(row[field])


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.0f}"


def _error(value: float) -> str:
    return f"{value:.0e}"


def _skipped(rows: dict[tuple, dict]) -> list[str]:
    """One line for each variant that did not run, with the reason in its row."""
    lines = [
        f"- {case}, T {T:,}, {dtype}, {variant}: not run, {row['skipped']}."
        for (case, T, dtype, variant), row in sorted(rows.items())
        if row["skipped"] is not None
    ]
    return [*lines, ""] if lines else []


def _table(header: list[str], lines: list[list[str]]) -> str:
    words = {"head", "dtype", "pass"}
    rule = ["---" if title in words else "--:" for title in header]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def _group_order(group: tuple[str, int, str]) -> tuple[int, int, int]:
    case, T, dtype = group
    return list(CASES).index(case), list(DTYPES).index(dtype), T


def replace(readme: str, table: str) -> str:
    """``readme`` with ``table`` between the two markers."""
    if (
        readme.count(BEGIN) != 1
        or readme.count(END) != 1
        or readme.index(BEGIN) > readme.index(END)
    ):
        raise ValueError(f"README.md must have {BEGIN} and, after it, {END}, each exactly once")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}{END}{after}"


def main(
    arguments: list[str] | None = None, *, results: Path = RESULTS, readme: Path = README
) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if it would change")
    check = parser.parse_args(arguments).check
    old = readme.read_text(encoding="utf-8")
    new = replace(old, render(newest(results)))
    if new == old:
        return 0
    if check:
        print(f"{readme.name}: the table is not that of the rows; run python -m benchmarks.table")
        return 1
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
