"""KTO's reference point, from prompts paired with completions of other prompts.

The passes over mismatched completions carry no gradient. Unless ``kl_estimator`` is "microbatch" they run once per
optimizer step, before its first micro-batch.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from prefopt.data.collate import pair_mismatched
from prefopt.train.passes import Answer
from prefopt.train.precompute import rotated
from prefopt.train.scoring import PassCollator
from prefopt_kernels.reference_point import EMAKL, MicrobatchKL, WindowKL

ESTIMATORS = {"window": WindowKL, "microbatch": MicrobatchKL, "ema": EMAKL, "exact": WindowKL}
PAIRINGS = {"window": pair_mismatched, "microbatch": rotated, "ema": pair_mismatched, "exact": pair_mismatched}


class Mismatched(NamedTuple):
    """A row's prompt with the completion of another prompt."""

    row: int  # whose prompt it is, by place
    answer: Answer
    ref_logp: float | None  # nats, if it was computed before training


class MismatchedRows:
    """Pairs the rows of a window or micro-batch and reduces their log-ratios to the reference point.

    Args:
        kl_estimator: "window", "microbatch" or "ema": the pairing, the reduction over ranks, and the memory.
        collator: cuts completions to ``max_length``.
        decay: of "ema".
    """

    def __init__(self, kl_estimator: str, collator: PassCollator, decay: float | None = None):
        self.pair = PAIRINGS[kl_estimator]
        self.estimator = ESTIMATORS[kl_estimator](**({} if decay is None else {"decay": decay}))
        self._start = self.estimator.state_dict()
        self.collator = collator

    def reset(self) -> None:
        """Restart from no estimate."""
        self.estimator.load_state_dict(self._start)

    def answers(self, rows: Sequence[Mapping]) -> list[Mismatched]:
        """One for each row that has a partner and room for its completion.

        Args:
            rows: of the window, in an order that does not depend on its micro-batches. Rows with a fixed
                ``kl_partner`` keep it; others are paired here.
        """
        if rows and "kl_partner" in rows[0]:
            others = [row["kl_completion_ids"] if row["kl_partner"] >= 0 else None for row in rows]
        else:
            partners = self.pair([row["group"] for row in rows])
            others = [rows[partner]["completion_ids"] if partner >= 0 else None for partner in partners]
        found = [
            Mismatched(place, self.collator.cut(row["prompt_ids"], other), row.get("ref_kl_logps"))
            for place, (row, other) in enumerate(zip(rows, others, strict=True))
            if other is not None
        ]
        return [one for one in found if one.answer.completion]
