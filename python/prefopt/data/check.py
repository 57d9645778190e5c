"""`prefopt data check`: counts of a source, every problem in it, and the tokens that a model would be scored on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from prefopt.data.overlap import Twins, leaks, read_questions, twins
from prefopt.data.read import LoadedRows, load_rows
from prefopt.data.scored import not_in_row, scored_tokens, template_notes
from prefopt.data.tokenize import Tokenized, token_lengths, tokenize_rows
from prefopt.data.vocabulary import padding_beyond, remedy, rows_beyond
from prefopt.errors import BadRow, DataError
from prefopt.models import from_pretrained


@dataclass(frozen=True)
class Checked:
    """The text to print, and the problems that should be corrected before training.

    ``contradictory`` and ``leaked`` count rows that contradict each other or contain an evaluation question;
    ``problem`` concerns the source, the tokenizer or the model as a whole.
    """

    text: str
    bad: list[BadRow] = field(default_factory=list)
    contradictory: int = 0
    leaked: int = 0
    problem: str = ""

    @property
    def clean(self) -> bool:
        """Whether no problem was found."""
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
        tokenizer: folder or hub id of the tokenizer; the default is that of ``model``.
        model: folder or hub id of the model whose embedding must cover the tokens; its weights are not read.
        max_length: tokens of prompt and answer.
        chat_template_kwargs: arguments of the chat template, as in training.
        questions: file of evaluation questions that must not be in the data (``read_questions``).
        ngram: consecutive words that a question and a row must share (``leaks``).
        row: the usable row whose tokens are shown; the default is the first that can be trained on.

    Returns:
        ``Checked``, with every bad row.

    Raises:
        DataError: the source, the tokenizer or the model cannot be read; an argument is out of range.
    """
    evaluation = None if questions is None else read_questions(questions)
    vocabulary = None if model is None else _vocabulary(model)
    tokenizer = tokenizer or model
    loaded_tokenizer = None if tokenizer is None else _load_tokenizer(tokenizer)
    try:
        loaded = load_rows(
            source, split=split, revision=revision, on_bad_row="skip", label_map=label_map, as_chat=as_chat
        )
    except DataError as error:
        if not error.bad:
            raise
        return Checked(_findings(error.bad, str(error)), error.bad, problem=str(error))
    if row is not None and not 0 <= row < len(loaded.rows):
        raise DataError(f"row is {row}; expected 0 to {len(loaded.rows) - 1}")
    parts, bad, problem = [_rows(loaded)], loaded.bad, ""
    leaked: dict[int, str] = {}
    if evaluation is not None:
        leaked, found = leaks(loaded, evaluation, ngram)
        parts.append(
            "\n".join(
                [
                    f"evaluation questions {found} of {len(evaluation)} found, in {len(leaked)} rows ({ngram} "
                    "consecutive words, or all of a shorter one)",
                    *(
                        f"  line {loaded.rows[number]['line']}: {' '.join(question.split()):.100}"
                        for number, question in leaked.items()
                    ),
                ]
            )
        )
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
            if vocabulary is not None:
                beyond = rows_beyond(tokenized, vocabulary, loaded_tokenizer)
                padding = padding_beyond(loaded_tokenizer.pad_token_id, vocabulary, loaded_tokenizer)
                bad = [*bad, *beyond]
                sentences = [f"{padding}."] if padding else []
                sentences += [remedy(vocabulary, loaded_tokenizer)] if padding or beyond else []
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
    """Lengths, the tokens of one row, and notes about the template."""
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
            "the rows are plain text and the tokenizer's chat template is not used. To use it, convert them to chat "
            "messages: --as-chat, in training data.as_chat: true"
        )
    return parts + (["\n".join(f"note: {note}" for note in notes)] if notes else [])


def _findings(
    bad: Sequence[BadRow],
    problem: str = "",
    loaded: LoadedRows | None = None,
    same: Twins | None = None,
) -> str:
    """Every bad, repeated and contradictory row, and the number of each."""
    parts = [_block("bad rows", [str(one) for one in sorted(bad, key=lambda one: one.line)])]
    counts = [f"bad rows             {len(bad)}"]
    if loaded is not None and same is not None:
        rows = loaded.rows

        def place(number: int) -> str:
            """File, line and label of a row; the two rows of a pair share a line."""
            label = "desirable" if rows[number]["label"] else "undesirable"
            return f"{loaded.name}:{rows[number]['line']} ({label})"

        repeated = [f"{place(one)}: repeats line {rows[first]['line']}" for one, first in same.repeated.items()]
        contradictory = [
            f"{place(one)}: line {rows[other]['line']} has the same answer with the other label"
            for one, other in same.contradictory.items()
        ]
        parts += [_block("repeated rows", repeated), _block("contradictory rows", contradictory)]
        counts += [f"repeated rows        {len(repeated)}", f"contradictory rows   {len(contradictory)}"]
    return "\n\n".join([*filter(None, parts), "\n".join(counts), *([problem] if problem else [])])


def _block(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)]) if lines else ""


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
        unused = ", ".join(f"{name} ({count})" for name, count in sorted(loaded.ignored.items()))
        lines.append(f"  unused fields  {unused}")
    if not counts["desirable"] or not counts["undesirable"]:
        lines.append("  kto and apo_zero need rows of both labels to train on")
    return "\n".join(lines)


def _tokens(tokenized: Tokenized) -> str:
    prompt, completion = token_lengths(tokenized.dataset)
    counts, length = tokenized.counts, prompt + completion
    lines = ["tokens            min   median      95%      max"]
    for name, lengths in (("prompt", prompt), ("answer", completion), ("together", length)):
        low, middle, high, top = (round(float(q)) for q in np.quantile(lengths, [0, 0.5, 0.95, 1]))
        lines.append(f"  {name:<12} {low:>6} {middle:>8} {high:>8} {top:>8}")
    total = counts["completion_tokens"] + counts["truncated_tokens"]
    lines.append(
        f"  max_length {tokenized.max_length} cuts {counts['truncated']} of {counts['rows']} answers "
        f"({counts['truncated_tokens']} of {total} tokens)"
    )
    if counts["truncated"]:
        assert tokenized.max_length is not None
        desirable = np.array(tokenized.dataset["label"][:])[length > tokenized.max_length]
        lines.append(
            f"  of these {int(desirable.sum())} desirable and {int((~desirable).sum())} undesirable; the end of turn "
            "of a cut answer is not scored"
        )
    if counts["prompt_cut"]:
        lines.append(f"  in {counts['prompt_cut']} rows the template renders the prompt differently without its answer")
    return "\n".join(lines)
