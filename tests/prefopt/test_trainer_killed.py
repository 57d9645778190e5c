"""A process that is killed in the middle of a step: torchrun ends the run, and it goes on from its checkpoint.

This file is the test and, run as a script by torchrun, one of the processes.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    import conftest  # noqa: F401  no network

import pytest
from transformers.trainer_utils import get_last_checkpoint

from prefopt.train import PreferenceTrainer
from support.distributed import (
    assert_ends_like,
    drifted_world,
    trained,
)
from support.forked import environment
from support.rank_scripts import WORLD_SIZE, leave, leave_group, run_as_ranks
from support.trainer import data_for, make_trainer

STEPS, SAVED, KILLED = (
    6,
    2,
    5,
)  # killed in the second micro-batch of this step; 4 is the last one saved
BOUND = 60  # seconds from the kill to torchrun's end; it waits up to 30 for the others before it kills them
OPTIONS = {
    "data": data_for("kto", 12),
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVED,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "linear",
}


class KilledTrainer(PreferenceTrainer):
    """Its second process dies as the out-of-memory killer would have it: at once, without a word."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        at = (self.state.global_step + 1, inputs.get("position"))
        if at == (KILLED, 1) and os.environ["RANK"] == "1":
            Path(os.environ["KILL_TIME"]).write_text(str(time.time()), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute_loss(model, inputs, *args, **kwargs)


def rank_main(folder: Path) -> None:
    """The run that is killed; or that one resumed, and then the same run left alone."""
    world = drifted_world(folder / f"world{os.environ['RANK']}")
    if "KILL_TIME" in os.environ:
        trainer = make_trainer(world, folder / "run", **OPTIONS)
        trainer.__class__ = KilledTrainer
        trained(trainer)
    else:
        checkpoint = get_last_checkpoint(str(folder / "run"))
        resumed = trained(make_trainer(world, folder / "run", **OPTIONS), resume_from_checkpoint=checkpoint)
        whole = trained(make_trainer(world, folder / "whole", **OPTIONS))
        leave(folder, {"from": Path(checkpoint).name, "resumed": resumed, "whole": whole})


def torchrun(folder: Path, **extra: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(WORLD_SIZE)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    command += ["--local_addr", "127.0.0.1", __file__, str(folder)]
    return subprocess.run(
        command,
        env=environment(extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_it_goes_on_from_its_checkpoint(tmp_path):
    kill_time = tmp_path / "killed"
    ended = torchrun(tmp_path, KILL_TIME=str(kill_time))
    took = time.time() - float(kill_time.read_text(encoding="utf-8"))
    assert ended.returncode != 0 and "SIGKILL" in ended.stdout, ended.stdout[-4000:]
    assert took < BOUND, took

    seen, _ = run_as_ranks(__file__, tmp_path)
    assert seen["from"] == "checkpoint-4"
    assert seen["whole"]["logs"][-1]["loss"] != seen["whole"]["logs"][3]["loss"]
    assert_ends_like(seen["resumed"], seen["whole"])


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
    leave_group()
