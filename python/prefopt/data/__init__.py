"""Preference data: from rows on disk to the tensors of a micro-batch."""

from prefopt.data.collate import PreferenceCollator, pair_mismatched
from prefopt.data.read import LoadedRows, load_rows, split_by_group
from prefopt.data.rows import BadRow, DataError
from prefopt.data.sampler import LabelBalancedSampler
from prefopt.data.tokenize import Tokenized, tokenize_rows

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
