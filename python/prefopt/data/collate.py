"""Batches of tokenised rows or pairs, and the mismatched sequences for KTO's KL estimate.

KTO's reference point is an estimate of the KL divergence between policy and reference model, made from completions of
*another* prompt (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1). The collator chooses that completion while it
builds the batch, so the choice is valid for every sampler, for evaluation, and for a last batch of any size.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MISMATCHES = ("none", "rotate", "window")
SIDES = ("chosen", "rejected")


class RawFeatures:
    """The rows of a batch before padding.

    Neither a list nor a mapping, because code that moves a batch to a device recurses into those token by token.
    """

    def __init__(self, features: Sequence[Mapping]):
        self._features = list(features)

    def __len__(self) -> int:
        return len(self._features)

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self._features)

    def __getitem__(self, index: int) -> Mapping:
        return self._features[index]


def pair_mismatched(groups: Sequence[int] | Tensor) -> list[int]:
    """Assign each row a partner from a different group (prompt), whose completion it is scored with.

    The rows are ordered by group, in order of first appearance, and rotated by the size of the largest group. So each
    completion is used at most once, and distinct prompts give the rotation by one: row ``i`` takes completion
    ``i - 1``. The result does not depend on how the rows are split into micro-batches.

    Args:
        groups: (n,) group of each row, any integers; equal means the same prompt.

    Returns:
        n positions into ``groups``; -1 for a row without a partner. There is no -1 unless one group holds m > n/2 rows;
        then exactly 2m - n rows of it, the minimum, have none.

    Example:
        >>> pair_mismatched([7, 8, 9])
        [2, 0, 1]
        >>> pair_mismatched([7, 7, 8, 8])
        [2, 3, 0, 1]
        >>> pair_mismatched([7, 7, 8])
        [-1, 2, 0]
    """
    groups = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if not groups:
        return []
    sizes = Counter(groups)  # keeps the order of first appearance
    block = {group: index for index, group in enumerate(sizes)}
    layout = sorted(range(len(groups)), key=lambda row: block[groups[row]])  # stable
    shift = max(sizes.values())
    partners = [-1] * len(groups)
    for position, row in enumerate(layout):
        partner = layout[(position - shift) % len(layout)]
        if groups[partner] != groups[row]:
            partners[row] = partner
    return partners


class PreferenceCollator:
    """Pads rows on the right into the tensors of one micro-batch.

    Args:
        pad_token_id: fills ``input_ids`` after each row.
        mismatch: "rotate" adds mismatched sequences within the micro-batch, prompt ``i`` with completion ``i - 1``, as
            TRL 1.16 does; "none" and "window" add none (for "window" the trainer builds them over the whole optimizer
            step with ``pair_mismatched`` and ``build_mismatched``).
        max_length: tokens per sequence; longer completions lose their end. None: no limit.

    A feature holds ``prompt_ids``, ``completion_ids``, ``label``, ``group`` and ``row``; further numeric columns whose
    names start with ``ref_`` become (B,) fp32 tensors.

    Example:
        >>> rows = [
        ...     {"prompt_ids": [5, 6], "completion_ids": [7], "label": True, "group": 1, "row": 0},
        ...     {"prompt_ids": [8], "completion_ids": [9, 3, 3], "label": False, "group": 2, "row": 1},
        ... ]
        >>> batch = PreferenceCollator(0, mismatch="rotate", max_length=3)(rows)
        >>> batch["input_ids"]
        tensor([[5, 6, 7],
                [8, 9, 3]])
        >>> batch["kl_input_ids"]
        tensor([[5, 6, 9],
                [8, 7, 0]])
    """

    def __init__(self, pad_token_id: int, *, mismatch: str = "none", max_length: int | None):
        if not isinstance(pad_token_id, int):
            raise TypeError(
                f"pad_token_id is {pad_token_id!r}; expected an integer (does the tokenizer have a pad token?)"
            )
        if mismatch not in MISMATCHES:
            raise ValueError(f"mismatch is {mismatch!r}; expected one of {', '.join(MISMATCHES)}")
        self.pad_token_id = pad_token_id
        self.mismatch = mismatch
        self.max_length = max_length

    def __call__(self, features: Sequence[Mapping]) -> dict[str, Any]:
        """One micro-batch.

        Returns:
            ``input_ids``, ``attention_mask`` (B, L) int64 and ``completion_mask`` (B, L) bool; ``labels`` (B,) bool;
            ``row`` and ``group`` (B,) int64; ``features``, the raw rows; and for "rotate" the ``kl_`` tensors of
            ``build_mismatched``.
        """
        batch: dict[str, Any] = {**self._pad([(row["prompt_ids"], row["completion_ids"]) for row in features])}
        batch["labels"] = torch.tensor([bool(row["label"]) for row in features], dtype=torch.bool)
        for name in ("row", "group"):
            batch[name] = torch.tensor([row[name] for row in features], dtype=torch.int64)
        for name in features[0]:
            if name.startswith("ref_"):
                batch[name] = torch.tensor([row[name] for row in features], dtype=torch.float32)
        if self.mismatch == "rotate":
            groups = [row["group"] for row in features]
            rotation = [(i - 1) % len(groups) for i in range(len(groups))]
            partners = [j if groups[i] != groups[j] else -1 for i, j in enumerate(rotation)]
            batch.update(self.build_mismatched(features, partners))
        batch["features"] = RawFeatures(features)
        return batch

    def build_mismatched(self, features: Sequence[Mapping], partners: Sequence[int]) -> dict[str, Tensor]:
        """Prompt ``i`` followed by the completion of row ``partners[i]``, for every row that has a partner.

        The completion is cut to the room that the prompt leaves within ``max_length``; the prompt is never cut.

        Returns:
            ``kl_input_ids``, ``kl_attention_mask``, ``kl_completion_mask`` (n, L) as in the batch, and ``kl_index``
            (n,) int64, the position in ``features`` of each sequence's prompt. Rows without a partner, or without room
            for its completion, are omitted. n may be 0.
        """
        kept = [
            (i, row["prompt_ids"], features[j]["completion_ids"])
            for i, (row, j) in enumerate(zip(features, partners, strict=True))
            if j >= 0 and self._room(row["prompt_ids"], features[j]["completion_ids"]) > 0
        ]
        batch = self._pad([(prompt, completion) for _, prompt, completion in kept])
        batch = {f"kl_{name}": tensor for name, tensor in batch.items()}
        batch["kl_index"] = torch.tensor([i for i, _, _ in kept], dtype=torch.int64)
        return batch

    def _room(self, prompt: Sequence[int], completion: Sequence[int]) -> int:
        """How many tokens of the completion fit."""
        if self.max_length is None:
            return len(completion)
        return min(len(completion), self.max_length - len(prompt))

    def _pad(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Tensor]:
        rooms = [self._room(prompt, completion) for prompt, completion in pairs]
        for position, room in enumerate(rooms):
            if room <= 0:
                raise ValueError(
                    f"row {position} of the batch has no completion token within max_length {self.max_length} "
                    f"(its prompt has {len(pairs[position][0])}); tokenize_rows reports such rows"
                )
        width = max((len(p) + n for (p, _), n in zip(pairs, rooms, strict=True)), default=0)
        input_ids = torch.full((len(pairs), width), self.pad_token_id, dtype=torch.int64)  # (B, L)
        attention_mask = torch.zeros_like(input_ids)
        completion_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for i, ((prompt, completion), room) in enumerate(zip(pairs, rooms, strict=True)):
            end = len(prompt) + room
            input_ids[i, :end] = torch.tensor([*prompt, *completion[:room]], dtype=torch.int64)
            attention_mask[i, :end] = 1
            completion_mask[i, len(prompt) : end] = True
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
        }
