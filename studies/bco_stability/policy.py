"""The study's policy: a small causal transformer with LoRA.

For a policy this small Python overhead exceeds arithmetic, so the seeds of a cell are a leading dimension S of every
tensor. Each seed has its own adapter, order of rows and statistics.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from studies.bco_stability.language import ANSWER, PROMPT, VOCABULARY, Pairs, make_pairs

WIDTH, HEADS, LAYERS, RANK, SCALE = 32, 2, 2, 8, 2.0
MATRICES = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "up": (1, 2), "down": (2, 1)}  # in widths
PRETRAINING_ROWS, PRETRAINING_RATE = 64, 4e-3
SCORED_AT_ONCE = 64  # rows

Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Reference:
    """The frozen reference model and the rows scored by it."""

    base: Weights
    rows: "Rows"
    held_out: Pairs
    held_out_logps: tuple[Tensor, Tensor]  # (n,) of the good and of the bad answers


@dataclass(frozen=True, eq=False)
class Rows:
    """Unpaired rows: the good answers, then the bad ones."""

    prompts: Tensor  # (n, PROMPT)
    answers: Tensor  # (n, ANSWER)
    lengths: Tensor  # (n,)
    good: Tensor  # (n,) bool
    ref_logps: Tensor  # (n,) fp32, nats


def names() -> list[tuple[str, int, int]]:
    """(name, inputs, outputs) of every linear layer."""
    return [
        (f"{layer}.{name}", inputs * WIDTH, outputs * WIDTH)
        for layer in range(LAYERS)
        for name, (inputs, outputs) in MATRICES.items()
    ]


def pretrain(steps: int, seed: int = 0) -> Weights:
    """The reference model: trained from scratch to write good and bad answers alike."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding": (VOCABULARY, WIDTH, 0.3),
        "position": (PROMPT + ANSWER, WIDTH, 0.1),
        "head": (WIDTH, VOCABULARY, WIDTH**-0.5),
    }
    shapes |= {name: (inputs, outputs, inputs**-0.5) for name, inputs, outputs in names()}
    base = {
        name: (torch.randn(rows, columns, generator=rng) * spread).requires_grad_()
        for name, (rows, columns, spread) in shapes.items()
    }
    pairs = make_pairs(8000, seed=seed + 7)
    prompts = torch.cat([pairs.prompts] * 2)
    answers = torch.cat([pairs.good, pairs.bad])
    lengths = torch.cat([pairs.good_lengths, pairs.bad_lengths])
    optimizer = torch.optim.AdamW(base.values(), lr=PRETRAINING_RATE, weight_decay=0.01)
    for step in range(steps):
        chosen = torch.randint(len(prompts), (PRETRAINING_ROWS,), generator=rng)
        logps = sequence_logps(base, None, *(x[None, chosen] for x in (prompts, answers, lengths)))
        for group in optimizer.param_groups:
            group["lr"] = PRETRAINING_RATE * (1 - step / steps)
        optimizer.zero_grad()
        (-logps.sum() / lengths[chosen].sum()).backward()
        optimizer.step()
    return {name: weight.detach() for name, weight in base.items()}


def make_reference(base: Weights, pairs: int = 2500, held_out: int = 200) -> Reference:
    """Draw the rows to train on and the held-out pairs, and score them under ``base``."""
    drawn, kept = make_pairs(pairs, seed=1), make_pairs(held_out, seed=2)
    scores = [
        score(base, None, *(x[None] for x in (one.prompts, answers, lengths)))[0]
        for one in (drawn, kept)
        for answers, lengths in ((one.good, one.good_lengths), (one.bad, one.bad_lengths))
    ]
    rows = Rows(
        torch.cat([drawn.prompts] * 2),
        torch.cat([drawn.good, drawn.bad]),
        torch.cat([drawn.good_lengths, drawn.bad_lengths]),
        torch.arange(2 * pairs) < pairs,
        torch.cat(scores[:2]),
    )
    return Reference(base, rows, kept, (scores[2], scores[3]))


def adapter_size() -> int:
    """Numbers in one adapter."""
    return sum(RANK * (inputs + outputs) for _, inputs, outputs in names())


def new_adapters(seeds: list[int]) -> Tensor:
    """(S, adapter_size()) fp32: of each pair A is random and B is 0, so the policy is the reference exactly."""
    adapters = torch.zeros(len(seeds), adapter_size())
    for row, seed in zip(adapters, seeds, strict=True):
        rng = torch.Generator().manual_seed(seed)
        start = 0
        for _, inputs, outputs in names():
            row[start : start + inputs * RANK] = torch.randn(inputs * RANK, generator=rng) / inputs**0.5
            start += RANK * (inputs + outputs)
    return adapters


