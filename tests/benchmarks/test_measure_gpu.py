"""The GPU benchmark on the CPU: the whole command in real processes, with variants that fail and crash."""

import json
import sys
import time

import pytest
import torch

from benchmarks import measure_gpu
from benchmarks.measure_gpu import GATE, Device, Measurement, Run, main, parse, plan, run_process
from benchmarks.rows import RESULTS, gpu_origin, newest
from benchmarks.variants import Variant

WORKER = """
import os, sys
from benchmarks import measure_gpu
from benchmarks.variants import Variant, gpu_variants

def fails(x): raise RuntimeError("no kernel\\nfor this shape")
def crashes(x): os._exit(11)
def is_wrong(x): return x.targets * float("nan")

measure_gpu.GROUP_SECONDS = 0.0
variants = {name: v for name, v in gpu_variants("reference").items() if v.who in ("gemm", "ours", "ours-skip")}
variants |= {v.name: v for v in (Variant("torch", "frozen", fails), Variant("compile", "frozen", crashes))}
variants |= {"torch-forward": Variant("torch", "forward", is_wrong)}
sys.exit(measure_gpu.work(measure_gpu.parse(sys.argv[1:]), variants))
"""
TRIAL = ["--device", "cpu", "--case", "smoke", "--peers", "torch", "compile", "--out"]


def command(tmp_path, *arguments, gate):
    return main([*TRIAL, str(tmp_path / "out"), *arguments], gate=[gate], worker=["-c", WORKER])


def rows_of(tmp_path):
    (rows,) = newest(tmp_path / "out").values()
    return {(key[1], key[3]): row for key, row in rows.items()}


