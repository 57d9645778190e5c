"""Read a run folder, whatever state it is in: what is missing or broken becomes a note, not an exception."""

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
from prefopt.report.score import Suite, suite_of

MOST_BAD_ROWS = 20


@dataclass
class Run:
    """What a run folder holds; empty where there is nothing to read."""

    path: Path
    record: dict = field(default_factory=dict)  # run.json
    logs: list[dict] = field(default_factory=list)  # metrics.jsonl
    samples: list[dict] = field(default_factory=list)  # samples.json
    summary: dict = field(default_factory=dict)  # summary.json
    adapter: dict = field(default_factory=dict)  # adapter_config.json
    bad_rows: list[dict] = field(default_factory=list)  # the first of bad_rows.jsonl
    recipe: str = ""  # recipe.yaml, as text
    options: dict = field(default_factory=dict)  # recipe.yaml, as sections, with paths of today
    suites: list[Suite] = field(default_factory=list)  # eval.json
    memory: dict = field(default_factory=dict)  # memory.json
    manifest: dict = field(default_factory=dict)  # of the built folder that the data came from
    counts: str = ""  # counts.txt of that folder
    notes: list[str] = field(default_factory=list)

    def option(self, section: str, name: str) -> Any:
        """An option of the recipe; None where it is not there."""
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


def is_number(value: Any) -> bool:
    """Whether JSON gave a number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_run(run_dir: str | Path) -> Run:
    """Read what there is.

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
    if run.options != options:  # written by hand, or by a version that kept secrets
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
            run.notes.append(f"There is no {name} in the run folder, so what it would show is missing.")
    except OSError as error:
        run.notes.append(f"{name} cannot be read ({error.strerror}).")
    return None


def _json(run: Run, name: str, expected: bool) -> Any:
    text = _text(run, name, expected)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        run.notes.append(f"{name} is not valid JSON and was left out.")
        return None


def _object(run: Run, name: str, expected: bool = False) -> dict:
    content = _json(run, name, expected)
    if content is not None and not isinstance(content, dict):
        run.notes.append(f"{name} is not a JSON object and was left out.")
    return content if isinstance(content, dict) else {}


def _lines(run: Run, name: str, expected: bool = False) -> list[dict]:
    """The JSON objects of a file, one a line; a run that was killed may have left half a line at the end."""
    text = _text(run, name, expected)
    if text is None:
        return []
    objects, broken = [], []
    lines = text.split("\n")  # not splitlines: a text in JSON may hold U+2028
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
        run.notes.append(
            f"{len(broken)} line{'s' if len(broken) > 1 else ''} of {name} "
            f"(first: {broken[0]}) cannot be read and {'were' if len(broken) > 1 else 'was'} left out."
        )
    return objects


def sections(recipe: str) -> dict:
    """The sections of a recipe; empty where it cannot be read."""
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
    """What `prefopt data build` says of its folder, if the data came from one that is still there."""
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


def _samples(run: Run) -> list[dict]:
    content = _json(run, "samples.json", expected=False)
    if content is None:
        return []
    if not isinstance(content, list):
        run.notes.append("samples.json is not a list of samples and was left out.")
        return []
    good = [
        sample
        for sample in content
        if isinstance(sample, dict) and all(isinstance(sample.get(key), str) for key in ("prompt", "before", "after"))
    ]
    if len(good) < len(content):
        run.notes.append(
            f"{len(content) - len(good)} of {len(content)} samples in samples.json lack a text and were left out."
        )
    return good
