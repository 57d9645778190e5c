"""`python -m benchmarks.inference`: the timed region, and the statistics of the times."""

import json
import shutil

import pytest
import torch
import yaml

from benchmarks import inference
from benchmarks.inference import Timing, bench_inference, distribution, main, summary, time_runs
from prefopt.errors import UserError
from prefopt.runs import find_run, load_model
from support.trained_runs import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("world"), "llama", "gpt-2")


class Clockwork(torch.nn.Module):
    """A fake model: each call takes one second of a fake clock per token."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.calls = clock, []
        self.device = torch.device("cpu")
        self.config = self
        self.vocab_size = 7

    def get_text_config(self):
        return self

    def forward(self, input_ids, use_cache, past_key_values=0, logits_to_keep=0):
        assert use_cache
        batch, length = input_ids.shape
        self.clock.now += length * (1 + (past_key_values == 0))  # prefill takes twice as long
        self.calls.append((batch, length, past_key_values))
        logits = torch.nn.functional.one_hot(input_ids, 7).float()
        return type("Out", (), {"logits": logits, "past_key_values": past_key_values + length})()


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


def test_prefill_and_decode_are_timed_separately_after_the_warm_up(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(inference.time, "perf_counter", clock.perf_counter)
    model = Clockwork(clock)
    timings = time_runs(model, runs=3, warmup=2, prompt_tokens=5, new_tokens=4, batch_size=2)
    assert timings == [Timing(prefill_ms=10_000.0, decode_ms=3_000.0)] * 3
    # five runs: the prompt, then one token at a time on top of the cache; the fourth token needs no further call
    assert model.calls == [(2, 5, 0), (2, 1, 5), (2, 1, 6), (2, 1, 7)] * 5


def test_generation_is_that_of_the_greedy_model(run):
    """The timed loop generates the tokens of ``generate`` with greedy decoding."""
    ids = torch.randint(len(run.tokenizer), (1, 12), generator=torch.Generator().manual_seed(0))
    seen = []
    model = run.model

    class Spy(torch.nn.Module):
        device = model.device

        def forward(self, input_ids, **options):
            seen.append(input_ids)
            return model(input_ids=input_ids, **options)

    with torch.inference_mode():
        inference._time_one(Spy(), ids, 6)
    expected = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.cat(seen, 1).tolist() == expected[:, :-1].tolist()


def test_percentiles_are_measured_values():
    values = [float(value) for value in range(1, 101)]
    assert distribution(values[::-1]) == {
        "min": 1.0, "p5": 5.0, "p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0,
    }  # fmt: skip
    assert set(distribution([3.0]).values()) == {3.0}


def test_throughput_is_that_of_the_median():
    timings = [Timing(20.0, 90.0), Timing(10.0, 30.0), Timing(1000.0, 9000.0)]
    found = summary(timings, prompt_tokens=40, new_tokens=4, batch_size=2)
    assert found["prefill_ms"]["p50"] == 20.0
    assert found["decode_ms_per_token"]["p50"] == 30.0  # three tokens after the first
    assert found["prefill_tokens_per_s"] == 2 * 40 / 0.020
    assert found["decode_tokens_per_s"] == pytest.approx(2 / 0.030)
    assert found["total_new_tokens_per_s"] == pytest.approx(2 * 4 / 0.110)


def test_the_result_records_settings_and_device(run, tmp_path):
    result, path = bench_inference(
        run.folder, runs=2, warmup=1, prompt_tokens=8, new_tokens=3, device="cpu",
        out=tmp_path / "result.json",
    )  # fmt: skip
    assert json.loads(path.read_text(encoding="utf-8")) == result
    assert result["runs"] == 2 and result["warmup"] == 1 and result["device"].startswith("CPU")
    assert result["dtype"] == "float32" and result["adapter"] == "not merged"
    assert result["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert 0 < result["prefill_ms"]["min"] <= result["prefill_ms"]["p50"] <= result["prefill_ms"]["max"]


def test_the_command_line_prints_a_table_and_writes_the_result(run, capsys):
    words = "--runs 2 --warmup 0 --prompt-tokens 4 --new-tokens 2 --device cpu --merge".split()
    assert main([str(run.folder), *words]) == 0
    printed = capsys.readouterr().out
    assert "decode, ms per token" in printed and "adapter merged" in printed
    assert printed.strip().endswith(str(run.folder / "inference.json"))
    (run.folder / "inference.json").unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": 0}, "--runs is 0; expected at least 1"),
        ({"new_tokens": 1}, "--new-tokens is 1; expected at least 2"),
        (
            {"prompt_tokens": 250, "new_tokens": 7},
            "prompt and answer have 257 tokens, .* takes 256",
        ),
    ],
)
def test_bad_arguments_are_named(run, options, message):
    with pytest.raises(UserError, match=message):
        bench_inference(run.folder, device="cpu", **options)
    assert not (run.folder / "inference.json").exists()


def test_a_base_in_four_bits_needs_an_adapter_and_is_not_merged_into(run):
    with pytest.raises(UserError, match="nf4 and --merge is given, which would round the adapter"):
        bench_inference(run.folder, merge=True, quantization="nf4")
    with pytest.raises(UserError, match="--quantization is nf4, but .* holds all the weights"):
        bench_inference(run.base, quantization="nf4")


def test_without_bitsandbytes_a_run_can_be_loaded_whole(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run.folder, tmp_path / "run")
    recipe = {"model": {"path": str(run.base), "quantization": "nf4"}}
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    monkeypatch.setattr("prefopt.models.find_spec", lambda name: None)
    with pytest.raises(
        UserError,
        match="trained on a base in nf4, .* bitsandbytes: .*; or give --quantization none",
    ):
        load_model(find_run(copy))
    assert load_model(find_run(copy), quantization="none").dtype == torch.float32


def test_merge_needs_an_adapter(run):
    with pytest.raises(UserError, match="--merge is given, but .* has no adapter"):
        bench_inference(run.base, merge=True)
