"""The table in README.md, generated from the newest result rows.

python -m benchmarks.table             rewrites it
python -m benchmarks.table --check     exits with 1 if it would change
"""

import sys
from pathlib import Path

from benchmarks import cells, pages
from benchmarks.cases import (
    CASES,
    DTYPES,
    LOGP_ERROR_TARGET,
    PASSES,
    TIME_TARGETS,
    memory_target,
)
from benchmarks.gpu_table import gpu_section
from benchmarks.origin import ROOT
from benchmarks.rows import RESULTS, newest

README = ROOT / "README.md"
PEERS = ("torch", "trl", "liger")
TITLES = {"torch": "plain torch", "trl": "TRL", "liger": "Liger"}


def render(devices: dict[str, dict[tuple, dict]]) -> str:
    """Markdown for all devices; empty where there are no rows."""
    return "\n".join(_section(rows) for _, rows in sorted(devices.items()))


def _section(rows: dict[tuple, dict]) -> str:
    on_gpu = any("gpu" in row for row in rows.values())
    return gpu_section(rows) if on_gpu else _cpu_section(rows)


def _cpu_section(rows: dict[tuple, dict]) -> str:
    groups = sorted({key[:3] for key in rows}, key=_group_order)
    times = [
        _time_line(rows, group, passed) for group in groups for passed in PASSES if (*group, f"ours-{passed}") in rows
    ]
    rest = [
        _rest_line(rows, group, passed) for group in groups for passed in PASSES if (*group, f"ours-{passed}") in rows
    ]
    peers = [TITLES[peer] for peer in PEERS]
    return "\n".join(
        [
            cells.heading(list(rows.values())),
            "",
            "Time in units of the bare `hidden @ weight.T` of the same rounds, whose own time stands in the",
            "fourth column.",
            "",
            cells.table(["head", "T", "dtype", "GEMM", "pass", "target", "ours", *peers], times),
            "",
            "Peak memory above the inputs in MiB, and the largest error of a token's log-probability in nats",
            "against fp64 of the same inputs.",
            "",
            cells.table(
                ["head", "T", "dtype", "pass", "MiB: target", "ours", *peers] + ["error: target", "ours", *peers[:2]],
                rest,
            ),
            "",
            *cells.skipped(rows),
        ]
    )


def _time_line(rows: dict, group: tuple, passed: str) -> list[str]:
    case, T, dtype = group
    ours = rows[(*group, f"ours-{passed}")]
    target = TIME_TARGETS.get((passed, dtype))
    gemm = rows.get((*group, "gemm"))
    return [
        *(case, f"{T:,}", dtype),
        "" if gemm is None else f"{gemm['median_ms']:,.0f} ms",
        cells.PASS_TITLES[passed],
        "" if target is None else f"{target:.1f}",
        cells.against(target, ours.get("ratio"), cells.ratio),
        *(cells.cell(rows.get((*group, f"{peer}-{passed}")), "ratio", cells.ratio) for peer in PEERS),
    ]


def _rest_line(rows: dict, group: tuple, passed: str) -> list[str]:
    case, T, dtype = group
    ours = rows[(*group, f"ours-{passed}")]
    memory = memory_target(CASES[case], T, dtype, passed)
    worst = None if passed.startswith("kto") else LOGP_ERROR_TARGET
    peers = [rows.get((*group, f"{peer}-{passed}")) for peer in PEERS]
    return [
        *(case, f"{T:,}", dtype, cells.PASS_TITLES[passed]),
        "" if memory is None else cells.mib(memory),
        cells.against(memory, ours.get("peak_extra_bytes"), cells.mib),
        *(cells.cell(peer, "peak_extra_bytes", cells.mib) for peer in peers),
        "" if worst is None else cells.error(worst),
        cells.against(worst, ours.get("logp_error"), cells.error),
        *(cells.cell(peer, "logp_error", cells.error) for peer in peers[:2]),
    ]


def _group_order(group: tuple[str, int, str]) -> tuple[int, int, int]:
    case, T, dtype = group
    return list(CASES).index(case), list(DTYPES).index(dtype), T


def main(arguments: list[str] | None = None, *, results: Path = RESULTS, readme: Path = README) -> int:
    return pages.run("benchmarks.table", arguments, readme, render(newest(results)), "rows")


if __name__ == "__main__":
    sys.exit(main())
