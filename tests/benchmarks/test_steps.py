"""The benchmark of optimizer steps on a random model: its rows, and its check that the ways agree."""

import argparse
from dataclasses import replace

import pytest
import torch

from benchmarks import steps
from prefopt.train.step_values import StepScores

OPTIONS = argparse.Namespace(model=None, name="random", way=None, lengths="short-128", windows=1, rounds=2, threads=1)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["kto", "dpo"])
def test_a_row_for_trl_for_trl_patched_and_for_each_way(method):
    rows = steps.measure(method, OPTIONS, {"device": "here"})
    ours = [f"ours-{way}" for way in steps.WAYS[method]]
    assert [row["variant"] for row in rows] == ["trl", "trl-patched", *ours]
    assert {row["ratio"] for row in rows if row["variant"] == "trl-patched"} == {1.0}
    lengths = list(steps.lengths("short-128", 8 if method == "dpo" else 16, 0))
    tokens = sum(2 * p + a + b if method == "dpo" else p + a for p, a, b in lengths)
    assert {row["T"] for row in rows} == {tokens} and max(map(sum, lengths)) <= 3 * 128


def test_losses_that_differ_stop_the_benchmark(monkeypatch):
    values, seen = StepScores.values, []

    def wrong(self, *args, **kwargs):
        found = values(self, *args, **kwargs)
        seen.append(found)
        shift = found.baselines.shift - (5.0 if self.trainer.recuts else 0.0)
        return replace(found, baselines=replace(found.baselines, shift=shift))

    monkeypatch.setattr(StepScores, "values", wrong)
    with pytest.raises(RuntimeError, match="the losses of the ways differ by .*: nothing is kept"):
        steps.measure("enhanced_kto", OPTIONS, {})
    assert seen
