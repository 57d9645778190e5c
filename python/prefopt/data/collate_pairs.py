"""Batches of pairs: both answers in one batch, so that one pass scores them and no step tears a pair apart."""

from collections.abc import Mapping, Sequence

from prefopt.data.collate import PreferenceCollator, RawFeatures

SIDES = ("chosen", "rejected")


class PairCollator:
    """Pads P pairs into the 2 P sequences of one micro-batch: the chosen ones, then the rejected ones in the same
    order.

    Args:
        pad_token_id, max_length: as for ``PreferenceCollator``.

    A feature is a row of ``tokenize_pairs``; columns ``ref_chosen_logps`` and ``ref_rejected_logps`` are passed on as
    ``ref_logps``.

    Example:
        >>> pair = {"chosen_prompt_ids": [5, 6], "chosen_completion_ids": [7], "rejected_prompt_ids": [5, 6],
        ...         "rejected_completion_ids": [8, 9], "group": 1, "row": 0}
        >>> batch = PairCollator(0, max_length=None)([pair])
        >>> batch["input_ids"], batch["labels"]
        (tensor([[5, 6, 7, 0],
                [5, 6, 8, 9]]), tensor([ True, False]))
    """

    def __init__(self, pad_token_id: int, *, max_length: int | None):
        self.rows = PreferenceCollator(pad_token_id, max_length=max_length)

    def __call__(self, features: Sequence[Mapping]) -> dict:
        """One micro-batch.

        Returns:
            ``input_ids``, ``attention_mask`` (2 P, L) int64 and ``completion_mask`` (2 P, L) bool; ``labels`` (2 P,)
            bool, True for the chosen ones; ``row`` and ``group`` (P,) int64; ``features``, the raw pairs; ``ref_logps``
            (2 P,) fp32 where the columns are there.
        """
        batch = self.rows([_half(pair, side) for side in SIDES for pair in features])
        for name in ("row", "group"):
            batch[name] = batch[name][: len(features)]
        batch["features"] = RawFeatures(features)
        return batch


def _half(pair: Mapping, side: str) -> dict:
    """One answer as a feature of ``PreferenceCollator``."""
    half = {
        "prompt_ids": pair[f"{side}_prompt_ids"],
        "completion_ids": pair[f"{side}_completion_ids"],
        "label": side == "chosen",
        "group": pair["group"],
        "row": pair["row"],
    }
    if f"ref_{side}_logps" in pair:
        half["ref_logps"] = pair[f"ref_{side}_logps"]
    return half
