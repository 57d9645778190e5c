"""Preference data: from rows on disk to the tensors of a micro-batch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefopt.data.collate import PreferenceCollator, pair_mismatched
    from prefopt.data.read import LoadedRows, load_rows, split_by_group
    from prefopt.data.sampler import LabelBalancedSampler
    from prefopt.data.tokenize import Tokenized, tokenize_rows
    from prefopt.errors import BadRow, DataError

_MODULES = {
    "PreferenceCollator": "data.collate",
    "pair_mismatched": "data.collate",
    "LoadedRows": "data.read",
    "load_rows": "data.read",
    "split_by_group": "data.read",
    "LabelBalancedSampler": "data.sampler",
    "Tokenized": "data.tokenize",
    "tokenize_rows": "data.tokenize",
    "BadRow": "errors",
    "DataError": "errors",
}

__all__ = [
    "BadRow",
    "DataError",
    "LabelBalancedSampler",
    "LoadedRows",
    "PreferenceCollator",
    "Tokenized",
    "load_rows",
    "pair_mismatched",
    "split_by_group",
    "tokenize_rows",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use: torch and datasets take seconds to import."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"prefopt.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
