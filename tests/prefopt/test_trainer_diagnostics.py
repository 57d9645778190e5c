"""Warnings with their reason and remedy; a run that is not finite stops and names the rows (defect 15)."""

import json
import warnings

import pytest
import torch
from transformers import TrainerCallback

from prefopt.train import NonFiniteError, PreferenceTrainer, TrainingWarning
from prefopt.train.diagnostics import KL_LOGS, Diagnostics
from prefopt.train.finite import FiniteWatch
from prefopt.train.run_folder import RunFolder
from support.tiny_models import make_dataset, make_rows
from support.trainer import data_for, make_trainer, make_world, train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("qwen3", tmp_path_factory.mktemp("qwen3"))


class _Break(TrainerCallback):
    """Spoils one weight before optimizer step ``step``, as a bad update or a broken device would."""

    def __init__(self, step: int, value: float):
        self.step = step
        self.value = value

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_defect_15_a_loss_that_is_not_finite_stops_the_run(world, tmp_path, value):
    trainer = make_trainer(
        world,
        tmp_path,
        callbacks=[_Break(3, value)],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=1,
        max_steps=5,
        sampler="sequential",
    )
    with pytest.raises(NonFiniteError) as caught:
        train(trainer)
    error = caught.value
    assert error.step == 3 and error.rows == [8, 9, 10, 11]
    assert "step 3: the loss is" in str(error) and "rows [8, 9, 10, 11]" in str(error)
    assert f"Last good checkpoint: {tmp_path / 'checkpoint-2'}" in str(error)
    # the optimizer did not take the step, and nothing was saved after it
    assert trainer.state.global_step == 2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "stopped" and "step 3" in record["stopped_by"]


@pytest.mark.parametrize("method", ["bco", "enhanced_kto", "dpo", "cpo", "sft"])
def test_defect_15_a_loss_that_is_not_finite_stops_every_method(world, tmp_path, method):
    """Also where the rows are looked at before the first loss of the step: no estimate hides them."""
    trainer = make_trainer(
        world,
        tmp_path,
        method=method,
        data=data_for(method, 20),
        callbacks=[_Break(2, float("nan"))],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        sampler="sequential",
    )
    with pytest.raises(NonFiniteError, match="step 2: the loss is nan") as caught:
        train(trainer)
    rows = trainer.train_dataset["row"][4:8]
    assert caught.value.rows == list(rows) and trainer.state.global_step == 1
    if method == "bco":
        assert trainer.baselines.shift.value.isfinite()


def test_defect_15_a_gradient_that_is_not_finite_stops_the_run(world, tmp_path):
    trainer = make_trainer(world, tmp_path, per_device_train_batch_size=4, sampler="sequential")
    clip = trainer._clip_grad_norm

    def spoil(model):
        if trainer.state.global_step == 1:
            trainer.model.model.norm.weight.grad[0] = float("nan")
        return clip(model)

    trainer._clip_grad_norm = spoil
    with pytest.raises(NonFiniteError, match=r"step 2: the gradient norm is nan, with rows \[4, 5, 6, 7\]"):
        train(trainer)
    with pytest.raises(NonFiniteError, match="none yet"):
        train(make_trainer(world, tmp_path, callbacks=[_Break(1, float("nan"))]))


@pytest.mark.parametrize(("logging_steps", "save_steps"), [(5, 2), (2, 5)])
def test_defect_15_elsewhere_than_on_the_cpu_a_log_or_a_checkpoint_finds_it(
    world, tmp_path, monkeypatch, logging_steps, save_steps
):
    """There the steps in between are taken, but nothing is saved or logged after the first bad one."""
    monkeypatch.setattr(PreferenceTrainer, "_sync_is_cheap", False)
    trainer = make_trainer(
        world,
        tmp_path,
        callbacks=[_Break(3, float("nan"))],
        per_device_train_batch_size=4,
        logging_steps=logging_steps,
        save_strategy="steps",
        save_steps=save_steps,
        max_steps=6,
        sampler="sequential",
    )
    with pytest.raises(NonFiniteError, match=r"step 3: the loss is nan, with rows \[8, 9, 10, 11\]"):
        train(trainer)
    assert trainer.state.global_step == 4
    names = [path.name for path in tmp_path.glob("checkpoint-*")]
    assert names == (["checkpoint-2"] if save_steps == 2 else [])
    assert all(entry["step"] < 3 for entry in trainer.state.log_history)


