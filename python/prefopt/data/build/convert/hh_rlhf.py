r"""Anthropic/hh-rlhf: {chosen, rejected}, two transcripts written as "\n\nHuman: ...\n\nAssistant: ...".

The prompt is the turns that both transcripts share, and must be all but the last answer. The transcripts are compared
turn by turn, because the longest common beginning of the *texts* is wrong if the answers begin alike or one is empty.

Omitted: dialogues that differ before the last answer, transcripts that end with a user's turn, empty last answers (also
"Assistant:" without a space), identical transcripts, and two turns of one speaker in a row. Many dialogues are one
conversation at several lengths, so the group is the opening question, not the prompt.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from prefopt.data.build.convert.answer import Answer, Dropped, Outcomes, Raws, each, pair, text_of
from prefopt.data.rows import folded

NEEDS = ("chosen", "rejected")
MARK = re.compile(r"\n\n(Human|Assistant):(?=\s|$)")
ROLES = {"Human": "user", "Assistant": "assistant"}


def convert(raws: Raws) -> Outcomes:
    """Two answers a row."""
    return each(raws, _answers)


def _answers(raw: Mapping[str, Any]) -> list[Answer]:
    transcripts = text_of(raw, "chosen"), text_of(raw, "rejected")
    chosen, rejected = map(_turns, transcripts)
    if chosen == rejected:
        raise Dropped("both transcripts are the same")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Dropped("a transcript ends with the user's turn")
    if chosen[:-1] != rejected[:-1]:
        raise Dropped("the transcripts part before the last answer")
    prompt = chosen[:-1]
    roles = [turn["role"] for turn in prompt]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise Dropped("the speakers do not take turns")
    if not all(turn["content"] for turn in prompt):
        raise Dropped("a turn before the answer is empty")
    opening = hashlib.sha256(folded(prompt[0]["content"]).encode("utf-8", "surrogatepass"))
    return pair(prompt, chosen[-1]["content"], rejected[-1]["content"], opening.hexdigest()[:16])


def _turns(transcript: str) -> list[dict[str, str]]:
    text = "\n\n" + transcript.lstrip()
    marks = list(MARK.finditer(text))
    if not marks or marks[0].start():
        raise Dropped("a transcript does not begin with a speaker")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {"role": ROLES[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]
