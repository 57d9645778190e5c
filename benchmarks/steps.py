"""One optimizer step, all micro-batches, forward and backward: TRL, TRL patched, and PreferenceTrainer's ways.

    python -m benchmarks.steps MODEL --name NAME                         a saved causal LM; hours on 2 cores
    python -m benchmarks.steps --lengths short-128 --windows 1 --rounds 2    a trial on a random model, keeps no row

The policy is the model with a LoRA adapter on every linear layer but the head, the reference the model without it.
Rows are random words with lognormal lengths, stand-ins for those of a published set or short ones, named in the row.
The same windows (optimizer steps) are run by every variant in interleaved rounds; the optimizer is left out, the same
for all.
"""

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from math import exp

import torch

from benchmarks.cases import CASES
from benchmarks.measure_cpu import KEPT_ROUNDS, extra_bytes_of, interleaved, require_green, summary
from benchmarks.rows import RESULTS, keep, now, origin
from benchmarks.trainers import COMMON, model_of, tokenizer_of
from prefopt_kernels.integrations import trl as integration

# Medians and log standard deviations of the tokens of prompts and completions, and the cut.
LENGTHS = {
    "ultrafeedback-512": (120, 0.9, 250, 0.7, 512),
    "hh-rlhf-1024": (110, 0.8, 55, 0.9, 1024),
    "short-128": (30, 0.9, 62, 0.7, 128),
}
METHODS = {"kto": (4, 4), "enhanced_kto": (4, 4), "dpo": (2, 4)}  # rows or pairs of a micro-batch, micro-batches
GATE = ("tests/prefopt/test_trainer_parity.py", "tests/prefopt/test_trainer_methods.py")
LOSS_DIFFERENCE = 1e-4  # of fp32, in a step's mean loss
# What every way of a method has: enhanced_kto with BCO's shift from the first step, as it needs the whole window.
BASE = {"kto": {}, "dpo": {}, "enhanced_kto": {"shift": "window", "shift_start": 0.0, "shift_ramp": 0.0}}
PLAIN, EXACT, PREVIOUS = {"share_prompts": "off"}, {"kl_estimator": "exact"}, {"window_values": "previous"}
# Options, and whether windows are cut again by length. No prompt has two answers in the unpaired rows here.
WAYS: dict[str, dict[str, tuple[dict, bool]]] = {
    "kto": {
        "padded": (PLAIN, False),
        "cut": ({}, True),
        "kl_rows-4": ({"kl_rows": 4}, True),
        "exact": (EXACT, True),
        "exact-previous": (EXACT | PREVIOUS, True),
    },
    "enhanced_kto": {
        "padded": (PLAIN, False),
        "cut": ({}, True),
        "previous": (PREVIOUS, True),
        "exact": (EXACT, True),
        "exact-previous": (EXACT | PREVIOUS, True),
    },
    "dpo": {"padded": (PLAIN, False), "cut": (PLAIN, True), "shared": ({}, False), "cut-shared": ({}, True)},
}
SAME_LOSS = ("padded", "cut", "shared", "cut-shared")  # the others have other baselines


def lengths(name: str, count: int, seed: int) -> Iterator[tuple[int, int, int]]:
    """Tokens of a prompt and of two completions."""
    median, spread, answer, answer_spread, cap = LENGTHS[name]
    draw = random.Random(f"{name} {seed}")

    def sample(middle: int, sigma: float, most: int) -> int:
        return min(most, max(8, int(middle * exp(sigma * draw.gauss(0, 1)))))

    for _ in range(count):
        prompt = sample(median, spread, cap - 9)
        first, second = (max(4, min(sample(answer, answer_spread, cap), cap - prompt)) for _ in range(2))
        yield prompt, first, second


def rows_of(method: str, name: str, vocabulary: int, count: int, seed: int):
    from datasets import Dataset

    draw = random.Random(seed)

    def text(tokens: int) -> str:
        return " ".join(f"w{draw.randrange(vocabulary - 2)}" for _ in range(tokens))

    rows = []
    for number, (prompt, first, second) in enumerate(lengths(name, count, seed)):
        row = {"prompt": text(prompt)}
        if method == "dpo":
            row |= {"chosen": " " + text(first - 1), "rejected": " " + text(second - 1)}
        else:
            row |= {"completion": " " + text(first - 1), "label": number % 2 == 0}
        rows.append(row)
    return Dataset.from_list(rows)


def load(path: str | None):
    from transformers import AutoModelForCausalLM

    if path is None:
        return model_of(CASES["smoke"], 2, "fp32", seed=0)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def adapter():
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)


def by_trl(method: str, path: str | None, data, vocabulary: int, folder: str, windows: int):
    import trl

    rows, accumulation = METHODS[method]
    config = getattr(trl, f"{method.upper()}Config")(
        output_dir=folder,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        bf16=False,
        gradient_checkpointing=False,
        **COMMON,
    )
    trainer = getattr(trl, f"{method.upper()}Trainer")(
        model=load(path),
        args=config,
        train_dataset=data,
        processing_class=tokenizer_of(vocabulary),
        peft_config=adapter(),
    )
    return trainer, stepper(trainer, accumulation, windows)


