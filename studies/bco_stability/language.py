"""The study's data: prompts of a made-up language, with a good and a bad answer each."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

VOCABULARY, KINDS = 32, 8  # tokens; kinds of prompt, each with its own distribution of good answers
END = 0  # ends an answer and pads what follows
PROMPT, ANSWER = 4, 44  # tokens of a prompt; most tokens of an answer, its end included
SHORTEST, MEDIAN, SPREAD = 4, 16, 0.7  # of an answer's length, which is log-normal like that of real answers


class Pairs(NamedTuple):
    """n prompts with two answers each; lengths count the end token."""

    prompts: Tensor  # (n, PROMPT) int64
    good: Tensor  # (n, ANSWER) int64
    good_lengths: Tensor  # (n,) int64
    bad: Tensor  # (n, ANSWER) int64
    bad_lengths: Tensor  # (n,) int64


def make_pairs(n: int, seed: int) -> Pairs:
    """Draw n pairs.

    Each answer is a Markov chain whose transitions depend on the prompt's kind. Good and bad answers differ in a style
    common to all prompts, and in a part specific to the prompt's kind.

    Args:
        n: number of pairs.
        seed: of the pairs; the language itself is always the same.
    """
    good, bad = _transitions()
    rng = torch.Generator().manual_seed(seed)
    kinds = torch.randint(KINDS, (n,), generator=rng)
    words = torch.randint(VOCABULARY // 2, VOCABULARY, (n, PROMPT - 2), generator=rng)
    prompts = torch.cat([1 + kinds[:, None] // 4, 8 + kinds[:, None] % 4, words], dim=1)
    drawn = [_answers(table, kinds, prompts[:, -1], rng) for table in (good, bad)]
    return Pairs(prompts, *drawn[0], *drawn[1])


def _transitions() -> tuple[Tensor, Tensor]:
    """(KINDS, V, V) probabilities of the next token, of good and of bad answers; END never comes from them."""
    rng = torch.Generator().manual_seed(20_240_202)
    common, manner = torch.randn(2, 1, VOCABULARY, VOCABULARY, generator=rng)
    asked, other = torch.randn(2, KINDS, VOCABULARY, VOCABULARY, generator=rng)
    tables = (
        1.2 * common + 0.9 * asked + 0.5 * manner,
        1.2 * common + 0.7 * asked + 0.5 * other - 0.5 * manner,
    )
    for table in tables:
        table[..., END] = -math.inf
    return tables[0].softmax(-1), tables[1].softmax(-1)


def _answers(table: Tensor, kinds: Tensor, last: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    n = len(kinds)
    drawn = torch.exp(math.log(MEDIAN) + SPREAD * torch.randn(n, generator=rng))
    words = drawn.round().clamp(SHORTEST, ANSWER - 1).long()  # without the end token
    tokens = torch.full((n, ANSWER), END)
    for position in range(ANSWER - 1):
        last = torch.multinomial(table[kinds, last], 1, generator=rng).squeeze(1)
        tokens[:, position] = last
    return tokens * (torch.arange(ANSWER) < words[:, None]), words + 1
