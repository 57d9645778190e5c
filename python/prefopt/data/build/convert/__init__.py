"""The schemas that `prefopt data build` reads, one file each."""

import difflib
from collections.abc import Callable
from typing import NamedTuple

from prefopt.data.build.convert import generic, hh_rlhf, kto_mix, mmlu_pro, oasst1, shp, ultrafeedback
from prefopt.data.build.convert.answer import Answer, Dropped, Outcome, Outcomes

__all__ = ["KINDS", "Answer", "Dropped", "Kind", "Outcome", "Outcomes", "nearest_kind"]


class Kind(NamedTuple):
    """A schema: its converter and required columns, and the published set that has it, at a reviewed commit."""

    convert: Callable[..., Outcomes]
    needs: tuple[str, ...] | None
    path: str | None = None
    split: str = "train"
    revision: str | None = None
    per_group: int | None = None


KINDS = {
    "ultrafeedback_binarized": Kind(
        ultrafeedback.convert,
        ultrafeedback.NEEDS,
        "HuggingFaceH4/ultrafeedback_binarized",
        "train_prefs",
        "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
    ),
    "hh-rlhf": Kind(
        hh_rlhf.convert,
        hh_rlhf.NEEDS,
        "Anthropic/hh-rlhf",
        revision="09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
    ),
    "shp": Kind(
        shp.convert,
        shp.NEEDS,
        "stanfordnlp/SHP",
        revision="e94b5f32602712d78ed494fe79105b1959396686",
        per_group=5,
    ),
    "oasst1": Kind(
        oasst1.convert,
        oasst1.NEEDS,
        "OpenAssistant/oasst1",
        revision="fdf72ae0827c1cda404aff25b6603abec9e3399b",
    ),
    "kto-mix-14k": Kind(
        kto_mix.convert,
        kto_mix.NEEDS,
        "trl-lib/kto-mix-14k",
        revision="4470f033f33364e7d064c9f920c3df54d0cce767",
    ),
    "mmlu-pro": Kind(
        mmlu_pro.convert,
        mmlu_pro.NEEDS,
        "TIGER-Lab/MMLU-Pro",
        "test",
        "b189ec765aa7ed75c8acfea42df31fdae71f97be",
    ),
    "rows": Kind(generic.convert, None),
}


def nearest_kind(name: str) -> str:
    """ "; did you mean shp?" if a kind has a similar name, otherwise an empty string."""
    near = difflib.get_close_matches(name, KINDS, n=1)
    return f"; did you mean {near[0]}?" if near else ""
