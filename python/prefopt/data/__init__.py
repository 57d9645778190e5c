"""Preference data: from rows on disk to the tensors of a micro-batch."""

from importlib import import_module

_HOMES = {
    "PreferenceCollator": "collate",
    "pair_mismatched": "collate",
    "LoadedRows": "read",
    "load_rows": "read",
    "split_by_group": "read",
    "BadRow": "rows",
    "DataError": "rows",
    "LabelBalancedSampler": "sampler",
    "Tokenized": "tokenize",
    "tokenize_rows": "tokenize",
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
    """Import a public name when it is first asked for: torch and datasets take seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
