"""DeepSpeed's ZeRO-2 and ZeRO-3 on two gloo processes, by the configurations that ship with prefopt.

This file is the test and, run as a script, one of the processes.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    import conftest  # noqa: F401  no network

import pytest

from prefopt.train.layout import ZERO, ZERO_3
from support.distributed import (
    SAVED,
    assert_ends_like,
    assert_same_run,
    assert_saved_whole,
    deepspeed_on_the_cpu,
    drifted_world,
    launch_environment,
    run_case,
    run_resumed,
    without_kl,
)
from support.rank_scripts import leave, leave_group, run_as_ranks

CONFIGS = Path(__file__).parents[2] / "python/prefopt/recipes/distributed"
STAGES = {"zero2": ZERO, "zero3": ZERO_3}
CASES = ("full-kto", "full-dpo", "lora-bco")
RESUMED = {"zero2": "lora-bco", "zero3": "full-kto"}


def rank_main(folder: Path) -> None:
    """Everything that one of the processes does."""
    deepspeed_on_the_cpu()
    world = drifted_world(folder / f"world{os.environ['RANK']}")
    seen = {}
    for stage in STAGES:
        os.environ |= launch_environment(CONFIGS / f"{stage}.yaml")
        place = folder / stage
        seen[stage] = {
            name: run_case(world, place / name, name, 2, use_cpu=False, **(SAVED if name == RESUMED[stage] else {}))
            for name in CASES
        }
        seen[stage]["again"] = run_resumed(world, place / RESUMED[stage], RESUMED[stage], use_cpu=False)
    leave(folder, seen)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes saw, and their folder."""
    folder = tmp_path_factory.mktemp("zero")
    return run_as_ranks(__file__, folder, DS_ACCELERATOR="cpu"), folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same cases on one process."""
    folder = tmp_path_factory.mktemp("alone")
    world = drifted_world(folder / "world")
    return {name: run_case(world, folder / name, name, 4) for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stage", STAGES)
def test_partitions_take_the_steps_of_one_process(ranks, alone, stage, name):
    (first, second), _ = ranks
    assert first[stage][name]["kind"] == second[stage][name]["kind"] == STAGES[stage]
    assert first[stage][name]["sharded"] is (stage == "zero3")
    assert_same_run(first[stage][name], alone[name])
    evaluation = first[stage][name]["evaluation"]
    assert evaluation == second[stage][name]["evaluation"]
    expected = alone[name]["evaluation"]
    expected = without_kl(expected) if stage == "zero3" else expected
    assert evaluation == pytest.approx(expected, abs=1e-4, rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_of_partitions_ends_like_the_whole_run(ranks, stage):
    (first, _), _ = ranks
    assert_ends_like(first[stage]["again"], first[stage][RESUMED[stage]])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_model_is_saved_whole(ranks, stage):
    (first, _), folder = ranks
    assert_saved_whole(folder / stage, folder / "world0", first[stage])


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
    leave_group()
