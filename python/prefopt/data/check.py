"""`prefopt data check`: what is in a source, what is wrong with it, and what of it a model would be scored on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from prefopt.data.overlap import Twins, leaks, read_questions, twins
from prefopt.data.read import LoadedRows, load_rows
from prefopt.data.rows import BadRow, DataError
from prefopt.data.scored import not_in_row, scored_tokens, template_notes
from prefopt.data.tokenize import Tokenized, tokenize_rows
from prefopt.data.vocabulary import padding_beyond, remedy, rows_beyond
from prefopt.pretrained import from_pretrained


@dataclass(frozen=True)
class Checked:
    """The text to print, and what was found that should be mended before training.

    ``contradictory`` and ``leaked`` count the rows that contradict each other and that hold an evaluation question;
    ``problem`` is what concerns the source, or the tokenizer and the model, as a whole.
    """

    text: str
    bad: list[BadRow] = field(default_factory=list)
    contradictory: int = 0
    leaked: int = 0
    problem: str = ""

    @property
    def clean(self) -> bool:
        """Whether nothing was found that should be mended before training."""
        return not (self.bad or self.contradictory or self.leaked or self.problem)


def check(
    source: str | Path,
    *,
    split: str | None = None,
    revision: str | None = None,
    tokenizer: str | None = None,
    model: str | None = None,
    max_length: int | None = 1024,
    chat_template_kwargs: Mapping | None = None,
    label_map: Mapping | None = None,
    as_chat: bool = False,
    questions: str | Path | None = None,
    ngram: int = 8,
    row: int | None = None,
) -> Checked:
    """Read a source as training would, and describe it.

    Args:
        source, split, revision, label_map, as_chat: as for ``load_rows``.
        tokenizer: folder or hub id whose tokenizer counts the tokens; that of ``model`` if not given.
        model: folder or hub id of the model that the tokens must have an embedding in; its weights are not read.
        max_length: tokens of prompt and answer.
        chat_template_kwargs: passed to the chat template, as in training.
        questions: file of evaluation questions that must not be in the data (``read_questions``).
        ngram: words in a row that a question and a row must share (``leaks``).
        row: which usable row's tokens are shown; the first one that can be trained on if not given.

    Returns:
        ``Checked``, with every bad row.

    Raises:
        DataError: the source, the tokenizer or the model cannot be read; an argument is out of range.
    """
    asked = None if questions is None else read_questions(questions)
    size = None if model is None else _vocabulary(model)
    tokenizer = tokenizer or model
    loaded_tokenizer = None if tokenizer is None else _load_tokenizer(tokenizer)
    try:
        loaded = load_rows(
            source, split=split, revision=revision, on_bad_row="skip",
            label_map=label_map, as_chat=as_chat,
        )  # fmt: skip
    except DataError as error:
        if not error.bad:
            raise
        # no row can be used: that is what was to be found out, and each of them is listed
        return Checked(_findings(error.bad, str(error)), error.bad, problem=str(error))
    if row is not None and not 0 <= row < len(loaded.rows):
        raise DataError(f"row is {row}; expected 0 to {len(loaded.rows) - 1}")
    parts, bad, problem, leaked = [_rows(loaded)], loaded.bad, "", {}
    if asked is not None:
        leaked, found = leaks(loaded, asked, ngram)
        parts.append(_leaks(leaked, found, len(asked), ngram, loaded))
    if loaded_tokenizer is not None:
        try:
            tokenized = tokenize_rows(
                loaded,
                loaded_tokenizer,
                max_length=max_length,
                on_bad_row="skip",
                chat_template_kwargs=chat_template_kwargs,
            )
        except DataError as error:
            if not error.bad:
                raise
            bad, problem = [*bad, *error.bad], str(error)
        else:
            bad = [*bad, *tokenized.bad]
            parts += _tokenized(loaded, tokenized, loaded_tokenizer, row, chat_template_kwargs)
            if size is not None:
                beyond = rows_beyond(tokenized, size, loaded_tokenizer)
                padding = padding_beyond(loaded_tokenizer.pad_token_id, size, loaded_tokenizer)
                bad = [*bad, *beyond]
                sentences = [f"{padding}."] if padding else []
                sentences += [remedy(size, loaded_tokenizer)] if padding or beyond else []
                problem = " ".join(sentences)
    same = twins(loaded)
    parts.append(_findings(bad, problem, loaded, same))
    return Checked("\n\n".join(parts), bad, len(same.contradictory), len(leaked), problem)


def _vocabulary(path: str) -> int:
    """Rows of a model's embedding, from its configuration."""
    config = from_pretrained(AutoConfig, path, f"cannot read the configuration of a model from {path}")
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise DataError(f"the configuration of {path} has no vocab_size")
    return size


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    return from_pretrained(AutoTokenizer, path, f"cannot load a tokenizer from {path}")


