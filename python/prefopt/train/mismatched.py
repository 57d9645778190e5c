"""KTO's reference point, from prompts paired with completions of other prompts.

The passes over mismatched completions carry no gradient. Unless ``kl_estimator`` is "microbatch" they run once per
optimizer step, before its first micro-batch, in pieces of the micro-batches' size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.data.collate import pair_mismatched
from prefopt.train.precompute import rotated
from prefopt.train.scoring import PackingCollator
from prefopt_kernels.reference_point import EMAKL, MicrobatchKL, WindowKL

ESTIMATORS = {"window": WindowKL, "microbatch": MicrobatchKL, "ema": EMAKL}
PAIRINGS = {"window": pair_mismatched, "microbatch": rotated, "ema": pair_mismatched}


@dataclass(frozen=True)
class Estimate:
    """A reference point and how many rows had no mismatched completion to give to it."""

    value: Tensor  # 0-dim fp32, nats, clamped at 0, the same on all ranks
    rows_without_partner: int  # of this rank


class MismatchedRows:
    """Estimates the reference point from the rows of a window or a micro-batch.

    Args:
        kl_estimator: "window", "microbatch" or "ema": the pairing, the reduction over ranks, and the memory.
        collator: builds the mismatched sequences.
        log_ratios: returns (n,) policy minus reference, nats, for a batch, which may contain ``ref_logps``.
        device: of an estimate from no rows.
        decay: of "ema".
        dummy_pass: called instead of ``log_ratios`` for a piece without sequences, where a pass needs all processes.
    """

    def __init__(
        self,
        kl_estimator: str,
        collator: PackingCollator,
        log_ratios: Callable[[dict], Tensor],
        device: torch.device,
        decay: float | None = None,
        dummy_pass: Callable[[], object] = lambda: None,
    ):
        self.pair = PAIRINGS[kl_estimator]
        self.estimator = ESTIMATORS[kl_estimator](**({} if decay is None else {"decay": decay}))
        self._start = self.estimator.state_dict()
        self.collator = collator
        self.log_ratios = log_ratios
        self.device = device
        self.dummy_pass = dummy_pass

    def reset(self) -> None:
        """Restart from no estimate."""
        self.estimator.load_state_dict(self._start)

    def estimate(self, pieces: Sequence[Sequence[dict]], *, update: bool) -> Estimate:
        """One estimate from all rows of all pieces, which are scored piece by piece.

        Args:
            pieces: rows of each micro-batch. Rows with a fixed ``kl_partner`` keep it; others are paired here.
            update: False in evaluation.
        """
        rows = [row for piece in pieces for row in piece]
        fixed = bool(rows) and "kl_partner" in rows[0]
        partners = [] if fixed else self.pair([row["group"] for row in rows])
        ratios, start = [torch.zeros(0, device=self.device)], 0
        for piece in pieces:
            if fixed:
                batch = self._fixed(piece)
            else:
                here = range(start, start + len(piece))
                masked = [p if row in here else -1 for row, p in enumerate(partners)]
                batch = self.collator.mismatched(rows, masked)
            start += len(piece)
            if batch is None:
                self.dummy_pass()
            else:
                ratios.append(self.log_ratios(batch))
        log_ratios = torch.cat(ratios)  # (n,)
        value = self.estimator.estimate(log_ratios, update=update)
        return Estimate(value, len(rows) - len(log_ratios))

    def _fixed(self, piece: Sequence[dict]) -> dict | None:
        """The sequences whose reference scores were computed beforehand."""
        n = len(piece)
        others = [{"prompt_ids": [], "completion_ids": row["kl_completion_ids"]} for row in piece]
        partners = [n + i if row["kl_partner"] >= 0 else -1 for i, row in enumerate(piece)]
        batch = self.collator.mismatched([*piece, *others], partners + [-1] * n)
        if batch is not None:
            known = [piece[i]["ref_kl_logps"] for i in batch["index"].tolist()]
            batch["ref_logps"] = torch.tensor(known)
        return batch
