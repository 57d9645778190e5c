"""Two processes that train together, and what a run of theirs has to agree on with a run of one.

A file of such tests is both: pytest finds its tests, whose fixture starts the file itself as a script, once per process.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from prefopt.train.spread import LOADED_IN_SHARDS

TESTS = Path(__file__).parent
WORLD_SIZE = 2
MOST_STEPS = 4  # of the runs whose weights are compared
PATIENCE = 240  # seconds; a hang is a failure


def rank_environment(rank: int, port: int, extra: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would set for one of the processes."""
    paths = (TESTS, TESTS.parent, TESTS.parent / "python")
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # no name look-up, which fails on isolated machines
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        **extra,
    }


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_as_ranks(script: str, folder: Path, **extra: str) -> list[dict]:
    """Start ``script folder`` once per process; returns what each has left in its ``rank{n}.pt``."""
    port, processes = free_port(), []
    for rank in range(WORLD_SIZE):
        env = rank_environment(rank, port, extra)
        log = (folder / f"rank{rank}.log").open("w", encoding="utf-8")
        command = [sys.executable, script, str(folder)]
        processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    outputs = [(folder / f"rank{rank}.log").read_text(encoding="utf-8") for rank in range(2)]
    assert codes == [0, 0], "\n".join(text[-6000:] for text in outputs)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


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


def launch_environment(config: Path) -> dict[str, str]:
    """The settings that ``accelerate launch --config_file`` gives to its processes, by its own parser."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(config), "--num_processes", "2", "train.py"])
    args, _, _ = _validate_launch_command(args)
    before = set(os.environ)
    env = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {name: value for name, value in env.items() if name not in before}


def whole_weights(trainer) -> dict[str, Tensor]:
    """Every weight, gathered from all processes on the first; each of them has to ask."""
    if trainer.spread.kind == LOADED_IN_SHARDS:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(trainer.model, options=options)
    else:
        model = trainer.model_wrapped if trainer.spread.by_engine else trainer.model
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
        stored = MOST_STEPS * torch.finfo(torch.float32).eps * weights[name].abs().max()
        assert differences.max() <= 1e-5 * largest + stored, (name, differences.max(), largest)
        moved += bool(largest > 0)
        off, size = off + differences.square().sum(), size + expected.square().sum()
    assert moved > 1 and off.sqrt() <= 1e-5 * size.sqrt(), (moved, off, size)


def assert_same_logs(mine: list[dict], others: list[dict]) -> None:
    """Loss to 1e-5 and the other metrics to 1e-4, the contract of the parity tests."""
    assert len(mine) == len(others) > 0
    for step, (ours, theirs) in enumerate(zip(mine, others, strict=True)):
        for key, value in theirs.items():
            if key != "epoch":
                tolerance = 1e-5 if key == "loss" else 1e-4
                assert abs(ours[key] - value) <= tolerance, (step, key, ours[key], value)


def leave(folder: Path, seen: dict) -> None:
    """Where ``run_as_ranks`` finds it."""
    torch.save(seen, folder / f"rank{os.environ['RANK']}.pt")
    (folder / "done.json").write_text(json.dumps(True), encoding="utf-8")
