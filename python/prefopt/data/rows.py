"""The schema of a preference row: its checks and their messages.

A row is unpaired (binary feedback), {prompt, completion, label}, or a pair, {prompt, chosen, rejected}. Its texts are
plain strings or chat messages ({role, content}), not both. A pair becomes two unpaired rows here, so that later stages
handle one kind only.

A label is ``true`` or ``false``. Any other value needs a ``label_map``: a number in this column may be a rank, a score
or "which of the two is better".
"""

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prefopt.errors import BadRow, DataError

ROLES = ("system", "user", "assistant")
UNPAIRED_FIELDS = ("prompt", "completion", "label")
PAIRED_FIELDS = ("prompt", "chosen", "rejected")
OPTIONAL_FIELDS = ("group", "source")
# Arabic tatweel and marks of writing direction, which change the rendering only.
INVISIBLE = dict.fromkeys([0x0640, 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
# They would change the model's input, so a row that has one cannot be used without it.
REFUSED_FIELDS = ("tools", "chat_template_kwargs", "image", "images", "video", "videos", "audio")
MAX_DEPTH = 100  # levels of lists and objects in a row

CHAT, TEXT = "chat", "text"  # messages for a chat template, or plain text

Text = str | list[dict[str, str]]
LabelTable = Mapping[tuple[type, Any], bool]  # of ``labels.label_table``


class RowError(ValueError):
    """The reason why one row is bad."""


class LabelError(RowError):
    """The label of a row is not true or false; ``label`` is its type and value."""

    def __init__(self, message: str, value: Any):
        super().__init__(message)
        self.label = key_of(value)


class UnpairedRow(NamedTuple):
    """One answer and its label; ``prompt`` and ``completion`` are both text or both lists of chat messages."""

    prompt: Text
    completion: Text
    label: bool


def bad_rows_error(
    bad: Sequence[BadRow],
    total: int,
    name: str,
    remedy: str = "--data.on_bad_row skip in training, which lists them in the run folder",
    hint: str = "",
) -> DataError:
    """The error with the number of bad rows, the first ten of them, and the remedy; ``hint`` is appended."""
    shown = "\n".join(f"  {row}" for row in bad[:10])
    rest = "" if len(bad) <= 10 else f"\n  ... and {len(bad) - 10} more"
    return DataError(
        f"{len(bad)} of {total} rows of {name} cannot be used:\n{shown}{rest}\n"
        f"Correct them, or leave them out with {remedy}." + (f"\n{hint}" if hint else ""),
        bad,
    )


def unpaired_rows(raw: Mapping[str, Any], labels: LabelTable | None = None) -> list[UnpairedRow]:
    """Check a row and return it as one answer, or as two (desirable first) if it is a pair.

    Args:
        raw: the row, checked by ``check_values``.
        labels: the meaning of labels other than true and false, from ``label_table``.

    Raises:
        RowError: the row cannot be used.

    Example:
        >>> unpaired_rows({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})
        [UnpairedRow(prompt='2 + 2?', completion='4', label=True),
         UnpairedRow(prompt='2 + 2?', completion='5', label=False)]
    """
    row = {name: value for name, value in raw.items() if value is not None}
    for name in REFUSED_FIELDS:
        if name in row:
            raise RowError(f"field {name!r} is not supported and changes what the model sees")
    paired = "chosen" in row or "rejected" in row
    if paired and ("completion" in row or "label" in row):
        raise RowError("has fields of an unpaired row (completion, label) and of a pair (chosen, rejected)")
    if paired:
        _require(row, ("chosen", "rejected"), PAIRED_FIELDS)
        return _unpaired(row)
    _require(row, UNPAIRED_FIELDS, (*UNPAIRED_FIELDS, *PAIRED_FIELDS))
    label = _label(row["label"], labels or {})
    return [_checked(row["prompt"], row["completion"], "completion", label)]


def as_messages(row: UnpairedRow) -> UnpairedRow:
    """Convert text to a user's and an assistant's message, stripped of surrounding space; chat rows are unchanged.

    Example:
        >>> as_messages(UnpairedRow("2 + 2?", " 4", True)).completion
        [{'role': 'assistant', 'content': '4'}]
    """
    if not isinstance(row.prompt, str):
        return row
    assert isinstance(row.completion, str)
    return UnpairedRow(
        [{"role": "user", "content": row.prompt.strip()}],
        [{"role": "assistant", "content": row.completion.strip()}],
        row.label,
    )


def key_of(label: Any) -> tuple[type, Any]:
    """Type and value of a label, so that 1, true and 1.0 are three labels."""
    return type(label), label if isinstance(label, (str, int, float)) else None


def _label(value: Any, labels: LabelTable) -> bool:
    if isinstance(value, bool):
        return value
    if key_of(value) in labels:
        return labels[key_of(value)]
    known = ", ".join(show(label) for _, label in labels)
    expected = f"true or false, or a label of label_map ({known})" if labels else "true or false"
    raise LabelError(f"label is {show(value)}; expected {expected}", value)


def group_of(raw: Mapping[str, Any], prompt: Text) -> int:
    """A 63-bit hash of the field ``group`` or, without one, of the ``folded`` prompt; the same on every machine."""
    given = raw.get("group")
    if given is None:
        key = "prompt\x1e" + folded_turns(prompt)
    elif isinstance(given, (str, int)) and not isinstance(given, bool):
        key = f"group\x1e{given}"
    else:
        raise RowError(f"group is {show(given)}; expected text or an integer")
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def _unpaired(row: Mapping[str, Any]) -> list[UnpairedRow]:
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    prompt = row.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        _messages(chosen, "chosen")
        _messages(rejected, "rejected")
        question = prompt
        shared = common_prefix(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not len(chosen) == len(rejected) == 1:
            raise RowError("chosen and rejected part before their last message; expected one other answer at the end")
        # Some sets repeat the question as text beside whole conversations.
        questions = [message["content"] for message in prompt if message["role"] == "user"]
        if isinstance(question, str) and question not in questions:
            raise RowError("prompt is text that is not a user turn shared by chosen and rejected")
    elif isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        prompt, chosen, rejected = _common_words(chosen, rejected)
    return [
        _checked(prompt, chosen, "chosen", True),
        _checked(prompt, rejected, "rejected", False),
    ]


def common_prefix(first: Sequence, second: Sequence) -> int:
    """The length of the common beginning of two sequences.

    Example:
        >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
        2
    """
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)


def _common_words(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split off the common beginning at a word boundary: "is blue", "is black" share "is", not "is bl"."""
    length = common_prefix(chosen, rejected)
    while length > 0 and not chosen[length - 1 : length].isspace():
        length -= 1
    if length > 0 and chosen[length - 1] == " ":  # the space belongs to the answer, as in tokens
        length -= 1
    return chosen[:length], chosen[length:], rejected[length:]


def _checked(prompt: Any, completion: Any, name: str, label: bool) -> UnpairedRow:
    """Check that both texts are of one kind, not empty, and in the order of a conversation."""
    for field, value in (("prompt", prompt), (name, completion)):
        if not isinstance(value, (str, list)):
            raise RowError(f"{field} is {show(value)}; expected text or a list of messages")
    if isinstance(prompt, str) != isinstance(completion, str):
        kinds = ["text" if isinstance(value, str) else "chat messages" for value in (prompt, completion)]
        raise RowError(f"prompt is {kinds[0]} but {name} is {kinds[1]}; expected both of one kind")
    if isinstance(prompt, str):
        for field, value in (("prompt", prompt), (name, completion)):
            if not value.strip():
                raise RowError(f"{field} is empty")
        return UnpairedRow(prompt, completion, label)
    prompt, completion = _messages(prompt, "prompt"), _messages(completion, name)
    _check_turns(prompt)
    roles = [message["role"] for message in completion]
    if roles != ["assistant"]:
        raise RowError(f"{name} has the roles {_few(roles)}; expected one assistant message")
    return UnpairedRow(prompt, completion, label)


def _check_turns(prompt: list[dict[str, str]]) -> None:
    """system?, user, assistant, user, ..., user."""
    roles = [message["role"] for message in prompt]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["assistant" if turn % 2 else "user" for turn in range(len(turns))]
    if turns != expected or not turns or turns[-1] != "user":
        raise RowError(
            f"prompt has the roles {_few(roles)}; expected system (optional), then user and assistant in turn, "
            "with user last"
        )


def _messages(value: list, field: str) -> list[dict[str, str]]:
    """Messages with exactly role and content, checked one by one."""
    if not value:
        raise RowError(f"{field} is empty")
    checked = []
    for number, message in enumerate(value, start=1):
        where = f"message {number} of {field}"
        if not isinstance(message, Mapping):
            raise RowError(f"{where} is {show(message)}; expected {{role, content}}")
        message = {key: part for key, part in message.items() if part is not None}
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RowError(f"{where} has {key} {show(message.get(key))}; expected text")
        extra = sorted(set(message) - {"role", "content"})
        if extra:
            raise RowError(f"{where} has {show(extra[0])}, which is not supported; expected role and content")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise RowError(f"{where} has the unknown role {show(role)}; expected {', '.join(ROLES)}")
        if not content.strip() and role != "system":
            raise RowError(f"{where} is empty")
        checked.append({"role": role, "content": content})
    return checked


def _require(row: Mapping[str, Any], needed: Sequence[str], known: Sequence[str]) -> None:
    for name in needed:
        if name not in row:
            spare = [other for other in row if other not in known]
            near = difflib.get_close_matches(name, spare, n=1)
            hint = f" (found {show(near[0])})" if near else ""
            raise RowError(f"field {name!r} is missing{hint}")


def plain_text(text: Text) -> str:
    """Text, or the contents of messages, one a line."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def folded_turns(text: Text) -> str:
    """Text or messages, with their roles, as one ``folded`` string."""
    turns = [("text", text)] if isinstance(text, str) else [(m["role"], m["content"]) for m in text]
    return "\x1e".join(f"{role}\x1f{folded(content)}" for role, content in turns)


def folded(text: str) -> str:
    """The text without differences of case, spacing, Unicode form, tatweel and direction marks, for comparisons.

    Example:
        >>> folded(" Caf\\u00e9  AU lait\\n") == folded("cafe\\u0301 au lait")
        True
    """
    plain = unicodedata.normalize("NFKC", text).translate(INVISIBLE)
    return re.sub(r"\s+", " ", plain).strip().casefold()


def _few(roles: Sequence[str]) -> str:
    return ", ".join(roles[:10]) + (", ..." if len(roles) > 10 else "")


def show(value: Any) -> str:
    """A value for a message, cut to 60 characters; None is "missing"."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_values(raw: Mapping[str, Any]) -> None:
    """Refuse values that cannot be written or printed: half of a surrogate pair, and deep nesting.

    Raises:
        RowError: with the place in the row.
    """
    pending: list[tuple[str, Any, int]] = [("", raw, 0)]
    while pending:
        where, value, level = pending.pop()
        if isinstance(value, str):
            _check_utf8(value, where)
        elif isinstance(value, (Mapping, list, tuple)):
            if level == MAX_DEPTH:
                raise RowError(f"{where[:60]} is nested more than {MAX_DEPTH} levels deep")
            if isinstance(value, Mapping):
                for key, part in value.items():
                    _check_utf8(str(key), f"key {show(key)}")
                    pending.append((f"{where}.{key}" if where else str(key), part, level + 1))
            else:
                pending += [(f"{where}[{i}]", part, level + 1) for i, part in enumerate(value)]


def _check_utf8(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{where:.60} holds half of a surrogate pair at character {error.start}") from None
