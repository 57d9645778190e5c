"""`prefopt data check`: what is in a source, what is wrong with it, and what of it a model would be scored on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prefopt.data.overlap import leaks, read_questions, twins
from prefopt.data.read import LoadedRows, load_rows
from prefopt.data.rows import BadRow, DataError
from prefopt.data.scored import not_in_row, scored_tokens, template_notes
from prefopt.data.tokenize import Tokenized, tokenize_rows
from prefopt.pretrained import from_pretrained

SHOWN = 10


@dataclass(frozen=True)
class Checked:
    """The text to print, every bad row, and how many rows contradict each other or hold an evaluation question."""

    text: str
    bad: list[BadRow] = field(default_factory=list)
    contradictory: int = 0
    leaked: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing was found that should be mended before training."""
        return not (self.bad or self.contradictory or self.leaked)


def check(
    source: str | Path,
    *,
    split: str | None = None,
    revision: str | None = None,
    tokenizer: str | None = None,
    max_length: int | None = 1024,
    chat_template_kwargs: Mapping | None = None,
    questions: str | Path | None = None,
    ngram: int = 8,
    row: int = 0,
) -> Checked:
    """Read a source as training would, and describe it.

    Args:
        source, split, revision: as for ``load_rows``.
        tokenizer: folder or hub id whose tokenizer counts the tokens; None leaves that part out.
        max_length: tokens of prompt and answer.
        chat_template_kwargs: passed to the chat template, as in training.
        questions: file of evaluation questions that must not be in the data (``read_questions``).
        ngram: words in a row that a question and a row must share (``leaks``).
        row: which usable row's tokens are shown.

    Raises:
        DataError: the source cannot be read, or no row of it can be used.
    """
    asked = None if questions is None else read_questions(questions)
    loaded = load_rows(source, split=split, revision=revision, on_bad_row="skip")
    if not 0 <= row < len(loaded.rows):
        raise DataError(f"row is {row}; expected 0 to {len(loaded.rows) - 1}")
    bad, parts = loaded.bad, [_rows(loaded)]
    same = twins(loaded)
    parts.append(
        f"repeated rows        {_listed(same.repeated, loaded)}\n"
        f"contradictory rows   {_listed(same.contradictory, loaded)}"
    )
    leaked = {}
    if asked is not None:
        leaked, found = leaks(loaded, asked, ngram)
        parts.append(_leaks(leaked, found, len(asked), ngram, loaded))
    if tokenizer is not None:
        loaded_tokenizer = _load_tokenizer(tokenizer)
        tokenized = tokenize_rows(
            loaded,
            loaded_tokenizer,
            max_length=max_length,
            on_bad_row="skip",
            chat_template_kwargs=chat_template_kwargs,
        )
        bad = [*bad, *tokenized.bad]
        index = _index(tokenized, row)
        beside = not_in_row(loaded, tokenized, loaded_tokenizer, index, chat_template_kwargs)
        notes = template_notes(loaded, tokenized, loaded_tokenizer, chat_template_kwargs)
        parts += [_tokens(tokenized), scored_tokens(tokenized, loaded_tokenizer, index, beside)]
        parts += ["\n".join(f"note: {note}" for note in notes)] if notes else []
    if bad:
        rest = [f"  ... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        parts.append(
            "\n".join([f"{len(bad)} bad rows", *(f"  {one}" for one in bad[:SHOWN]), *rest])
        )
    return Checked("\n\n".join(parts), bad, len(same.contradictory), len(leaked))


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    return from_pretrained(AutoTokenizer, path, f"cannot load a tokenizer from {path}")


def _index(tokenized: Tokenized, row: int) -> int:
    """Where a row of ``LoadedRows`` stands after rows have left."""
    rows = tokenized.dataset["row"][:]
    if row not in rows:
        raise DataError(f"row {row} cannot be shown: it is one of the bad rows")
    return rows.index(row)


def _rows(loaded: LoadedRows) -> str:
    counts = loaded.counts
    share = counts["desirable"] / counts["rows"]
    lines = [
        loaded.name,
        f"  rows read      {counts['read']}"
        + (f", {counts['pairs']} of them pairs" if counts["pairs"] else ""),
        f"  usable rows    {counts['rows']} ({'chat messages' if loaded.conversational else 'text'})",
        f"  desirable      {counts['desirable']} ({share:.1%})",
        f"  undesirable    {counts['undesirable']} ({1 - share:.1%})",
        f"  prompts        {counts['groups']} different",
        f"  bad rows       {counts['bad']}",
    ]
    if counts["blank_lines"]:
        lines.append(f"  blank lines    {counts['blank_lines']}")
    if loaded.ignored:
        used = ", ".join(f"{name} ({count})" for name, count in sorted(loaded.ignored.items()))
        lines.append(f"  without use    {used}")
    if not counts["desirable"] or not counts["undesirable"]:
        lines.append("  kto and apo_zero need rows of both labels to train on")
    return "\n".join(lines)


def _listed(rows: list[int], loaded: LoadedRows) -> str:
    if not rows:
        return "0"
    lines = loaded.rows.select(rows[:SHOWN])["line"][:]
    more = ", ..." if len(rows) > SHOWN else ""
    return f"{len(rows)} (lines {', '.join(map(str, lines))}{more})"


def _leaks(
    leaked: Mapping[int, str], found: int, asked: int, ngram: int, loaded: LoadedRows
) -> str:
    lines = [
        f"evaluation questions {found} of {asked} found, in {len(leaked)} rows ({ngram} words in a row, or all of a shorter "
        "one)"
    ]
    for row, question in list(leaked.items())[:SHOWN]:
        lines.append(f"  line {loaded.rows[row]['line']}: {' '.join(question.split()):.100}")
    return "\n".join(lines)


def _tokens(tokenized: Tokenized) -> str:
    rows = tokenized.dataset.with_format("numpy")
    prompt = np.array([len(ids) for ids in rows["prompt_ids"]])
    completion = np.array([len(ids) for ids in rows["completion_ids"]])
    counts = tokenized.counts
    lines = ["tokens            min   median      95%      max"]
    for name, lengths in (
        ("prompt", prompt),
        ("answer", completion),
        ("together", prompt + completion),
    ):
        low, middle, high, top = (round(float(q)) for q in np.quantile(lengths, [0, 0.5, 0.95, 1]))
        lines.append(f"  {name:<12} {low:>6} {middle:>8} {high:>8} {top:>8}")
    total = counts["completion_tokens"] + counts["truncated_tokens"]
    lines.append(
        f"  max_length {tokenized.max_length} cuts {counts['truncated']} of {counts['rows']} answers "
        f"({counts['truncated_tokens']} of {total} tokens)"
    )
    if counts["truncated"]:
        labels = np.array(tokenized.dataset["label"][:])
        cut = prompt + completion > tokenized.max_length
        lines.append(
            f"  of these {int((cut & labels).sum())} desirable and {int((cut & ~labels).sum())} undesirable; a cut answer "
            "is not scored on its end of turn"
        )
    if counts["prompt_cut"]:
        lines.append(
            f"  in {counts['prompt_cut']} rows the template renders the prompt differently without its answer"
        )
    return "\n".join(lines)
