"""The files a run leaves in its folder: run.json, metrics.jsonl and bad_rows.jsonl."""

import json
import math
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from prefopt.data import BadRow
from prefopt.redact import redacted

PACKAGES = ("prefopt-kernels", "torch", "transformers", "accelerate", "peft", "datasets")


class RunFolder:
    """Writes the files; does nothing where ``active`` is False (every process but the first).

    run.json is rewritten as a whole whenever something in it changes, metrics.jsonl grows by a line per log.
    """

    def __init__(self, path: str | Path, active: bool):
        self.path = Path(path)
        self.active = active
        self.record: dict = {"versions": versions()}

    def update(self, **entries: object) -> None:
        """Change top-level entries of run.json."""
        self.record.update(entries)
        if self.active:
            self.path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(redacted(self.record), indent=2, ensure_ascii=False, default=str)
            (self.path / "run.json").write_text(text + "\n", encoding="utf-8")

    def bad_rows(self, bad: Iterable[BadRow]) -> None:
        """List the rows that were left out, one JSON object a line; no file if there are none."""
        self._write_lines("bad_rows.jsonl", [row._asdict() for row in bad])

    def metrics(self, entry: Mapping[str, object]) -> None:
        """Append one log; a number that is not finite, which JSON cannot hold, becomes null."""
        entry = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in entry.items()
        }
        if self.active:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def start_metrics(self, last_step: int) -> None:
        """Drop the logs after ``last_step``, which a resumed run is about to write again; 0 drops all."""
        file = self.path / "metrics.jsonl"
        if not self.active or not file.is_file():
            return
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        kept = [entry for entry in lines if last_step and entry["step"] <= last_step]
        file.unlink()
        self._write_lines("metrics.jsonl", kept)

    def _write_lines(self, name: str, entries: list) -> None:
        if self.active and entries:
            self.path.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            (self.path / name).write_text(text, encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a distribution"
    return found
