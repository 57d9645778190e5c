"""Rated rows, {prompt, completion, label}, and pairs, {prompt, chosen, rejected}, as `prefopt train` reads them.

The group is the field ``group`` where there is one, the prompt otherwise. Text stays text unless ``messages`` is set:
then a prompt becomes one message of the user, and an answer one of the assistant.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from prefopt.data.build.convert.answer import Answer, Outcomes, Raws, each
from prefopt.data.rows import as_messages, group_of, rated_rows


def convert(raws: Raws, *, messages: bool = False) -> Outcomes:
    """One answer for a rated row, two for a pair."""
    return each(raws, partial(_answers, messages=messages))


def _answers(raw: Mapping[str, Any], messages: bool) -> list[Answer]:
    answers = []
    for row in rated_rows(raw):
        prompt, completion, label = row
        key = group_of(raw, prompt)
        given = raw.get("group")
        group = f"{key:016x}" if given is None else str(given)
        if messages:
            prompt, completion, label = as_messages(row)
        answers.append(Answer(prompt, completion, label, group))
    return answers
