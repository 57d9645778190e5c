"""Generate answers: token ids of a prompt, stop tokens, sampling options, batched generation, generation configs."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.template import render
from prefopt.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, str]],
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a text or of chat messages, which end where the answer begins.

    Raises:
        UserError: the chat template refuses the messages.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    rendered = render(tokenizer, prompt, template_kwargs, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def stop_ids(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Tokens that end an answer: those of the generation config, the tokenizer's EOS, and the template's end of turn.

    A base model that was trained with a chat template ends its turns with a token that its generation config may not
    have. Without that token, generation would continue with the user's next turn.
    """
    eos = cast(Any, model).generation_config.eos_token_id
    found = [eos] if isinstance(eos, int) else list(eos or [])
    found += [tokenizer.eos_token_id, end_of_turn(tokenizer, template_kwargs)]
    return sorted({token for token in found if token is not None})


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None) -> int | None:
    """The special token that the chat template writes after an answer; None without a template."""
    if not tokenizer.chat_template:
        return None
    mark = "ANSWER"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    text = render(tokenizer, messages, template_kwargs)
    after = tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((token for token in after if token in special), None)


def sampling_options(temperature: float | None) -> dict[str, Any]:
    """Arguments of the model's ``generate`` for a temperature; None keeps its generation config.

    Example:
        >>> sampling_options(0.7)
        {'do_sample': True, 'temperature': 0.7}
    """
    if temperature is None:
        return {}
    if temperature == 0:  # transformers warns about sampling values without do_sample
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}


@torch.no_grad()
def generate(
    model: "PreTrainedModel | PeftModel",
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
    """Generate an answer to each prompt, without the sampling values of the model's generation config.

    Args:
        model: in evaluation mode.
        prompts: token ids.
        pad_token_id: for padding on the left, which is masked.
        eos_token_ids: tokens that end an answer.
        temperature: for sampling from the whole distribution; None is greedy.
        seed: for sampling; the random state of torch is restored.

    Returns:
        The new tokens of each prompt, including the stop token if there is one.
    """
    device = next(model.parameters()).device
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        eos_token_id=list(eos_token_ids) or None,
        repetition_penalty=1.0,
        **sampling,
    )
    stops = set(eos_token_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    # longest first, so that a batch that does not fit into memory fails at once
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        tqdm(total=len(prompts), desc=desc, unit="answer", dynamic_ncols=True) as bar,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            width = len(prompts[places[0]])
            ids = torch.full((len(places), width), pad_token_id)  # (B, L)
            mask = torch.zeros_like(ids)
            for row, place in enumerate(places):
                first = width - len(prompts[place])
                ids[row, first:] = torch.tensor(prompts[place])
                mask[row, first:] = 1
            inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            made = cast(Any, model).generate(**inputs, generation_config=config)
            for place, new in zip(places, made[:, width:].tolist(), strict=True):
                end = next((i + 1 for i, token in enumerate(new) if token in stops), len(new))  # then padding
                answers[place] = new[:end]
            bar.update(len(places))
    return answers


def make_savable(model: PreTrainedModel, name: str) -> None:
    """Set ``do_sample`` if the generation config has sampling values, such as a temperature, without it.

    transformers loads such a config, which published models have, but does not save it after a token id has changed. A
    negative padding id becomes None.

    Args:
        model: about to be trained in all weights, or exported.
        name: of the model, in messages.

    Raises:
        UserError: the config is invalid for another reason.
    """
    config = cast(Any, model).generation_config
    if config.pad_token_id is not None and config.pad_token_id < 0:
        config.pad_token_id = None
    if _invalid(config) is None:
        return
    before, config.do_sample = config.do_sample, True
    reason = _invalid(config)
    if reason is not None:
        config.do_sample = before
        raise UserError(
            f"the generation config of {name} cannot be saved with the model: {reason}; correct its "
            "generation_config.json"
        )
    logger.warning(
        "the generation config of %s has sampling values without do_sample, which cannot be saved; do_sample is now "
        "true",
        name,
    )


def _invalid(config: GenerationConfig) -> str | None:
    """Why transformers would refuse to save the config, in one line."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None
