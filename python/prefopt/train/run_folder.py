"""The files a run leaves in its folder: run.json, metrics.jsonl and bad_rows.jsonl."""

import json
import math
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from prefopt.errors import BadRow
from prefopt.files import write_whole
from prefopt.redact import redacted

RECORD = "run.json"
PACKAGES = ("prefopt-kernels", "torch", "transformers", "accelerate", "peft", "datasets")


class RunFolder:
    """Writes the files; does nothing where ``active`` is False (every process but the first).

    run.json is replaced as a whole whenever something in it changes; metrics.jsonl grows by a line per log.
    ``changes`` are the options of the recipe that a resumed run changes, as {dotted key: [before, now]}; None if no
    recipe resumes the run.
    """

    def __init__(self, path: str | Path, active: bool):
        self.path = Path(path)
        self.active = active
        self.record: dict = {"versions": versions()}
        self.changes: dict[str, list] | None = None
        self._bad: list[BadRow] = []

    def describe(self, bad: Iterable[BadRow], **entries: object) -> None:
        """Note what is known of a run before it starts, and the rows that were left out; ``start`` writes it."""
        self._bad = list(bad)
        self.record.update(entries)

    def start(self, resumed_from: str | None, step: int) -> None:
        """Write run.json and bad_rows.jsonl, with a row in run.json if this continues the run that is in the folder."""
        if resumed_from is not None or self.changes is not None:
            row = {
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "from_step": step,
                "checkpoint": None if resumed_from is None else Path(resumed_from).name,
                "changed": self.changes or {},
            }
            self.record["resumes"] = [*read_record(self.path).get("resumes", []), row]
        self._write_lines("bad_rows.jsonl", [row._asdict() for row in self._bad])
        self.update(status="running", stopped_by=None)

    def update(self, **entries: object) -> None:
        """Change top-level entries of run.json."""
        self.record.update(entries)
        if self.active:
            text = json.dumps(redacted(self.record), indent=2, ensure_ascii=False, default=str)
            write_whole(self.path / RECORD, text + "\n")

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
        """Drop the logs that a resumed run is about to write again; 0 drops all.

        Drops the logs after ``last_step`` and from the end of training on, and a truncated last line.
        """
        file = self.path / "metrics.jsonl"
        if not self.active or not file.is_file():
            return
        kept = []
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                entry = json.loads(line)
                if entry["step"] > last_step or "train_runtime" in entry:
                    break
            except (ValueError, KeyError, TypeError):  # half a line, or none of ours
                continue
            kept.append(entry)
        self._write_lines(file.name, kept if last_step else [])

    def _write_lines(self, name: str, entries: list) -> None:
        """Replace a file by one JSON object a line; no file if there are none."""
        if not self.active:
            return
        if entries:
            text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            write_whole(self.path / name, text)
        else:
            (self.path / name).unlink(missing_ok=True)


def read_record(folder: Path) -> dict:
    """The run.json of a folder; empty where there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a distribution"
    return found