def test_defect_15_the_watch_names_the_first_of_several_bad_steps(tmp_path):
    watch = FiniteWatch(str(tmp_path))
    watch.check()
    for step in (1, 2, 3):
        bad = float("nan") if step > 1 else 0.0
        watch.add_rows(step, [10 * step, 10 * step + 1], torch.tensor([0.5, 0.5 + bad]))
        watch.add_gradient(step, torch.tensor(1.0 + bad))
    with pytest.raises(NonFiniteError) as caught:
        watch.check()
    assert caught.value.step == 2 and caught.value.rows == [21]
    watch.check()  # what was looked at is forgotten
    with pytest.raises(NonFiniteError, match="on another process"):
        watch.stop_elsewhere(7)


def findings(*logs: dict, max_steps: int = 100) -> list[str]:
    """Names of what a run with these logs, one a step, is told."""
    diagnostics = Diagnostics(max_steps)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step, log in enumerate(logs, start=1):
            diagnostics.observe(step, log)
    assert len(told) == len(diagnostics.findings)
    return [finding.name for finding in diagnostics.findings]


GOOD = {"rewards/chosen": 0.2, "rewards/rejected": -0.1, "rewards/margins": 0.3, "grad_norm": 1.0}
STILL = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0, "grad_norm": 1.0}


def test_defect_15_exploding_rewards_are_told_once():
    logs = [GOOD | {"rewards/chosen": -40.0} for _ in range(3)]
    assert findings(*logs) == ["exploding_rewards"]


def test_defect_15_no_learning_is_told():
    assert findings(*[dict(STILL) for _ in range(3)]) == ["no_learning"]
    assert findings(GOOD, GOOD | {"grad_norm": 0.0}) == ["no_learning"]
    flat = [GOOD | {"rewards/margins": 1e-5} for _ in range(60)]
    assert findings(*flat) == ["flat_margin"]


def test_defect_15_a_kl_stuck_at_zero_is_told():
    assert findings(*[GOOD | {"kl": 0.0} for _ in range(KL_LOGS + 1)]) == ["kl_stuck"]


def test_defect_15_a_healthy_run_is_told_nothing():
    # policy = reference at step 1, a KL that is 0 now and then
    logs = [STILL | {"kl": 0.0}]
    logs += [GOOD | {"kl": 0.1 if step % 5 == 0 else 0.0} for step in range(100)]
    assert findings(*logs) == []


def real(*logs: tuple[float, float, float]) -> list[dict]:
    """Logs at steps 5, 10, ...: rewards/chosen at beta 0.1 of answers of 56 tokens, margin, entropy."""
    return [
        {
            "rewards/chosen": chosen,
            "rewards/rejected": chosen - margin,
            "rewards/margins": margin,
            "log_ratios/chosen": chosen / 0.1 / 56,
            "entropy": entropy,
            "grad_norm": 0.1,
        }
        for chosen, margin, entropy in logs
    ]


