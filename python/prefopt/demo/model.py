"""A tokenizer and a tiny language model, built here from the demo's own text, and a short fine-tune on answers."""

import math
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from prefopt.data import Tokenized
from prefopt.demo import text
from prefopt_kernels import linear_logprob

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The line break stands before a turn, not after it: an answer ends with its end-of-turn token. A line break after that
# would be one more scored token, the same in every row, by which KTO can tell good from bad without any better answer.
CHATML = (
    "{% for message in messages %}"
    "{{ '' if loop.first else '\n' }}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """ByteLevel BPE over the demo's English and Arabic sentences, with a ChatML template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=2048,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_sentences(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=TURN_END,
        pad_token=PAD,
        model_max_length=256,
        chat_template=CHATML,
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


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of about a million parameters with random weights drawn from ``seed``, fp32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def supervised_fine_tune(
    model: Qwen3ForCausalLM,
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


def save_model(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Model (safetensors) and tokenizer into ``path``, as a folder that any hub id could stand for."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
