"""Two processes that train together, and what a run of theirs has to agree on with a run of one."""

import os
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from prefopt.train.layout import LOADED_IN_SHARDS
from support.rank_scripts import WORLD_SIZE
from support.trainer import data_for, make_trainer, make_world, train

# 11 rows, 8 a step: the second and the last have 3; the dataloader repeats others to fill up.
# SGD, so that what a weight has moved by is its gradients; Adam would divide rounding by rounding where they are 0.
STEPS = {
    "sampler": "sequential",
    "max_steps": 4,
    "optim": "sgd",
    "learning_rate": 0.5,
    "max_grad_norm": 0.7,  # below most of the norms here
    "per_device_train_batch_size": 2,
}
SAVED = {"save_strategy": "steps", "save_steps": 2}
CASES = {  # method, options, adapter
    "full-kto": ("kto", {"precompute_ref_logps": True}, False),
    "full-dpo": ("dpo", {}, False),
    "lora-bco": ("bco", {"ref": False}, True),
    "lora-kto": ("kto", {"ref": False, "precompute_ref_logps": True}, True),
}


def shard_on_the_cpu() -> None:
    """From now on accelerate takes its FSDP settings on the CPU too, where it ignores them.

    Everything after that decision is its own: what ``accelerate launch`` leaves in the environment, the units that it
    makes, the optimizer, the checkpoints.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plain = AcceleratorState.__init__

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = with_plugin


def deepspeed_on_the_cpu() -> None:
    """From now on accelerate counts the processes of a DeepSpeed run on the CPU too, where it would count one.

    DeepSpeed is told the same by ``DS_ACCELERATOR``; it builds no C++ for its collectives, gloo does them. And ZeRO-3
    partitions weights as small as those of the tests, which it would keep whole on each process otherwise.
    """
    import deepspeed
    import deepspeed.comm.torch
    from accelerate.state import PartialState

    plain = PartialState._prepare_backend

    def with_gloo(self, cpu, *args, **kwargs):
        return plain(self, True, *args, **kwargs)

    PartialState._prepare_backend = with_gloo
    deepspeed.comm.torch.build_shm_op = lambda: None
    initialize = deepspeed.initialize

    def in_small_parts(*args, **kwargs):
        for name in {"config", "config_params"} & set(kwargs):
            zero = kwargs[name]["zero_optimization"]
            zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
        return initialize(*args, **kwargs)

    deepspeed.initialize = in_small_parts


def launch_environment(config: Path) -> dict[str, str]:
    """The settings that ``accelerate launch --config_file`` gives to its processes, found by itself."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    command = ["--config_file", str(config), "--num_processes", str(WORLD_SIZE), "train.py"]
    with (
        mock.patch.object(launch, "deepspeed_launcher") as by_deepspeed,
        mock.patch.object(launch, "multi_gpu_launcher") as by_torch,
    ):
        launch.launch_command(launch.launch_command_parser().parse_args(command))
    ((args,),) = [call.args for call in (*by_deepspeed.mock_calls, *by_torch.mock_calls)]
    env = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    ours = ("PYTHONPATH", "OMP_NUM_THREADS")
    return {k: v for k, v in env.items() if k not in ours and os.environ.get(k) != v}


def whole_weights(trainer) -> dict[str, Tensor]:
    """Every weight, gathered from all processes on the first; each of them has to ask."""
    if trainer.layout.kind == LOADED_IN_SHARDS:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(trainer.model, options=options)
    else:
        model = trainer.model_wrapped if trainer.layout.by_engine else trainer.model
        state = trainer.accelerator.get_state_dict(model)
    return {name: tensor.detach().clone() for name, tensor in (state or {}).items()}


