"""Reference log-probabilities of a whole dataset, computed once and kept on disk.

The file's name is a hash of everything that determines the scores: the tokenised rows (and so the tokenizer, its
template and max_length), the pairing of mismatched completions, the reference's weights, and the precision of the
passes. It contains no training option, so a sweep over learning rates computes the scores once.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from prefopt.data.collate import SIDES, pair_mismatched
from prefopt.data.pairs import are_pairs
from prefopt.data.tokenize import Tokenized
from prefopt.files import temporary
from prefopt.train.passes import Answer
from prefopt.train.scoring import PassCollator

CACHE_VERSION = 1  # part of the key: raise it when the numbers of the same inputs change


def rotated(groups: Sequence[int]) -> list[int]:
    """TRL's pairing inside one micro-batch: row ``i`` takes completion ``i - 1``; -1 where that has the same prompt.

    Example:
        >>> rotated([7, 8, 9]), rotated([7]), rotated([7, 7, 8])
        ([2, 0, 1], [-1], [2, -1, 1])
    """
    n = len(groups)
    return [(row - 1) % n if groups[row] != groups[row - 1] else -1 for row in range(n)]


def fixed_partners(groups: Sequence[int], block: int | None) -> list[int]:
    """A mismatched partner for every row of a dataset: from all rows (``block`` None), or rotated within blocks."""
    if block is None:
        return pair_mismatched(groups)
    partners = []
    for start in range(0, len(groups), block):
        within = rotated(groups[start : start + block])
        partners += [start + partner if partner >= 0 else -1 for partner in within]
    return partners


def with_reference(
    tokenized: Tokenized,
    partners: Sequence[int] | None,
    score: Callable[[dict], Tensor],
    collator: PassCollator,
    *,
    identity: Sequence[str],
    cache_dir: str | Path | None,
    batch_size: int,
    accelerator: Accelerator,
    in_lockstep: bool = False,
) -> Dataset:
    """The dataset with the reference's scores as columns.

    They are ``ref_logps``; given partners also ``kl_partner``, ``kl_completion_ids`` and ``ref_kl_logps``; of pairs
    ``ref_chosen_logps`` and ``ref_rejected_logps``.

    Args:
        tokenized: rows or pairs.
        partners: of ``fixed_partners``, or None where the method needs no mismatched completions.
        score: gives the reference's (B,) log-probabilities of a batch.
        collator: of rows, packs the batches.
        identity: what else the numbers depend on: the reference's fingerprint and the precision.
        cache_dir: folder of the cache; None is a folder beside the cache of ``datasets``.
        batch_size: sequences per pass.
        accelerator: shares the passes between processes.
        in_lockstep: a pass needs all processes, so each takes as many.
    """
    key = "|".join([str(CACHE_VERSION), tokenized.fingerprint, repr(partners), *identity])
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "prefopt-reference")
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    cached = [load_file(file) if accelerator.is_main_process and file.is_file() else None]
    broadcast_object_list(cached, from_process=0)
    columns = cached[0]
    rows = tokenized.dataset
    if columns is None:
        sequences = _sequences(tokenized, partners)
        passes = [(name, part) for name in sequences for part in sequences[name].parts(batch_size)]
        mine = passes[accelerator.process_index :: accelerator.num_processes]
        scored = []
        bar = tqdm(mine, desc="Reference log-probabilities", disable=not accelerator.is_main_process)
        for name, positions in bar:
            batch = collator.lay_out([sequences[name].answer(position, collator) for position in positions])
            scored.append((name, positions, score(batch).cpu()))
        if in_lockstep and len(mine) * accelerator.num_processes < len(passes):
            score(collator.dummy_pass())
        columns = {name: torch.zeros(len(rows)) for name in sequences}
        for name, positions, values in gather_object(scored):
            columns[name][positions] = values
        if accelerator.is_main_process:
            with temporary(file) as scratch:
                save_file(columns, scratch)
                os.replace(scratch, file)
    for name in sorted(columns, reverse=True):
        rows = rows.add_column(name, columns[name].tolist())
    if partners is None:
        return rows
    sources = [partner if partner >= 0 else row for row, partner in enumerate(partners)]
    others = tokenized.dataset.select(sources).select_columns("completion_ids")
    others = others.rename_column("completion_ids", "kl_completion_ids")
    rows = rows.add_column("kl_partner", list(partners))
    return datasets.concatenate_datasets([rows, others], axis=1)


class _Sequences:
    """The sequences behind one column of scores.

    Args:
        prompts, completions: datasets, with the column of token ids in each.
        partners: position of each prompt's completion, -1 for none; None is its own.
    """

    def __init__(
        self,
        prompts: tuple[Dataset, str],
        completions: tuple[Dataset, str],
        partners: Sequence[int] | None = None,
    ):
        self.prompts, self.completions = prompts, completions
        self.partners = range(len(prompts[0])) if partners is None else partners

    def parts(self, size: int) -> list[list[int]]:
        """Positions to score together, sequences of similar length, so that little is padded."""
        before, after = ([len(ids) for ids in rows[name]] for rows, name in (self.prompts, self.completions))
        lengths = [b + after[partner] for b, partner in zip(before, self.partners, strict=True)]
        wanted = [position for position, partner in enumerate(self.partners) if partner >= 0]
        ordered = sorted(wanted, key=lengths.__getitem__, reverse=True)
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def answer(self, position: int, collator: PassCollator) -> Answer:
        """The prompt and its completion within ``max_length``."""
        (prompts, prompt), (completions, completion) = self.prompts, self.completions
        return collator.cut(prompts[position][prompt], completions[self.partners[position]][completion])


def _sequences(tokenized: Tokenized, partners: Sequence[int] | None) -> dict[str, _Sequences]:
    rows = tokenized.dataset
    if are_pairs(tokenized):
        return {
            f"ref_{side}_logps": _Sequences((rows, f"{side}_prompt_ids"), (rows, f"{side}_completion_ids"))
            for side in SIDES
        }
    prompts, completions = (rows, "prompt_ids"), (rows, "completion_ids")
    found = {"ref_logps": _Sequences(prompts, completions)}
    if partners is not None:
        found["ref_kl_logps"] = _Sequences(prompts, completions, partners)
    return found
