"""Read the sources of a plan: convert and count every row, and keep its answers."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefopt.data.build.choose import OTHER_LANGUAGE, Answers
from prefopt.data.build.convert import KINDS, Answer, Dropped
from prefopt.data.build.counts import BAD, Reading
from prefopt.data.build.language import is_in
from prefopt.data.build.plan import Plan, Source
from prefopt.data.read import KNOWN_FIELDS
from prefopt.data.rows import RowError, bad_rows_error, folded_turns
from prefopt.data.sources import FILES, commit_of, local_file, open_rows
from prefopt.data.write import Spool, file_digest
from prefopt.errors import BadRow, DataError

REMEDY = "--on-bad-row skip (on_bad_row: skip), which lists them in bad_rows.jsonl"


class Intake:
    """The answers of all sources: attributes in ``answers``, texts in ``spool`` by number, bad rows in ``bad``."""

    def __init__(self, plan: Plan, spool: Spool):
        self.plan, self.spool = plan, spool
        self.answers = Answers()
        self.bad: list[BadRow] = []
        self.chat = False
        self._first: str | None = None  # the source that decided between text and chat messages

    def take(self, number: int) -> tuple[Reading, dict[str, Any]]:
        """Read one source of the plan; returns its counts and its entry in the manifest.

        Raises:
            DataError: it cannot be read, has bad rows (if ``on_bad_row`` is "stop"), or has no usable rows.
        """
        source = _pinned(self.plan.sources[number])
        kind, reading = KINDS[source.kind], Reading()
        name, raws = open_rows(source.path, source.split, source.revision, data_dir=source.data_dir, needs=kind.needs)
        problems: list[BadRow] = []
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
                if source.kind == "rows":
                    reading.without_use.update(field for field in raw if field not in KNOWN_FIELDS)
                yield line, raw

        options = dict(source.options)
        if source.kind == "rows":
            options["messages"] = self.plan.messages
        with closing(raws):  # closes the progress bar before an error is reported
            for line, outcome in kind.convert(objects(), **options):
                if isinstance(outcome, RowError):
                    problems.append(BadRow(name, line, str(outcome)))
                elif isinstance(outcome, Dropped):
                    reading.left_out[str(outcome)] += 1
                else:
                    reading.used += 1
                    for answer in outcome:
                        self._keep(number, line, answer)
        problems.sort(key=lambda row: row.line)
        if problems and self.plan.on_bad_row == "stop":
            raise bad_rows_error(problems, reading.read, name, REMEDY)
        if not reading.used:
            reasons = [f"{many} {reason}" for reason, many in reading.left_out.most_common(3)]
            why = f": {', '.join(reasons)}" if reasons else ""
            raise DataError(f"{name} has no usable rows among {reading.read}{why}", problems)
        if problems:
            reading.left_out[BAD] = len(problems)
        self.bad += problems
        file = local_file(source.path, source.split)
        return reading, {
            "name": source.name,
            "kind": source.kind,
            "path": source.path,
            "split": source.split,
            "revision": source.revision,
            "rows": reading.read,
            "sha256_of_rows": content.hexdigest(),
            "sha256_of_file": None if file is None else file_digest(file)[0],
        }

    def _keep(self, number: int, line: int, answer: Answer) -> None:
        plan, name = self.plan, self.plan.sources[number].name
        self._one_kind(name, isinstance(answer.prompt, list))
        prompt = folded_turns(answer.prompt)
        whole = f"{prompt}\x1d{folded_turns(answer.completion)}"
        fits = is_in(plan.language, answer.prompt, answer.completion, plan.language_share)
        self.answers.add(
            number,
            line,
            answer.label,
            _short(prompt),
            _short(whole),
            f"{name}/{answer.group}",
            answer.category,
            None if fits else OTHER_LANGUAGE,
        )
        self.spool.add(answer.prompt, answer.completion)

    def _one_kind(self, name: str, chat: bool) -> None:
        if self._first is None:
            self._first, self.chat = name, chat
        if chat != self.chat:
            text, messages = (self._first, name) if chat else (name, self._first)
            raise DataError(
                f"source {text} holds text and {messages} chat messages; --messages (messages: true) converts text to "
                "chat messages"
            )


def _pinned(source: Source) -> Source:
    """The source with the commit of its revision; a local file has neither."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        return replace(source, revision=None)
    if path.exists() or path.suffix.lower() in FILES:
        return replace(source, revision=None, split=None)
    return replace(source, revision=commit_of(source.path, source.revision))


def _short(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()[:16]