# SmolLM2-135M-Instruct, LoRA, 480 sampled answers judged by a rule, 30 steps
COLLAPSED_AT_2 = real((-0.58, 0.0, 2.06), (-3.6, 0.7, 2.82), (-5.6, 0.9, 3.17), (-6.3, 0.8, 3.22))  # kto, 5e-4
COLLAPSED_AT_3 = real((-0.06, 0.01, 1.88), (-0.54, 0.12, 2.09), (-2.0, 0.04, 2.50), (-3.2, 0.25, 2.81))  # kto, 2e-4
INTACT = real((-0.04, 0.004, 1.86), (-0.08, 0.06, 1.90), (-0.14, 0.06, 1.97), (-0.09, 0.08, 1.99), (-0.08, 0.14, 1.91))
DISPLACED = real((-0.06, 0.01, 1.90), (-0.78, 0.083, 2.32))  # bco with a shift, 2e-4


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        (COLLAPSED_AT_2, [("collapsed", 2)]),
        (COLLAPSED_AT_3, [("collapsed", 3)]),
        (INTACT, []),
        (DISPLACED, [("displaced", 2)]),
    ],
)
def test_collapse_is_found_at_the_first_log_that_shows_it(logs, expected):
    diagnostics = Diagnostics(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, log in enumerate(logs, start=1):
            diagnostics.observe(step, log)
    assert [(one.name, one.step) for one in diagnostics.findings] == expected
    assert diagnostics.collapsed == bool(expected and expected[0][0] == "collapsed")


def test_collapse_names_its_signs_and_the_last_sound_step():
    diagnostics = Diagnostics(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, log in zip((5, 10, 15), COLLAPSED_AT_3, strict=False):
            diagnostics.observe(step, log | {"flat_rows": 0.6})
    (finding,) = diagnostics.findings
    assert finding.reason == (
        "The model is collapsing: desirable answers lost 0.36 nats per token, the entropy went from 1.88 to 2.50 nats, "
        "60 % of the rows have almost no gradient left"
    )
    assert finding.remedy.startswith("Go back to step 10, and train with a quarter of the learning rate")


@pytest.mark.parametrize("on_collapse", ["warn", "stop"])
def test_a_run_that_collapses_warns_or_stops(world, tmp_path, on_collapse):
    options = {"learning_rate": 0.3, "max_steps": 12, "per_device_train_batch_size": 8, "on_collapse": on_collapse}
    trainer = make_trainer(world, tmp_path, **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    names = [finding.name for finding in trainer.diagnostics.findings]
    assert "collapsed" in names and any("The model is collapsing" in str(one.message) for one in told)
    step = next(finding.step for finding in trainer.diagnostics.findings if finding.name == "collapsed")
    assert step < 12 and trainer.state.global_step == (12 if on_collapse == "warn" else step)


def test_the_remedy_for_a_collapse_works(world, tmp_path):
    """At the rate that collapses, divided until the remedy's quarter has been taken as often as it is named."""
    rate, runs = 0.3, 0
    while runs < 6:
        trainer = make_trainer(
            world, tmp_path / str(runs), learning_rate=rate, max_steps=12, per_device_train_batch_size=8
        )
        train(trainer)
        if not trainer.diagnostics.collapsed:
            break
        rate, runs = rate / 4, runs + 1
    assert 1 <= runs < 6
    last = trainer.state.log_history[-2]
    assert last["log_ratios/chosen"] > -0.1 and last["rewards/margins"] > 0


@pytest.mark.parametrize(
    ("desirable", "undesirable", "weights", "expected"),
    [
        (50, 50, (1.0, 1.0), []),
        (40, 60, (1.6, 1.0), []),
        (20, 80, (1.0, 1.0), ["class_weights"]),
        (50, 50, (1.0, 2.25), ["class_weights"]),
        (50, 0, (1.0, 1.0), ["one_class"]),
        (0, 50, (1.0, 1.0), ["one_class"]),
    ],
)
def test_defect_15_the_labels_and_their_weights(desirable, undesirable, weights, expected, recwarn):
    diagnostics = Diagnostics()
    diagnostics.observe_data(desirable, undesirable, *weights)
    assert [finding.name for finding in diagnostics.findings] == expected
    assert len(recwarn) == len(expected)


def test_defect_15_findings_reach_the_run_folder_and_the_checkpoint(world, tmp_path):
    options = {
        "data": make_rows(True)[:16],
        "learning_rate": 0.0,
        "ref": False,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 4,
    }
    trainer = make_trainer(world, tmp_path, **options)
    with pytest.warns(TrainingWarning, match="the learning rate is 0"):
        trainer.train()
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    (told,) = [entry for entry in record["diagnostics"] if entry["name"] == "no_learning"]
    assert told["step"] == 3 and "learning_rate" in told["remedy"]
    options |= {"max_steps": 5}
    resumed = make_trainer(world, tmp_path, **options)
    train(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    names = [finding.name for finding in resumed.diagnostics.findings]
    assert names.count("no_learning") == 1


def test_the_run_folder_tells_what_was_run(world, tmp_path):
    rows = [*make_rows(True), {"prompt": "no answer", "label": True}]
    trainer = make_trainer(
        world,
        tmp_path,
        data=rows,
        on_bad_row="skip",
        eval_dataset=make_dataset(True),
        eval_strategy="steps",
        eval_steps=2,
        per_device_train_batch_size=4,
    )
    train(trainer)
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished" and record["stopped_by"] is None
    assert record["config"]["beta"] == 0.1 and record["method"] == "kto"
    assert record["data"]["train"]["rows"] == record["data"]["eval"]["rows"] == 20
    assert record["data"]["train"]["bad"] == 1 and len(record["data"]["train"]["fingerprint"]) == 64
    assert record["reference"]["kind"] == "ref_model"
    assert set(record["versions"]) >= {"torch", "transformers", "peft", "python"}
    (bad,) = (tmp_path / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert "completion" in json.loads(bad)["reason"]
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": entry["step"]} | entry for entry in trainer.state.log_history
    ]


def test_metrics_that_are_not_finite_are_null_in_the_file(tmp_path):
    folder = RunFolder(tmp_path / "run", active=True)
    folder.metrics({"step": 1, "eval_loss": float("nan"), "grad_norm": float("inf"), "kl": 0.5})
    text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == {"step": 1, "eval_loss": None, "grad_norm": None, "kl": 0.5}
    RunFolder(tmp_path / "other", active=False).metrics({"step": 1})
    assert not (tmp_path / "other").exists()