def _tokenized(
    loaded: LoadedRows,
    tokenized: Tokenized,
    tokenizer: PreTrainedTokenizerBase,
    row: int | None,
    chat_template_kwargs: Mapping | None,
) -> list[str]:
    """Lengths, the tokens of one row, and notes about what the template has scored."""
    parts = [_tokens(tokenized)]
    places = tokenized.dataset["row"][:]
    if row is None or row in places:
        index = 0 if row is None else places.index(row)
        beside = not_in_row(loaded, tokenized, tokenizer, index, chat_template_kwargs)
        parts.append(scored_tokens(tokenized, tokenizer, index, beside))
    else:
        parts.append(f"row {row} cannot be shown: it is one of the bad rows")
    notes = template_notes(loaded, tokenized, tokenizer, chat_template_kwargs)
    if tokenizer.chat_template and not loaded.conversational:
        notes.append(
            "the rows are plain text and are scored as they are; the tokenizer's chat template is not used. To use it, "
            "make chat messages of them: --as-chat, in training data.as_chat: true"
        )
    return parts + (["\n".join(f"note: {note}" for note in notes)] if notes else [])


def _findings(
    bad: Sequence[BadRow],
    problem: str = "",
    loaded: LoadedRows | None = None,
    same: Twins | None = None,
) -> str:
    """Every bad, repeated and contradictory row, and how many there are of each."""
    parts = [_block("bad rows", [str(one) for one in sorted(bad, key=lambda one: one.line)])]
    counts = [f"bad rows             {len(bad)}"]
    if loaded is not None and same is not None:
        places = _places(loaded, {*same.repeated, *same.contradictory})
        parts += [
            _block(
                "repeated rows",
                [f"{places[one]}: repeats line {loaded.rows[first]['line']}" for one, first in same.repeated.items()],
            ),
            _block(
                "contradictory rows",
                [
                    f"{places[one]}: line {loaded.rows[other]['line']} has the same answer with the other label"
                    for one, other in same.contradictory.items()
                ],
            ),
        ]
        counts += [
            f"repeated rows        {len(same.repeated)}",
            f"contradictory rows   {len(same.contradictory)}",
        ]
    return "\n\n".join([*(part for part in parts if part), "\n".join(counts), *([problem] if problem else [])])


def _block(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)]) if lines else ""


def _places(loaded: LoadedRows, rows: set[int]) -> dict[int, str]:
    """File, line and label of rows; a pair has two rows in one line."""
    return {
        number: f"{loaded.name}:{row['line']} ({'desirable' if row['label'] else 'undesirable'})"
        for number in rows
        for row in [loaded.rows[number]]
    }


def _rows(loaded: LoadedRows) -> str:
    counts = loaded.counts
    share = counts["desirable"] / counts["rows"]
    lines = [
        loaded.name,
        f"  rows read      {counts['read']}" + (f", {counts['pairs']} of them pairs" if counts["pairs"] else ""),
        f"  usable rows    {counts['rows']} ({'chat messages' if loaded.conversational else 'text'})",
        f"  desirable      {counts['desirable']} ({share:.1%})",
        f"  undesirable    {counts['undesirable']} ({1 - share:.1%})",
        f"  prompts        {counts['groups']} different",
    ]
    if counts["blank_lines"]:
        lines.append(f"  blank lines    {counts['blank_lines']}")
    if loaded.ignored:
        used = ", ".join(f"{name} ({count})" for name, count in sorted(loaded.ignored.items()))
        lines.append(f"  unused fields  {used}")
    if not counts["desirable"] or not counts["undesirable"]:
        lines.append("  kto and apo_zero need rows of both labels to train on")
    return "\n".join(lines)


def _leaks(leaked: Mapping[int, str], found: int, asked: int, ngram: int, loaded: LoadedRows) -> str:
    lines = [
        f"evaluation questions {found} of {asked} found, in {len(leaked)} rows ({ngram} words in a row, or all of a "
        "shorter one)"
    ]
    for row, question in leaked.items():
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
            f"  of these {int((cut & labels).sum())} desirable and {int((cut & ~labels).sum())} undesirable; a cut "
            "answer is not scored on its end of turn"
        )
    if counts["prompt_cut"]:
        lines.append(f"  in {counts['prompt_cut']} rows the template renders the prompt differently without its answer")
    return "\n".join(lines)
