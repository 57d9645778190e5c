"""Read a run folder in any state: a missing or broken file becomes a note, not an exception."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prefopt.errors import UserError
from prefopt.paths import paths_from
from prefopt.read_yaml import parse_yaml
from prefopt.redact import redacted
from prefopt.report.score import Suite, is_number, suite_of

MOST_BAD_ROWS = 20


@dataclass
class Run:
    """The files of a run folder; empty for what is missing."""

    path: Path
    record: dict[str, Any] = field(default_factory=dict)  # run.json
    logs: list[dict[str, Any]] = field(default_factory=list)  # metrics.jsonl
    samples: list[dict[str, Any]] = field(default_factory=list)  # samples.json
    summary: dict[str, Any] = field(default_factory=dict)  # summary.json
    adapter: dict[str, Any] = field(default_factory=dict)  # adapter_config.json
    bad_rows: list[dict[str, Any]] = field(default_factory=list)  # the first of bad_rows.jsonl
    recipe: str = ""  # recipe.yaml, as text
    options: dict[str, Any] = field(default_factory=dict)  # recipe.yaml, as sections, with paths of today
    suites: list[Suite] = field(default_factory=list)  # eval.json
    memory: dict[str, Any] = field(default_factory=dict)  # memory.json
    manifest: dict[str, Any] = field(default_factory=dict)  # of the built folder that the data came from
    counts: str = ""  # counts.txt of that folder
    notes: list[str] = field(default_factory=list)

    def option(self, section: str, name: str) -> Any:
        """An option of the recipe, or None."""
        options = self.options.get(section)
        return options.get(name) if isinstance(options, dict) else None

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every log with this key, in order of the file; a value may be NaN or infinite."""
        return [
            (float(log["step"]), float(log[key]))
            for log in self.logs
            if is_number(log.get("step")) and is_number(log.get(key))
        ]

    def finite(self, key: str) -> list[float]:
        """The finite values of a key, in order."""
        return [value for _, value in self.series(key) if math.isfinite(value)]

    def last(self, key: str) -> float | None:
        """The last finite value of a key, or None."""
        values = self.finite(key)
        return values[-1] if values else None


def read_run(run_dir: str | Path) -> Run:
    """Read all files of a run folder.

    Raises:
        FileNotFoundError: the folder does not exist, or has neither run.json nor metrics.jsonl.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no run folder {path}")
    if not any((path / name).is_file() for name in ("run.json", "metrics.jsonl")):
        raise FileNotFoundError(f"{path} is not a run folder: it has neither run.json nor metrics.jsonl")
    run = Run(path)
    run.record = redacted(_object(run, "run.json", expected=True))
    run.logs = _lines(run, "metrics.jsonl", expected=True)
    run.summary = _object(run, "summary.json")
    run.adapter = _object(run, "adapter_config.json")
    run.samples = _samples(run)
    run.bad_rows = _lines(run, "bad_rows.jsonl")[:MOST_BAD_ROWS]
    run.recipe = _text(run, "recipe.yaml") or ""
    options = sections(run.recipe)
    run.options = redacted(options)
    if run.options != options:  # it contains secrets
        run.recipe = yaml.safe_dump(run.options, sort_keys=False, allow_unicode=True)
    run.options = paths_from(run.options, path)
    run.suites = _suites(run)
    run.memory = _object(run, "memory.json")
    _read_built(run)
    broken = sum(not math.isfinite(value) for log in run.logs for value in log.values() if is_number(value))
    if broken:
        run.notes.append(
            f"{broken} logged value{'s are' if broken > 1 else ' is'} not finite (NaN or infinite); "
            "plots have gaps there and averages leave them out."
        )
    return run


def _text(run: Run, name: str, expected: bool = False) -> str | None:
    try:
        return (run.path / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if expected:
            run.notes.append(f"There is no {name} in the run folder, so its part of the report is missing.")
    except OSError as error:
        run.notes.append(f"{name} cannot be read ({error.strerror}).")
    return None


def _json(run: Run, name: str, kind: type, described: str, expected: bool = False) -> Any:
    """The content of a JSON file of the given type; empty, with a note, if it is another or broken."""
    text = _text(run, name, expected)
    if text is None:
        return kind()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        run.notes.append(f"{name} is not valid JSON and was left out.")
        return kind()
    if not isinstance(content, kind):
        run.notes.append(f"{name} is not {described} and was left out.")
        return kind()
    return content


def _object(run: Run, name: str, expected: bool = False) -> dict[str, Any]:
    return _json(run, name, dict, "a JSON object", expected)


def _lines(run: Run, name: str, expected: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; a run that was killed may have left half a line at the end."""
    objects, broken = [], []
    lines = (_text(run, name, expected) or "").split("\n")  # not splitlines: a text in JSON may contain U+2028
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if isinstance(content, dict):
            objects.append(content)
        else:
            broken.append(number)
    if broken == [len(lines)]:
        run.notes.append(f"The last line of {name} was only half written and was left out.")
    elif broken:
        plural = len(broken) > 1
        run.notes.append(
            f"{len(broken)} line{'s' if plural else ''} of {name} (first: {broken[0]}) cannot be read and "
            f"{'were' if plural else 'was'} left out."
        )
    return objects


def sections(recipe: str) -> dict[str, Any]:
    """The sections of a recipe; empty if it cannot be read."""
    try:
        content = parse_yaml(recipe)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


def _suites(run: Run) -> list[Suite]:
    entries = _object(run, "eval.json").get("suites")
    found = []
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        suite = suite_of(name, entry)
        if suite is None:
            run.notes.append(f"The suite {name} of eval.json cannot be read and was left out.")
        else:
            found.append(suite)
    return found


def _read_built(run: Run) -> None:
    """Manifest and counts of `prefopt data build`, if the data came from its folder and that still exists."""
    path = run.option("data", "path")
    folder = Path(path).expanduser() if isinstance(path, str) else None
    if folder is None or not (folder / "manifest.json").is_file():
        return
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        run.manifest = manifest if isinstance(manifest, dict) else {}
        run.counts = (folder / "counts.txt").read_text(encoding="utf-8")
    except (OSError, ValueError):
        run.notes.append("The manifest or the counts of the built data cannot be read.")


def _samples(run: Run) -> list[dict[str, Any]]:
    content = _json(run, "samples.json", list, "a list of samples")
    texts = ("prompt", "before", "after")
    good = [one for one in content if isinstance(one, dict) and all(isinstance(one.get(key), str) for key in texts)]
    if len(good) < len(content):
        run.notes.append(
            f"{len(content) - len(good)} of {len(content)} samples in samples.json lack a text and were left out."
        )
    return good
