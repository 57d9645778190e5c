"""What training shows: one line for each log, and at the end the held-out numbers, the verdict and the warnings."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from prefopt.cli import main
from prefopt.report.read import Run, read_run
from prefopt.report.summary import closing_lines, summarize
from prefopt.train import PreferenceConfig, console
from support.tiny_models import make_model, make_rows, make_tokenizer

LOG = {"loss": 0.48213, "rewards/margins": 0.1316, "kl": 0.0208, "learning_rate": 4.8e-6}


class Printed:
    """A callback on a clock that each step of training moves by two seconds."""

    def __init__(self, monkeypatch, method="kto", first=0, most=300, main_process=True):
        self.now = 0.0
        monkeypatch.setattr(console.time, "perf_counter", lambda: self.now)
        self.args = PreferenceConfig(output_dir="run", use_cpu=True, method=method)
        self.state = SimpleNamespace(
            global_step=first, max_steps=most, is_world_process_zero=main_process,
            is_local_process_zero=True,
        )  # fmt: skip
        self.callback = console.LinePrinter()
        self.call("on_train_begin")

    def call(self, name, **more):
        getattr(self.callback, name)(self.args, self.state, None, **more)

    def steps(self, count):
        for _ in range(count):
            self.now += 2.0
            self.state.global_step += 1
            self.call("on_step_end")

    def log(self, **logs):
        self.call("on_log", logs=logs)


def test_a_log_is_one_aligned_line(monkeypatch, capsys):
    run = Printed(monkeypatch)
    run.steps(20)
    run.log(**LOG, num_tokens=32_480, grad_norm=1.0)
    run.steps(80)
    run.log(**LOG | {"loss": 12.5, "rewards/margins": -0.5}, num_tokens=162_480)
    # 40 s for 32,480 tokens, then 160 s for 130,000; two seconds for each of the steps that are left
    assert capsys.readouterr().out.splitlines() == [
        "step  20/300  loss   0.4821  margin   +0.132  kl   0.021  lr 4.8e-06      812 tok/s  left 9m20s",
        "step 100/300  loss  12.5000  margin   -0.500  kl   0.021  lr 4.8e-06      812 tok/s  left 6m40s",
    ]


def test_evaluations_and_checkpoints_are_not_part_of_the_speed(monkeypatch, capsys):
    run = Printed(monkeypatch, most=20)
    run.steps(10)
    run.log(**LOG, num_tokens=1000)
    for event in ("on_evaluate", "on_save"):
        run.now += 500.0
        run.call(event)
    run.steps(5)
    run.log(**LOG, num_tokens=2000)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("    100 tok/s  left 10s")


@pytest.mark.parametrize(("method", "names"), [("sft", ["loss"]), ("dpo", ["loss", "margin"])])
def test_a_method_shows_what_it_has(method, names, monkeypatch, capsys):
    run = Printed(monkeypatch, method)
    run.steps(1)
    run.log(**LOG, num_tokens=10)
    words = capsys.readouterr().out.split()
    assert [name for name in ("loss", "margin", "kl") if name in words] == names


def test_what_is_missing_or_not_finite_keeps_its_column(monkeypatch, capsys):
    run = Printed(monkeypatch, first=10)  # resumed: the tokens before it are not known yet
    run.steps(1)
    run.log(loss=float("nan"), kl=0.0, learning_rate=0.0, num_tokens=500)
    run.log(**LOG | {"loss": 1e9, "rewards/margins": 1e-5}, num_tokens=500)
    first, second = capsys.readouterr().out.splitlines()
    assert "loss      nan  margin        -  kl   0.000  lr 0.0e+00        - tok/s" in first
    assert "loss    1e+09  margin   +1e-05  kl   0.021" in second
    assert first.index("lr") == second.index("lr") and len(second) <= 100


def test_an_evaluation_and_the_end_have_lines_too(monkeypatch, capsys):
    run = Printed(monkeypatch)
    run.steps(3)
    run.log(eval_loss=0.5, eval_kl=0.1, eval_runtime=75.2, epoch=1.0)
    run.log(**{"eval_other_loss": 0.25, "eval_other_rewards/margins": 2.0, "eval_other_runtime": 1})
    run.log(train_runtime=3700.0, train_loss=0.4, epoch=1.0)
    run.log(mine=3)
    assert capsys.readouterr().out.splitlines() == [
        "step   3/300  eval  loss   0.5000  margin        -  kl   0.100  in 1m15s",
        "step   3/300  eval other  loss   0.2500  margin   +2.000  kl       -  in 1s",
        "trained 3 steps in 1h01m",
        "{'mine': 3}",  # a log of a user's own, as Trainer prints it
    ]


def test_other_processes_print_nothing(monkeypatch, capsys):
    run = Printed(monkeypatch, main_process=False)
    run.steps(1)
    run.log(**LOG, num_tokens=10)
    run.log(mine=3)
    assert capsys.readouterr().out == ""


def test_closing_has_numbers_verdict_and_warnings():
    logs = [{"step": 4, "eval_loss": 0.5, "eval_rewards/margins": 0.25, "eval_kl": 0.0}]
    finding = {"name": "x", "step": 3, "reason": "Rewards are large", "remedy": "Train slower"}
    record = {"data": {"eval": {"rows": 1180}}, "diagnostics": [finding]}
    assert closing_lines(Run(Path("run"), record=record, logs=logs)) == [
        "held-out rows: loss 0.5000, margin 0.2500, kl 0, n = 1,180",
        "verdict: The model learned to prefer desirable answers: on held-out rows the margin is 0.2500.",
        "warning: Step 3: Rewards are large. Train slower.",
    ]
    assert len(closing_lines(Run(Path("run")))) == 1


def test_a_run_prints_lines_and_ends_with_the_verdict(tmp_path, capsys):
    make_model("llama", len(make_tokenizer(tmp_path / "model")), tmp_path / "model")
    with (tmp_path / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows(True))
    recipe = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.3},
        "training": {"output_dir": str(tmp_path / "run"), "use_cpu": True, "max_steps": 4},
    }
    recipe["training"] |= {"logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith("step ")]
    pattern = r"step \d/4  loss +\S+  margin +\S+  kl +\S+  lr +\S+ +\S+ tok/s  left \d+s"
    assert all(re.fullmatch(pattern, line) for line in lines[1:5])
    assert lines[0].startswith("step 0/4  eval  loss   0.5000") and "step 4/4  eval" in lines[5]
    assert all(line.isascii() and len(line) <= 100 for line in lines) and len(lines) == 6
    assert not any(line.startswith("{") for line in printed)
    run = read_run(tmp_path / "run")
    closed = closing_lines(run)
    assert closed[0].endswith("n = 5") and printed[-1 - len(closed) : -1] == closed
    assert f"verdict: {summarize(run).verdict}" in closed
    assert printed[-1] == str(tmp_path / "run" / "report.html")
