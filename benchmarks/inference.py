"""Generation speed of a run: prefill and decode, timed separately.

python -m benchmarks.inference RUN [--runs 100] [--merge]
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefopt.cli.arguments import disable_hub_kernels

disable_hub_kernels()  # before peft and transformers are imported

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel

from prefopt.errors import UserError
from prefopt.files import write_whole
from prefopt.models import check_length, choose_device, device_name, merge_adapter
from prefopt.options import QUANTIZATIONS, WHOLE
from prefopt.runs import find_run, load_model
from prefopt.train.run_folder import versions

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
    out: Path | None = None,
) -> tuple[dict, Path]:
    """Time generation; the arguments are the options of the command.

    Generation is greedy, uses the key-value cache, and ignores end-of-sequence tokens. Prompts are random tokens. The
    device is synchronised before and after each part, not between tokens.

    Returns:
        The result (times in ms, throughput in tokens per second) and the file it was written to.

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
    path = (source.folder / OUT if out is None else out).expanduser()
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; expected a file")
    if merge:
        if source.base is None:
            raise UserError(f"--merge is given, but {source.folder} has no adapter")
        if quantization not in (None, WHOLE):
            raise UserError(
                f"--quantization is {quantization} and --merge is given, which would round the adapter; choose one"
            )
        quantization = WHOLE
    model = load_model(source, dtype=dtype, quantization=quantization, device=device)
    check_length(model, prompt_tokens + new_tokens, "prompt and answer have")
    if merge:
        model = merge_adapter(model)
    timings = time_runs(model, runs, warmup, prompt_tokens, new_tokens, batch_size)
    result = {
        "run": source.folder.name,
        "adapter": "none" if source.base is None else "merged" if merge else "not merged",
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
    """Time ``runs`` generations, after ``warmup`` untimed ones."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    timings = []
    for number in tqdm(range(warmup + runs), desc="generation", unit="run", delay=1):
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
    """Seconds, after the device has finished its queue."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description="Time greedy generation of a run over random prompts, prefill and decode separately.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("--runs", type=int, default=100, help="number of timed generations (default: 100)")
    add("--warmup", type=int, default=5, help="number of untimed generations before them (default: 5)")
    add("--prompt-tokens", type=int, default=128, help="tokens of each prompt (default: 128)")
    add("--new-tokens", type=int, default=64, help="tokens generated for each prompt (default: 64)")
    add("--batch-size", type=int, default=1, help="prompts per generation (default: 1)")
    add("--merge", action="store_true", help="merge the adapter into the weights first")
    add("--base", metavar="MODEL", help="base model (default: the one that the adapter names)")
    add(
        "--quantization", choices=QUANTIZATIONS, help="of the base's weights under an adapter (default: as in training)"
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as in training)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--out", type=Path, metavar="FILE", help=f"JSON file of the result (default: RUN/{OUT})")
    try:
        result, path = bench_inference(**vars(parser.parse_args(arguments)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{table(result)}\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
