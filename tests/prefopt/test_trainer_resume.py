"""Defect 8: a resumed run equals the uninterrupted one bit for bit, in its logs, its weights and its counters."""

import copy
import json

import pytest
import torch
from peft import LoraConfig

from support.tiny_models import make_dataset
from support.trainer import data_for, make_trainer, make_world, train

STEPS, CUT = 6, 4
# 20 rows, 8 a step: steps 1 to 3 are the first epoch, so the cut is inside the second; logs at 2, 4, 6 and, for
# logging_steps 3, at 3 and 6: then the cut falls between two logs.
OPTIONS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": CUT,
    "lr_scheduler_type": "linear",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("qwen3", tmp_path_factory.mktemp("qwen3"))


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        {"logging_steps": 3},
        {"logging_steps": 1, "sampler": "random"},
        {"logging_steps": 3, "kl_estimator": "microbatch", "sampler": "sequential"},
        {"logging_steps": 3, "ref": False},
        pytest.param({"logging_steps": 3, "ref": False, "adapter": True}, marks=pytest.mark.nightly),
        {"logging_steps": 2, "ref": False, "adapter": True, "disable_dropout": False},
        {"logging_steps": 3, "ref": False, "precompute_ref_logps": True},
        {"logging_steps": 3, "method": "bco", "shift": "cumulative"},
        {
            "logging_steps": 3,
            "method": "enhanced_kto",
            "kl_estimator": "ema",
            "shift": "ema",
            "shift_start": 0.5,  # the gate opens at step 3 and is on its way at the cut
            "shift_ramp": 0.5,
        },
        {"logging_steps": 1, "method": "bco", "shift": "ema", "shift_start": "plateau"},
        {"logging_steps": 1, "method": "enhanced_kto", "window_values": "previous", "kl_estimator": "exact"},
        {"logging_steps": 1, "kl_rows": 3},
        {"logging_steps": 3, "method": "dpo", "ref": False, "adapter": True},
        pytest.param({"logging_steps": 3, "method": "cpo"}, marks=pytest.mark.nightly),
        {"logging_steps": 1, "method": "sft"},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_defect_08_resume_equals_the_uninterrupted_run(world, tmp_path, options):
    options = OPTIONS | options | {"reference_cache_dir": str(tmp_path / "cache")}
    adapter, method = options.pop("adapter", False), options.get("method", "kto")
    options["data"] = data_for(method, 20)

    def build():
        config = LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.2)
        return make_trainer(world, tmp_path / "run", peft_config=config if adapter else None, **options)

    whole = build()
    logs = train(whole)
    metrics_file = tmp_path / "run" / "metrics.jsonl"
    lines = metrics_file.read_text(encoding="utf-8").splitlines()
    resumed = build()
    train(resumed, resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{CUT}"))

    assert [entry for entry in resumed.state.log_history if "loss" in entry] == logs
    assert resumed._num_tokens == whole._num_tokens == logs[-1]["num_tokens"]
    assert resumed.baselines.state_dict() == whole.baselines.state_dict()
    if whole.mismatched is not None:
        expected = whole.mismatched.estimator.state_dict()
        for name, value in resumed.mismatched.estimator.state_dict().items():
            assert torch.equal(value, expected[name]), name
    expected = weights(whole)
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name
    # the file too: the logs after the checkpoint are not there twice (the last line holds run times)
    assert metrics_file.read_text(encoding="utf-8").splitlines()[:-1] == lines[:-1]
    # and the run went on learning after the cut, so that all this means something
    assert logs[-1]["logps/chosen"] != logs[0]["logps/chosen"]
    if options.get("shift_start") == 0.5:
        assert [0 < log["shift_gate"] < 1 for log in logs] == [False, True]
    if options.get("shift_start") == "plateau":
        assert whole.baselines.schedule.weight > 0  # it has watched the margin


def test_defect_08_a_checkpoint_of_the_model_alone_keeps_the_counters(world, tmp_path):
    options = OPTIONS | {"save_only_model": True, "logging_steps": 3}
    logs = train(make_trainer(world, tmp_path, **options))
    checkpoint = tmp_path / f"checkpoint-{CUT}"
    assert not (checkpoint / "optimizer.pt").exists()
    state = json.loads((checkpoint / "prefopt_state.json").read_text(encoding="utf-8"))
    assert set(state) == {
        "num_tokens",
        "loss_sum",
        "positions",
        "filled",
        "sums",
        "reference_point",
        "baselines",
        "previous_step",
        "diagnostics",
        "reference_fingerprint",
    }
    resumed = make_trainer(world, tmp_path, **options)
    again = train(resumed, resume_from_checkpoint=str(checkpoint))
    assert [entry["num_tokens"] for entry in again] == [entry["num_tokens"] for entry in logs]


def test_defect_08_training_again_from_the_start_starts_all_counters_anew(world, tmp_path):
    trainer = make_trainer(world, tmp_path, learning_rate=0.0, per_device_train_batch_size=4)
    first = train(trainer)
    assert train(trainer) == first
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 3]


def test_resume_refuses_the_checkpoint_as_the_reference(world, tmp_path):
    options = OPTIONS | {"ref": False}
    trained = make_trainer(world, tmp_path, **options)
    train(trained)
    checkpoint = str(tmp_path / f"checkpoint-{CUT}")
    wrong = make_trainer(world, tmp_path, model=copy.deepcopy(trained.model), **options)
    with pytest.raises(ValueError, match="the reference is not the one .* was trained against"):
        wrong.train(resume_from_checkpoint=checkpoint)
    right = make_trainer(world, tmp_path, **options)
    train(right, resume_from_checkpoint=checkpoint)


def test_an_adapter_that_already_changes_the_model_is_no_reference(world, tmp_path):
    from peft import get_peft_model

    def wrapped(fresh: bool):
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=fresh)
        return get_peft_model(copy.deepcopy(world.model), config)

    with pytest.raises(ValueError, match="with it or without it"):
        make_trainer(world, tmp_path, ref=False, model=wrapped(fresh=False))
    trainer = make_trainer(world, tmp_path, ref=False, model=wrapped(fresh=True))
    assert trainer.reference.kind == "adapter off"
    make_trainer(world, tmp_path, ref=True, model=wrapped(fresh=False))


def test_the_reference_never_moves(world, tmp_path):
    trainer = make_trainer(world, tmp_path, ref=False, per_device_train_batch_size=4)
    before = copy.deepcopy(trainer.reference.model.state_dict())
    train(trainer)
    moved = trainer.model.state_dict()
    for name, value in trainer.reference.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert any(not torch.equal(moved[name], before[name]) for name in before)


def test_a_freed_reference_cannot_score_new_rows(world, tmp_path):
    trainer = make_trainer(
        world,
        tmp_path,
        precompute_ref_logps=True,
        eval_dataset=make_dataset(True),
        reference_cache_dir=str(tmp_path / "cache"),
    )
    assert "eval_loss" in trainer.evaluate()
    with pytest.raises(ValueError, match="new rows cannot be scored"):
        trainer.evaluate(make_dataset(True))
