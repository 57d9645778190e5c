"""What is measured: language-model heads with their origin, numbers of tokens, and the target ratios of each pass."""

from dataclasses import dataclass

import torch

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A language model's head: ``logits = hidden (T, H) @ weight (V, H).T``."""

    name: str
    origin: str
    H: int
    V: int
    softcap: float | None = None


CASES = {
    case.name: case
    for case in (
        Case("smollm2-135m", "HuggingFaceTB/SmolLM2-135M, config.json", 576, 49_152),
        Case("smollm2-360m", "HuggingFaceTB/SmolLM2-360M, config.json", 960, 49_152),
        Case("qwen3-0.6b", "Qwen/Qwen3-0.6B, config.json", 1024, 151_936),
        Case("qwen3-1.7b", "Qwen/Qwen3-1.7B, config.json", 2048, 151_936),
        Case("deepseek-r1-1.5b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B, config.json", 1536, 151_936),
        Case("llama-3.1-8b", "meta-llama/Llama-3.1-8B, config.json", 4096, 128_256),
        Case("gemma-2-2b", "google/gemma-2-2b, config.json: final_logit_softcapping", 2304, 256_000, softcap=30.0),
        Case("smoke", "no model: a shape to try the commands with; its rows are not kept", 64, 1000),
    )
}

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PASSES = ("forward", "frozen", "trainable")
KTO_PASSES = ("kto-frozen", "kto-trainable")
# Of linear_kl, with one head: no gradient; through logp with a frozen head, kl a metric; through kl.
KL_PASSES = ("kl-forward", "kl-logp", "kl-frozen", "kl-trainable")

# (case, T, dtype): what `make bench` measures if no option narrows it.
GRID = [
    (case, T, dtype)
    for case in ("smollm2-360m", "qwen3-0.6b")
    for T, dtype in ((512, "bf16"), (4096, "bf16"), (512, "fp32"))
]
KL_GRID = [("smollm2-135m", T, dtype) for T, dtype in ((256, "bf16"), (1024, "bf16"), (1024, "fp32"))]
KL_GRID += [("qwen3-0.6b", 512, "bf16")]
# (case, T, logits) of the GPU benchmark, the most important first; benchmarks.variants.make_inputs defines the logits.
GPU_TOKENS = (4096, 8192, 16_384, 1024)
GPU_CASES = ("qwen3-0.6b", "llama-3.1-8b", "qwen3-1.7b", "smollm2-360m", "deepseek-r1-1.5b", "gemma-2-2b")
GPU_LOGITS = ("random", "planted")

# Largest time in units of the bare GEMM of the same rounds.
TIME_TARGETS = {
    ("forward", "bf16"): 1.0,
    ("frozen", "bf16"): 1.7,
    ("trainable", "bf16"): 3.5,
    ("forward", "fp32"): 1.1,
    ("frozen", "fp32"): 2.1,
}
GPU_TIME_TARGETS = {("forward", "bf16"): 1.15, ("frozen", "bf16"): 2.4, ("trainable", "bf16"): 4.0}  # of an H100
GPU_SKIP_TARGET = 1.5  # frozen head with a grad_filter, if at most this share of the tiles is kept:
GPU_SKIP_KEEP_RATE = 0.2
GPU_TRL_TARGET = 1.4  # smallest time of TRL in units of ours, frozen head
LOGP_ERROR_TARGET = 1e-5  # nats, largest over tokens, against fp64 of the same inputs


def memory_target(case: Case, T: int, dtype: str, passed: str, gpu: bool = False) -> int | None:
    """Bytes above the inputs: 300 MiB on a GPU, else 64 MiB and three fp32 (T, H); plus a trained head's gradient."""
    if passed in KTO_PASSES:
        return None
    head_gradient = case.V * case.H * DTYPES[dtype].itemsize if passed == "trainable" else 0
    return (300 * MIB if gpu else 64 * MIB + 3 * T * case.H * 4) + head_gradient
