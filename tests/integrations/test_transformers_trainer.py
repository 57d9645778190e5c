"""FusedTrainer trains and evaluates as transformers' Trainer, and restores the model."""

import copy

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from prefopt_kernels.integrations.transformers import trainer as transformers_trainer
from prefopt_kernels.integrations.transformers.trainer import FusedTrainer
from prefopt_kernels.ops import _extension
from support.causal_lm import VOCAB, make
from support.trainer import steps_of, train


def rows(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (count, 7), generator=generator)
    labels = ids.masked_fill(torch.arange(7) < 2, -100)
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


def build(cls, folder, name: str = "softcap gemma2", **named):
    options = {
        "max_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    } | named.pop("options", {})
    trainer = cls(
        model=named.pop("model", None) or make(name),
        args=TrainingArguments(str(folder), **options),
        train_dataset=rows(12),
        eval_dataset=rows(5),
        **named,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.mark.parametrize("name", ["softcap gemma2", "experts qwen3_moe"])
def test_logs_and_gradients_equal_trainer(name, tmp_path):
    mine, theirs = build(FusedTrainer, tmp_path, name), build(Trainer, tmp_path, name)
    logs, expected = train(mine), train(theirs)
    assert [entry["loss"] for entry in logs] == pytest.approx([entry["loss"] for entry in expected], abs=1e-5)
    assert [entry["grad_norm"] for entry in logs] == pytest.approx([entry["grad_norm"] for entry in expected], rel=1e-4)
    assert len(steps_of(mine)) == 3 and len({entry["loss"] for entry in logs}) == 3
    evaluations = [
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (mine, theirs)
    ]
    assert evaluations[0] == pytest.approx(evaluations[1], abs=1e-5) and len(evaluations[0]) == 2
    assert mine.fused_calls == 3 * 2 + 2  # and a batch of evaluation, twice
    assert mine.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], abs=1e-5)
    assert mine.fused_calls == 3 * 2 + 3


def test_the_model_is_restored(tmp_path):
    trainer = build(FusedTrainer, tmp_path)
    ids = torch.arange(3, 9)[None]
    train(trainer)
    outputs = trainer.model.train()(input_ids=ids, labels=ids)
    assert outputs.logits.shape == (1, 6, VOCAB)
    assert trainer.predict(rows(2)).predictions.shape == (2, 7, VOCAB)
    trainer.save_model(str(tmp_path / "saved"))
    copy.deepcopy(trainer.model)
    with pytest.raises(KeyError), trainer._patched():
        raise KeyError
    assert trainer.model(input_ids=ids, labels=ids).logits is not None


def test_compute_metrics_gets_logits(tmp_path):
    shapes = []

    def measure(prediction) -> dict:
        shapes.append(prediction.predictions.shape)
        return {"rows": len(prediction.predictions)}

    trainer = build(FusedTrainer, tmp_path, compute_metrics=measure)
    train(trainer)
    assert shapes == 2 * [(5, 7, VOCAB)] and trainer.fused_calls == 3 * 2
    assert trainer.evaluate()["eval_rows"] == 5


def test_the_backend_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(_extension, "why_not", lambda: "no C++ compiler")
    trainer = build(FusedTrainer, tmp_path, backend="cpu", options={"max_steps": 1})
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run"):
        train(trainer)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"compute_loss_func": lambda *_, **__: None}, "compute_loss_func is given; expected none"),
        ({"options": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor is 0.1; expected 0"),
    ],
)
def test_options_that_need_logits_are_refused(named, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(FusedTrainer, tmp_path, **named)


def test_further_refusals(tmp_path):
    with pytest.raises(ValueError, match="model_init is given; expected a model"):
        FusedTrainer(model_init=lambda: make("llama"), args=TrainingArguments(str(tmp_path)))
    with pytest.raises(AttributeError, match="has no attribute 'FusedTrainr'"):
        _ = transformers_trainer.FusedTrainr
