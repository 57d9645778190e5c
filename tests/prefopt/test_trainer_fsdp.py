"""FSDP2 on two gloo processes, as accelerate shards a model and as transformers does while loading it.

This file is the test and, run as a script, one of the processes.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    import conftest  # noqa: F401  no network

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from distributed_testing import (
    MOST_STEPS,
    assert_same_logs,
    assert_same_movements,
    launch_environment,
    leave,
    movements,
    run_as_ranks,
    shard_on_the_cpu,
    whole_weights,
)
from prefopt.train.spread import FSDP2, LOADED_IN_SHARDS
from prefopt_testing import make_rows
from trainer_testing import data_for, make_trainer, make_world, train

CONFIG = Path(__file__).parents[2] / "python/prefopt/recipes/distributed/fsdp2.yaml"

# 11 rows, 8 a step: the second and the last have 3; the dataloader repeats others to fill up.
# SGD, so that what a weight has moved by is its gradients; Adam would divide rounding by rounding where they are 0.
STEPS = {
    "sampler": "sequential",
    "max_steps": MOST_STEPS,
    "optim": "sgd",
    "learning_rate": 0.5,
    "per_device_train_batch_size": 2,
}
CASES = {  # method, options, adapter
    "full-kto": ("kto", {"precompute_ref_logps": True}, False),
    "full-dpo": ("dpo", {}, False),
    "lora-bco": ("bco", {"ref": False}, True),
    "lora-kto": ("kto", {"ref": False, "precompute_ref_logps": True}, True),
}
RESUMED = ("full-kto", "lora-bco")
LAYOUTS = {"norm-and-head": None, "head-alone": {"lm_head": "free_full_weight"}}


def drifted_world(folder: Path):
    """Policy and reference swapped, which makes the first reference points positive."""
    world = make_world("qwen3", folder)
    return world._replace(model=world.ref, ref=world.model)


def built(world, folder: Path, name: str, accumulation: int, **further):
    """A trainer of one of the cases."""
    method, options, with_adapter = CASES[name]
    return make_trainer(
        world,
        folder,
        method=method,
        data=data_for(method, 11),
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=accumulation,  # in evaluation a batch of all processes is a step
        peft_config=LoraConfig(target_modules="all-linear", r=4) if with_adapter else None,
        **(STEPS | {"reference_cache_dir": str(folder / "cache")} | options | further),
    )


def trained(trainer, **kwargs) -> dict:
    """What a run has logged, and how far it has taken the weights."""
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    logs = train(trainer, **kwargs)
    after = whole_weights(trainer)
    return {
        "kind": trainer.spread.kind,
        "sharded": isinstance(trainer.model, FSDPModule),
        "logs": logs,
        "weights": after,
        "moved": movements(before, after),
    }


def run_case(world, folder: Path, name: str, accumulation: int) -> dict:
    """Train, evaluate and save."""
    trainer = built(world, folder, name, accumulation, eval_dataset=data_for(CASES[name][0], 5))
    seen = trained(trainer)
    metrics = trainer.evaluate()
    times = ("second", "runtime", "preparation_time")
    seen["evaluation"] = {k: v for k, v in metrics.items() if not k.endswith(times)}
    trainer.save_model(str(folder / "saved"))
    return seen


def run_in_layout(world, folder: Path, layout: str) -> dict:
    """A model and a reference that transformers puts into shards while loading them."""
    parts = {}
    for name in ("model", "ref"):
        if os.environ["RANK"] == "0":
            getattr(world, name).save_pretrained(folder / name)
        dist.barrier()
        config = DistributedConfig(fsdp_size=2, fsdp_plan=LAYOUTS[layout])
        parts[name] = AutoModelForCausalLM.from_pretrained(
            folder / name, distributed_config=config, dtype=torch.float32
        )
    trainer = built(world, folder, "full-dpo", 2, **parts)
    before = whole_weights(trainer)
    logs = train(trainer)
    after = whole_weights(trainer)
    return {
        "kind": trainer.spread.kind,
        "logs": logs,
        "weights": after,
        "moved": movements(before, after),
    }


def one_class_each() -> list[dict]:
    """4 desirable rows for the first process and 4 others for the second; then 3 rows, all of the first."""
    rows = make_rows(True)
    good, bad = ([row for row in rows if row["label"] is label] for label in (True, False))
    return [*good[:4], *bad[:4], *bad[4:6], good[4]]


def run_with_pairs_of_the_window(world, folder: Path) -> dict:
    """KTO whose mismatched pairs are made anew in each window, among the rows of each process."""
    options = STEPS | {"data": one_class_each(), "per_device_train_batch_size": 4}
    return trained(make_trainer(world, folder, **options))


def rank_main(folder: Path) -> None:
    """Everything that one of the processes does."""
    world = drifted_world(folder / f"world{os.environ['RANK']}")
    seen = {}
    use_fsdp = os.environ.pop("ACCELERATE_USE_FSDP")
    seen["whole"] = run_with_pairs_of_the_window(world, folder / "whole")
    seen["layouts"] = {name: run_in_layout(world, folder / name, name) for name in LAYOUTS}
    os.environ["ACCELERATE_USE_FSDP"] = use_fsdp
    shard_on_the_cpu()
    seen["shards"] = run_with_pairs_of_the_window(world, folder / "shards")
    seen["cases"] = {name: run_case(world, folder / name, name, 2) for name in CASES}
    seen["resumed"] = {}
    for name in RESUMED:
        saved = {"save_strategy": "steps", "save_steps": 2}
        train(built(world, folder / f"{name}-again", name, 2, **saved))
        again = built(world, folder / f"{name}-again", name, 2, **saved)
        checkpoint = str(folder / f"{name}-again" / "checkpoint-2")
        seen["resumed"][name] = trained(again, resume_from_checkpoint=checkpoint)
    leave(folder, seen)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes saw, and their folder."""
    folder = tmp_path_factory.mktemp("fsdp")
    return run_as_ranks(__file__, folder, **launch_environment(CONFIG)), folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same cases on one process."""
    folder = tmp_path_factory.mktemp("alone")
    world = drifted_world(folder / "world")
    return {name: run_case(world, folder / name, name, 4) for name in CASES}


def assert_same_run(mine: dict, other: dict) -> None:
    """In logs, and in what became of the weights."""
    assert_same_logs(mine["logs"], other["logs"])
    assert_same_movements(mine["moved"], other["moved"], other["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_shards_take_the_steps_of_one_process(ranks, alone, name):
    (first, second), _ = ranks
    assert first["cases"][name]["kind"] == second["cases"][name]["kind"] == FSDP2
    assert first["cases"][name]["sharded"] and not alone[name]["sharded"]
    assert_same_run(first["cases"][name], alone[name])
    evaluation = first["cases"][name]["evaluation"]
    assert evaluation == second["cases"][name]["evaluation"]
    assert evaluation == pytest.approx(alone[name]["evaluation"], abs=1e-4, rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_of_shards_takes_the_steps_of_one_process(ranks, alone, layout):
    (first, _), _ = ranks
    assert first["layouts"][layout]["kind"] == LOADED_IN_SHARDS
    assert_same_run(first["layouts"][layout], alone["full-dpo"])


@pytest.mark.slow
def test_shards_do_as_whole_models_where_a_process_has_one_class_or_no_rows(ranks):
    (first, _), _ = ranks
    assert first["shards"]["sharded"] and not first["whole"]["sharded"]
    assert any(entry["kl"] > 0 for entry in first["whole"]["logs"])
    assert_same_run(first["shards"], first["whole"])


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_of_shards_ends_like_the_whole_run(ranks, name):
    (first, _), _ = ranks
    resumed, whole = first["resumed"][name], first["cases"][name]
    for entry, expected in zip(resumed["logs"], whole["logs"], strict=True):
        assert entry == pytest.approx(expected, abs=1e-12)
    for key, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][key], value), key


@pytest.mark.slow
def test_the_model_is_saved_whole(ranks):
    (first, _), folder = ranks
    saved = AutoModelForCausalLM.from_pretrained(folder / "full-kto" / "saved", dtype=torch.float32)
    expected = first["cases"]["full-kto"]["weights"]
    for name, value in saved.state_dict().items():
        assert torch.equal(value, expected[name]), name
    base = AutoModelForCausalLM.from_pretrained(folder / "world0" / "model", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / "lora-bco" / "saved").state_dict()
    expected = first["cases"]["lora-bco"]["weights"]
    pairs = [name for name in expected if "lora_" in name]
    assert len(pairs) == 28 and all(torch.equal(adapted[name], expected[name]) for name in pairs)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
