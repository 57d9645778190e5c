"""Which ways of spreading a model the trainer takes, the sentences for the others, and the configurations that ship."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from prefopt.train.layout import (
    FSDP2,
    LOADED_IN_SHARDS,
    WHOLE,
    ZERO,
    ZERO_3,
    Layout,
    refuse_unsupported,
)
from support.distributed import launch_environment

CONFIGS = Path(__file__).parents[2] / "python/prefopt/recipes/distributed"


def a_trainer(model=None, *, gpus=1, parallel=None, fsdp=None, zero=None, layout=None):
    """What the checks look at."""
    model = nn.Linear(2, 2) if model is None else model
    model.config = SimpleNamespace(distributed_config=layout)
    plugin = SimpleNamespace(deepspeed_config=zero)
    state = SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=plugin)
    return SimpleNamespace(
        args=SimpleNamespace(n_gpu=gpus),
        model=model,
        accelerator=SimpleNamespace(parallelism_config=parallel, state=state, device=torch.device("cpu")),
        place_model_on_device=fsdp is zero is layout is None,
        is_fsdp_enabled=fsdp is not None,
        is_deepspeed_enabled=zero is not None,
        is_distributed_loading_by_transformers=layout is not None,
    )


def fsdp_plugin(**settings):
    defaults = {"fsdp_version": 2, "cpu_ram_efficient_loading": False}
    return FullyShardedDataParallelPlugin(**(defaults | settings))


def in_parts() -> nn.Module:
    model = nn.Linear(2, 2)
    model.weight.ds_id = 0
    return model


@pytest.mark.parametrize(
    ("options", "kind", "in_lockstep"),
    [
        ({}, WHOLE, False),
        ({"fsdp": fsdp_plugin()}, FSDP2, True),
        ({"layout": SimpleNamespace(tp_size=1, pp_size=1, ep_size=1)}, LOADED_IN_SHARDS, True),
        ({"zero": {"zero_optimization": {"stage": 2}}}, ZERO, False),
        ({"zero": {}}, ZERO, False),
        ({"zero": {"zero_optimization": {"stage": 3}}}, ZERO_3, True),
    ],
)
def test_the_ways_that_are_known(options, kind, in_lockstep):
    spread = Layout(a_trainer(**options))
    assert (spread.kind, spread.in_lockstep) == (kind, in_lockstep)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": 2}, "through nn.DataParallel; start with torchrun"),
        ({"parallel": ParallelismConfig(cp_size=2)}, "cp_size is 2: context parallelism .* is not"),
        ({"parallel": SimpleNamespace(sp_size=4)}, "sp_size is 4: sequence parallelism is not"),
        ({"parallel": ParallelismConfig(tp_size=2)}, "tp_size is 2: tensor parallelism is not"),
        ({"parallel": ParallelismConfig()}, "a parallelism_config is given"),
        ({"layout": SimpleNamespace(tp_size=2)}, "tp_size is 2: tensor parallelism is not"),
        ({"layout": SimpleNamespace(pp_size=2)}, "pp_size is 2: pipeline parallelism is not"),
        ({"layout": SimpleNamespace(ep_size=2)}, "ep_size is 2: expert parallelism is not"),
        ({"fsdp": fsdp_plugin(fsdp_version=1)}, "fsdp_version is 1.*; set fsdp_version: 2"),
        (
            {"fsdp": fsdp_plugin(cpu_ram_efficient_loading=True)},
            "fsdp_cpu_ram_efficient_loading is on.*; set it to false",
        ),
        (
            {"model": in_parts(), "zero": {"zero_optimization": {"stage": 3}}},
            "partitioned by DeepSpeed .*; set zero3_init_flag: false",
        ),
    ],
)
def test_the_others_are_refused_in_one_sentence(options, words):
    with pytest.raises(ValueError, match=words) as found:
        refuse_unsupported(a_trainer(**options))
    assert "\n" not in str(found.value)


def test_weights_in_shards_already_are_refused(tmp_path):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Linear(2, 2)
        mesh = init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match="DTensors already; pass it whole"):
            refuse_unsupported(a_trainer(model))
    finally:
        dist.destroy_process_group()


def test_evaluation_before_training_is_refused_where_the_model_is_not_sharded_yet():
    spread = Layout(a_trainer(fsdp=fsdp_plugin()))
    with pytest.raises(ValueError, match="evaluate was called before train"):
        spread.check_prepared(nn.Linear(2, 2))
    Layout(a_trainer()).check_prepared(nn.Linear(2, 2))


def test_a_reference_beside_an_engine_has_the_dtype_of_the_policy():
    config = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    frozen = Layout(a_trainer(zero=config)).frozen(nn.Linear(2, 2))
    assert frozen.weight.dtype == torch.bfloat16
    config["bf16"]["enabled"] = "auto"
    assert Layout(a_trainer(zero=config)).frozen(nn.Linear(2, 2)).weight.dtype == torch.float32


def test_a_reference_is_moved_where_the_policy_would_be():
    placed, kept = a_trainer(), a_trainer()
    kept.place_model_on_device = False
    engine = a_trainer(zero={})
    for trainer, device in ((placed, "meta"), (kept, "cpu"), (engine, "meta")):
        trainer.accelerator.device = torch.device("meta")
        assert Layout(trainer).frozen(nn.Linear(2, 2)).weight.device.type == device


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddp", {}),
        (
            "fsdp2",
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_RESHARD_AFTER_FORWARD": "true",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
                "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
            },
        ),
        (
            "zero2",
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"},
        ),
        (
            "zero3",
            {
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
                "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
            },
        ),
    ],
)
def test_accelerate_reads_the_configurations_as_they_are_meant(name, expected):
    env = launch_environment(CONFIGS / f"{name}.yaml")
    engines = {key for key in env if key in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")}
    wanted = {"fsdp2": {"ACCELERATE_USE_FSDP"}, "ddp": set()}
    assert engines == wanted.get(name, {"ACCELERATE_USE_DEEPSPEED"})
    assert {key: env[key] for key in expected} == expected


def test_every_configuration_is_one_of_those():
    assert {file.stem for file in CONFIGS.iterdir()} == {"ddp", "fsdp2", "zero2", "zero3"}
