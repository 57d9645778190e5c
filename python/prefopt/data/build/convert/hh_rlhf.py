r"""Anthropic/hh-rlhf: {chosen, rejected}, two transcripts written as "\n\nHuman: ...\n\nAssistant: ...".

The prompt is not given: it is all turns that both transcripts share, and it must end right before the last answer. The
transcripts are split into turns first and compared turn by turn; cutting at the longest common beginning of the two
*texts* goes wrong where the answers begin alike, and where one of them is empty. Traps:

- Dialogues that part before the last answer: the rest of each would hold turns of the user, which are nobody's answer.
- Transcripts that end with a turn of the user.
- Empty last answers, also as "Assistant:" without a space.
- The same dialogue twice.
- Two turns of one speaker in a row.
- Many dialogues are one conversation at several lengths: a longer one holds the answer of a shorter one in its prompt.
  So the group is the opening question, not the prompt.
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
