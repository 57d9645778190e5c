"""`prefopt data check`: what is in a source, what is wrong with it, and what of it a model would be scored on."""

import textwrap
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prefopt.data.read import LoadedRows, load_rows
from prefopt.data.rows import BadRow, DataError
from prefopt.data.tokenize import Tokenized, tokenize_rows

SHOWN = 10
WIDTH = 100


def check(
    source: str | Path,
    *,
    split: str | None = None,
    revision: str | None = None,
    model: str | None = None,
    max_length: int | None = 1024,
) -> tuple[str, list[BadRow]]:
    """Read a source as training would, and describe it.

    Args:
        source, split, revision: as for ``load_rows``.
        model: folder or hub id whose tokenizer counts the tokens; None leaves that part out.
        max_length: tokens of prompt and answer.

    Returns:
        The text to print, and every bad row.

    Raises:
        DataError: the source cannot be read, or no row of it can be used.
    """
    loaded = load_rows(source, split=split, revision=revision, on_bad_row="skip")
    bad, parts = loaded.bad, [_rows(loaded)]
    if model is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise DataError(f"cannot load a tokenizer from {model}: {first}") from None
        tokenized = tokenize_rows(loaded, tokenizer, max_length=max_length, on_bad_row="skip")
        bad = [*bad, *tokenized.bad]
        parts += [_tokens(tokenized), scored_tokens(tokenized, tokenizer)]
    if bad:
        rest = [f"  ... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        parts.append(
            "\n".join([f"{len(bad)} bad rows", *(f"  {row}" for row in bad[:SHOWN]), *rest])
        )
    return "\n\n".join(parts), bad


def scored_tokens(tokenized: Tokenized, tokenizer: PreTrainedTokenizerBase, index: int = 0) -> str:
    """One row as the model sees it: the prompt, which is not scored, and the tokens that are.

    Tokens are split by ``│`` and a line break is written ``\\n``; a character that is spread over several tokens is shown once, with the last of them.
    """
    row = tokenized.dataset[index]
    limit = tokenized.max_length
    room = len(row["completion_ids"]) if limit is None else limit - len(row["prompt_ids"])
    scored, cut = row["completion_ids"][:room], row["completion_ids"][room:]
    lines = [
        f"what is scored, row {row['row']} ({'desirable' if row['label'] else 'undesirable'})",
        _block("prompt, not scored", tokenizer.decode(row["prompt_ids"])),
        _block(f"scored, {len(scored)} tokens", "│".join(_pieces(scored, tokenizer))),
    ]
    if cut:
        lines.append(
            _block(f"cut off by max_length, {len(cut)} tokens", "│".join(_pieces(cut, tokenizer)))
        )
    return "\n".join(lines)


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
    if counts["prompt_cut"]:
        lines.append(
            f"  in {counts['prompt_cut']} rows the template renders the prompt differently without its answer"
        )
    return "\n".join(lines)


def _pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token; tokens that end within a character wait for the rest of it."""
    pieces, waiting = [], []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd"):
            pieces.append(text)
            waiting = []
    pieces += [tokenizer.decode(waiting)] if waiting else []
    return [piece.replace("\n", "\\n") for piece in pieces]


def _block(title: str, text: str) -> str:
    lines = [
        line
        for part in text.replace("\r", "").split("\n")
        for line in textwrap.wrap(part, WIDTH, drop_whitespace=False, break_on_hyphens=False)
        or [""]
    ]
    return "\n".join([f"  {title}:", *(f"    {line}" for line in lines)])
