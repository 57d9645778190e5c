"""The benchmark of TRL's trainers, on the harness's own tiny head: its rows, and its refusal of wrong numbers."""

import argparse

import pytest
import torch

from benchmarks import trainers, trainers_table
from benchmarks.cases import CASES
from benchmarks.pages import BEGIN, END
from benchmarks.rows import keep
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


def test_the_page_has_the_newest_rows(tmp_path, capsys):
    where = {
        "run": "2026-11-21T10:00:00+00:00", "device": "cpu-x", "cpu": "Some CPU", "instruction_set": ["avx2"],
        "versions": {"torch": "2.13.0", "trl": "1.16.0"}, "commit": "0123456789", "dirty": False,
    }  # fmt: skip
    speeds = {"kto": 10.0, "dpo": 20.0}
    for name, speed in speeds.items():
        for time, factor in (("2026-11-21T11:00:00", 4.0), ("2026-11-21T10:00:00", 3.0)):
            shape = {
                "op": f"trl_{name}_step",
                "case": "qwen3-0.6b",
                "T": 1024,
                "dtype": "bf16",
                "threads": 2,
            }
            row = where | shape | {"layers": 2, "rows": 4, "time": time}
            trl = row | {"variant": "trl-trainable", "ratio": 1.0, "tokens_per_second": speed}
            ours = row | {
                "variant": "ours-trainable",
                "ratio": 1 / factor,
                "tokens_per_second": factor * speed,
            }
            own = row | {
                "variant": "prefopt-trainable",
                "ratio": 0.2,
                "tokens_per_second": 5 * speed,
            }
            keep([trl, ours, own] if name == "kto" else [trl, ours], tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n", encoding="utf-8")
    assert trainers_table.main(["--check"], results=tmp_path, page=page) == 1
    assert "page.md: its tables are not those of the rows" in capsys.readouterr().out
    assert trainers_table.main([], results=tmp_path, page=page) == 0
    text = page.read_text(encoding="utf-8")
    assert "Some CPU (avx2), 2 threads; torch 2.13.0, trl 1.16.0; 2026-11-21, commit 0123456." in text
    assert "| qwen3-0.6b | KTO | 2 | 4 | 1,024 | bf16 | 10 | 40 | 50 | 4.0 | 5.0 |" in text
    assert "| qwen3-0.6b | DPO | 2 | 4 | 1,024 | bf16 | 20 | 80 |  | 4.0 |  |" in text
    assert text.count("| qwen3-0.6b |") == 2  # the older rows are not shown


def test_the_table_of_the_page_is_that_of_the_rows():
    assert trainers_table.main(["--check"]) == 0


def test_sequences_have_exactly_the_tokens_asked_for(tmp_path):
    data = trainers.rows_of("dpo", CASES["smoke"], OPTIONS.rows, OPTIONS.tokens)
    theirs, batch = trainers.build("dpo", CASES["smoke"], data, OPTIONS, str(tmp_path))
    assert batch["input_ids"].shape == (4, 12) and batch["attention_mask"].all()
    assert batch["completion_mask"].sum() == 4 * 6
    own, batch = trainers.build_own("dpo", theirs, data, str(tmp_path / "own"))
    assert batch["attention_mask"].sum() == 4 * 12 and batch["cu_seqlens"].tolist() == [
        0,
        6,
        12,
        18,
        24,
    ]
    assert own.model is theirs.model


def test_no_numbers_from_a_wrong_kernel(monkeypatch):
    linear_logprob = integration.linear_logprob

    def wrong(hidden, weight, targets, **options):
        return linear_logprob(hidden, weight, (targets + 1) % weight.shape[0], **options)

    monkeypatch.setattr(integration, "linear_logprob", wrong)
    with pytest.raises(RuntimeError, match="no numbers from a wrong kernel"):
        trainers.measure("dpo", CASES["smoke"], OPTIONS, {})