@pytest.mark.slow
def test_every_cell_is_measured_whatever_fails(tmp_path, capfd):
    gate = tmp_path / "test_gate.py"
    gate.write_text("def test_a():\n    assert 1 == 2\ndef test_b():\n    pass\n", encoding="utf-8")
    assert command(tmp_path, "--tokens", "256", gate=gate) == 1  # for the failing test
    rows = rows_of(tmp_path)
    reasons = {variant: row["skipped"] for (_, variant), row in rows.items() if row["skipped"] is not None}
    assert reasons == {
        "torch-frozen": "RuntimeError: no kernel",
        "torch-forward": "ArithmeticError: log-probabilities that are not finite",
        "compile-frozen": "the process ended with 11",
    }
    for passed in ("forward", "frozen", "trainable"):
        row = rows[256, f"ours-{passed}"]
        assert row["tests"] == {"passed": 1, "failed": 1, "error": 0, "skipped": 0, "finished": True}
        assert row["logp_error"] < 1e-5 and row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
        assert row["rounds"] == measure_gpu.MIN_ROUNDS and row["logits"] == "random"
    assert {(256, "ours-kto-frozen"), (256, "ours-skip-frozen/planted")} <= set(rows)
    assert not (tmp_path / "out" / "unfinished.json").exists()
    printed = capfd.readouterr().out
    (tables,) = (tmp_path / "out").glob("*/*.md")
    assert "assert 1 == 2" in printed and "1 passed, 1 failed" in tables.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_next_start_continues(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    where = gpu_origin("cpu", None) | {"run": "2026-01-02T03:04:05+00:00"}
    where["tests"] = {"passed": 7, "failed": 0, "error": 0, "skipped": 0, "finished": True}
    avoided = {"smoke, T 512, random, compile-frozen": "the process ended with 9"}
    Run(tmp_path / "out" / "unfinished.json", where, ["smoke, T 256, random"], avoided).save()
    sizes = ["--tokens", "512", "--tokens", "256", "--logits", "random"]
    assert command(tmp_path, *sizes, gate=tmp_path / "none.py") == 0
    rows = rows_of(tmp_path)
    assert {T for T, _ in rows} == {512} and rows[512, "compile-frozen"]["skipped"] == "the process ended with 9"
    assert rows[512, "ours-frozen"]["run"] == where["run"] and rows[512, "ours-frozen"]["tests"]["passed"] == 7
    assert "continues the run of 2026-01-02" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "nothing is measured: no CUDA device: torch.cuda.is_available() is False\n"


class Scripted(Device):
    """A device that reports given seconds: those of each variant in turn, the round that is not kept first."""

    def __init__(self, seconds):
        super().__init__("cpu")
        self.seconds = iter(seconds)

    def time(self, run):
        run()
        return next(self.seconds), 1e-4


def test_variants_take_turns_and_ratios_are_those_of_a_round(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_gpu, "GROUP_SECONDS", 0.0)
    calls = []
    variants = {v.name: v for v in (Variant("gemm", "gemm", lambda x: calls.append("g")), _ours(calls))}
    run, group = Run(tmp_path / "unfinished.json", {}), ("smoke", 256, "random")
    # each round in its order; the machine is slow in three of five rounds, so that the ratio of the medians is 4 / 3
    device = Scripted([9, 9, 1, 2, 4, 3, 3, 6, 6, 3, 1, 2])
    rows = {row["variant"]: row for row in Measurement(group, variants, run, device).rows(float("inf"))}
    # the library's workspace; two first calls each; six rounds, each starting with the other one
    assert "".join(calls) == "g" + "gg" + "oo" + "og" + "go" + "og" + "go" + "og" + "go"
    ours = rows["ours-frozen"]
    assert (ours["median_ms"], ours["ratio"], ours["rounds"]) == (4000.0, 2.0, 5)
    assert ours["ratio_p20"] == pytest.approx(4 / 3 + 0.8 * 2 / 3) and ours["ratio_p80"] == 2.0
    assert ours["tflops"] == pytest.approx(2 * 2e-12 * 256 * 64 * 1000 / 4.0)  # of the two products of the pass
    assert json.loads(json.dumps(rows)) == rows
    assert Measurement(group, variants, run, device).rows(until=time.monotonic()) == []


def _ours(calls):
    def run(x):
        calls.append("o")
        return torch.full(x.targets.shape, -1.0)

    return Variant("ours", "frozen", run)


@pytest.mark.parametrize(("code", "status"), [("os._exit(3)", 3), ("os.abort()", -6), ("time.sleep(60)", None)])
def test_a_process_ends_with_its_children(code, status, tmp_path, monkeypatch):
    monkeypatch.setattr(measure_gpu, "SILENCE", 1.0)
    (tmp_path / "alive").touch()
    child = f"  while True:\n    open({str(tmp_path / 'sign')!r}, 'w').close(); time.sleep(0.01)\n"
    code = f"import os, time\nif not os.fork():\n{child}time.sleep(0.5)\n{code}"
    assert run_process([sys.executable, "-c", code], seconds=60, alive=tmp_path / "alive") == status
    (tmp_path / "sign").unlink()
    time.sleep(0.3)
    assert not (tmp_path / "sign").exists()


def test_a_process_has_a_limit():
    assert run_process([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.5) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "nan"], "--minutes is nan; expected a number above 0"),
        (["--tokens", "0"], "--tokens: T is 0; expected a positive multiple of 2"),
        (["--tokens", "1000"], "--tokens: T is 1000; expected a positive multiple of 3"),
        (["--peers", "cse"], "invalid choice: 'cse'"),
        (["--case", "smoke", "--out", str(RESULTS)], "choose another folder for their rows with --out"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_plan_starts_with_the_most_important():
    groups = plan(parse([]))
    assert groups[0] == ("qwen3-0.6b", 4096, "random") and len(groups) == len(set(groups)) == 6 * 4 * 2
    options = ["--case", "gemma-2-2b", "--tokens", "2048", "--tokens", "512", "--logits", "planted"]
    assert plan(parse(options)) == [("gemma-2-2b", T, "planted") for T in (2048, 512)]


def test_nothing_but_torch_triton_and_pytest_is_needed(tmp_path):
    """The command is imported, and the tests that it runs are collected, without any other package."""
    others = (
        "hypothesis transformers trl peft datasets accelerate liger_kernel matplotlib cut_cross_entropy quack xdist"
    )
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({others.split()}))\n"
        "import benchmarks.measure_gpu, pytest\n"
        "files = map(str, benchmarks.measure_gpu.GATE)\n"
        "sys.exit(pytest.main(['--collect-only', '-qq', '-p', 'no:cacheprovider', *files]))\n"
    )
    with (tmp_path / "log").open("w") as log:
        status = run_process(["env", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1", sys.executable, "-c", code], 120, log)
    assert status == 0 and len(GATE) > 2, (tmp_path / "log").read_text(encoding="utf-8")
