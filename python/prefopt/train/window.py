"""The weight of each row in the mean loss of an optimizer step."""

import torch
import torch.distributed as dist
from accelerate import Accelerator

from prefopt.data.collate import RawFeatures


def set_row_weights(batches: list[dict], accelerator: Accelerator, *, by_tokens: bool) -> None:
    """Number the batches, and weight every row for the step's mean loss over all ranks.

    ``row_weights`` (R,) sum to the number of processes over all rows or pairs of the step; DDP's mean divides by that
    number. With ``by_tokens`` also ``token_weights`` (R,), in proportion to the tokens of the desirable answer.
    """
    last = len(batches) - 1
    total = sum(drop_repeats(batch, accelerator, last=position == last) for position, batch in enumerate(batches))
    counted = [batch["row_weights"] > 0 for batch in batches]
    for position, batch in enumerate(batches):
        batch["position"] = position
        batch["row_weights"] *= accelerator.num_processes / total
    if not by_tokens or not batches:
        return
    tokens = [
        torch.where(rows, batch["cu_seqlens"].diff()[: len(rows)], 0)
        for batch, rows in zip(batches, counted, strict=True)
    ]
    everywhere = torch.cat(tokens).sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(everywhere)
    for batch, lengths in zip(batches, tokens, strict=True):
        batch["token_weights"] = lengths * accelerator.num_processes / everywhere


def drop_repeats(batch: dict, accelerator: Accelerator, *, last: bool) -> int:
    """Set ``row_weights`` (R,): 1, or 0 for a row that the dataloader repeats to fill the last batch of every rank.

    Returns:
        How many rows of all ranks' micro-batches are not repeats; by arithmetic, without a reduction.
    """
    rows, state = list(batch["features"]), accelerator.gradient_state
    everywhere = len(rows) * accelerator.num_processes
    if last and state.end_of_dataloader and 0 < state.remainder < everywhere:
        everywhere = state.remainder
    mine = everywhere - len(rows) * accelerator.process_index
    mine = max(0, min(len(rows), mine))
    device = batch["input_ids"].device
    batch["row_weights"] = (torch.arange(len(rows), device=device) < mine).float()
    batch["features"] = RawFeatures(rows[:mine])
    return everywhere
