"""stanfordnlp/SHP: two comments on a post, with their Reddit scores, and which of them is preferred.

Traps:

- ``labels`` is 1 where A is preferred and 0 where B is: it is not a verdict on either comment. A label that contradicts
  the scores is left out.
- Scores tie, or nearly: with ``min_ratio`` the better score must be that many times the other. ``score_ratio`` is
  described in two ways in the card's revisions (A to B, better to worse), so the ratio is computed here.
- ``domain`` carries the name of the split ("askculinary_train").
- A popular post is in many pairs: ``per_group`` in the plan caps them (5 unless said otherwise).
- One comment is in many pairs and can win one and lose another. As rated rows these contradict each other; the
  builder's count of contradictory labels shows how many, and its count of repetitions how often a comment came again.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from prefopt.data.build.convert.answer import (
    Answer,
    Dropped,
    Outcomes,
    Raws,
    each,
    number_of,
    pair,
    text_of,
    user,
)
from prefopt.data.rows import RowError

NEEDS = ("post_id", "domain", "history", "human_ref_A", "human_ref_B", "score_A", "score_B", "labels")  # fmt: skip
GONE = ("[deleted]", "[removed]")


def convert(raws: Raws, *, min_ratio: float = 2.0) -> Outcomes:
    """Two answers a row; the group is the post."""
    return each(raws, partial(_answers, min_ratio=min_ratio))


def _answers(raw: Mapping[str, Any], min_ratio: float) -> list[Answer]:
    scores = number_of(raw, "score_A"), number_of(raw, "score_B")
    label = raw.get("labels")
    if label not in (0, 1):
        raise RowError(f"labels is {label!r}; expected 1 (A is preferred) or 0 (B is)")
    if scores[0] == scores[1]:
        raise Dropped("the scores tie")
    if (scores[0] > scores[1]) != bool(label):
        raise Dropped("the label contradicts the scores")
    if max(scores) <= 0:
        raise Dropped("the better score is not positive")
    ratio = max(scores) / min(scores) if min(scores) > 0 else math.inf
    if ratio < min_ratio:
        raise Dropped(f"the score ratio is below {min_ratio:g}")
    comments = [text_of(raw, f"human_ref_{side}") for side in ("AB" if label else "BA")]
    if any(comment.strip() in GONE for comment in comments):
        raise Dropped("a comment was deleted")
    post = text_of(raw, "history").strip()
    if not post:
        raise Dropped("the post is empty")
    domain = re.sub("_(train|validation|test)$", "", text_of(raw, "domain"))
    return pair([user(post)], *comments, text_of(raw, "post_id"), domain)
