"""FusedKTOTrainer against TRL for TRL's losses, and against formulas for the others."""

import copy
import os
from pathlib import Path

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["CI"] = "1"  # TRL's trainers ping a server when they are built, unless this is set

import pytest
import torch
import trl.trainer.utils as utils
from peft import LoraConfig
from torch import Tensor
from transformers import PrinterCallback
from trl import KTOConfig, KTOTrainer
from trl.kernels import ChunkedLogProbFunction

from prefopt.train.checkpoint import MANIFEST
from prefopt.train.trl_trainer import ENHANCED_KTO, FusedKTOTrainer
from prefopt_kernels import enhanced_kto_loss
from prefopt_kernels.integrations.trl import FusedHead
from support.tiny_models import make_dataset
from support.trainer import COMMON, gradients_of_first_step, make_world, steps_of, train

BETA = 0.1
TOLERANCES = {"loss": 1e-5}  # the contract, as for our own trainer: 1e-5 on the loss,
OTHERS = 1e-4  # 1e-4 on sums of log-probabilities and on what is made of them


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("qwen3", tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def trl_has_its_own_function_between_steps():
    yield
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def lora() -> LoraConfig:
    """B is not 0, so that policy and reference differ at the first step."""
    return LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def make(cls, world, folder: Path, *, peft_config=None, ours=None, data=None, **options):
    settings = {"per_device_train_batch_size": 4, "beta": BETA} | COMMON | options
    eval_dataset = settings.pop("eval_dataset", None)
    config = KTOConfig(
        output_dir=str(folder),
        bf16=False,  # TRL turns bf16 autocast on otherwise
        gradient_checkpointing=False,
        **settings,
    )
    trainer = cls(
        copy.deepcopy(world.model),
        None if peft_config else copy.deepcopy(world.ref),
        config,
        train_dataset=make_dataset(conversational=True) if data is None else data,
        eval_dataset=eval_dataset,
        processing_class=world.tokenizer,
        peft_config=peft_config,
        **(ours or {}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


CASES = {
    "kto": {},
    "lora": {"peft_config": lora()},
    "precomputed": {"precompute_ref_log_probs": True},
    "two micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "weights": {"desirable_weight": 0.7, "undesirable_weight": 1.9},
    "apo_zero": {"loss_type": "apo_zero_unpaired"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_microbatch_estimate_equals_trl(case, world, tmp_path):
    options = {"max_steps": 2, **CASES[case]}
    theirs = train(make(KTOTrainer, world, tmp_path / "theirs", **options))
    mine = make(FusedKTOTrainer, world, tmp_path / "mine", ours={"kl_estimator": "microbatch"}, **options)
    logs = train(mine)
    assert len(logs) == len(theirs) == 2
    for step, (found, expected) in enumerate(zip(logs, theirs, strict=True)):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            allowed = TOLERANCES.get(key, OTHERS)
            assert found[key] == pytest.approx(value, abs=allowed, rel=0), (step, key)
    assert abs(logs[0]["rewards/chosen"]) > 1e-2 and len({entry["loss"] for entry in logs}) > 1
    assert case == "apo_zero" or any(entry["kl"] > 1e-2 for entry in logs)


def logps(model, ids: Tensor, attention: Tensor, completion: Tensor) -> Tensor:
    """(B,) sums over the completions' tokens, from the model's own logits."""
    logp = model(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
    logp = logp.gather(2, ids[:, 1:, None])[..., 0]
    return (logp * completion[:, 1:]).sum(1)


class Window:
    """The first optimizer step's rows, scored by plain torch; ``logps`` has a graph to ``model``."""

    def __init__(self, world, batches: list[dict]):
        self.model = copy.deepcopy(world.model).train()
        rows, mismatched = [], []
        for batch in batches:
            matched = [batch[key] for key in ("input_ids", "attention_mask", "completion_mask")]
            with torch.no_grad():
                ref = logps(world.ref, *matched)
            rows.append((logps(self.model, *matched), ref, batch))
            if "KL_input_ids" in batch:
                other = [batch[f"KL_{key}"] for key in ("input_ids", "attention_mask", "completion_mask")]
                with torch.no_grad():
                    mismatched.append(logps(self.model, *other) - logps(world.ref, *other))
        self.logps = torch.cat([row[0] for row in rows])
        self.ref_logps = torch.cat([row[1] for row in rows])
        self.labels = torch.cat([torch.as_tensor(batch["label"]).bool() for batch in batches])
        self.lengths = torch.cat([batch["completion_mask"][:, 1:].sum(1) for batch in batches])
        self.mismatched = mismatched
        self.size = len(batches[0]["input_ids"])

    @property
    def rewards(self) -> Tensor:
        return BETA * (self.logps - self.ref_logps)

    @property
    def signed(self) -> Tensor:
        return torch.where(self.labels, 1.0, -1.0)

    @property
    def z0(self) -> Tensor:
        return torch.cat(self.mismatched).mean().clamp(min=0)

    @property
    def shift(self) -> Tensor:
        means = [self.rewards[side].mean() for side in (self.labels, ~self.labels)]
        return sum(means).detach() / 2

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def kto(w: Window) -> Tensor:
    return torch.sigmoid(-w.signed * (w.rewards - BETA * w.z0))


def bco(w: Window) -> Tensor:
    return -torch.nn.functional.logsigmoid(w.signed * (w.rewards - w.shift))


def enhanced(w: Window, **options) -> Tensor:
    """Micro-batch by micro-batch, because decision weights have mean 1 over those."""
    rows = (w.logps, w.ref_logps, w.labels, w.lengths)
    parts = zip(*(x.split(w.size) for x in rows), strict=True)
    options = ENHANCED_KTO | options
    return torch.cat([enhanced_kto_loss(*part, beta=BETA, reference_point=w.z0, **options) for part in parts])


METHODS = {
    "kto": ({"loss_type": "kto"}, {}, kto),
    "bco": ({"loss_type": "bco"}, {}, bco),
    "enhanced": ({"loss_type": "enhanced_kto"}, {}, enhanced),
    "enhanced with a shift and weights": (
        {"loss_type": "enhanced_kto", "desirable_weight": 0.7, "undesirable_weight": 1.9},
        {"loss_options": {"shift_gate": 0.5, "odds_weight": 0.0}},
        lambda w: enhanced(
            w,
            shift_gate=0.5,
            odds_weight=0.0,
            shift=w.shift,
            desirable_weight=0.7,
            undesirable_weight=1.9,
        ),
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_loss_and_gradients_of_a_window_equal_the_formula(method, accumulation, world, tmp_path):
    options, ours, formula = METHODS[method]
    world = world._replace(model=world.ref, ref=world.model)  # this way round z0 is above 0
    size = 6 // accumulation
    trainer = make(
        FusedKTOTrainer,
        world,
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        ours=ours,
        **options,
    )
    batches = list(trainer.get_train_dataloader())[:accumulation]
    gradients = gradients_of_first_step(trainer)
    first = steps_of(trainer)[0]

    window = Window(world, batches)
    loss = formula(window).mean()
    assert first["loss"] == pytest.approx(loss.item(), abs=1e-5)
    if options["loss_type"] != "bco":
        assert first["kl"] == pytest.approx(window.z0.item(), abs=OTHERS)
        own = [ratios.mean().clamp(min=0) for ratios in window.mismatched]
        assert window.z0 > 0.1, "blind otherwise"
        assert accumulation == 1 or max(abs(z - window.z0) for z in own) > 0.1, "blind otherwise"
    if "bco" in method or "shift" in method:
        assert first["shift"] == pytest.approx(window.shift.item(), abs=OTHERS)
        assert abs(window.shift) > 1e-2, "blind otherwise"
    else:
        assert "shift" not in first
    expected = window.gradients(loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm()
        assert error <= 1e-4 * expected[name].norm().clamp(min=1e-6), name


def test_the_fused_op_scores_and_bco_has_no_mismatched_rows(world, tmp_path, monkeypatch):
    calls, apply = [], FusedHead.apply

    def counted(self, *args):
        calls.append(torch.is_grad_enabled())
        return apply(self, *args)

    monkeypatch.setattr(FusedHead, "apply", counted)
    trainer = make(
        FusedKTOTrainer,
        world,
        tmp_path,
        loss_type="bco",
        per_device_train_batch_size=1,  # which TRL refuses for its KL term
        gradient_accumulation_steps=2,
        train_sampling_strategy="random",
        max_steps=1,
    )
    assert not any("KL" in key for key in next(iter(trainer.get_train_dataloader())))
    train(trainer)
    # two micro-batches: the reference, the policy for the shift, the policy with its gradient
    assert calls.count(True) == 2 and calls.count(False) == 4
    assert trainer.args.loss_type == "bco"


def test_evaluation_and_checkpoints(world, tmp_path):
    data = make_dataset(conversational=True).select(range(8))
    options = {"loss_type": "bco", "eval_dataset": data, "save_strategy": "steps", "save_steps": 2}
    straight = make(FusedKTOTrainer, world, tmp_path / "one", **options)
    logs = train(straight)
    checkpoint = tmp_path / "one" / "checkpoint-2"
    assert (checkpoint / "prefopt_shift.json").is_file()
    resumed = make(FusedKTOTrainer, world, tmp_path / "two", **options)
    again = train(resumed, resume_from_checkpoint=str(checkpoint))
    for key in ("loss", "shift", "rewards/margins", "grad_norm"):
        assert again[-1][key] == pytest.approx(logs[-1][key], abs=1e-6), key

    value = straight._shift.value.clone()
    found = straight.evaluate()
    assert {"eval_loss", "eval_shift", "eval_rewards/chosen"} <= found.keys()
    assert torch.equal(straight._shift.value, value)  # evaluation leaves it alone
    assert found == pytest.approx(found) and found["eval_loss"] > 0


def test_a_resumed_run_restores_the_shift(world, tmp_path):
    """Rows of one class do not change the shift."""
    data = make_dataset(conversational=True).filter(lambda row: row["label"])
    options = {"loss_type": "bco", "save_strategy": "steps", "save_steps": 2, "data": data}
    logs = train(make(FusedKTOTrainer, world, tmp_path / "one", **options))
    assert [entry["shift"] for entry in logs] == [0.0] * 3
    checkpoint = tmp_path / "one" / "checkpoint-2"
    (checkpoint / "prefopt_shift.json").write_text('{"shift": 0.25}', encoding="utf-8")
    (checkpoint / MANIFEST).unlink()  # or the change would be refused
    resumed = make(FusedKTOTrainer, world, tmp_path / "two", **options)
    logs = train(resumed, resume_from_checkpoint=str(checkpoint))
    assert logs[-1]["shift"] == 0.25


def test_positional_arguments_of_trl(world, tmp_path):
    trainer = make(FusedKTOTrainer, world, tmp_path)  # model, ref_model and args by position
    assert isinstance(trainer, KTOTrainer) and trainer.args.loss_type == "kto"
    assert trainer.kl_estimator == "window" and trainer.ref_model is not None


@pytest.mark.parametrize(
    ("options", "ours", "message"),
    [
        ({"loss_type": "enhanced"}, {}, "'enhanced' is not one of .*; did you mean 'enhanced_kto'"),
        ({}, {"kl_estimator": "windw"}, "did you mean 'window'"),
        ({}, {"loss_options": {"alpha": 0.5}}, "expected it for 'enhanced_kto' only"),
        (
            {"loss_type": "enhanced_kto"},
            {"loss_options": {"loss_aversoin": 2.0}},
            "did you mean 'loss_aversion'",
        ),
        (
            {"loss_type": "enhanced_kto"},
            {"loss_options": {"beta": 2.0}},
            "loss_options: 'beta' is not one of",
        ),
        ({"loss_type": "bco", "desirable_weight": 2.0}, {}, "has no class weights"),
    ],
)
def test_refusals(options, ours, message, world, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(FusedKTOTrainer, world, tmp_path, ours=ours, **options)
