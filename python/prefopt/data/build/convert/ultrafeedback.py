"""HuggingFaceH4/ultrafeedback_binarized: {prompt, prompt_id, chosen, rejected, score_chosen, score_rejected}.

``chosen`` and ``rejected`` are whole conversations; ``messages`` repeats ``chosen`` and is not read. ``rejected`` was
drawn at random from the three answers that are not the best, so scores can be equal; such pairs are omitted, as are
empty and identical answers.
"""

from collections.abc import Mapping
from typing import Any

from prefopt.data.build.convert.answer import Answer, Dropped, Outcomes, Raws, each, number_of, pair, text_of
from prefopt.data.rows import RowError

NEEDS = ("prompt_id", "chosen", "rejected", "score_chosen", "score_rejected")


def convert(raws: Raws) -> Outcomes:
    """Two answers a row; the group is the prompt's id."""
    return each(raws, _answers)


def _answers(raw: Mapping[str, Any]) -> list[Answer]:
    best, other = number_of(raw, "score_chosen"), number_of(raw, "score_rejected")
    if best == other:
        raise Dropped("both scores are equal")
    if best < other:
        raise Dropped("the rejected answer has the higher score")
    chosen, rejected = _turns(raw, "chosen"), _turns(raw, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise Dropped("the conversations part before the last answer")
    group = text_of(raw, "prompt_id")
    return pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], group)


def _turns(raw: Mapping[str, Any], name: str) -> list[dict[str, str]]:
    turns = raw.get(name)
    if not isinstance(turns, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise RowError(f"{name} is {turns!r:.60}; expected a list of {{role, content}}")
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise Dropped("a conversation does not end with an answer")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