def by_ours(
    method: str, options: dict, recuts: bool, path: str | None, data, vocabulary: int, folder: str, windows: int
):
    from prefopt.train import PreferenceConfig, PreferenceTrainer

    rows, accumulation = METHODS[method]
    config = PreferenceConfig(
        output_dir=folder,
        method=method,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        **COMMON,
        **BASE[method],
        **options,
    )
    tokenizer = tokenizer_of(vocabulary)
    trainer = PreferenceTrainer(load(path), config, data, processing_class=tokenizer, peft_config=adapter())
    trainer.recuts = recuts
    trainer.scorer.collator.shared = "share_prompts" not in options
    return trainer, stepper(trainer, accumulation, windows)


def stepper(trainer, accumulation: int, windows: int) -> Callable[[], torch.Tensor]:
    """Runs the first ``windows`` windows of an epoch; returns the sum of their losses."""
    device = trainer.args.device
    trainer.model.train()

    def run() -> torch.Tensor:
        batches = iter(trainer.get_train_dataloader())
        total = torch.zeros(())
        trainer.current_gradient_accumulation_steps = accumulation
        for _ in range(windows):
            trainer.model.zero_grad(set_to_none=True)
            samples, items = trainer.get_batch_samples(batches, accumulation, device)
            for batch in samples:
                total += trainer.training_step(trainer.model, batch, items).detach()
        return total

    return run


def measure(method: str, options: argparse.Namespace, where: dict) -> list[dict]:
    torch.set_num_threads(options.threads)
    rows, accumulation = METHODS[method]
    model = load(options.model)
    vocabulary, layers, H = model.config.vocab_size, model.config.num_hidden_layers, model.config.hidden_size
    del model
    count = rows * accumulation * options.windows
    data = rows_of(method, options.lengths, vocabulary, count, seed=0)
    tokens = sum(
        2 * prompt + first + second if method == "dpo" else prompt + first
        for prompt, first, second in lengths(options.lengths, count, 0)
    )
    runs: dict[str, Callable] = {}
    with tempfile.TemporaryDirectory() as folder:
        if method != "enhanced_kto":
            _, plain = by_trl(method, options.model, data, vocabulary, f"{folder}/trl", options.windows)

            def patched() -> torch.Tensor:
                with integration.patch() as patch:
                    loss = plain()
                    assert patch.calls > 0 and patch.passed_on == 0
                return loss

            runs |= {"trl": plain, "trl-patched": patched}
        for name, (extra, recuts) in WAYS[method].items():
            if options.way and name not in options.way:
                continue
            _, runs[f"ours-{name}"] = by_ours(
                method, extra, recuts, options.model, data, vocabulary, f"{folder}/{name}", options.windows
            )
        for run in runs.values():  # pages in the weights, which are mapped from a file
            run()
        peaks = {who: extra_bytes_of(run) for who, run in runs.items()}
        seconds, losses = interleaved(runs, options.rounds)
    ours = [losses[who].item() for who in runs if who.removeprefix("ours-") in SAME_LOSS]
    if not max(ours) - min(ours) <= LOSS_DIFFERENCE * options.windows:
        raise RuntimeError(f"the losses of the ways differ by {max(ours) - min(ours):.1e}: nothing is kept")
    unit = "trl-patched" if "trl-patched" in runs else "ours-padded"
    base = statistics.median(seconds[unit])
    return [
        where
        | {
            "time": now(),
            "op": f"{method}_step",
            "model": options.name,
            "layers": layers,
            "H": H,
            "V": vocabulary,
            "lengths": options.lengths,
            "rows": rows,
            "micro_batches": accumulation,
            "windows": options.windows,
            "T": tokens,
            "threads": options.threads,
            "variant": who,
            "rounds": options.rounds,
            **summary(seconds[who]),
            "ratio": statistics.median(seconds[who]) / base,
            "tokens_per_second": tokens / statistics.median(seconds[who]),
            "peak_extra_bytes": peaks[who],
            "loss": losses[who].item() / options.windows,
        }
        for who in runs
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder of a causal LM; left out, a random one")
    parser.add_argument("--name", default="random", help="of the model in the rows")
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--way", action="append")
    parser.add_argument("--lengths", choices=LENGTHS, default="ultrafeedback-512")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=KEPT_ROUNDS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    kept = options.rounds >= KEPT_ROUNDS and options.model is not None
    if kept:
        require_green(*GATE)
    where = origin()
    for method in options.method or METHODS:
        rows = measure(method, options, where)
        for row in rows:
            print(
                f"{method} {row['variant']}: {row['median_ms']:,.0f} ms, {row['tokens_per_second']:,.0f} tokens/s, "
                f"ratio {row['ratio']:.3f}, "
                f"{row['peak_extra_bytes'] / 2**20:,.0f} MiB, loss {row['loss']:.6f}",
                flush=True,
            )
        if kept:
            print(keep(rows, RESULTS / "steps"))


if __name__ == "__main__":
    main()
