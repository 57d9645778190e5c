"""Paired methods and SFT log what TRL 1.16.0 logs, step by step, on the same rows from the same weights.

The tolerances are the contract: 1e-5 on the loss, 1e-4 on sums of log-probabilities and on what is made of them, in
fp32 on the CPU. CPO, SimPO and ORPO are trl.experimental's. Where TRL's number is another one, the test says which and
why.
"""

import copy
import os

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["CI"] = "1"  # TRL's trainers ping a server when they are built, unless this is set
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
from datasets import Dataset
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from support.tiny_models import ROWS
from support.trainer import COMMON, make_pairs, make_trainer, make_world, train

TOLERANCES = {"loss": 1e-5}
OTHERS = 1e-4
METRICS = {
    "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy",
}  # fmt: skip
SHARED = {"train_sampling_strategy": "sequential", "bf16": False, "gradient_checkpointing": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Text rows and a tokenizer without a token of the beginning, which CPO's and ORPO's trainers would add."""
    world = make_world("qwen3", tmp_path_factory.mktemp("qwen3"))
    tokenizer = copy.deepcopy(world.tokenizer)
    tokenizer.bos_token = None
    return world._replace(tokenizer=tokenizer)


def run_trl(world, kind, config, rows: list[dict], **models) -> list[dict]:
    trainer = kind(
        model=copy.deepcopy(world.model),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=world.tokenizer,
        **models,
    )
    trainer.remove_callback(PrinterCallback)
    return train(trainer)


def assert_same(ours: list[dict], theirs: list[dict], keys: set[str]) -> None:
    assert len(ours) == len(theirs) == COMMON["max_steps"]
    for step, (mine, trls) in enumerate(zip(ours, theirs, strict=True), start=1):
        for key in keys:
            assert mine[key] == pytest.approx(trls[key], abs=TOLERANCES.get(key, OTHERS), rel=0), f"step {step}: {key}"


@pytest.mark.parametrize(
    ("method", "mine", "trls"),
    [
        ("dpo", {}, {"loss_type": ["sigmoid"]}),
        (
            "dpo",
            {"beta": 0.3, "label_smoothing": 0.1, "robust": True},
            {"beta": 0.3, "label_smoothing": 0.1, "loss_type": ["robust"]},
        ),
        ("ipo", {}, {"loss_type": ["ipo"]}),
    ],
    ids=["dpo", "robust", "ipo"],
)
def test_dpo_logs_what_trl_logs(world, tmp_path, method, mine, trls):
    rows, size = make_pairs(12, chat=False), {"per_device_train_batch_size": 4}
    config = DPOConfig(output_dir=str(tmp_path / "trl"), **(COMMON | SHARED | size | trls))
    theirs = run_trl(world, DPOTrainer, config, rows, ref_model=copy.deepcopy(world.ref))
    ours = train(make_trainer(world, tmp_path, method=method, data=rows, sampler="sequential", **size, **mine))
    assert_same(ours, theirs, METRICS)
    assert abs(ours[0]["rewards/margins"]) > 1e-2  # or the comparison would be blind


@pytest.mark.parametrize(
    ("method", "mine", "trls"),
    [
        ("cpo", {"alpha": 0.5}, {"loss_type": "sigmoid", "cpo_alpha": 0.5}),
        (
            "simpo",
            {"beta": 2.5, "gamma": 0.8},
            {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 0.8},
        ),
    ],
    ids=["cpo", "simpo"],
)
def test_cpo_and_simpo_log_what_trl_logs(world, tmp_path, method, mine, trls):
    """TRL's logits/* are a mean over prompt and padding, and its logps of simpo are per token; the rest is the same.

    Smaller steps than elsewhere: AdamW's first ones turn the rounding of a near-zero gradient into a whole step, and
    these losses, without a reference, start where the gradient is ten times as large.
    """
    rows = make_pairs(12, chat=False)
    size = {"per_device_train_batch_size": 4, "learning_rate": 1e-4}
    config = CPOConfig(output_dir=str(tmp_path / "trl"), **(COMMON | SHARED | size | trls))
    theirs = run_trl(world, CPOTrainer, config, rows)
    ours = train(make_trainer(world, tmp_path, method=method, data=rows, sampler="sequential", **size, **mine))
    keys = {key for key in METRICS if not key.startswith(("logits", "entropy"))}
    assert_same(ours, theirs, keys - ({"logps/chosen", "logps/rejected"} if method == "simpo" else set()))


def test_orpo_logs_what_trl_logs_but_for_the_prompts(world, tmp_path):
    """TRL's likelihood term is a mean over the tokens of the prompts too; ours is the paper's, of the answers."""
    rows, size = make_pairs(4, chat=False), {"per_device_train_batch_size": 4, "max_steps": 1}
    config = ORPOConfig(output_dir=str(tmp_path / "trl"), beta=0.4, **(COMMON | SHARED | size))
    (theirs,) = run_trl(world, ORPOTrainer, config, rows)
    (ours,) = train(
        make_trainer(world, tmp_path, method="orpo", odds_weight=0.4, data=rows, sampler="sequential", **size)
    )
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert ours[key] == pytest.approx(theirs[key], abs=OTHERS, rel=0), key
    likelihood = -ours["rewards/chosen"] / 0.4  # rewards are odds_weight times the mean log-probability
    odds = theirs["loss"] - theirs["nll_loss"]
    assert ours["loss"] - likelihood == pytest.approx(odds, abs=1e-5, rel=0)
    assert abs(likelihood - theirs["nll_loss"]) > 1e-2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_logs_what_trl_logs(world, tmp_path, accumulation):
    """A mean over the tokens of the answers of the whole step, also where the micro-batches have unequal numbers."""
    good = [(prompt, completion) for prompt, completion, label in ROWS if label]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in good]
    size = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1 if accumulation == 2 else 3,
    }
    config = SFTConfig(output_dir=str(tmp_path / "trl"), **(COMMON | SHARED | size))
    theirs = run_trl(world, SFTTrainer, config, rows)
    data = [row | {"label": True} for row in rows]
    ours = train(make_trainer(world, tmp_path, method="sft", data=data, sampler="sequential", **size))
    assert len(ours) == len(theirs) == size["max_steps"]
    for mine, trls in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm"):
            assert mine[key] == pytest.approx(trls[key], abs=TOLERANCES.get(key, OTHERS), rel=0), key
    if accumulation == 1:
        assert ours[0]["entropy"] == pytest.approx(theirs[0]["entropy"], abs=OTHERS, rel=0)
