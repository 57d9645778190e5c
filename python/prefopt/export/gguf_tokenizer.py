"""The tokenizer of a GGUF file: vocabulary and merges of a byte-level BPE, and the name of its pre-tokenizer.

The file stores only the name of a pre-tokenizer of llama.cpp. A wrong name would silently give other tokens, so a
pre-tokenizer whose exact expression is not known is refused.
"""

import json
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from prefopt.errors import UserError

LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# by expression: the name, and whether words that are tokens skip merging
SPLITS = {
    rf"{ENDINGS}|{LETTERS}|\p{{N}}|{REST}": ("qwen2", False),
    rf"{ENDINGS}|{LETTERS}|\p{{N}}{{1,3}}|{REST}": ("llama-bpe", True),
}
BYTE_LEVEL = ("gpt-2", False)
DIGITS_APART = ("smollm", False)
PROBE = "a"


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer as stored in the file; ``types`` are names of ``gguf.TokenType``."""

    pre: str
    tokens: list[str]
    types: list[str]
    merges: list[str]
    ids: dict[str, int | None]
    add_bos: bool
    add_eos: bool
    chat_template: str | None
    notes: list[str] = field(default_factory=list)


def read_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int, end_of_turn: int | None = None) -> Vocabulary:
    """Convert a tokenizer.

    Args:
        tokenizer: a fast byte-level BPE.
        rows: of the embedding; ids without a token are padded.
        end_of_turn: token with which the chat template ends a turn.

    Raises:
        UserError: the tokenizer is of another kind, or its pre-tokenizer is unknown.
    """
    if not tokenizer.is_fast:
        raise UserError(f"--format gguf needs a fast tokenizer; this is {type(tokenizer).__name__}")
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    model = core["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "BPE with byte fallback" if model["type"] == "BPE" else model["type"]
        raise UserError(
            f"--format gguf supports byte-level BPE tokenizers; this one is {kind}: use --format merged, and "
            "llama.cpp's own converter"
        )
    pre = _pre(core["pre_tokenizer"], bool(model.get("ignore_merges")))
    notes = _normalizer_notes(core["normalizer"])
    added = {token["id"]: token for token in core["added_tokens"]}
    spelled = {token_id: token for token, token_id in model["vocab"].items()}
    spelled |= {token_id: token["content"] for token_id, token in added.items()}
    if max(spelled) >= rows:
        raise UserError(
            f"the tokenizer has the id {max(spelled)}, and the model's embedding {rows} rows; expected a row for each "
            "id"
        )
    first, last = _added_around(tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Vocabulary(
        pre=pre,
        tokens=[spelled.get(token_id, f"[PAD{token_id}]") for token_id in range(rows)],
        types=[_type(token_id, spelled, added) for token_id in range(rows)],
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        ids={
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "unk": tokenizer.unk_token_id,
            "pad": tokenizer.pad_token_id,
            "eot": None if end_of_turn == tokenizer.eos_token_id else end_of_turn,
        },
        add_bos=first is not None and first == tokenizer.bos_token_id,
        add_eos=last is not None and last == tokenizer.eos_token_id,
        chat_template=template,
        notes=notes,
    )


def _pre(rule: dict | None, whole_words: bool) -> str:
    """The name of the pre-tokenizer."""
    steps = rule["pretokenizers"] if rule and rule["type"] == "Sequence" else [rule or {}]
    named = _named(steps)
    if named is None:
        raise UserError(
            "--format gguf supports the pre-tokenizers of Qwen, Llama 3, SmolLM and GPT-2; this tokenizer has another "
            "one, so the file would give other tokens: use --format merged, and llama.cpp's own converter"
        )
    name, expected = named
    if whole_words != expected:
        raise UserError(
            f"the tokenizer splits text as {name} does, but {'takes' if whole_words else 'does not take'} words that "
            "are tokens as a whole without merging, unlike it; --format gguf would give other tokens"
        )
    return name


def _named(steps: list[dict]) -> tuple[str, bool] | None:
    kinds = [step.get("type") for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    by_itself = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_itself:
        return BYTE_LEVEL
    if kinds == ["Digits", "ByteLevel"] and by_itself and steps[0]["individual_digits"]:
        return DIGITS_APART
    if kinds == ["Split", "ByteLevel"] and not by_itself:
        split = steps[0]
        if split["behavior"] == "Isolated" and not split["invert"]:
            return SPLITS.get(split["pattern"].get("Regex"))
    return None


def _normalizer_notes(normalizer: dict | None) -> list[str]:
    steps = normalizer["normalizers"] if normalizer and "normalizers" in normalizer else [normalizer]
    kinds = {step["type"] for step in steps if step}
    if kinds - {"NFC"}:
        raise UserError(
            f"--format gguf cannot hold the tokenizer's normaliser ({', '.join(sorted(kinds))}); use --format merged"
        )
    if not kinds:
        return []
    return [
        "the tokenizer composes Unicode (NFC) and llama.cpp does not: give it composed text, or decomposed accents and "
        "Arabic hamzas become other tokens"
    ]


def _type(token_id: int, spelled: dict[int, str], added: dict[int, dict]) -> str:
    if token_id not in spelled:
        return "UNUSED"
    if token_id in added:
        return "CONTROL" if added[token_id]["special"] else "USER_DEFINED"
    return "NORMAL"


def _added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """The special tokens that the tokenizer adds before and after a text."""
    bare = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(PROBE)["input_ids"]
    if len(whole) == len(bare):
        return None, None
    return (
        whole[0] if whole[0] != bare[0] else None,
        whole[-1] if whole[-1] != bare[-1] else None,
    )
