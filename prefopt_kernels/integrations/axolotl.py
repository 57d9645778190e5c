"""Axolotl's KTO on ``linear_logprob``, as a plugin.

    rl: kto
    plugins:
      - prefopt_kernels.integrations.axolotl.PrefoptPlugin

Axolotl 0.19 pins TRL 1.9, whose KTO trainer builds the logits of every batch; the plugin replaces it by the class of
:mod:`prefopt_kernels.integrations.trl.kto`. It sets ``trainer_cls`` in the configuration rather than
``get_trainer_cls``, with which Axolotl's builder of preference trainers does not pass the model.

``PrefoptPlugin``, ``PrefoptArgs`` and ``FusedKTOTrainer`` are defined on first use, because they derive from Axolotl's
and pydantic's classes. Calls and signatures are those of Axolotl 0.19.0.
"""

import difflib
from functools import cache
from typing import Any

from prefopt_kernels.integrations._optional import lazy_classes
from prefopt_kernels.integrations.trl.kto import METHODS, fused_kto_trainer

TRAINER = f"{__name__}.FusedKTOTrainer"
OPTIONS = ("prefopt_loss_type",)


def check_configuration(cfg: Any) -> None:
    """Raise ValueError for the first setting of Axolotl's configuration that the plugin does not support.

    Example:
        >>> check_configuration({"rl": "kto", "prefopt_los_type": "kto"})
        Traceback (most recent call last):
            ...
        ValueError: prefopt_los_type is not an option of the plugin; did you mean prefopt_loss_type?
        >>> check_configuration({"rl": "dpo"})
        Traceback (most recent call last):
            ...
        ValueError: rl is 'dpo'; expected 'kto', the only method of the plugin
    """
    rl = cfg.get("rl")
    if rl != "kto":
        raise ValueError(f"rl is {rl!r}; expected 'kto', the only method of the plugin")
    for name in cfg:
        if str(name).startswith("prefopt_") and name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.0)[0]
            raise ValueError(f"{name} is not an option of the plugin; did you mean {near}?")
    loss_type = cfg.get("prefopt_loss_type")
    if loss_type not in (None, *METHODS):
        raise ValueError(f"prefopt_loss_type is {loss_type!r}; expected one of {tuple(METHODS)}")
    if cfg.get("trainer_cls") not in (None, TRAINER):
        raise ValueError(f"trainer_cls is {cfg.get('trainer_cls')!r}; expected none: the plugin sets it")


@cache
def _trainer() -> type:
    from axolotl.core.trainers import AxolotlKTOTrainer

    return fused_kto_trainer(AxolotlKTOTrainer)


@cache
def _arguments() -> type:
    """The plugin's options in Axolotl's configuration: TRL's loss_type, "kto" by default or "apo_zero_unpaired"."""
    from pydantic import create_model

    return create_model("PrefoptArgs", prefopt_loss_type=(str | None, None))


@cache
def _plugin() -> type:
    from axolotl.integrations.base import BasePlugin

    class PrefoptPlugin(BasePlugin):
        """Trains ``rl: kto`` with fused log-probabilities."""

        def register(self, cfg: Any) -> None:
            # Axolotl also calls plugins of earlier configurations in the same process
            if not any(str(name).startswith(__name__) for name in cfg.get("plugins") or ()):
                return
            check_configuration(cfg)
            cfg["trainer_cls"] = TRAINER

        def get_input_args(self) -> str:
            return f"{__name__}.PrefoptArgs"

        def get_training_args(self, cfg: Any) -> dict[str, str]:
            loss_type = cfg.get("prefopt_loss_type")
            return {} if loss_type is None else {"loss_type": loss_type}

    return PrefoptPlugin


__getattr__ = lazy_classes(__name__, FusedKTOTrainer=_trainer, PrefoptArgs=_arguments, PrefoptPlugin=_plugin)
