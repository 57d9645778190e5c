"""Result rows: appended to results/<device>/<date>.jsonl, one JSON object a line, and read back."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.origin import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def keep(rows: list[dict], results: Path = RESULTS) -> Path:
    """Append the rows of one run; nothing that stands there is changed."""
    path = results / rows[0]["device"] / f"{rows[0]['run'][:10]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def newest(
    results: Path = RESULTS, fields: Sequence[str] = ("case", "T", "dtype", "variant")
) -> dict[str, dict[tuple, dict]]:
    """By device, the newest row of every combination of the fields."""
    devices = {}
    for path in sorted(results.glob("*/*.jsonl")):
        rows = devices.setdefault(path.parent.name, {})
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not a JSON object: {error}") from None
            key = tuple(row[field] for field in fields)
            if key not in rows or rows[key]["time"] <= row["time"]:
                rows[key] = row
    return devices
