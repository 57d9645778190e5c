"""OpenAssistant/oasst1: one row a message, which form trees; answers to one message are ranked among each other.

An answer is desirable if it is the best of its siblings and undesirable if it is the worst (``keep="extremes"``), or by
the half it is in (``keep="halves"``, an odd one in the middle left out). Rank 0 is the best. Traps:

- Ranks compare siblings only; a rank says nothing across messages. Unranked answers, and answers without a sibling,
  have no verdict. Unrolling every neighbouring pair (a over b, b over c) would call b good and bad at once.
- Deleted messages, messages that the review refused, and answers below a deleted message are not used, and do not count
  as siblings.
- The prompt is the path from the root. An answer further down the tree has another one's answer in its prompt, so the
  group is the tree.
- Languages are mixed; ``languages`` keeps some, by the message's own field.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.data.build.convert.answer import Answer, Dropped, Outcome, Outcomes, Raws, answer, text_of
from prefopt.data.rows import RowError

NEEDS = ("message_id", "text", "role", "lang", "message_tree_id")
ROLES = {"prompter": "user", "assistant": "assistant"}
KEEP = ("extremes", "halves")


def convert(raws: Raws, *, keep: str = "extremes", languages: Sequence[str] | None = None) -> Outcomes:
    """One answer a ranked message; the whole table is held in memory, because a path can run through any row of it."""
    rows = list(raws)
    messages = {raw["message_id"]: raw for _, raw in rows if isinstance(raw.get("message_id"), str)}
    outcomes: dict[int, Outcome] = {}
    siblings = defaultdict(list)
    for line, raw in rows:
        try:
            parent = _parent_of_ranked(raw, languages)
            entry = (_rank(raw), text_of(raw, "message_id"), line, raw)
            siblings[parent].append(entry)
        except (Dropped, RowError) as reason:
            outcomes[line] = reason
    for parent, ranked in siblings.items():
        ranked.sort(key=lambda entry: entry[:2])
        labels = _labels([entry[0] for entry in ranked], keep)
        for (_, _, line, raw), label in zip(ranked, labels, strict=True):
            try:
                outcomes[line] = [_answer(raw, parent, label, messages)]
            except (Dropped, RowError) as reason:
                outcomes[line] = reason
    for line, _ in rows:
        yield line, outcomes[line]


def _parent_of_ranked(raw: Mapping[str, Any], languages: Sequence[str] | None) -> str:
    """The message that a usable ranked answer replies to."""
    role = text_of(raw, "role")
    if role not in ROLES:
        raise RowError(f"role is {role!r}; expected prompter or assistant")
    if role == "prompter":
        raise Dropped("a prompter's message")
    if raw.get("deleted"):
        raise Dropped("the message was deleted")
    if raw.get("review_result") is False:
        raise Dropped("the review refused the message")
    if languages is not None and text_of(raw, "lang") not in languages:
        raise Dropped("another language")
    if not text_of(raw, "text").strip():
        raise Dropped("the answer is empty")
    if _rank(raw) is None:
        raise Dropped("the message is not ranked")
    if not isinstance(raw.get("parent_id"), str):
        raise Dropped("a message above it is deleted or missing")
    return raw["parent_id"]


def _rank(raw: Mapping[str, Any]) -> int | None:
    rank = raw.get("rank")
    if rank is None or rank != rank:  # a missing number that went through pandas is a NaN
        return None
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or rank != int(rank):
        raise RowError(f"rank is {rank!r}; expected a whole number or nothing")
    return int(rank)


def _labels(ranks: Sequence[int], keep: str) -> list[bool | str]:
    """For ranks from best to worst: the label, or the reason why there is none."""
    if len(ranks) < 2:
        return ["no sibling to be compared with"]
    if ranks[0] == ranks[-1]:
        return ["its siblings have the same rank"] * len(ranks)
    size = 1 if keep == "extremes" else len(ranks) // 2
    middle: list[bool | str] = ["neither among the best nor the worst"] * (len(ranks) - 2 * size)
    return [True] * size + middle + [False] * size


def _answer(raw: Mapping[str, Any], parent: str, label: bool | str, messages: Mapping) -> Answer:
    if isinstance(label, str):
        raise Dropped(label)
    path, here, seen = [], parent, set()
    while here is not None:
        above = messages.get(here)
        if above is None or above.get("deleted") or here in seen:
            raise Dropped("a message above it is deleted or missing")
        seen.add(here)
        path.append({"role": ROLES.get(above.get("role"), "?"), "content": text_of(above, "text").strip()})
        here = above.get("parent_id")
    path.reverse()
    roles = [turn["role"] for turn in path]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise Dropped("the speakers do not take turns")
    if not all(turn["content"] for turn in path):
        raise Dropped("a message above it is empty")
    tree, language = text_of(raw, "message_tree_id"), text_of(raw, "lang")
    return answer(path, raw["text"].strip(), label, tree, language)
