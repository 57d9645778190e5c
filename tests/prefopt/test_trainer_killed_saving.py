"""Kills between the files of a checkpoint, and a full disk: a short form of support/kill_campaign.py."""

import json

import pytest

from prefopt.train.checkpoint import PARTIAL, newest_whole
from support.kill_campaign import (
    killed_at,
    limited,
    make_base,
    make_recipe_file,
    operations_of,
    result_of,
    resumed,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was left alone: its folder, its file operations, and its result."""
    folder = tmp_path_factory.mktemp("killed")
    make_base(folder)
    recipe = make_recipe_file(folder, folder / "whole", "enhanced_kto")
    return folder, operations_of(recipe), result_of(recipe.with_name("run"))


@pytest.mark.parametrize(
    ("operation", "left"),
    [
        (f"open {PARTIAL}/checkpoint-4/trainer_state.json", 2),  # optimizer.pt is there
        (f"os.rename {PARTIAL}/checkpoint-6", 4),  # all is there, the manifest too
    ],
)
def test_a_run_killed_while_saving_resumes_from_the_checkpoint_before(whole, tmp_path, operation, left):
    base, operations, expected = whole
    run = base / "whole" / "run"
    verb, _, place = operation.partition(" ")
    at = operations.index(f"{verb} {run / place}")
    recipe = make_recipe_file(base, tmp_path / "killed", "enhanced_kto")
    run = recipe.with_name("run")
    assert killed_at(recipe, at)
    assert (run / PARTIAL).is_dir()
    found = newest_whole(run)
    assert found == run / f"checkpoint-{left}"
    resumed(recipe)
    assert result_of(run) == expected
    (row,) = json.loads((run / "run.json").read_text(encoding="utf-8"))["resumes"]
    assert row["from_step"] == left


def test_a_full_disk_ends_in_one_sentence_and_the_run_can_be_resumed(whole, tmp_path):
    base, _, expected = whole
    recipe = make_recipe_file(base, tmp_path / "full", "enhanced_kto")
    optimizer = base / "whole" / "run" / "checkpoint-8" / "optimizer.pt"
    code, output = limited(recipe, optimizer.stat().st_size - 1)
    run = recipe.with_name("run")
    assert code not in (0, None) and code > 0
    assert "Traceback" not in output
    (message,) = [line for line in output.splitlines() if line.startswith("prefopt: ")]
    assert message.startswith(f"prefopt: {run / 'checkpoint-2'} could not be saved (")
    assert "there is none before it. Check the free space, then resume the run" in message
    assert not (run / PARTIAL).exists()
    resumed(recipe)
    assert result_of(run) == expected
