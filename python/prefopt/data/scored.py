"""What of a row a model is scored on: its tokens one by one, and what of them the answer did not write.

A chat template renders the prompt alone (with the opening of an answer) to begin a generation, and the whole
conversation to train on. The two need not agree:

- Qwen3's template writes an empty thought, ``<think>\n\n</think>\n\n``, in front of an answer. Unless the prompt is
  rendered with ``enable_thinking: false``, it is scored in every row.
- DeepSeek-R1-Distill's opens an answer with ``<think>\n`` and then renders conversations without it: the prompt alone
  is no beginning of the row. The tokens that differ are in no row: they are neither shown nor scored, but will be shown
  when the model answers. It also deletes an answer up to ``</think>``.
- ChatML-like templates end a turn with a line break behind the end-of-turn token. It is scored, and never generated.
"""

import textwrap
from collections import Counter
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from prefopt.data.read import LoadedRows
from prefopt.data.tokenize import Encode, Tokenized, common_prefix

WIDTH = 100


def scored_tokens(tokenized: Tokenized, tokenizer: PreTrainedTokenizerBase, index: int = 0, beside: str = "") -> str:
    """One row as the model sees it: the prompt, which is not scored, and the tokens that are.

    Tokens are split by ``│`` and a line break is written ``\\n``; a character that is spread over several tokens is
    shown once, with the last of them. ``beside`` is said below the prompt.
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
    """The tokens that follow the prompt when it is rendered alone and differ from the row's; empty if none do."""
    encode = Encode(tokenizer, loaded.conversational, dict(chat_template_kwargs or {}))
    row = tokenized.dataset[index]
    source = loaded.rows[row["row"]]
    asked, whole, _ = encode.texts(source["prompt"], source["completion"])
    alone, together = encode.ids([asked, whole])
    lost = alone[common_prefix(alone, together) :]
    if not lost:
        return ""
    shown = "│".join(pieces(lost, tokenizer))
    why = (
        "the template writes it to open an answer, but not into this row. The model is not shown it here, and will be "
        "when it answers"
        if loaded.conversational
        else "with the answer behind it this text becomes other tokens, which are scored"
    )
    return _block(f"left out, {len(lost)} tokens of the prompt alone", shown) + f"\n    {why}"


def template_notes(
    loaded: LoadedRows,
    tokenized: Tokenized,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping | None = None,
) -> list[str]:
    """Sentences about tokens that are scored in every row, or in none, whatever the answer says.

    A shortcut for KTO is named as such: a token that the model never generates, and whose log-probability is all the
    same part of every row's sum, can carry the difference between desirable and undesirable rows in place of the
    answers.
    """
    special = _special_ids(tokenizer)
    encode = Encode(tokenizer, loaded.conversational, dict(chat_template_kwargs or {}))
    heads, ends, trailing, rows = Counter(), Counter(), Counter(), 0
    changed = unended = 0
    sources = loaded.rows.select(tokenized.dataset["row"][:])
    for ids, source in zip(tokenized.dataset["completion_ids"], sources, strict=True):
        rows += 1
        answer = source["completion"]
        text = answer if isinstance(answer, str) else answer[0]["content"]
        head, found, _ = decode(ids, tokenizer).partition(text.strip())
        if found:
            heads[head.strip(" ")] += 1
        elif text.strip() not in encode.texts(source["prompt"], answer)[1]:
            changed += 1  # the template did it, not the tokenizer's own spelling
        last = max((place for place, token in enumerate(ids) if token in special), default=None)
        # An end of turn stands behind the answer: nothing of the answer may come after it.
        if last is None or text.strip()[-8:] in decode(ids[last + 1 :], tokenizer):
            unended += 1
            continue
        ends[ids[last]] += 1
        trailing[tuple(ids[last + 1 :])] += 1
    notes = [_head_note(head, many, rows) for head, many in heads.most_common(3) if head]
    if changed:
        notes.append(
            f"in {changed} of {rows} rows the template does not render the answer as it is written: what it leaves out "
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
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token; tokens that end within a character wait for the rest of it."""
    found, waiting = [], []
    for token in ids:
        waiting.append(token)
        text = decode(waiting, tokenizer)
        if not text.endswith("\ufffd"):
            found.append(text)
            waiting = []
    found += [decode(waiting, tokenizer)] if waiting else []
    return [piece.replace("\n", "\\n") for piece in found]


def _head_note(head: str, many: int, rows: int) -> str:
    return (
        f"scored before the answer in {many} of {rows} rows: {head!r}. The template wrote it, not the answer; if the "
        "prompt should end with it, say so in the template's arguments (for Qwen3 {enable_thinking: false})"
    )


def _trailing_note(
    ids: tuple[int, ...], many: int, rows: int, ends: Counter, tokenizer: PreTrainedTokenizerBase
) -> str:
    end = decode([ends.most_common(1)[0][0]], tokenizer)
    return (
        f"scored after the end of turn {end!r} in {many} of {rows} rows: {decode(list(ids), tokenizer)!r} "
        f"({len(ids)} token{'s' if len(ids) > 1 else ''}). The model stops at {end!r} and never writes it, but it "
        "counts in "
        "each row's log-probability: a shortcut by which KTO's loss can fall while the answers stay as they were"
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
