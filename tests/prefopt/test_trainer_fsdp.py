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
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from prefopt.train.layout import FSDP2, LOADED_IN_SHARDS, WHOLE
from support.distributed import (
    CASES,
    SAVED,
    STEPS,
    assert_ends_like,
    assert_same_run,
    assert_saved_whole,
    built,
    drifted_world,
    launch_environment,
    movements,
    run_case,
    run_resumed,
    shard_on_the_cpu,
    trained,
    whole_weights,
    without_kl,
)
from support.rank_scripts import leave, leave_group, run_as_ranks
from support.tiny_models import make_rows
from support.trainer import make_trainer, train

CONFIG = Path(__file__).parents[2] / "python/prefopt/recipes/distributed/fsdp2.yaml"

WHOLE_CASES = ("full-dpo", "lora-bco")  # under DDP
RESUMED = ("full-kto", "lora-bco")
LAYOUTS = {  # case, what is different from the model's own plan
    "norm-and-head": ("full-dpo", None),
    "head-alone": ("full-dpo", {"lm_head": "free_full_weight"}),
    "adapter-of-shards": ("lora-bco", None),
}


def run_in_layout(world, folder: Path, layout: str) -> dict:
    """A model and a reference that transformers puts into shards while loading them."""
    case, plan = LAYOUTS[layout]
    parts = {}
    for name in ("model", "ref") if case == "full-dpo" else ("model",):
        if os.environ["RANK"] == "0":
            getattr(world, name).save_pretrained(folder / name)
        dist.barrier()
        config = DistributedConfig(fsdp_size=2, fsdp_plan=plan)
        parts[name] = AutoModelForCausalLM.from_pretrained(
            folder / name, distributed_config=config, dtype=torch.float32
        )
    trainer = built(world, folder, case, 2, **parts)
    before = whole_weights(trainer)
    logs = train(trainer)
    after = whole_weights(trainer)
    return {
        "kind": trainer.layout.kind,
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
    # Of the two ways round, the one whose reference points are above 0 for these pairs.
    world = world._replace(model=world.ref, ref=world.model)
    options = STEPS | {"data": one_class_each(), "per_device_train_batch_size": 4}
    return trained(make_trainer(world, folder, **options))


def rank_main(folder: Path) -> None:
    """Everything that one of the processes does."""
    world = drifted_world(folder / f"world{os.environ['RANK']}")
    seen = {}
    use_fsdp = os.environ.pop("ACCELERATE_USE_FSDP")
    seen["whole"] = run_with_pairs_of_the_window(world, folder / "whole")
    seen["ddp"] = {name: run_case(world, folder / f"{name}-ddp", name, 2) for name in WHOLE_CASES}
    seen["layouts"] = {name: run_in_layout(world, folder / name, name) for name in LAYOUTS}
    os.environ["ACCELERATE_USE_FSDP"] = use_fsdp
    shard_on_the_cpu()
    seen["shards"] = run_with_pairs_of_the_window(world, folder / "shards")
    seen["cases"] = {
        name: run_case(world, folder / name, name, 2, **(SAVED if name in RESUMED else {})) for name in CASES
    }
    seen["resumed"] = {name: run_resumed(world, folder / name, name) for name in RESUMED}
    os.environ["FSDP_RESHARD_AFTER_FORWARD"] = "false"
    seen["kept"] = run_case(world, folder / "kept", "lora-bco", 2)
    leave(folder, seen)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_shards_take_the_steps_of_one_process(ranks, alone, name):
    (first, second), _ = ranks
    assert first["cases"][name]["kind"] == second["cases"][name]["kind"] == FSDP2
    assert first["cases"][name]["sharded"] and not alone[name]["sharded"]
    assert_same_run(first["cases"][name], alone[name])
    evaluation = first["cases"][name]["evaluation"]
    assert evaluation == second["cases"][name]["evaluation"]
    assert evaluation == pytest.approx(without_kl(alone[name]["evaluation"]), abs=1e-4, rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE_CASES)
def test_whole_models_on_two_processes_take_the_steps_of_one(ranks, alone, name):
    (first, _), _ = ranks
    assert first["ddp"][name]["kind"] == WHOLE
    assert_same_run(first["ddp"][name], alone[name])
    evaluation = first["ddp"][name]["evaluation"]
    assert evaluation == pytest.approx(alone[name]["evaluation"], abs=1e-4, rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_of_shards_takes_the_steps_of_one_process(ranks, alone, layout):
    (first, _), _ = ranks
    assert first["layouts"][layout]["kind"] == LOADED_IN_SHARDS
    assert_same_run(first["layouts"][layout], alone[LAYOUTS[layout][0]])


@pytest.mark.slow
def test_an_adapter_learns_where_its_layers_stay_whole_after_the_reference_ran(ranks, alone):
    (first, _), _ = ranks
    assert_same_run(first["kept"], alone["lora-bco"])


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
    assert_ends_like(first["resumed"][name], first["cases"][name])


@pytest.mark.slow
def test_the_model_is_saved_whole(ranks):
    (first, _), folder = ranks
    assert_saved_whole(folder, folder / "world0", first["cases"])


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
    leave_group()
