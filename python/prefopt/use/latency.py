"""How fast a run answers: the prompt (prefill) and the tokens after it (decode), timed apart."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel

from prefopt.errors import UserError
from prefopt.files import write_whole
from prefopt.options import WHOLE
from prefopt.train.run_folder import versions
from prefopt.use.adapter import merge_adapter
from prefopt.use.load import check_length, choose_device, find_run, load_model

PERCENTILES = (5, 50, 95, 99)
OUT = "inference.json"


@dataclass(frozen=True)
class Timing:
    """One generation: milliseconds until the first token, and from the first to the last."""

    prefill_ms: float
    decode_ms: float


def bench_inference(
    run: str | Path,
    *,
    runs: int = 100,
    warmup: int = 5,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    batch_size: int = 1,
    merge: bool = False,
    base: str | None = None,
    quantization: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    out: str | Path | None = None,
) -> tuple[dict, Path]:
    """Time generation over ``runs`` runs after ``warmup`` that do not count.

    Greedy, with the key-value cache, over prompts of random tokens, and never stopped by an end-of-sequence token: each
    run does the same work. The device is synchronised before and after each part and not between the tokens.

    Args:
        run: run folder.
        runs: that count.
        warmup: runs before them.
        prompt_tokens, new_tokens: of each sequence.
        batch_size: sequences at once.
        merge: merge the adapter into the weights first.
        base: base model, instead of the one that the adapter names.
        quantization: of the base's weights, "nf4" or "none"; as in training if not given.
        dtype: of the weights; as in training if not given.
        device: "auto", "cpu" or "cuda".
        out: file of the result; inference.json in the run folder if not given.

    Returns:
        the result (times in ms, throughput in tokens per second) and the file it was written to.

    Raises:
        UserError: the run cannot be loaded, or an argument is out of range.
    """
    sizes = {
        "--runs": (runs, 1),
        "--warmup": (warmup, 0),
        "--prompt-tokens": (prompt_tokens, 1),
        "--new-tokens": (new_tokens, 2),
        "--batch-size": (batch_size, 1),
    }
    for flag, (value, least) in sizes.items():
        if value < least:
            raise UserError(f"{flag} is {value}; expected at least {least}")
    device = choose_device(device)
    source = find_run(run, base)
    path = source.folder / OUT if out is None else Path(out).expanduser()
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; expected a file")
    if merge and source.base is None:
        raise UserError(f"--merge is given, but {source.folder} has no adapter")
    if merge:
        if quantization not in (None, WHOLE):
            raise UserError(
                f"--quantization is {quantization} and --merge is given, which would round the adapter; expected one of them"
            )
        quantization = WHOLE
    model = load_model(source, dtype=dtype, quantization=quantization, device=device)
    check_length(model, prompt_tokens + new_tokens, "prompt and answer have")
    if merge:
        model = merge_adapter(model)
    timings = time_runs(model, runs, warmup, prompt_tokens, new_tokens, batch_size)
    result = {
        "run": source.folder.name,
        "adapter": "none" if source.base is None else "merged" if merge else "beside the weights",
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": quantization or source.quantization,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "runs": runs,
        "warmup": warmup,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        **summary(timings, prompt_tokens, new_tokens, batch_size),
    }
    write_whole(path, json.dumps(result, indent=2) + "\n")
    return result, path


@torch.inference_mode()
def time_runs(
    model: PreTrainedModel | PeftModel,
    runs: int,
    warmup: int,
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
) -> list[Timing]:
    """``runs`` timings; the ``warmup`` before them are made and dropped."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    timings = []
    for number in tqdm(range(warmup + runs), desc="bench-inference", unit="run", delay=1):
        ids = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator)
        timing = _time_one(model, ids.to(model.device), new_tokens)
        if number >= warmup:
            timings.append(timing)
    return timings


def _time_one(model: PreTrainedModel | PeftModel, ids: torch.Tensor, new_tokens: int) -> Timing:
    start = _now(ids.device)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)  # (B, 1)
    first = _now(ids.device)
    for _ in range(new_tokens - 1):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return Timing(1e3 * (first - start), 1e3 * (_now(ids.device) - first))


def _now(device: torch.device) -> float:
    """Seconds, when everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(timings: Sequence[Timing], prompt_tokens: int, new_tokens: int, batch_size: int) -> dict:
    """Percentiles of each part in ms, and throughput in tokens per second at the median.

    Example:
        >>> found = summary([Timing(10.0, 30.0)] * 3, prompt_tokens=100, new_tokens=4, batch_size=2)
        >>> found["decode_ms_per_token"]["p50"], found["decode_tokens_per_s"], found["prefill_tokens_per_s"]
        (10.0, 200.0, 20000.0)
    """
    steps = new_tokens - 1  # the first token comes out of the prefill
    prefill = distribution([timing.prefill_ms for timing in timings])
    decode = distribution([timing.decode_ms / steps for timing in timings])
    total = distribution([timing.prefill_ms + timing.decode_ms for timing in timings])
    return {
        "prefill_ms": prefill,
        "decode_ms_per_token": decode,
        "total_ms": total,
        "prefill_tokens_per_s": 1e3 * batch_size * prompt_tokens / prefill["p50"],
        "decode_tokens_per_s": 1e3 * batch_size / decode["p50"],
        "total_new_tokens_per_s": 1e3 * batch_size * new_tokens / total["p50"],
    }


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Percentiles (nearest rank: a value that was measured, the p-th percentile being the ceil(p n / 100)-th smallest).

    Example:
        >>> distribution([4.0, 1.0, 3.0, 2.0])
        {'min': 1.0, 'p5': 1.0, 'p50': 2.0, 'p95': 4.0, 'p99': 4.0, 'max': 4.0}
    """
    ordered = sorted(values)
    at = {f"p{p}": ordered[math.ceil(p * len(ordered) / 100) - 1] for p in PERCENTILES}
    return {"min": ordered[0], **at, "max": ordered[-1]}


def table(result: dict) -> str:
    """The result as text for the terminal."""
    names = ["min", *(f"p{p}" for p in PERCENTILES), "max"]
    rows = [["", *names]]
    for title, key in (
        ("prefill, ms", "prefill_ms"),
        ("decode, ms per token", "decode_ms_per_token"),
        ("whole answer, ms", "total_ms"),
    ):
        rows.append([title, *(f"{result[key][name]:.2f}" for name in names)])
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:<{width}}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows]
    head = (
        f"{result['run']} on {result['device']}, {result['threads']} threads, {result['dtype']}, adapter "
        f"{result['adapter']}: {result['runs']} runs after {result['warmup']}, {result['batch_size']} x "
        f"({result['prompt_tokens']} + {result['new_tokens']} tokens)"
    )
    rates = (
        f"tokens per second at the median: prefill {result['prefill_tokens_per_s']:,.0f}, decode "
        f"{result['decode_tokens_per_s']:,.1f}, whole answer {result['total_new_tokens_per_s']:,.1f}"
    )
    return "\n".join([head, *lines, rates])


def device_name(device: str) -> str:
    """The GPU's or the CPU's name, as the system gives it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "CPU"
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return f"CPU ({names[0]})" if names else "CPU"
