"""The window of an optimizer step: its rows, their weights in the step's mean loss, and its cut into micro-batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator

from prefopt.data.collate import RawFeatures
from prefopt.train.passes import by_prompt, cut, width
from prefopt.train.scoring import PassCollator, to_device


@dataclass
class Window:
    """The micro-batches of a step, and all rows or pairs of this rank in the order of the data.

    ``places`` has, for each micro-batch, the places of its rows in ``rows``, fillers included; ``kept`` how many rows
    of each count. A filler is a repeated row of weight 0, in a micro-batch that would be empty.
    """

    batches: list[dict]
    rows: list[Mapping]
    places: list[list[int]]
    kept: list[int]

    @property
    def counted(self) -> list[int]:
        """The places of the rows that count."""
        return sorted(place for places, n in zip(self.places, self.kept, strict=True) for place in places[:n])


def make_window(batches: list[dict], accelerator: Accelerator, collator: PassCollator, *, recut: bool) -> Window:
    """The window of these micro-batches, with ``row_weights`` (R,) in each, which sum to 1 over all ranks' rows.

    DDP's mean divides by the number of processes, so the weights contain it as a factor.

    Args:
        batches: as the dataloader has them; the last one of an epoch may repeat rows.
        accelerator: knows how many.
        collator: of the micro-batches.
        recut: share the rows out by length, in as many micro-batches, none with more positions than the largest one.
    """
    last = len(batches) - 1
    counts = [count_rows(batch, accelerator, last=place == last) for place, batch in enumerate(batches)]
    total, kept = sum(everywhere for _, everywhere in counts), [mine for mine, _ in counts]
    rows = [row for batch in batches for row in batch["features"]]
    starts = [sum(len(batch["features"]) for batch in batches[:place]) for place in range(len(batches))]
    places = [list(range(start, start + len(batch["features"]))) for start, batch in zip(starts, batches, strict=True)]
    if recut and len(batches) > 1:
        counted = [place for here, n in zip(places, kept, strict=True) for place in here[:n]]
        spare = [place for here, n in zip(places, kept, strict=True) for place in here[n:]]
        used = counted + spare[: max(0, len(batches) - len(counted))]
        cap = max(batch["input_ids"].numel() for batch in batches)
        chosen = _cut_rows([rows[place] for place in used], len(batches), cap, collator)
        places = [[used[index] for index in piece] for piece in chosen]
        spares = set(spare)
        kept = [sum(place not in spares for place in piece) for piece in places]
        device = batches[0]["input_ids"].device
        batches = [to_device(collator([rows[place] for place in piece]), device) for piece in places]
    for place, (batch, mine) in enumerate(zip(batches, kept, strict=True)):
        batch["position"] = place
        set_counted(batch, mine)
        batch["row_weights"] *= accelerator.num_processes / total
    return Window(batches, rows, places, kept)


def _cut_rows(rows: Sequence[Mapping], pieces: int, cap: int, collator: PassCollator) -> list[list[int]]:
    """Rows of one prompt stay together if the collator shares it and there are prompts enough."""
    if collator.pairs:
        sides = [[collator.answer(row, side) for side in ("chosen", "rejected")] for row in rows]
        if collator.shared:
            widths = [sum(width(pair, group) for group in by_prompt(pair)) for pair in sides]
        else:  # both have the width of the longer one, unless nothing is padded
            lengths = [[width([answer], [0]) for answer in pair] for pair in sides]
            widths = [sum(pair) if collator.packed else 2 * max(pair) for pair in lengths]
        return cut(widths, pieces, cap=cap, packed=collator.packed)
    answers = [collator.answer(row) for row in rows]
    groups = by_prompt(answers) if collator.shared else []
    if not pieces <= len(groups) < len(rows):
        groups = [[place] for place in range(len(rows))]
    widths = [width(answers, group) for group in groups]
    return [
        [place for group in piece for place in groups[group]]
        for piece in cut(widths, pieces, cap=cap, packed=collator.packed)
    ]


def set_token_weights(window: Window, accelerator: Accelerator) -> None:
    """Add ``token_weights`` (R,) to the micro-batches, in proportion to the tokens of the desirable answer."""
    if not window.batches:
        return
    tokens = [
        torch.where(batch["row_weights"] > 0, batch["cu_seqlens"].diff()[: len(batch["row_weights"])], 0)
        for batch in window.batches
    ]
    everywhere = torch.cat(tokens).sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(everywhere)
    for batch, lengths in zip(window.batches, tokens, strict=True):
        batch["token_weights"] = lengths * accelerator.num_processes / everywhere


def count_rows(batch: dict, accelerator: Accelerator, *, last: bool) -> tuple[int, int]:
    """How many rows count, of this rank's and of all ranks' micro-batches; by arithmetic, without a reduction.

    The dataloader repeats rows to fill the last batch of every rank; those do not count.
    """
    rows, state = len(batch["features"]), accelerator.gradient_state
    everywhere = rows * accelerator.num_processes
    if last and state.end_of_dataloader and 0 < state.remainder < everywhere:
        everywhere = state.remainder
    mine = everywhere - rows * accelerator.process_index
    return max(0, min(rows, mine)), everywhere


def set_counted(batch: dict, count: int) -> None:
    """Set ``row_weights`` (R,) to 1 for the first ``count`` rows and 0 for the rest, and ``features`` to the former."""
    rows = list(batch["features"])
    batch["row_weights"] = (torch.arange(len(rows), device=batch["input_ids"].device) < count).float()
    batch["features"] = RawFeatures(rows[:count])
