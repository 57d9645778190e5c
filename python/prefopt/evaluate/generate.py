"""Seeded, batched generation from token ids."""

from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    temperature: float | None,
    seed: int = 0,
    desc: str = "answers",
) -> list[list[int]]:
    """The new tokens of each prompt, with the one that ended it, if one did.

    Args:
        model: in evaluation mode.
        prompts: token ids.
        pad_token_id: fills short prompts up on the left, masked.
        eos_token_ids: any of them ends an answer.
        temperature: of sampling from the whole distribution; None takes the likeliest token each time.
        seed: of the samples; torch's random state is given back as it was.

    Returns:
        Lists of at most ``max_new_tokens`` ids. What the model's own generation settings say about sampling is not
        used.
    """
    device = next(model.parameters()).device
    sampling = {"do_sample": False}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        eos_token_id=list(eos_token_ids) or None,
        repetition_penalty=1.0,
        **sampling,
    )
    ends, answers = set(eos_token_ids), []
    # Long prompts first, so that a batch that does not fit the memory fails at once.
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        tqdm(total=len(prompts), desc=desc, unit="answer", dynamic_ncols=True) as bar,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            batch = [prompts[place] for place in order[start : start + batch_size]]
            width = max(map(len, batch))
            ids = torch.full((len(batch), width), pad_token_id)  # (B, L)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(batch):
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            made = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
            answers += [_ended(new, ends) for new in made[:, width:].tolist()]
            bar.update(len(batch))
    placed: list[list[int]] = [[] for _ in prompts]
    for place, answer in zip(order, answers, strict=True):
        placed[place] = answer
    return placed


def _ended(ids: list[int], ends: set[int]) -> list[int]:
    """Up to the first end, with it; what follows is padding."""
    return ids[: next((place + 1 for place, one in enumerate(ids) if one in ends), len(ids))]
