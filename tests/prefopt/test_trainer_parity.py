"""With TRL's estimate of the KL term and the rows in order, the trainer logs what TRL 1.16.0 logs, step by step.

TRL runs in the same test, on the same rows, from the same weights. The tolerances are the contract: 1e-5 on the loss,
1e-4 on sums of log-probabilities and on what is made of them, in fp32 on the CPU.
"""

import copy
import os

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["CI"] = "1"  # TRL's trainers ping a server when they are built, unless this is set

import pytest
import trl
from peft import LoraConfig
from transformers import PrinterCallback
from trl import KTOConfig, KTOTrainer

from support.tiny_models import make_dataset
from support.trainer import COMMON, World, make_trainer, make_world, train

TOLERANCES = {"loss": 1e-5}
OTHERS = 1e-4


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """One world per architecture, made when first asked for."""
    made: dict[str, World] = {}

    def get(arch: str) -> World:
        if arch not in made:
            made[arch] = make_world(arch, tmp_path_factory.mktemp(arch))
        return made[arch]

    return get


def lora() -> LoraConfig:
    """With B not 0, so that policy and reference differ at the first step."""
    return LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )


def run_trl(world: World, folder, *, ref: bool, peft_config, **options):
    """TRL's logs, its values per micro-batch, and its batches."""
    config = KTOConfig(
        output_dir=str(folder),
        bf16=False,  # TRL turns bf16 autocast on otherwise
        gradient_checkpointing=False,
        **(COMMON | options),
    )
    trainer = KTOTrainer(
        model=copy.deepcopy(world.model),
        ref_model=copy.deepcopy(world.ref) if ref else None,
        args=config,
        train_dataset=make_dataset(conversational=True),
        processing_class=world.tokenizer,
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    batches = list(trainer.get_train_dataloader())
    microbatches, log = [], trainer.log

    def keep(logs, *rest):
        if "loss" in logs:
            microbatches.append({key: list(v) for key, v in trainer._metrics["train"].items()})
        return log(logs, *rest)

    trainer.log = keep
    return train(trainer), microbatches, batches


def weighted(values: dict[str, list[float]], batches: list[dict]) -> dict[str, float]:
    """The mean over all rows (or tokens) that TRL's values of several micro-batches amount to."""
    counts = {key: [] for key in ("chosen", "rejected", "chosen_tokens", "rejected_tokens")}
    for batch in batches:
        labels = batch["label"].bool()
        tokens = batch["completion_mask"][:, 1:].sum(1)
        for side, mask in (("chosen", labels), ("rejected", ~labels)):
            counts[side].append(int(mask.sum()))
            counts[f"{side}_tokens"].append(int(tokens[mask].sum()))
    both = zip(counts["chosen_tokens"], counts["rejected_tokens"], strict=True)
    counts["tokens"] = [a + b for a, b in both]

    def mean(key: str, by: str) -> float:
        present = [count for count in counts[by] if count]  # TRL has no value where it counts none
        assert len(present) == len(values[key]), key
        return sum(v * n for v, n in zip(values[key], present, strict=True)) / sum(present)

    found = {"entropy": mean("entropy", "tokens"), "kl": sum(values["kl"]) / len(values["kl"])}
    for side in ("chosen", "rejected"):
        if sum(counts[side]):
            found[f"logits/{side}"] = mean(f"logits/{side}", f"{side}_tokens")
            found[f"rewards/{side}"] = mean(f"rewards/{side}", side)
            found[f"logps/{side}"] = mean(f"logps/{side}", side)
    if "rewards/chosen" in found and "rewards/rejected" in found:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


CASES = {
    "full": {},
    "llama": {"arch": "llama"},
    "gemma2": {"arch": "gemma2"},
    "lora": {"ref": False, "lora": True},
    "lora-gemma2": {"arch": "gemma2", "ref": False, "lora": True},
    "precomputed": {"precompute": True},
    "batch2x2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "weights": {"desirable_weight": 0.7, "undesirable_weight": 1.9},
    "apo_zero": {"method": "apo_zero"},
}


@pytest.mark.parametrize("name", CASES)
def test_logs_what_trl_logs(name, worlds, tmp_path):
    assert trl.__version__ == "1.16.0"
    options = {"per_device_train_batch_size": 4, "beta": 0.1, **CASES[name]}
    world = worlds(options.pop("arch", "qwen3"))
    ref, with_lora = options.pop("ref", True), options.pop("lora", False)
    method, precompute = options.pop("method", "kto"), options.pop("precompute", False)

    theirs, microbatches, batches = run_trl(
        world,
        tmp_path / "trl",
        ref=ref,
        peft_config=lora() if with_lora else None,
        loss_type={"kto": "kto", "apo_zero": "apo_zero_unpaired"}[method],
        precompute_ref_log_probs=precompute,
        **options,
    )
    ours = train(
        make_trainer(
            world,
            tmp_path / "ours",
            ref=ref,
            peft_config=lora() if with_lora else None,
            method=method,
            precompute_ref_logps=precompute,
            reference_cache_dir=str(tmp_path / "cache"),
            kl_estimator="microbatch" if method == "kto" else None,
            sampler="sequential",
            **options,
        )
    )

    accumulation = options.get("gradient_accumulation_steps", 1)
    assert len(ours) == len(theirs) == COMMON["max_steps"]
    for step, (mine, trls) in enumerate(zip(ours, theirs, strict=True)):
        window = batches[step * accumulation : (step + 1) * accumulation]
        expected = weighted(microbatches[step], window)
        if accumulation == 1:  # then TRL's mean over micro-batches is the mean over rows
            expected = {key: trls[key] for key in expected}
        for key in ("loss", "grad_norm", "learning_rate", "num_tokens"):
            expected[key] = trls[key]
        if method == "apo_zero":  # TRL logs a constant 0
            assert expected.pop("kl") == 0.0
        assert set(mine) >= set(expected)
        for key, value in expected.items():
            assert mine[key] == pytest.approx(value, abs=TOLERANCES.get(key, OTHERS), rel=0), f"step {step + 1}: {key}"

    # Otherwise the comparison would be blind.
    assert abs(ours[0]["rewards/chosen"]) > 1e-2
    assert method == "apo_zero" or any(entry["kl"] > 1e-2 for entry in ours)
    assert {"rewards/chosen", "rewards/rejected"} <= set().union(*ours)
