"""Whole features that fused trainers of others refuse or miss: KTO's loss and gradient are plain torch's, and it
trains.

TRL 1.16 refuses an adapter on the head, and fails at trainable tokens in tied embeddings; Liger's fused loss refuses
both, and prompt learning. The heads themselves are tested in test_transformers_adapters.py.
"""

import contextlib
import copy
import os

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["CI"] = "1"  # TRL's trainers ping a server when they are built, unless this is set

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM
from trl import KTOConfig, KTOTrainer

from prefopt.data import PreferenceCollator
from prefopt_kernels.integrations.transformers import patch_forward
from support.tiny_models import ROWS, make_dataset
from support.trainer import COMMON, World, gradients_of_first_step, make_trainer, make_world

BETA = 0.1
TASK = {"task_type": "CAUSAL_LM"}
CASES = {  # architecture, PEFT's configuration
    "an adapter on the head": (
        "qwen3",
        lambda: LoraConfig(r=4, target_modules=["q_proj", "lm_head"], **TASK),
    ),
    "an adapter on a tied head": (
        "gemma2",
        lambda: LoraConfig(r=4, target_modules=["q_proj", "lm_head"], **TASK),
    ),
    "the whole head": (
        "qwen3",
        lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], **TASK),
    ),
    "tokens of a tied head": (
        "gemma2",
        lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 40, 300], **TASK),
    ),
    "a learned prompt": ("qwen3", lambda: PromptTuningConfig(num_virtual_tokens=3, **TASK)),
    "a learned prefix": ("qwen3", lambda: PrefixTuningConfig(num_virtual_tokens=3, **TASK)),
    "a base in 4 bits": ("nf4", lambda: LoraConfig(r=4, target_modules="all-linear", **TASK)),
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made = {}

    def get(arch: str) -> World:
        if arch not in made:
            folder = tmp_path_factory.mktemp(arch)
            made[arch] = make_world("qwen3" if arch == "nf4" else arch, folder)
            if arch == "nf4":
                made[arch] = made[arch]._replace(model=in_four_bits(folder / "model"))
        return made[arch]

    return get


def in_four_bits(folder) -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, the extra [quant], is not installed: no 4-bit weights")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=config
    )


def move(model: nn.Module) -> None:
    """Add noise, because a new adapter adds nothing and policy and reference agree."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def plain_logps(model: nn.Module, batch: dict) -> Tensor:
    """(B,) from the model's own logits, without those of a learned prompt."""
    ids, attention = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -ids.shape[1] :]
    logp = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (logp * batch["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize("case", CASES)
def test_kto_loss_and_gradients_equal_the_formula(case, worlds, tmp_path):
    arch, config = CASES[case]
    world = worlds(arch)
    trainer = make_trainer(
        world,
        tmp_path,
        ref=False,  # the policy without its adapter
        peft_config=config(),
        method="apo_zero",
        beta=BETA,
        per_device_train_batch_size=len(ROWS),  # one batch holds all, in whatever order
    )
    move(trainer.model)
    model = copy.deepcopy(trainer.model).train()
    collator = PreferenceCollator(world.tokenizer.pad_token_id, max_length=COMMON["max_length"])
    batch = collator(list(trainer.train_dataset))
    with torch.no_grad(), model.disable_adapter():
        ref_logps = plain_logps(model, batch)
    rewards = BETA * (plain_logps(model, batch) - ref_logps)
    assert rewards.abs().max() > 1e-2, "blind otherwise"
    loss = torch.sigmoid(torch.where(batch["labels"], -rewards, rewards)).mean()
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    gradients = gradients_of_first_step(trainer)
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0] == pytest.approx(loss.item(), abs=1e-5)  # the contract on a loss in fp32
    assert logs[-1] < logs[0]  # the same batch, three times
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm()
        assert error <= 1e-4 * expected[name].norm().clamp(min=1e-6), name
    assert any("lm_head" in name or "tokens" in name for name in gradients) == ("head" in case)


def trl_trainer(world: World, folder, config: LoraConfig) -> KTOTrainer:
    return KTOTrainer(
        model=copy.deepcopy(world.model),
        args=KTOConfig(
            str(folder),
            per_device_train_batch_size=4,
            bf16=False,
            gradient_checkpointing=False,
            **COMMON,
        ),
        train_dataset=make_dataset(conversational=True),
        processing_class=world.tokenizer,
        peft_config=config,
    )


def test_trl_does_not_support_it(worlds, tmp_path):
    arch, config = CASES["an adapter on the head"]
    with pytest.raises(ValueError, match="lm_head"):
        trl_trainer(worlds(arch), tmp_path, config())
    arch, config = CASES["tokens of a tied head"]
    trainer = trl_trainer(worlds(arch), tmp_path, config())
    with pytest.raises(AttributeError, match="TrainableTokensWrapper"):
        trainer.train()


def test_a_base_in_4_bits_has_its_own_loss_and_gradients_when_patched(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2}
    config = Qwen3Config(vocab_size=97, tie_word_embeddings=False, **sizes, **heads)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    found, ids = [], torch.arange(5, 25).view(2, 10)
    for patched in (False, True):
        torch.manual_seed(0)
        base = in_four_bits(tmp_path)
        layer = base.model.layers[0].mlp.up_proj
        assert type(layer).__name__ == "Linear4bit" and layer.weight.dtype == torch.uint8
        assert base.lm_head.weight.dtype == torch.float32
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **TASK)
        model = get_peft_model(base, lora).train()
        with patch_forward(model) if patched else contextlib.nullcontext():
            outputs = model(input_ids=ids, labels=ids)
        assert (outputs.logits is None) == patched
        outputs.loss.backward()
        found.append((outputs.loss, [p.grad for p in model.parameters() if p.grad is not None]))
    (expected, their_gradients), (loss, gradients) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert len(gradients) == len(their_gradients) == 2 * 7
    for mine, theirs in zip(gradients, their_gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