def merged(base: Weights, adapters: Tensor) -> Weights:
    """The base with each seed's adapter added: every linear layer as (S, inputs, outputs)."""
    merged = dict(base)
    start = 0
    for name, inputs, outputs in names():
        middle, end = start + inputs * RANK, start + RANK * (inputs + outputs)
        a = adapters[:, start:middle].reshape(-1, inputs, RANK)
        b = adapters[:, middle:end].reshape(-1, RANK, outputs)
        merged[name] = torch.baddbmm(base[name], a, b, alpha=SCALE)
        start = end
    return merged


def sequence_logps(base: Weights, adapters: Tensor | None, prompts: Tensor, answers: Tensor, lengths: Tensor) -> Tensor:
    """Log-probability of each answer under its seed's policy.

    Args:
        base: of :func:`pretrain`.
        adapters: (S, adapter_size()), or None for the reference model itself.
        prompts, answers, lengths: (S, N, PROMPT), (S, N, ANSWER), (S, N) int64.

    Returns:
        (S, N) fp32, nats, summed over the answer's tokens, its end included.
    """
    weights = base if adapters is None else merged(base, adapters)
    # Lengths differ by a factor of ten: grouping rows by length halves the padding.
    order = lengths.argsort(dim=1, descending=True)
    logps = []
    for part in order.tensor_split(_parts(order.shape[1]), dim=1):
        at = part[..., None]
        rows = (prompts.take_along_dim(at, 1), answers.take_along_dim(at, 1), lengths.take_along_dim(part, 1))
        logps.append(_logps(weights, *rows))
    return torch.cat(logps, 1).take_along_dim(order.argsort(dim=1), 1)


def score(base: Weights, adapters: Tensor | None, prompts: Tensor, answers: Tensor, lengths: Tensor) -> Tensor:
    """:func:`sequence_logps` of many rows, without gradients and a few rows at a time."""
    with torch.no_grad():
        parts = zip(*(x.split(SCORED_AT_ONCE, dim=1) for x in (prompts, answers, lengths)), strict=True)
        return torch.cat([sequence_logps(base, adapters, *part) for part in parts], dim=1)


def _parts(n: int) -> list[int]:
    """Where n rows, the longest first, are cut: a quarter, a quarter, a half."""
    return [n // 4, n // 2] if n >= 8 else []


def _logps(weights: Weights, prompts: Tensor, answers: Tensor, lengths: Tensor) -> Tensor:
    longest = int(lengths.max())
    answers = answers[..., :longest]
    tokens = torch.cat([prompts, answers[..., :-1]], dim=-1)  # (S, N, T)
    seeds, n, length = tokens.shape
    x = weights["embedding"][tokens] + weights["position"][:length]
    x = x.reshape(seeds, n * length, WIDTH)
    for layer in range(LAYERS):
        x = x + _attention(weights, layer, _normal(x), n, length)
        hidden = torch.matmul(_normal(x), weights[f"{layer}.up"])
        x = x + torch.matmul(F.gelu(hidden, approximate="tanh"), weights[f"{layer}.down"])
    # The token at PROMPT - 1 predicts the answer's first one.
    x = x.reshape(seeds, n, length, WIDTH)[:, :, PROMPT - 1 :]
    logits = torch.matmul(_normal(x), weights["head"])  # (S, N, longest, V)
    logp = logits.gather(-1, answers[..., None])[..., 0] - logits.logsumexp(-1)
    return (logp * (torch.arange(longest) < lengths[..., None])).sum(-1)


def _normal(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


def _attention(weights: Weights, layer: int, x: Tensor, n: int, length: int) -> Tensor:
    seeds = x.shape[0]
    three = torch.cat([weights[f"{layer}.{name}"] for name in "qkv"], dim=-1)
    qkv = torch.matmul(x, three).reshape(seeds * n, length, 3, HEADS, WIDTH // HEADS)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mixed = mixed.transpose(1, 2).reshape(seeds, n * length, WIDTH)
    return torch.matmul(mixed, weights[f"{layer}.o"])


def preference(reference: Reference, adapters: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Accuracy and mean margin on the held-out pairs, each (S,); the margin in reward units (beta times nats)."""
    pairs, seeds = reference.held_out, len(adapters)
    rises = []
    for answers, lengths, ref_logps in (
        (pairs.good, pairs.good_lengths, reference.held_out_logps[0]),
        (pairs.bad, pairs.bad_lengths, reference.held_out_logps[1]),
    ):
        rows = (x.expand(seeds, *x.shape) for x in (pairs.prompts, answers, lengths))
        rises.append(score(reference.base, adapters, *rows) - ref_logps)
    margins = beta * (rises[0] - rises[1])
    return (margins > 0).float().mean(1), margins.mean(1)
