"""Tokens per second of a micro-batch, forward and backward: TRL's trainers, the same patched, and PreferenceTrainer.

    python -m benchmarks.trainers                                      the required cases; about an hour on 2 cores
    python -m benchmarks.trainers --case smoke --rows 4 --tokens 16    a trial, keeps no row

One micro-batch is repeated in interleaved rounds by TRL's trainer, the same trainer patched, and PreferenceTrainer with
the same weights. The model has a real head on a few random layers: only the head differs, and its share of a step
falls with the number of layers, which is part of the row. Tokens are prompt and completion tokens of the matched
sequences; a KTO step also runs the policy and the reference on the mismatched ones. Rows go to
results/trainers/<device>/.
"""

import argparse
import statistics
import tempfile

import torch
from torch import Tensor

from benchmarks.cases import CASES, DTYPES, Case
from benchmarks.measure_cpu import KEPT_ROUNDS, interleaved, require_green, row_start, summary
from benchmarks.rows import RESULTS, keep, origin
from prefopt_kernels.integrations import trl as integration

TRAINERS = ("kto", "dpo")
WHO = ("trl", "ours", "prefopt")  # TRL as it is, patched, and PreferenceTrainer
REQUIRED = ("smollm2-360m", "qwen3-0.6b")
GATE = ("tests/ops", "tests/integrations/test_trl.py", "tests/prefopt/test_trainer_parity.py")
COMMON = dict(max_length=None, use_cpu=True, report_to="none", disable_tqdm=True)  # of all configurations
# TRL rounds the logits of bf16 models: .1 nat in a completion's sum, of which the losses take a twentieth.
LOSS_DIFFERENCE = {"bf16": 1e-2, "fp32": 1e-4}


