"""A thin preference trainer on ``transformers.Trainer``."""

from prefopt.train.config import PreferenceConfig
from prefopt.train.diagnostics import TrainingWarning
from prefopt.train.finite import NonFiniteError
from prefopt.train.trainer import PreferenceTrainer

__all__ = ["NonFiniteError", "PreferenceConfig", "PreferenceTrainer", "TrainingWarning"]
