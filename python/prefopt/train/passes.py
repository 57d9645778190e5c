"""Answers laid out as the tokens of a forward pass, and windows cut into passes by length.

Three layouts. Padded: a row for each answer, padded on the right. Shared: a row for each prompt, followed by all its
answers; each starts at the prompt's end and attends to the prompt and itself. Packed: all answers in one row, without
padding; positions start again at 0, by which transformers separates them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LARGEST_SEARCH = 512  # rows up to which the best cut is searched for


class Answer(NamedTuple):
    """Token ids of a prompt, and of a completion within ``max_length``."""

    prompt: Sequence[int]
    completion: Sequence[int]


def lay_out(answers: Sequence[Answer], pad_token_id: int, *, shared: bool = False, packed: bool = False) -> dict:
    """The tensors of one pass over B answers; packed, no prompt is shared.

    Returns:
        ``input_ids`` (R, L) int64; one of ``attention_mask`` (R, L) int64, if padded, and ``position_ids`` (R, L)
        int64; if a prompt is shared also ``segments`` (R, L) int64, -1 for padding, 0 for a prompt and k for its k-th
        answer; ``Packing``'s ``positions``, ``targets`` (T,) and ``cu_seqlens`` (B + 1,), in the order of the answers;
        ``tokens`` (B,) int64, of each prompt and completion; ``filled`` 0-dim int64, the positions with a token.

    Example:
        >>> batch = lay_out([Answer([5, 6], [7]), Answer([5, 6], [8, 9])], 0, shared=True)
        >>> batch["input_ids"], batch["position_ids"], batch["segments"]
        (tensor([[5, 6, 7, 8, 9]]), tensor([[0, 1, 2, 2, 3]]), tensor([[0, 0, 1, 2, 2]]))
        >>> batch["positions"], batch["targets"], batch["cu_seqlens"]
        (tensor([1, 1, 3]), tensor([7, 8, 9]), tensor([0, 1, 3]))
    """
    groups = by_prompt(answers) if shared and not packed else [[number] for number in range(len(answers))]
    rows = [groups] if packed and groups else [[group] for group in groups]
    widths = [sum(width(answers, group) for group in row) for row in rows]
    shape = (len(rows), max(widths, default=0))
    input_ids = torch.full(shape, pad_token_id)
    position_ids, segments = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    predicting: list[Tensor] = [torch.empty(0)] * len(answers)
    for number, row in enumerate(rows):
        ids: list[int] = []
        places: list[int] = []
        parts: list[int] = []
        base = number * shape[1]
        for group in row:
            prompt = answers[group[0]].prompt
            last = len(ids) + len(prompt) - 1
            ids += prompt
            places += range(len(prompt))
            parts += [0] * len(prompt)
            for part, index in enumerate(group, 1):
                start, n = len(ids), len(answers[index].completion)
                ids += answers[index].completion
                places += range(len(prompt), len(prompt) + n)
                parts += [part] * n
                inner = torch.arange(start, start + n - 1)
                predicting[index] = base + (torch.cat([torch.tensor([last]), inner]) if prompt else inner)
        input_ids[number, : len(ids)] = torch.tensor(ids)
        position_ids[number, : len(ids)] = torch.tensor(places)
        segments[number, : len(ids)] = torch.tensor(parts)
    positions = torch.cat(predicting) if predicting else torch.empty(0, dtype=torch.int64)
    counts = torch.tensor([0, *map(len, predicting)])
    # without a prompt, the first token has no predecessor and is not scored
    targets = [id for answer in answers for id in (answer.completion if answer.prompt else answer.completion[1:])]
    batch = {
        "input_ids": input_ids,
        "positions": positions,
        "targets": torch.tensor(targets, dtype=torch.int64),
        "cu_seqlens": counts.cumsum(0),
        "tokens": torch.tensor([len(answer.prompt) + len(answer.completion) for answer in answers]),
        "filled": torch.tensor(sum(widths)),
    }
    if len(groups) < len(answers):
        return batch | {"position_ids": position_ids, "segments": segments}
    return batch | ({"position_ids": position_ids} if packed else {"attention_mask": (segments >= 0).long()})


def by_prompt(answers: Sequence[Answer]) -> list[list[int]]:
    """The answers of each prompt, by number, in order of first appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, answer in enumerate(answers):
        groups.setdefault(tuple(answer.prompt), []).append(number)
    return list(groups.values())


