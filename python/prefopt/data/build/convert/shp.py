"""stanfordnlp/SHP: two comments on a post, with their Reddit scores, and which of them is preferred.

- ``labels`` is 1 if A is preferred and 0 if B is. A row whose label contradicts the scores is omitted.
- ``min_ratio``: the better score must be at least this multiple of the other. The ratio is computed here, because
  revisions of the data card define ``score_ratio`` differently.
- ``domain`` includes the name of the split ("askculinary_train"), which is removed.
- A popular post is in many pairs: ``per_group`` in the plan limits them (default 5).
- A comment can be preferred in one pair and not in another; the build drops such contradictory answers.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from prefopt.data.build.convert.answer import Answer, Dropped, Outcomes, Raws, each, number_of, pair, text_of, user
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
    chosen, rejected = (text_of(raw, f"human_ref_{side}") for side in ("AB" if label else "BA"))
    if chosen.strip() in GONE or rejected.strip() in GONE:
        raise Dropped("a comment was deleted")
    post = text_of(raw, "history").strip()
    if not post:
        raise Dropped("the post is empty")
    domain = re.sub("_(train|validation|test)$", "", text_of(raw, "domain"))
    return pair([user(post)], chosen, rejected, text_of(raw, "post_id"), domain)
