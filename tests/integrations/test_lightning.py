"""The Lightning module trains as the plain loop of examples/plain_loop.py does."""

import copy
import runpy

import pytest
import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from prefopt.data import PreferenceCollator
from prefopt.demo.model import build_model, build_tokenizer
from prefopt_kernels.integrations import lightning
from prefopt_kernels.integrations.lightning import PrefoptModule
from prefopt_kernels.integrations.transformers import completion_logprobs, pack_completions
from prefopt_kernels.modules import sequence_logps
from support.docs_checks import ROOT
from support.trainer import noisy_copy

RATE = 1e-3


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def loader(tokenizer, steps: int) -> DataLoader:
    """``steps`` batches of four rows, with mismatched completions."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "prompt_ids": torch.randint(3, 500, (5,), generator=generator).tolist(),
            "completion_ids": torch.randint(3, 500, (2 + i % 4,), generator=generator).tolist(),
            "label": i % 2 == 0,
            "group": i,
            "row": i,
        }
        for i in range(4 * steps)
    ]
    collator = PreferenceCollator(tokenizer.pad_token_id, mismatch="rotate", max_length=64)
    return DataLoader(rows, batch_size=4, collate_fn=collator)


class Losses(pl.Callback):
    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        values = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.logged.append({"step": outputs["loss"].item(), **values})


def fit(module, data, folder, **options) -> list[dict]:
    losses = Losses()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        callbacks=[losses],
        **({"enable_checkpointing": False} | quiet | options),
    )
    trainer.fit(module, data)
    return losses.logged


def test_steps_equal_the_plain_loop(tokenizer, tmp_path):
    model, reference = build_model(tokenizer, 0), build_model(tokenizer, 1)
    other = copy.deepcopy(model)
    data = loader(tokenizer, steps=4)
    module = PrefoptModule(model, reference, learning_rate=RATE)
    logged = fit(module, data, tmp_path)

    train = runpy.run_path(str(ROOT / "examples" / "plain_loop.py"))["train"]
    expected = train(other.train(), reference, list(data), RATE)
    assert [entry["step"] for entry in logged] == pytest.approx(expected, abs=1e-6)
    assert [entry["loss"] for entry in logged] == [entry["step"] for entry in logged]
    assert max(entry["kl"] for entry in logged) > 0 and "rewards/margins" in logged[0]
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        # Adam divides by the gradient's size, so rounding of a small one moves it by a part of a step
        torch.testing.assert_close(mine, theirs, rtol=0, atol=RATE * 1e-2, msg=name)


def test_an_adapter_is_trained_against_the_policy_without_it(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    base = build_model(tokenizer, 0)
    plain = copy.deepcopy(base)
    model = get_peft_model(base, config)
    batch = next(iter(loader(tokenizer, 1)))
    module = PrefoptModule(model, method="apo_zero", learning_rate=RATE)
    packing = pack_completions(batch["input_ids"], batch["completion_mask"])
    tokens = completion_logprobs(plain, batch["input_ids"], batch["attention_mask"], packing)
    expected = sequence_logps(tokens.logp, packing.cu_seqlens)
    assert torch.allclose(module._reference(batch), expected, atol=1e-4, rtol=0)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    logged = fit(module, loader(tokenizer, 3), tmp_path)
    assert all(entry["kl"] == 0 for entry in logged) and logged[0]["step"] != 0.5
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
    lora = [p for name, p in model.named_parameters() if "lm_head.lora" in name]
    assert len(lora) == 2 and all(p.requires_grad for p in lora)


def test_checkpoints_and_modes_do_not_change_the_reference(tokenizer, tmp_path):
    model = build_model(tokenizer, 0)
    reference = noisy_copy(model, 0.01)
    module = PrefoptModule(model, reference, learning_rate=RATE)
    before = {name: p.clone() for name, p in reference.named_parameters()}
    data = loader(tokenizer, 2)
    fit(module, data, tmp_path, enable_checkpointing=True)
    assert not module.train().ref_model.training and module.model.training
    assert all(torch.equal(p, before[name]) for name, p in reference.named_parameters())
    (file,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert saved and all(name.startswith("model.") for name in saved)
    again = PrefoptModule(build_model(tokenizer, 5), reference)
    again.load_state_dict(saved, strict=again.strict_loading)
    for mine, theirs in zip(again.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    (values,) = trainer.validate(module, data, verbose=False)
    assert {"val_loss", "val_kl", "val_rewards/margins"} <= values.keys()


def test_refusals(tokenizer):
    model = build_model(tokenizer, 0)
    with pytest.raises(ValueError, match=r"method is 'dpo'; expected one of \('kto', 'apo_zero'\)"):
        PrefoptModule(model, model, method="dpo")
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no adapter to disable; expected"):
        PrefoptModule(model)
    with pytest.raises(ValueError, match="Linear has no output embedding"):
        PrefoptModule(nn.Linear(2, 2), model)
    with pytest.raises(AttributeError, match="has no attribute 'Module'"):
        _ = lightning.Module
