"""The demo's tokenizer and language model, and a short supervised fine-tune."""

import math
import random

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from prefopt.data.tokenize import Tokenized
from prefopt.data.toy import text
from prefopt.demo.build import random_model, train_tokenizer
from prefopt_kernels import linear_logprob

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
POSITIONS = 256
SIZES: dict[str, int | bool] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": True,
}
# The line break is before a turn, not after it, so that an answer ends with its end-of-turn token. Otherwise the line
# break would be scored too: a token that is the same in every row, by which KTO can separate good from bad.
CHATML = (
    "{% for message in messages %}"
    "{{ '' if loop.first else '\n' }}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the demo's English and Arabic sentences, with a ChatML template."""
    return train_tokenizer(
        _sentences(),
        vocabulary=2048,
        special=(PAD, TURN_START, TURN_END),
        eos=TURN_END,
        pad=PAD,
        template=CHATML,
        max_length=POSITIONS,
    )


def _sentences() -> list[str]:
    sentences = ["user\nassistant\n"]
    for lang in text.TOPICS:
        for topic in text.TOPICS[lang]:
            sentences += [question.format(do=topic.do) for question in text.QUESTIONS[lang]]
            sentences += topic.tips
        for phrases in (text.OPENERS, text.CLOSERS, text.RUDE, text.EVASIVE):
            sentences += [f"{phrase} {other}" for phrase in phrases[lang] for other in phrases[lang]]
    return sentences


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A Qwen3 of about a million parameters with random fp32 weights drawn from ``seed``."""
    return random_model("qwen3", tokenizer, seed, **SIZES)


def supervised_fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Tokenized,
    *,
    seed: int,
    epochs: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
) -> list[float]:
    """Teach the model to answer: minimise the mean of ``-logp`` (nats) over the answers' tokens, good and bad alike.

    Returns:
        the loss of every step, in nats per token.
    """
    data = rows.dataset
    encoded = list(zip(data["prompt_ids"], data["completion_ids"], strict=True))
    steps = epochs * math.ceil(len(encoded) / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    rng = random.Random(f"fine-tune {seed}")
    losses = []
    model.train()
    with tqdm(total=steps, desc="short fine-tune", unit="step", dynamic_ncols=True) as bar:
        for _ in range(epochs):
            rng.shuffle(encoded)
            for start in range(0, len(encoded), batch_size):
                ids, mask, targets = _pad(encoded[start : start + batch_size], tokenizer.pad_token_id)
                hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
                scored = targets >= 0  # only answers go through the head
                logp = linear_logprob(hidden[scored], model.lm_head.weight, targets[scored]).logp
                loss = -logp.mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                bar.update()
    return losses


def _pad(batch: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, ...]:
    """Right-padded ids and mask (B, L), and the targets that each position predicts, -1 outside the answer."""
    length = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.full((len(batch), length), pad)
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, -1)
    for i, (prompt, answer) in enumerate(batch):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        mask[i, :end] = 1
        targets[i, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    return ids, mask, targets
