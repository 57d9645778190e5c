"""The table of docs/integrations.md, generated from the newest rows of benchmarks/trainers.py.

python -m benchmarks.trainers_table             rewrites it
python -m benchmarks.trainers_table --check     exits with 1 if it would change
"""

import sys
from pathlib import Path

from benchmarks import cells, pages
from benchmarks.origin import ROOT
from benchmarks.rows import RESULTS, newest
from benchmarks.trainers import WHO

PAGE = ROOT / "docs" / "integrations.md"
HEAD = ["head", "trainer", "layers", "sequences", "tokens", "dtype"]
HEAD += [
    "TRL, tokens/s",
    "patched",
    "PreferenceTrainer",
    "patched, times as fast",
    "PreferenceTrainer",
]


def render(results: Path) -> str:
    """Markdown for all devices; empty where there are no rows."""
    devices = newest(results, ("op", "case", "T", "dtype", "layers", "rows", "variant"))
    return "\n".join(_section(rows) for _, rows in sorted(devices.items()))


def _section(rows: dict[tuple, dict]) -> str:
    steps = sorted({key[:-1] for key in rows})
    heads = sorted({key[-1].split("-")[1] for key in rows}, reverse=True)
    lines = [_line(rows, step, head) for step in steps for head in heads if (*step, f"trl-{head}") in rows]
    return "\n".join([cells.heading(list(rows.values())), "", cells.table(HEAD, lines), ""])


def _line(rows: dict[tuple, dict], step: tuple, head: str) -> list[str]:
    trl, *others = (rows.get((*step, f"{who}-{head}")) for who in WHO)
    trainer = trl["op"].split("_")[1].upper() + ("" if head == "trainable" else ", head frozen")
    speeds = ["" if row is None else f"{row['tokens_per_second']:,.0f}" for row in (trl, *others)]
    times = ["" if row is None else f"{1 / row['ratio']:.1f}" for row in others]
    shape = [f"{trl[field]:,}" for field in ("layers", "rows", "T")]
    return [trl["case"], trainer, *shape, trl["dtype"], *speeds, *times]


def main(arguments: list[str] | None = None, *, results: Path | None = None, page: Path = PAGE) -> int:
    made = render(results or RESULTS / "trainers")
    return pages.run("benchmarks.trainers_table", arguments, page, made, "rows")


if __name__ == "__main__":
    sys.exit(main())
