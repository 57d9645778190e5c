"""Unpaired rows, {prompt, completion, label}, and pairs, {prompt, chosen, rejected}, as `prefopt train` reads them.

The group is the field ``group`` or, without one, the prompt. With ``messages``, text becomes chat messages.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from prefopt.data.build.convert.answer import Answer, Outcomes, Raws, each
from prefopt.data.rows import as_messages, group_of, unpaired_rows


def convert(raws: Raws, *, messages: bool = False) -> Outcomes:
    """One answer for an unpaired row, two for a pair."""
    return each(raws, partial(_answers, messages=messages))


def _answers(raw: Mapping[str, Any], messages: bool) -> list[Answer]:
    answers = []
    for row in unpaired_rows(raw):
        key, given = group_of(raw, row.prompt), raw.get("group")
        group = f"{key:016x}" if given is None else str(given)
        answers.append(Answer(*(as_messages(row) if messages else row), group=group))
    return answers