def tokenizer_of(vocabulary: int):
    """A tokenizer with one token per word w0, w1, ..., so that texts have exact numbers of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocabulary - 2)}
    words |= {"<eos>": vocabulary - 2, "<pad>": vocabulary - 1}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def model_of(case: Case, layers: int, dtype: str, seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = max(1, case.H // 64)
    config = LlamaConfig(
        vocab_size=case.V,
        hidden_size=case.H,
        intermediate_size=3 * case.H,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        pad_token_id=case.V - 1,
        eos_token_id=case.V - 2,
    )
    return LlamaForCausalLM(config).to(DTYPES[dtype])


def rows_of(trainer: str, case: Case, rows: int, tokens: int):
    """``rows`` random sequences of ``tokens`` tokens, half prompt and half completion; a pair counts as two."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)

    def text(number: int) -> str:
        ids = torch.randint(case.V - 2, (number,), generator=generator).tolist()
        return " ".join(f"w{i}" for i in ids)

    prompt, completion = tokens // 2, tokens - tokens // 2 - 1  # and the end of the sequence

    def row(i: int) -> dict:
        found = {"prompt": text(prompt)}
        if trainer == "dpo":
            return found | {"chosen": " " + text(completion), "rejected": " " + text(completion)}
        return found | {"completion": " " + text(completion), "label": i % 2 == 0}

    return Dataset.from_list([row(i) for i in range(rows // 2 if trainer == "dpo" else rows)])


def build(name: str, case: Case, data, options: argparse.Namespace, folder: str):
    """TRL's trainer, ready for ``training_step``, and its micro-batch."""
    import trl

    config = getattr(trl, f"{name.upper()}Config")(
        output_dir=folder, per_device_train_batch_size=len(data), bf16=False, gradient_checkpointing=False, **COMMON
    )
    trainer = getattr(trl, f"{name.upper()}Trainer")(
        model=model_of(case, options.layers, options.dtype, seed=0),
        ref_model=model_of(case, options.layers, options.dtype, seed=1),
        args=config,
        train_dataset=data,
        processing_class=tokenizer_of(case.V),
    )
    for parameter in trainer.model.lm_head.parameters():
        parameter.requires_grad_(options.head == "trainable")
    trainer.current_gradient_accumulation_steps = 1
    (batch,) = trainer.get_train_dataloader()
    return trainer, batch


def build_own(name: str, theirs, data, folder: str):
    """PreferenceTrainer with the weights of TRL's, ready for ``training_step``, and its micro-batch."""
    from prefopt.train import PreferenceConfig, PreferenceTrainer

    config = PreferenceConfig(
        output_dir=folder,
        method=name,
        per_device_train_batch_size=len(data),
        kl_estimator="microbatch" if name == "kto" else None,  # TRL's
        sampler="sequential",
        **COMMON,
    )
    tokenizer, reference = theirs.processing_class, theirs.ref_model
    trainer = PreferenceTrainer(theirs.model, config, data, processing_class=tokenizer, ref_model=reference)
    trainer.current_gradient_accumulation_steps = 1
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, config.device)
    return trainer, batches[0]


def measure(name: str, case: Case, options: argparse.Namespace, where: dict) -> list[dict]:
    """Three rows: TRL as it is, patched, and our own trainer."""
    torch.set_num_threads(options.threads)
    data = rows_of(name, case, options.rows, options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        trainer, batch = build(name, case, data, options, folder)
        own, own_batch = build_own(name, trainer, data, f"{folder}/own")

        def step() -> Tensor:
            trainer.model.zero_grad(set_to_none=True)
            return trainer.training_step(trainer.model, dict(batch)).detach()

        def patched() -> Tensor:
            with integration.patch() as patch:
                loss = step()
                assert patch.calls > 0 and patch.passed_on == 0
            return loss

        def ours() -> Tensor:
            own.model.zero_grad(set_to_none=True)
            return own.training_step(own.model, dict(own_batch)).detach()

        seconds, losses = interleaved({"trl": step, "ours": patched, "prefopt": ours}, options.rounds)
    difference = max(abs(losses["trl"] - losses[who]).item() for who in WHO)
    if not difference <= LOSS_DIFFERENCE[options.dtype]:
        raise RuntimeError(f"the losses differ by {difference:.1e}: nothing is kept")
    T = options.rows * options.tokens
    unit = statistics.median(seconds["trl"])
    return [
        where
        | row_start(case, T, options.dtype, f"{who}-{options.head}", None)
        | {
            "op": f"trl_{name}_step",
            "layers": options.layers,
            "rows": options.rows,
            "rounds": options.rounds,
            **summary(seconds[who]),
            "ratio": statistics.median(seconds[who]) / unit,
            "tokens_per_second": T / statistics.median(seconds[who]),
            "loss": losses[who].item(),
        }
        for who in WHO
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", action="append", choices=CASES, help="a head; may be repeated")
    parser.add_argument("--trainer", action="append", choices=TRAINERS, help="may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--head", choices=("frozen", "trainable"), default="trainable")
    parser.add_argument("--rows", type=int, default=4, help="sequences; a pair has two")
    parser.add_argument("--tokens", type=int, default=256, help="of each sequence")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=KEPT_ROUNDS, help=f"{KEPT_ROUNDS} are kept")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.rounds < 2 or options.rows < 4 or options.rows % 2:
        parser.error("expected --rounds 2 or more and --rows even, 4 or more")
    cases = options.case or REQUIRED
    kept = options.rounds >= KEPT_ROUNDS and "smoke" not in cases
    if kept:
        require_green(*GATE)
    where = origin()
    for case in cases:
        for name in options.trainer or TRAINERS:
            rows = measure(name, CASES[case], options, where)
            for row in rows:
                print(
                    f"\n{row['case']} {name} {row['variant']}: {row['tokens_per_second']:,.0f} tokens/s, "
                    f"{row['median_ms']:,.0f} ms, ratio {row['ratio']:.2f}",
                    flush=True,
                )
            if kept:
                print(keep(rows, RESULTS / "trainers"))


if __name__ == "__main__":
    main()
