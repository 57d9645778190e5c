"""The table of docs/integrations.md, generated from the newest rows of benchmarks/trainers.py.

python -m benchmarks.trainers_table             rewrites it
python -m benchmarks.trainers_table --check     exits with 1 if it would change
"""

import sys
from pathlib import Path

from benchmarks import cells, pages
from benchmarks.origin import ROOT
from benchmarks.rows import RESULTS, newest

PAGE = ROOT / "docs" / "integrations.md"
HEAD = ["head", "trainer", "layers", "sequences", "tokens", "dtype"]
HEAD += ["TRL, tokens/s", "patched, tokens/s", "times as fast"]


def render(results: Path) -> str:
    """Markdown for all devices; empty where there are no rows."""
    devices = newest(results, ("op", "case", "T", "dtype", "layers", "rows", "variant"))
    return "\n".join(_section(rows) for _, rows in sorted(devices.items()))


def _section(rows: dict[tuple, dict]) -> str:
    lines = [
        _line(row, rows[(*key[:-1], key[-1].replace("ours", "trl", 1))])
        for key, row in sorted(rows.items())
        if key[-1].startswith("ours")
    ]
    ordered = sorted(rows.values(), key=lambda row: row["time"])
    last = ordered[-1]
    return "\n".join(
        [
            f"{last['cpu']} ({', '.join(last['instruction_set'])}), "
            f"{cells.every(ordered, lambda row: str(row['threads']))} threads; {cells.versions(last)}; "
            f"{cells.commits(ordered)}.",
            "",
            cells.table(HEAD, lines),
            "",
        ]
    )


def _line(ours: dict, trl: dict) -> list[str]:
    trainer = ours["op"].split("_")[1].upper()
    head = "" if ours["variant"] == "ours-trainable" else ", head frozen"
    shape = [f"{ours[field]:,}" for field in ("layers", "rows", "T")]
    return [
        *(ours["case"], f"{trainer}{head}", *shape, ours["dtype"]),
        *(f"{row['tokens_per_second']:,.0f}" for row in (trl, ours)),
        f"{1 / ours['ratio']:.1f}",
    ]


def main(
    arguments: list[str] | None = None, *, results: Path | None = None, page: Path = PAGE
) -> int:
    made = render(results or RESULTS / "trainers")
    return pages.run("benchmarks.trainers_table", arguments, page, made, "rows")


if __name__ == "__main__":
    sys.exit(main())
