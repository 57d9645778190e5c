"""Reference log-probabilities of a whole dataset, computed once and kept on disk.

The file's name is a hash of what the numbers depend on: the tokenised rows (and through them the tokenizer, its template
and max_length), the pairing of mismatched completions, the reference's weights, and the precision of the passes. No
training option is in it, so a sweep over learning rates computes the reference once.
"""

import hashlib
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

from prefopt.data import Tokenized, pair_mismatched
from prefopt.train.scoring import PackingCollator

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
    """One mismatched partner for every row of a dataset: anywhere (``block`` None), or rotated within blocks of rows."""
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
    collator: PackingCollator,
    *,
    identity: Sequence[str],
    cache_dir: str | Path | None,
    batch_size: int,
    accelerator: Accelerator,
) -> Dataset:
    """The dataset with ``ref_logps`` and, given partners, ``kl_partner``, ``kl_completion_ids`` and ``ref_kl_logps``.

    Args:
        tokenized: the rows.
        partners: of ``fixed_partners``, or None where the method needs no mismatched completions.
        score: gives the reference's (B,) log-probabilities of a batch of ``collator``.
        collator: makes the batches.
        identity: what else the numbers depend on: the reference's fingerprint and the precision.
        cache_dir: folder of the cache; None is a folder beside the cache of ``datasets``.
        batch_size: rows per pass.
        accelerator: shares the passes between processes.
    """
    key = "|".join([str(CACHE_VERSION), tokenized.fingerprint, repr(partners), *identity])
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "prefopt-reference")
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    cached = [load_file(file) if accelerator.is_main_process and file.is_file() else None]
    broadcast_object_list(cached, from_process=0)
    columns = cached[0]
    rows = tokenized.dataset
    if columns is None:
        passes = _passes(rows, partners, batch_size)
        mine = passes[accelerator.process_index :: accelerator.num_processes]
        scored = []
        bar = tqdm(
            mine, desc="Reference log-probabilities", disable=not accelerator.is_main_process
        )
        for name, positions in bar:
            features = [rows[position] for position in positions]
            if name == "ref_logps":
                batch = collator(features)
            else:
                others = [rows[partners[position]] for position in positions]
                n = len(features)
                batch = collator.mismatched(features + others, [*range(n, 2 * n), *([-1] * n)])
            scored.append((name, positions, score(batch).cpu()))
        columns = {"ref_logps": torch.zeros(len(rows))}
        if partners is not None:
            columns["ref_kl_logps"] = torch.zeros(len(rows))
        for name, positions, values in gather_object(scored):
            columns[name][positions] = values
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(columns, file)
    rows = rows.add_column("ref_logps", columns["ref_logps"].tolist())
    if partners is None:
        return rows
    sources = [partner if partner >= 0 else row for row, partner in enumerate(partners)]
    others = tokenized.dataset.select(sources).select_columns("completion_ids")
    others = others.rename_column("completion_ids", "kl_completion_ids")
    rows = rows.add_column("ref_kl_logps", columns["ref_kl_logps"].tolist())
    rows = rows.add_column("kl_partner", list(partners))
    return datasets.concatenate_datasets([rows, others], axis=1)


def _passes(
    rows: Dataset, partners: Sequence[int] | None, batch_size: int
) -> list[tuple[str, list[int]]]:
    """Which rows to score together, for each column; rows of similar length, so that little is padded."""
    prompts = [len(ids) for ids in rows["prompt_ids"]]
    completions = [len(ids) for ids in rows["completion_ids"]]
    wanted = {"ref_logps": list(range(len(rows)))}
    lengths = {"ref_logps": [p + c for p, c in zip(prompts, completions, strict=True)]}
    if partners is not None:
        wanted["ref_kl_logps"] = [row for row, partner in enumerate(partners) if partner >= 0]
        lengths["ref_kl_logps"] = [
            p + completions[partner] for p, partner in zip(prompts, partners, strict=True)
        ]
    passes = []
    for name, positions in wanted.items():
        ordered = sorted(positions, key=lengths[name].__getitem__, reverse=True)
        passes += [
            (name, ordered[start : start + batch_size])
            for start in range(0, len(ordered), batch_size)
        ]
    return passes
