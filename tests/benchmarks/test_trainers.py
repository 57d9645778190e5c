"""The benchmark of trainers on a tiny head: its rows, its inputs, and its check that the losses agree."""

import argparse

import pytest
import torch

from benchmarks import trainers
from benchmarks.cases import CASES
from prefopt_kernels.integrations import trl as integration

OPTIONS = argparse.Namespace(rows=4, tokens=12, layers=1, dtype="fp32", head="trainable", rounds=2, threads=1)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_row_for_trl_and_one_for_ours():
    rows = trainers.measure("kto", CASES["smoke"], OPTIONS, {"device": "here"})
    assert [row["variant"] for row in rows] == [
        "trl-trainable",
        "ours-trainable",
        "prefopt-trainable",
    ]
    for row in rows:
        assert row["device"] == "here" and row["op"] == "trl_kto_step"
        assert (row["T"], row["rounds"], row["layers"]) == (48, 2, 1)
        assert row["tokens_per_second"] == pytest.approx(48e3 / row["median_ms"])
    assert rows[0]["ratio"] == 1.0 and 0.0 < rows[0]["loss"] < 1.0


def test_sequences_have_exactly_the_tokens_asked_for(tmp_path):
    data = trainers.rows_of("dpo", CASES["smoke"], OPTIONS.rows, OPTIONS.tokens)
    theirs, batch = trainers.build("dpo", CASES["smoke"], data, OPTIONS, str(tmp_path))
    assert batch["input_ids"].shape == (4, 12) and batch["attention_mask"].all()
    assert batch["completion_mask"].sum() == 4 * 6
    own, batch = trainers.build_own("dpo", theirs, data, str(tmp_path / "own"))
    assert batch["tokens"].tolist() == [12] * 4 and batch["cu_seqlens"].tolist() == [0, 6, 12, 18, 24]
    assert own.model is theirs.model


def test_losses_that_differ_stop_the_benchmark(monkeypatch):
    linear_logprob = integration.linear_logprob

    def wrong(hidden, weight, targets, **options):
        return linear_logprob(hidden, weight, (targets + 1) % weight.shape[0], **options)

    monkeypatch.setattr(integration, "linear_logprob", wrong)
    with pytest.raises(RuntimeError, match="the losses differ by .*: nothing is kept"):
        trainers.measure("dpo", CASES["smoke"], OPTIONS, {})
