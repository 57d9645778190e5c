"""Preference training on fused log-probabilities: data, a thin trainer, reports and the command line."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefopt.data import load_rows
    from prefopt.train import PreferenceConfig, PreferenceTrainer

__version__ = "0.1.0"
__all__ = ["PreferenceConfig", "PreferenceTrainer", "load_rows"]

_MODULES = {"PreferenceConfig": "train", "PreferenceTrainer": "train", "load_rows": "data"}


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import prefopt` and the command line stay fast."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
