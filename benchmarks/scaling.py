"""Memory and communication of one optimizer step on many GPUs, as formulas; docs/scaling.md has their tables.

python -m benchmarks.scaling             rewrites the tables
python -m benchmarks.scaling --check     exits with 1 if they would change

Everything here is arithmetic; tests/benchmarks/test_scaling.py compares it with two processes that train.
"""

import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Literal

from benchmarks.rows import ROOT
from benchmarks.tables import check_option, table, write_page

PAGE = ROOT / "docs" / "scaling.md"
GPUS = (8, 64, 1024)
GIB = 2**30
FP32, BF16 = 4, 2  # bytes
ADAM = 2 * FP32  # AdamW's two averages
# Two fifths of the dense bf16 rate in the data sheet of an H100 SXM, an assumption about training.
FLOPS = 0.4 * 989e12

Layout = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class Shape:
    """A decoder with gated feed-forward layers and grouped attention."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    head_dim: int = 128
    qk_norm: bool = True

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return attention + 3 * self.hidden * self.intermediate + norms

    @property
    def embedding(self) -> int:
        """Parameters of the embedding; 0 if it is tied to the head."""
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the head, which with the last norm's ``hidden`` is one FSDP2 unit."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.layer + self.embedding + self.head + self.hidden

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA with this rank on the seven linear layers."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        ends = 2 * (self.hidden + query) + 2 * (self.hidden + key) + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * ends


# From the models' published config.json.
SHAPES = {
    "Qwen3-0.6B": Shape(1024, 28, 3072, 16, 8, 151936, tied=True),
    "Qwen3-1.7B": Shape(2048, 28, 6144, 16, 8, 151936, tied=True),
    "Qwen3-8B": Shape(4096, 36, 12288, 32, 8, 151936, tied=False),
    "Qwen3-32B": Shape(5120, 64, 25600, 64, 8, 151936, tied=False),
    "Llama-3.1-70B": Shape(8192, 80, 28672, 64, 8, 128256, tied=False, qk_norm=False),
}


@dataclass(frozen=True)
class Step:
    """One optimizer step of one process.

    Args:
        gpus: number of processes, one per GPU.
        layout: "ddp", replicated; "fsdp2", weights, gradients and optimizer state sharded.
        rank: of LoRA on a frozen model; None trains all weights.
        tokens: per micro-batch of one process, prompt and padding included.
        micro_batches: per optimizer step.
        ahead: forward passes of the policy without gradient per micro-batch. KTO has one, on the mismatched answers.
        reference: forward passes of the reference per micro-batch: two for KTO, one for DPO, none for SFT and ORPO.
        copy: the reference is a frozen copy, not the model without its adapter.
        each_batch: FSDP2 reduces gradients after each micro-batch instead of after the last.
        weight, gather, reduce: bytes of a stored weight, of a gathered weight, of a reduced gradient.
    """

    gpus: int
    layout: Layout = "fsdp2"
    rank: int | None = 16
    tokens: int = 8192
    micro_batches: int = 4
    ahead: int = 1
    reference: int = 2
    copy: bool = False
    each_batch: bool = False
    weight: int = BF16
    gather: int = BF16
    reduce: int = FP32

    @property
    def passes(self) -> int:
        """Forward passes without gradient per micro-batch."""
        return self.ahead + self.reference

    @property
    def reductions(self) -> int:
        """Gradient reductions of FSDP2 per step."""
        return self.micro_batches if self.each_batch else 1

    def trained(self, shape: Shape) -> int:
        """Trainable parameters."""
        return shape.parameters if self.rank is None else shape.adapter(self.rank)

    @property
    def shards(self) -> int:
        """Number of shards of a weight."""
        return self.gpus if self.layout == "fsdp2" else 1


def held(shape: Shape, step: Step) -> int:
    """Bytes held by a process between steps: weights, reference, gradients, AdamW's averages.

    With accelerate's FSDP2 the head of a frozen copy stays gathered.
    """
    frozen = 0 if step.rank is None else shape.parameters * step.weight
    copied = shape.parameters * step.weight if step.copy else 0
    # an adapter's weights are fp32 beside a frozen model of any dtype
    stored = step.weight if step.rank is None else FP32
    trained = step.trained(shape) * (stored + FP32 + ADAM)
    kept = (shape.head + shape.hidden) * step.gather * (1 - 1 / step.shards) if step.copy else 0
    return ceil((frozen + copied + trained) / step.shards + kept)


def passing(shape: Shape, step: Step) -> int:
    """Peak bytes of temporary memory in a step, with activation checkpointing per layer.

    The input of each layer, the activations of the recomputed layer, hidden states and unit gradient of the fused
    log-probabilities. With FSDP2 also the gathered weights of the head and of two layers (one prefetched), and the
    unreduced gradients: of the head and one layer, or all of them if micro-batches accumulate before reduction.
    """
    rows = step.tokens * BF16
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    one_layer = rows * (4 * shape.hidden + 2 * query + 2 * key + 3 * shape.intermediate)
    activations = rows * shape.hidden * shape.layers + one_layer + 2 * rows * shape.hidden
    if step.layout == "ddp":
        return activations
    units = (shape.head + 2 * shape.layer) * step.gather
    if step.micro_batches > step.reductions:
        gradient = step.trained(shape) * FP32
    else:
        gradient = (shape.head + shape.layer) * step.reduce if step.rank is None else 0
    return activations + units + gradient


def logits(shape: Shape, step: Step) -> int:
    """Bytes of the fp32 logits of one micro-batch and of their gradient, which are not materialised."""
    return 2 * step.tokens * shape.vocab * FP32


def gathered(shape: Shape, step: Step) -> int:
    """Number of weights that a process gathers in a step.

    FSDP2 gathers each layer, and the embedding, for every forward pass and for the backward. The head stays gathered
    from the first forward pass to the end of the backward; if all weights are trained and the policy has extra forward
    passes, the first micro-batch's backward gathers it again. With an adapter the last norm is gathered more often.
    """
    if step.layout == "ddp":
        return 0
    m = step.micro_batches
    adapter = 0 if step.rank is None else shape.adapter(step.rank)
    units = shape.layers * shape.layer + adapter + shape.embedding
    once = m + (step.rank is None and step.ahead > 0)
    norm = once if step.rank is None else m * (step.reference + 1)
    return m * (step.passes + 2) * units + once * shape.head + norm * shape.hidden


def sent(shape: Shape, step: Step) -> int:
    """Bytes sent by a process in a step by ring algorithms: (n - 1) / n of the data, twice that for an all-reduce."""
    ring = (step.gpus - 1) / step.gpus
    gradients = step.trained(shape) * step.reduce
    if step.layout == "ddp":
        return ceil(2 * ring * gradients)
    return ceil(ring * (gathered(shape, step) * step.gather + step.reductions * gradients))


def work(shape: Shape, step: Step) -> float:
    """Floating-point operations of a process in a step, without attention scores.

    Two per weight and token for a forward pass, which is recomputed once; the same for the gradient of activations and,
    if all weights are trained, for that of weights.
    """
    backward = 2 if step.rank is None else 1
    return 2.0 * shape.parameters * step.tokens * step.micro_batches * (step.passes + 2 + backward)


def link(shape: Shape, step: Step) -> float:
    """Bandwidth in bytes per second at which communication takes as long as computation."""
    return sent(shape, step) / (work(shape, step) / FLOPS)


def vocab_parallel(tokens: int, hidden: int, ranks: int, width: int = BF16) -> int:
    """Bytes sent by a process for a vocabulary-parallel head, with ring all-reduces.

    Per scored token: the log-sum-exp in fp32 and three fp64 numbers forward, the gradient of the hidden state backward.
    """
    return ceil(2 * (ranks - 1) / ranks * tokens * (FP32 + 3 * 8 + hidden * width))


def tables() -> str:
    """The page's tables, in Markdown."""
    lora = [
        _line(name, shape, Step(gpus, layout))
        for name, shape in SHAPES.items()
        for layout, gpus in (("ddp", 8), *(("fsdp2", gpus) for gpus in GPUS))
    ]
    full = [
        _line(name, shape, Step(gpus, rank=None, copy=True, each_batch=True, weight=FP32))
        for name, shape in SHAPES.items()
        for gpus in GPUS
    ]
    header = ["model", "layout", "GPUs", "held", "passing", "sent", "link", "logits not built"]
    return "\n".join(
        [
            "LoRA of rank 16 on a frozen bf16 model, KTO:",
            "",
            table(header, lora),
            "",
            "All weights, fp32 with bf16 products, KTO with a frozen copy as the reference:",
            "",
            table(header, full),
            "",
        ]
    )


def _line(name: str, shape: Shape, step: Step) -> list[str]:
    at_rest, peak = held(shape, step) / GIB, passing(shape, step) / GIB
    return [
        name,
        "DDP" if step.layout == "ddp" else "FSDP2",
        f"{step.gpus:,}" if step.layout != "ddp" else "any",
        *(f"{value:,.1f}" for value in (at_rest, peak)),
        f"{sent(shape, step) / GIB:,.2f}",
        f"{link(shape, step) / 1e9:,.1f}",
        f"{logits(shape, step) / GIB:,.1f}",
    ]


def main(arguments: list[str] | None = None, page: Path = PAGE) -> int:
    check = check_option("benchmarks.scaling", __doc__, arguments)
    return write_page(page, tables(), "benchmarks.scaling", "formulas", check)


if __name__ == "__main__":
    sys.exit(main())
