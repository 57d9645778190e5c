"""Batched sampling of answers from a seed."""

from collections.abc import Callable
from typing import cast

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPERATURE = 0.7


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    *,
    seed: int,
    temperature: float = TEMPERATURE,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    desc: str = "answers",
) -> list[str]:
    """One answer to each question, sampled at ``temperature``; reproducible by ``seed``.

    The random state of torch is restored.
    """
    was_training = model.training
    generate = cast(Callable[..., torch.Tensor], model.generate)
    model.eval()
    answers = []
    with (
        torch.random.fork_rng(devices=[]),
        tqdm(total=len(questions), desc=desc, unit="answer", dynamic_ncols=True) as bar,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            prompts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}],
                    add_generation_prompt=True,
                    tokenize=False,
                )
                for question in batch
            ]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
            ids = generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = ids[:, inputs.input_ids.shape[1] :]
            answers += [answer.strip() for answer in tokenizer.batch_decode(new, skip_special_tokens=True)]
            bar.update(len(batch))
    model.train(was_training)
    return answers
