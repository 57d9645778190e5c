"""`prefopt data build`: from published sets and files of one's own to one checked set in splits.

Start here. Every source is read and converted (``convert``), its answers lie on disk (``write.Spool``) while the stages of
``choose`` decide by facts alone, and the rest is written to a folder that appears when all of it is there.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from tqdm.auto import tqdm

import prefopt
from prefopt.data.choose import OTHER_LANGUAGE, Answers, choose
from prefopt.data.convert import KINDS, Dropped
from prefopt.data.counts import BAD, Reading, count, table
from prefopt.data.language import is_in
from prefopt.data.plan import Plan, Source
from prefopt.data.rows import BadRow, DataError, RowError, bad_rows_error, folded_turns
from prefopt.data.sources import FILES, MANIFEST, commit_of, open_rows
from prefopt.data.write import Spool, whole_folder, write_json, write_rows

REMEDY = "--on-bad-row skip (on_bad_row: skip), which lists them in bad_rows.jsonl"
FORMAT = 1  # of the manifest


@dataclass(frozen=True)
class Built:
    """What ``build`` wrote: the folder, the counts of every stage, and the same as a table."""

    folder: Path
    counts: dict[str, Any]
    table: str


def build(plan: Plan, out: str | Path) -> Built:
    """Build a set of rated rows {prompt, completion, label, source, group} as a plan says.

    The folder gets one file a split, manifest.json (arguments, sources with their commits and fingerprints, files with
    theirs), counts.json, counts.txt, and bad_rows.jsonl if there are any. The same plan on the same data gives the same
    bytes. A build that is interrupted or fails leaves nothing.

    Args:
        plan: from ``make_plan``.
        out: a folder that is not there yet, or is empty.

    Raises:
        DataError: a source that cannot be read, bad rows, an empty split, one label alone.
        OSError: the folder cannot be written.

    Example:
        >>> import json, tempfile
        >>> from prefopt.data.plan import make_plan
        >>> folder = Path(tempfile.mkdtemp())
        >>> pair = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
        >>> _ = (folder / "pairs.jsonl").write_text(json.dumps(pair), encoding="utf-8")
        >>> plan = make_plan([str(folder / "pairs.jsonl")], validation=0.0)
        >>> build(plan, folder / "set").counts["total"]["splits"]
        {'train': {'rows': 2, 'desirable': 1, 'undesirable': 1, 'groups': 1}}
    """
    out = Path(out)
    with whole_folder(out) as folder:
        spool, answers = Spool(folder / "rows.spool"), Answers()
        readings, records, bad = [], [], []
        kinds: dict[str, bool] = {}  # whether the source of that name holds chat messages
        for number, source in enumerate(plan.sources):
            source = _pinned(source)
            reading, record = _read(number, source, plan, answers, spool, kinds, bad)
            readings.append(reading)
            records.append(record)
        splits = choose(answers, plan)
        counts = count(readings, answers, splits, plan)
        chat = next(iter(kinds.values()))
        files = {
            split: write_rows(
                folder / f"{split}.{plan.format}", _rows(numbers, split, answers, spool, plan), chat
            )
            for split, numbers in splits.items()
        }
        spool.remove()
        text = table(counts)
        (folder / "counts.txt").write_text(text + "\n", encoding="utf-8")
        write_json(folder / "counts.json", counts)
        if bad:
            lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in bad]
            (folder / "bad_rows.jsonl").write_text("".join(lines), encoding="utf-8")
        # last: a folder without it is refused
        write_json(folder / MANIFEST, _manifest(plan, records, files))
    return Built(out, counts, text)


def _pinned(source: Source) -> Source:
    """The source with the commit that its revision stands for if it is on the hub, without one if it is a file."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        return replace(source, revision=None)
    if path.exists() or path.suffix.lower() in FILES:
        return replace(source, revision=None, split=None)
    return replace(source, revision=commit_of(source.path, source.revision))


