"""trl-lib/kto-mix-14k: {prompt, completion, label}, unpaired chat messages.

Prompts can have several turns. The set was made of pairs, so a slice from its start may be unbalanced.
"""

from collections.abc import Mapping
from typing import Any

from prefopt.data.build.convert.answer import Answer, Dropped, Outcomes, Raws, each
from prefopt.data.rows import group_of, unpaired_rows

NEEDS = ("prompt", "completion", "label")


def convert(raws: Raws) -> Outcomes:
    """One answer a row; the group is the prompt."""
    return each(raws, _answers)


def _answers(raw: Mapping[str, Any]) -> list[Answer]:
    completion = raw.get("completion")
    if isinstance(completion, list) and len(completion) == 1:
        content = completion[0].get("content") if isinstance(completion[0], Mapping) else None
        if isinstance(content, str) and not content.strip():
            raise Dropped("an answer is empty")
    rated = unpaired_rows({name: raw.get(name) for name in NEEDS})[0]
    return [Answer(*rated, group=f"{group_of({}, rated.prompt):016x}")]
