"""The plugin with a stub of Axolotl that makes the same calls.

Checked by hand on 21 November 2026 against Axolotl 0.19.0 with TRL 1.9.0: ``cli/config.py`` (``prepare_plugins``),
``integrations/base.py`` (``BasePlugin``, ``load_plugin``), ``integrations/config.py`` (``merge_input_args``),
``core/builders/rl.py`` (``_build_training_arguments``, ``_get_trainer_cls``, ``build``) and ``utils/import_helper.py``.
"""

import copy
import importlib
import os
import re
import sys
from types import ModuleType

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["CI"] = "1"  # TRL's trainers ping a server when they are built, unless this is set

import pytest
import trl
import yaml
from pydantic import BaseModel
from transformers import PrinterCallback

from prefopt_kernels.integrations import axolotl as plugin_module
from prefopt_kernels.integrations.axolotl import check_configuration
from support.docs_checks import ROOT, code_blocks
from support.tiny_models import make_dataset
from support.trainer import COMMON, make_world, train

OPTIONS = COMMON | {"max_steps": 2}
PLUGIN = "prefopt_kernels.integrations.axolotl.PrefoptPlugin"


class BasePlugin:
    """The hooks of Axolotl's class that are called below, with its defaults."""

    def register(self, cfg):
        pass

    def get_input_args(self):
        return None

    def get_trainer_cls(self, cfg):
        return None

    def get_training_args(self, cfg):
        return None


class AxolotlKTOTrainer(trl.KTOTrainer):
    """Axolotl's class adds optimizers and schedulers to TRL's."""


class AxolotlInput(BaseModel):
    """A part of Axolotl's schema, which silently drops unknown keys."""

    rl: str | None = None
    plugins: list[str] | None = None
    trainer_cls: str | None = None
    rl_beta: float | None = None


@pytest.fixture
def axolotl(monkeypatch):
    for name, members in {
        "axolotl": {},
        "axolotl.core": {},
        "axolotl.core.trainers": {"AxolotlKTOTrainer": AxolotlKTOTrainer},
        "axolotl.integrations": {},
        "axolotl.integrations.base": {"BasePlugin": BasePlugin},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for made in (plugin_module._trainer, plugin_module._plugin):
        made.cache_clear()
    yield
    for made in (plugin_module._trainer, plugin_module._plugin):
        made.cache_clear()


def load(dotted: str):
    module, name = dotted.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def configure(raw: dict) -> tuple[dict, list]:
    """Register the plugins, then validate by a schema that theirs are part of."""
    raw = dict(raw)
    plugins = [load(name)() for name in raw.get("plugins", ())]
    for plugin in plugins:
        plugin.register(raw)
    schemas = [load(plugin.get_input_args()) for plugin in plugins]
    schema = type("AxolotlInputConfig", (AxolotlInput, *schemas), {})
    return schema(**raw).model_dump(exclude_none=True), plugins


def build(cfg: dict, plugins: list, world, folder) -> trl.KTOTrainer:
    """Axolotl's builder of preference trainers, for KTO."""
    arguments = {"beta": cfg["rl_beta"], "per_device_train_batch_size": 4, **OPTIONS}
    for plugin in plugins:
        arguments |= plugin.get_training_args(cfg) or {}
    args = trl.KTOConfig(str(folder), bf16=False, gradient_checkpointing=False, **arguments)
    # a trainer from get_trainer_cls would not be given the model
    assert all(plugin.get_trainer_cls(cfg) is None for plugin in plugins)
    cls = load(cfg["trainer_cls"]) if cfg.get("trainer_cls") else AxolotlKTOTrainer
    trainer = cls(
        copy.deepcopy(world.model),
        args=args,
        train_dataset=make_dataset(conversational=True),
        callbacks=[],
        processing_class=world.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("qwen3", tmp_path_factory.mktemp("world"))


def snippet() -> dict:
    """The configuration of docs/integrations.md."""
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    (text,) = [code for info, code in code_blocks(page) if info == "yaml" and PLUGIN in code]
    return yaml.safe_load(text)


@pytest.mark.parametrize("loss_type", [None, "apo_zero_unpaired"])
def test_the_documented_configuration_trains_as_axolotl_without_it(loss_type, axolotl, world, tmp_path):
    raw = snippet()
    assert raw.pop("prefopt_loss_type") == "kto"
    cfg, plugins = configure(raw | ({"prefopt_loss_type": loss_type} if loss_type else {}))
    mine = build(cfg, plugins, world, tmp_path / "mine")
    plain = {name: value for name, value in raw.items() if name != "plugins"}
    theirs = build(*configure(plain), world, tmp_path / "theirs")
    assert type(theirs) is AxolotlKTOTrainer
    assert type(mine).__mro__[2] is AxolotlKTOTrainer
    assert mine.loss_type == (loss_type or "kto") and mine.calculate_KL == (loss_type is None)
    mine, theirs = train(mine), train(theirs)
    assert len(mine) == OPTIONS["max_steps"] and len({entry["loss"] for entry in mine}) > 1
    if loss_type is None:
        for found, expected in zip(mine, theirs, strict=True):
            assert found == pytest.approx(expected, abs=1e-4, rel=0)


def test_a_validated_configuration_may_be_registered_again(axolotl):
    cfg, _ = configure(snippet())  # a Ray worker does that
    again, _ = configure(cfg)
    assert again == cfg and cfg["trainer_cls"] == plugin_module.TRAINER


def test_a_configuration_without_the_plugin_is_unchanged(axolotl):
    cfg = {"rl": "dpo", "plugins": ["other.Plugin"]}
    load(PLUGIN)().register(cfg)
    load(PLUGIN)().register(later := {"rl": "dpo"})
    assert "trainer_cls" not in cfg and "trainer_cls" not in later


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rl": "dpo"}, "rl is 'dpo'; expected 'kto'"),
        ({"rl": None}, "rl is None; expected 'kto'"),
        ({"prefopt_los_type": "kto"}, "prefopt_los_type is not .* did you mean prefopt_loss_type"),
        ({"prefopt_loss_type": "bco"}, "prefopt_loss_type is 'bco'; expected one of"),
        ({"trainer_cls": "my.Trainer"}, "trainer_cls is 'my.Trainer'; expected none"),
    ],
)
def test_refusals(change, message, axolotl):
    with pytest.raises(ValueError, match=message):
        configure(snippet() | change)
    with pytest.raises(ValueError, match=message):
        check_configuration(snippet() | change)


def test_unknown_names_and_missing_axolotl():
    with pytest.raises(AttributeError, match=re.escape("has no attribute 'PrefoptPlugins'")):
        _ = plugin_module.PrefoptPlugins
    assert issubclass(plugin_module.PrefoptArgs, BaseModel)
    with pytest.raises(ModuleNotFoundError, match="axolotl"):
        _ = plugin_module.PrefoptPlugin