def _read(
    number: int,
    source: Source,
    plan: Plan,
    answers: Answers,
    spool: Spool,
    kinds: dict[str, bool],
    bad: list[BadRow],
) -> tuple[Reading, dict[str, Any]]:
    """Take in one source; what was found in it, and its entry in the manifest."""
    kind, reading, problems = KINDS[source.kind], Reading(), []
    name, raws = open_rows(
        source.path, source.split, source.revision, data_dir=source.data_dir, needs=kind.needs
    )
    content = hashlib.sha256()

    def objects() -> Iterator[tuple[int, Mapping[str, Any]]]:
        for line, raw in raws:
            if raw is None:
                reading.blank_lines += 1
                continue
            reading.read += 1
            if isinstance(raw, RowError):
                problems.append(BadRow(name, line, str(raw)))
                continue
            content.update(json.dumps(raw, sort_keys=True, default=str).encode() + b"\n")
            yield line, raw

    options = dict(source.options)
    if source.kind == "rows":
        options["messages"] = plan.messages
    for line, outcome in kind.convert(objects(), **options):
        if isinstance(outcome, RowError):
            problems.append(BadRow(name, line, str(outcome)))
        elif isinstance(outcome, Dropped):
            reading.left_out[str(outcome)] += 1
        else:
            reading.used += 1
            for answer in outcome:
                _one_kind(kinds, source.name, isinstance(answer.prompt, list))
                fits = is_in(plan.language, answer.prompt, answer.completion, plan.language_share)
                prompt = folded_turns(answer.prompt)
                whole = f"{prompt}\x1d{folded_turns(answer.completion)}"
                answers.add(
                    number,
                    line,
                    answer.label,
                    _short(prompt),
                    _short(whole),
                    f"{source.name}/{answer.group}",
                    answer.category,
                    None if fits else OTHER_LANGUAGE,
                )
                spool.add(answer.prompt, answer.completion)
    if problems and plan.on_bad_row == "stop":
        raise bad_rows_error(problems, reading.read, name, REMEDY)
    if not reading.used:
        reasons = [f"{many} {reason}" for reason, many in reading.left_out.most_common(3)]
        why = f": {', '.join(reasons)}" if reasons else ""
        raise DataError(f"{name} has no usable rows among {reading.read}{why}", problems)
    if problems:
        reading.left_out[BAD] = len(problems)
    bad += sorted(problems, key=lambda row: row.line)
    record = {
        "name": source.name,
        "kind": source.kind,
        "path": source.path,
        "split": source.split,
        "revision": source.revision,
        "rows": reading.read,
        "sha256_of_rows": content.hexdigest(),
    }
    return reading, record


def _one_kind(kinds: dict[str, bool], name: str, chat: bool) -> None:
    kinds.setdefault(name, chat)
    other = next((known for known, was in kinds.items() if was != chat), None)
    if other is not None:
        text, messages = (other, name) if chat else (name, other)
        raise DataError(
            f"source {text} holds text and {messages} chat messages; --messages (messages: true) makes a user's and an "
            "assistant's message of each text"
        )


def _rows(
    numbers: list[int], split: str, answers: Answers, spool: Spool, plan: Plan
) -> Iterator[dict[str, Any]]:
    for number in tqdm(numbers, desc=f"writing {split}", unit="row", delay=1):
        prompt, completion = spool.read(number)
        yield {
            "prompt": prompt,
            "completion": completion,
            "label": answers.label[number],
            "source": plan.sources[answers.source[number]].name,
            "group": answers.group_name(number),
        }


def _manifest(plan: Plan, sources: list[dict], files: dict[str, dict]) -> dict[str, Any]:
    """Nothing in it depends on when, where or by whom the set was built."""
    return {
        "format": FORMAT,
        "fingerprint": hashlib.sha256(
            "".join(f"{split} {entry['sha256']}\n" for split, entry in files.items()).encode()
        ).hexdigest(),
        "splits": files,
        "sources": sources,
        "arguments": plan.described(),
        "versions": {
            "prefopt": prefopt.__version__,
            "datasets": datasets.__version__,
            "pyarrow": pyarrow.__version__,
        },
    }


def _short(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()[:16]
