"""The scored tokens of a row, and those that come from the chat template rather than the answer.

A chat template renders the prompt alone (with the opening of an answer) for generation, and the whole conversation for
training. The two can disagree:

- Qwen3's template writes an empty thought, ``<think>\n\n</think>\n\n``, before an answer. Unless the prompt is
  rendered with ``enable_thinking: false``, it is scored in every row.
- DeepSeek-R1-Distill's opens an answer with ``<think>\n`` but renders conversations without it. These tokens are in no
  row, but precede the answer in generation. The template also deletes an answer up to ``</think>``.
- ChatML-like templates end a turn with a line break after the end-of-turn token. It is scored, but never generated.
"""

import textwrap
from collections import Counter
from collections.abc import Mapping
from typing import cast

from transformers import PreTrainedTokenizerBase

from prefopt.data.read import LoadedRows
from prefopt.data.rows import common_prefix
from prefopt.data.tokenize import Encode, Tokenized

WIDTH = 100


def scored_tokens(tokenized: Tokenized, tokenizer: PreTrainedTokenizerBase, index: int = 0, beside: str = "") -> str:
    """One row as text: the prompt, then the scored tokens.

    Tokens are separated by ``│`` and a line break is written ``\\n``; a character made of several tokens is shown with
    the last one. ``beside`` is inserted below the prompt.
    """
    row = tokenized.dataset[index]
    limit = tokenized.max_length
    room = len(row["completion_ids"]) if limit is None else limit - len(row["prompt_ids"])
    scored, cut = row["completion_ids"][:room], row["completion_ids"][room:]
    lines = [
        f"what is scored, row {row['row']} ({'desirable' if row['label'] else 'undesirable'})",
        _block("prompt, not scored", decode(row["prompt_ids"], tokenizer)),
        beside,
        _block(f"scored, {len(scored)} tokens", "│".join(pieces(scored, tokenizer))),
    ]
    if cut:
        lines.append(_block(f"cut off by max_length, {len(cut)} tokens", "│".join(pieces(cut, tokenizer))))
    return "\n".join(line for line in lines if line)


def not_in_row(
    loaded: LoadedRows,
    tokenized: Tokenized,
    tokenizer: PreTrainedTokenizerBase,
    index: int = 0,
    chat_template_kwargs: Mapping | None = None,
) -> str:
    """The last tokens of the prompt rendered alone, if the row does not contain them; otherwise empty."""
    encode = Encode(tokenizer, loaded.conversational, dict(chat_template_kwargs or {}))
    row = tokenized.dataset[index]
    source = loaded.rows[row["row"]]
    alone, together = encode.ids(encode.texts(source["prompt"], source["completion"])[:2])
    lost = alone[common_prefix(alone, together) :]
    if not lost:
        return ""
    shown = "│".join(pieces(lost, tokenizer))
    why = (
        "the template opens an answer with it, but this row does not contain it: the model sees it in generation only"
        if loaded.conversational
        else "followed by the answer, this text becomes other tokens, which are scored"
    )
    return _block(f"left out, {len(lost)} tokens of the prompt alone", shown) + f"\n    {why}"


def template_notes(
    loaded: LoadedRows,
    tokenized: Tokenized,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping | None = None,
) -> list[str]:
    """Sentences about tokens that are scored in every row, or in none, independently of the answer.

    A token that the model never generates still adds its log-probability to every row, so KTO's loss can fall without
    any change of the answers.
    """
    special = _special_ids(tokenizer)
    encode = Encode(tokenizer, loaded.conversational, dict(chat_template_kwargs or {}))
    heads: Counter[str] = Counter()
    ends: Counter[int] = Counter()
    trailing: Counter[tuple[int, ...]] = Counter()
    rows, changed, unended = len(tokenized.dataset), 0, 0
    sources = loaded.rows.select(tokenized.dataset["row"][:])
    for ids, source in zip(tokenized.dataset["completion_ids"], sources, strict=True):
        answer = source["completion"]
        text = answer if isinstance(answer, str) else answer[0]["content"]
        head, found, _ = decode(ids, tokenizer).partition(text.strip())
        if found:
            heads[head.strip(" ")] += 1
        elif text.strip() not in encode.texts(source["prompt"], answer)[1]:
            changed += 1  # by the template, not by the tokenizer
        last = max((place for place, token in enumerate(ids) if token in special), default=None)
        # an end of turn must follow the whole answer
        if last is None or text.strip()[-8:] in decode(ids[last + 1 :], tokenizer):
            unended += 1
            continue
        ends[ids[last]] += 1
        trailing[tuple(ids[last + 1 :])] += 1
    notes = [_head_note(head, many, rows) for head, many in heads.most_common(3) if head]
    if changed:
        notes.append(
            f"in {changed} of {rows} rows the template does not render the answer as it is written: the omitted part "
            "is not learned"
        )
    if unended:
        notes.append(f"in {unended} of {rows} rows no end-of-turn token is scored: they do not teach the model to stop")
    notes += [_trailing_note(ids, many, rows, ends, tokenizer) for ids, many in trailing.most_common(3) if ids]
    eos = tokenizer.eos_token_id
    for end, many in ends.most_common(1):
        if end != eos:
            notes.append(
                f"{many} of {rows} rows end their turn with {decode([end], tokenizer)!r}, but the tokenizer's EOS "
                "token is "
                f"{tokenizer.eos_token!r}: generation stops there only if the model's generation config names it"
            )
    return notes


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens, special ones and spaces included."""
    return cast(str, tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token; tokens that end within a character are joined with the next one."""
    found: list[str] = []
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = decode(pending, tokenizer)
        if not text.endswith("\ufffd"):
            found.append(text)
            pending = []
    found += [decode(pending, tokenizer)] if pending else []
    return [piece.replace("\n", "\\n") for piece in found]


def _head_note(head: str, many: int, rows: int) -> str:
    return (
        f"scored before the answer in {many} of {rows} rows: {head!r}. It comes from the template, not from the "
        "answer; if the prompt should end with it, set the template's arguments (for Qwen3 {enable_thinking: false})"
    )


def _trailing_note(
    ids: tuple[int, ...], many: int, rows: int, ends: Counter, tokenizer: PreTrainedTokenizerBase
) -> str:
    end = decode([ends.most_common(1)[0][0]], tokenizer)
    return (
        f"scored after the end of turn {end!r} in {many} of {rows} rows: {decode(list(ids), tokenizer)!r} "
        f"({len(ids)} token{'s' if len(ids) > 1 else ''}). The model stops at {end!r} and never generates it, but it "
        "is part of each row's log-probability: KTO's loss can fall by this shortcut without any change of the answers"
    )


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _block(title: str, text: str) -> str:
    lines = [
        line
        for part in text.replace("\r", "").split("\n")
        for line in textwrap.wrap(part, WIDTH, drop_whitespace=False, break_on_hyphens=False) or [""]
    ]
    return "\n".join([f"  {title}:", *(f"    {line}" for line in lines)])
