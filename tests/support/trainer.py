"""Small worlds for the tests of `prefopt.train`: a model, its tokenizer, a reference that differs, and a trainer."""

import copy
import warnings
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
)

from prefopt.train import PreferenceConfig, PreferenceTrainer
from prefopt.train.methods import METHODS, PAIRS
from support.tiny_models import ROWS, make_dataset, make_model, make_rows, make_tokenizer

datasets.disable_progress_bars()


class World(NamedTuple):
    """What a trainer needs; ``ref`` differs from ``model``, or loss and KL would be 0.5 and 0 whatever one computes."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    ref: PreTrainedModel


def make_world(arch: str, folder: Path, noise: float = 0.02) -> World:
    """A tiny model of ``arch`` and a noisy copy of it as the reference."""
    tokenizer = make_tokenizer(folder / "model")
    model = make_model(arch, len(tokenizer), folder / "model")
    return World(folder, tokenizer, model, noisy_copy(model, noise))


def noisy_copy(model: PreTrainedModel, scale: float, seed: int = 3) -> PreTrainedModel:
    """The same model with ``scale`` times standard normal noise on every parameter."""
    generator = torch.Generator().manual_seed(seed)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return copied


COMMON = {  # of TRL's configuration and ours
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 3,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
    "max_length": 96,
    "dataloader_pin_memory": False,
    "seed": 7,
}


def make_pairs(count: int, chat: bool = True) -> list[dict]:
    """The first rows of ROWS as pairs: their completion, and a worse one of another length."""
    rows = []
    for number, (prompt, completion, _) in enumerate(ROWS[:count]):
        texts = {
            "prompt": prompt,
            "chosen": completion,
            "rejected": "Bananas, I suppose." + " Or not." * (number % 3),
        }
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows.append({name: [{"role": roles[name], "content": text}] for name, text in texts.items()} if chat else texts)
    return rows


def data_for(method: str, count: int) -> list[dict]:
    """Rows of the kind that the method learns from."""
    return make_pairs(count) if METHODS[method].data == PAIRS else make_rows(True)[:count]


def make_trainer(world: World, folder: Path, *, data=None, ref: bool | nn.Module = True, **options):
    """Our trainer on a copy of the world's model; ``eval_dataset`` and ``peft_config`` go where they belong.

    ``ref``: True for a copy of the world's, False for none, or a model; ``model`` is taken as it is, too.
    """
    settings = {
        "eval_dataset": options.pop("eval_dataset", None),
        "peft_config": options.pop("peft_config", None),
        "callbacks": options.pop("callbacks", None),
    }
    model = options.pop("model", None)
    if ref is True:
        ref = copy.deepcopy(world.ref) if _has_reference(options) else None
    trainer = PreferenceTrainer(
        copy.deepcopy(world.model) if model is None else model,
        PreferenceConfig(output_dir=str(folder), **(COMMON | options)),
        make_dataset(conversational=True) if data is None else data,
        processing_class=world.tokenizer,
        ref_model=ref or None,
        **settings,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _has_reference(options: dict) -> bool:
    return METHODS[options.get("method", "kto")].needs_reference


def train(trainer: Trainer, **kwargs) -> list[dict]:
    """Train on one thread, which is fastest for models this small, and return the logs of the training loop."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train(**kwargs)
    finally:
        torch.set_num_threads(threads)
    return steps_of(trainer)


def steps_of(trainer: Trainer) -> list[dict]:
    """The training loop's logs, one per logging step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def gradients_of_first_step(trainer: PreferenceTrainer) -> dict[str, torch.Tensor]:
    """Every gradient of the first optimizer step, before clipping and before the step is taken."""
    found = {}
    original = trainer._clip_grad_norm

    def keep(model):
        if not found:
            for name, parameter in trainer.model.named_parameters():
                if parameter.grad is not None:
                    found[name] = parameter.grad.clone()
        return original(model)

    trainer._clip_grad_norm = keep
    train(trainer)
    return found