def width(answers: Sequence[Answer], group: Sequence[int]) -> int:
    """Tokens of the answers to one prompt, with the prompt once."""
    return len(answers[group[0]].prompt) + sum(len(answers[number].completion) for number in group)


def attention_masks(batch: dict, config: object, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The 4-d mask of a batch with shared prompts, as ``attention_mask`` of a transformers model.

    Args:
        batch: of ``lay_out``, on the model's device.
        config: the text configuration; it has the kinds of the layers and the attention implementation.
        dtype: of the model, for an additive mask.

    Returns:
        (R, 1, L, L) bool for sdpa, and additive for eager; by kind of layer for a model whose layers differ.

    Raises:
        ValueError: layers or an implementation that such a mask does not fit.
    """
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"attention {implementation} takes no mask of this form")
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    plain = "full_attention" if window is None else "sliding_attention"
    kinds = sorted(set(getattr(config, "layer_types", None) or [plain]))
    if not {*kinds} <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of {', '.join(kinds)} take no mask of this form")
    places, segments = batch["position_ids"], batch["segments"]
    order = torch.arange(segments.shape[1], device=segments.device)
    to, of = segments[:, :, None], segments[:, None, :]  # (R, L, 1), (R, 1, L)
    full = (order[:, None] >= order) & (of >= 0) & ((of == 0) | (of == to))
    full |= order[:, None] == order  # padding attends to itself, for a row without any key is NaN
    masks = {}
    for kind in kinds:
        mask = full
        if kind == "sliding_attention":
            mask = full & (places[:, :, None] - places[:, None, :] < window)
        mask = mask[:, None]
        if implementation == "eager":
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        masks[kind] = mask
    return masks if len(masks) > 1 else masks[kinds[0]]


def cut(widths: Sequence[int], pieces: int, *, cap: int | None = None, packed: bool = False) -> list[list[int]]:
    """Share rows out by length, longest first, so that little is padded.

    Args:
        widths: tokens of each row.
        pieces: how many passes; some are empty if there are fewer rows.
        cap: most positions of a pass, kept if it can be.
        packed: nothing is padded; the passes are to be equal.

    Returns:
        The rows of each pass, by number.

    Example:
        >>> cut([3, 9, 3, 8, 2, 9], 2)
        [[1, 5, 3], [0, 2, 4]]
    """
    order = sorted(range(len(widths)), key=lambda row: -widths[row])  # stable
    n = len(order)
    if n <= pieces:
        return [order[place : place + 1] for place in range(pieces)]
    if n > LARGEST_SEARCH:
        ends = [n * piece // pieces for piece in range(pieces + 1)]
        return [order[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    sizes = np.array([widths[row] for row in order], dtype=float)
    starts, ends_ = np.arange(n + 1)[:, None], np.arange(n + 1)[None]
    if packed:
        total = np.concatenate([[0], sizes.cumsum()])
        cost = (total[None] - total[:, None]) ** 2
    else:
        cost = (ends_ - starts) * np.append(sizes, 0)[:, None]
    cost[ends_ <= starts] = np.inf
    limits = [np.where(cost > cap, np.inf, cost)] if cap is not None and not packed else []
    for limited in (*limits, cost):
        best = np.full(n + 1, np.inf)
        best[0] = 0
        choices = []
        for _ in range(pieces):
            sums = best[:, None] + limited
            choices.append(sums.argmin(0))
            best = sums.min(0)
        if np.isfinite(best[n]):
            break
    bounds = [n]
    for choice in reversed(choices):
        bounds.append(int(choice[bounds[-1]]))
    bounds.reverse()
    return [order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
