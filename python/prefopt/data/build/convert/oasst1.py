"""OpenAssistant/oasst1: trees of messages, one row each; the answers to a message are ranked.

The best of the siblings is desirable and the worst undesirable (``keep="extremes"``), or the better and the worse half
(``keep="halves"``, without an odd one in the middle). Rank 0 is the best.

- Ranks compare siblings only, so unranked answers and answers without siblings have no label. Pairs of neighbours
  (a over b, b over c) would give b both labels.
- Deleted messages, messages rejected in review, and answers below a deleted message are not used, also not as siblings.
- The prompt is the path from the root. It can contain other answers, so the group is the tree.
- ``languages`` selects languages by the message's own field.
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
    """One answer for each ranked message; the table is held in memory, because a path can contain any row."""
    rows = list(raws)
    messages = {raw["message_id"]: raw for _, raw in rows if isinstance(raw.get("message_id"), str)}
    outcomes: dict[int, Outcome] = {}
    siblings = defaultdict(list)
    for line, raw in rows:
        try:
            parent, rank = _parent_and_rank(raw, languages)
            siblings[parent].append((rank, text_of(raw, "message_id"), line, raw))
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


def _parent_and_rank(raw: Mapping[str, Any], languages: Sequence[str] | None) -> tuple[str, int]:
    """The message that a usable answer replies to, and the answer's rank."""
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
    rank = _rank(raw)
    if rank is None:
        raise Dropped("the message is not ranked")
    if not isinstance(raw.get("parent_id"), str):
        raise Dropped("a message above it is deleted or missing")
    return raw["parent_id"], rank


def _rank(raw: Mapping[str, Any]) -> int | None:
    rank = raw.get("rank")
    if rank is None or rank != rank:  # pandas writes a missing number as NaN
        return None
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or rank != int(rank):
        raise RowError(f"rank is {rank!r}; expected a whole number or nothing")
    return int(rank)


def _labels(ranks: Sequence[int], keep: str) -> list[bool | str]:
    """The label of each rank, from best to worst, or the reason why it has none."""
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