def movements(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far training has taken each weight, fp64: with SGD, its gradients."""
    return {name: after[name].double() - before[name].double() for name in after}


def assert_same_movements(
    mine: Mapping[str, Tensor], others: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    """Equal to 1e-5: together in their norm, and each weight's to 1e-5 of the largest in it.

    For a single weight there is the rounding of what is stored besides: half a unit in the last place per step and run.
    """
    assert set(mine) == set(others) == set(weights)
    moved, off, size = 0, 0.0, 0.0
    for name, expected in others.items():
        differences, largest = (mine[name] - expected).abs(), expected.abs().max()
        stored = STEPS["max_steps"] * torch.finfo(torch.float32).eps * weights[name].abs().max()
        assert differences.max() <= 1e-5 * largest + stored, (name, differences.max(), largest)
        moved += bool(largest > 0)
        off, size = off + differences.square().sum(), size + expected.square().sum()
    assert moved > 1 and off.sqrt() <= 1e-5 * size.sqrt(), (moved, off, size)


def assert_same_logs(mine: list[dict], others: list[dict]) -> None:
    """Loss to 1e-5 and the other metrics to 1e-4, the contract of the parity tests; shards have no exact KL."""
    assert len(mine) == len(others) > 0
    for step, (ours, theirs) in enumerate(zip(mine, others, strict=True)):
        for key, value in theirs.items():
            if key != "epoch" and not (key == "kl_per_token" and key not in ours):
                tolerance = 1e-5 if key == "loss" else 1e-4
                assert abs(ours[key] - value) <= tolerance, (step, key, ours[key], value)


def without_kl(metrics: dict) -> dict:
    """Without the exact KL per token, which sharded models do not have."""
    return {name: value for name, value in metrics.items() if not name.endswith("kl_per_token")}


def assert_same_run(mine: dict, other: dict) -> None:
    """In logs, and in what became of the weights."""
    assert_same_logs(mine["logs"], other["logs"])
    assert_same_movements(mine["moved"], other["moved"], other["weights"])


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
    head = trainer.model.get_output_embeddings()
    sharded = isinstance(trainer.model, FSDPModule) or head.weight.numel() == 0  # ZeRO-3
    after = whole_weights(trainer)
    return {
        "kind": trainer.layout.kind,
        "sharded": sharded,
        "logs": logs,
        "weights": after,
        "moved": movements(before, after),
    }


def run_case(world, folder: Path, name: str, accumulation: int, **further) -> dict:
    """Train, evaluate and save."""
    held_out = data_for(CASES[name][0], 5)
    trainer = built(world, folder, name, accumulation, eval_dataset=held_out, **further)
    seen = trained(trainer)
    metrics = trainer.evaluate()
    times = ("second", "runtime", "preparation_time")
    seen["evaluation"] = {k: v for k, v in metrics.items() if not k.endswith(times)}
    trainer.save_model(str(folder / "saved"))
    return seen


def run_resumed(world, folder: Path, name: str, **further) -> dict:
    """Resume, in a new trainer, the run that ``run_case`` made in ``folder`` with SAVED, from its second step."""
    again = built(world, folder, name, 2, **(SAVED | further))
    return trained(again, resume_from_checkpoint=str(folder / "checkpoint-2"))


def assert_ends_like(resumed: dict, whole: dict) -> None:
    """To the bit in its weights."""
    for entry, expected in zip(resumed["logs"], whole["logs"], strict=True):
        assert set(entry) == set(expected)
        assert all(abs(entry[key] - value) <= 1e-12 for key, value in expected.items())
    for name, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], value), name


def assert_saved_whole(folder: Path, world: Path, cases: Mapping[str, dict]) -> None:
    """What ``save_model`` left of a full model and of an adapter."""
    saved = AutoModelForCausalLM.from_pretrained(folder / "full-kto" / "saved", dtype=torch.float32)
    expected = cases["full-kto"]["weights"]
    for name, value in saved.state_dict().items():
        assert torch.equal(value, expected[name]), name
    base = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / "lora-bco" / "saved").state_dict()
    expected = cases["lora-bco"]["weights"]
    pairs = [name for name in expected if "lora_" in name]
    assert len(pairs) == 28 and all(torch.equal(adapted[name], expected[name]) for name in pairs)
