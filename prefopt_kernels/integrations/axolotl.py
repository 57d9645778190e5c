"""Axolotl's KTO on ``linear_logprob``: one line in the configuration.

    rl: kto
    plugins:
      - prefopt_kernels.integrations.axolotl.PrefoptPlugin

Axolotl 0.19 pins TRL 1.9, whose KTO trainer builds the logits of every batch; with the plugin it trains with the class
of :mod:`prefopt_kernels.integrations.trl.kto`. The plugin names that class as ``trainer_cls`` of the configuration. It
does not return it from ``get_trainer_cls``, because Axolotl's builder of preference trainers then leaves out the model
that it passes to all others (``_get_trainer_cls`` in its core/builders/rl.py returns no positional arguments).

``PrefoptPlugin``, ``PrefoptArgs`` and ``FusedKTOTrainer`` are made when they are first asked for: they are subclasses
of Axolotl's and pydantic's classes, which this package does not need otherwise. Calls and signatures are those of
Axolotl 0.19.0, read and run on 21 November 2026.
"""

import difflib
from functools import cache

from prefopt_kernels.integrations.trl.kto import LOSSES, fused_kto_trainer

TRAINER = f"{__name__}.FusedKTOTrainer"
OPTIONS = ("prefopt_loss_type",)


def __getattr__(name: str):
    make = {
        "FusedKTOTrainer": _trainer,
        "PrefoptArgs": _arguments,
        "PrefoptPlugin": _plugin,
    }.get(name)
    if make is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return make()


def check_configuration(cfg: dict) -> None:
    """Raise ValueError for the first thing in Axolotl's configuration that the plugin cannot serve.

    Example:
        >>> check_configuration({"rl": "kto", "prefopt_los_type": "kto"})
        Traceback (most recent call last):
            ...
        ValueError: prefopt_los_type is not an option of the plugin; did you mean prefopt_loss_type?
        >>> check_configuration({"rl": "dpo"})
        Traceback (most recent call last):
            ...
        ValueError: rl is 'dpo'; expected 'kto', which is what the plugin trains
    """
    rl = cfg.get("rl")
    if rl != "kto":
        raise ValueError(f"rl is {rl!r}; expected 'kto', which is what the plugin trains")
    for name in cfg:
        if str(name).startswith("prefopt_") and name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.0)[0]
            raise ValueError(f"{name} is not an option of the plugin; did you mean {near}?")
    loss_type = cfg.get("prefopt_loss_type")
    if loss_type not in (None, *LOSSES):
        raise ValueError(f"prefopt_loss_type is {loss_type!r}; expected one of {LOSSES}")
    if cfg.get("trainer_cls") not in (None, TRAINER):
        raise ValueError(f"trainer_cls is {cfg.get('trainer_cls')!r}; expected none, because the plugin sets it")


@cache
def _trainer() -> type:
    from axolotl.core.trainers import AxolotlKTOTrainer

    return fused_kto_trainer(AxolotlKTOTrainer)


@cache
def _arguments() -> type:
    """The plugin's options in Axolotl's configuration."""
    from pydantic import BaseModel

    class PrefoptArgs(BaseModel):
        prefopt_loss_type: str | None = None  # TRL's: "kto" (the default) or "apo_zero_unpaired"

    return PrefoptArgs


@cache
def _plugin() -> type:
    from axolotl.integrations.base import BasePlugin

    class PrefoptPlugin(BasePlugin):
        """Trains ``rl: kto`` with fused log-probabilities; see the module."""

        def register(self, cfg) -> None:
            # Axolotl asks every plugin that it ever loaded, also for a later configuration without it
            if not any(str(name).startswith(__name__) for name in cfg.get("plugins") or ()):
                return
            check_configuration(cfg)
            cfg["trainer_cls"] = TRAINER

        def get_input_args(self) -> str:
            return f"{__name__}.PrefoptArgs"

        def get_training_args(self, cfg) -> dict:
            loss_type = cfg.get("prefopt_loss_type")
            return {} if loss_type is None else {"loss_type": loss_type}

    return PrefoptPlugin
