"""A thin preference trainer on ``transformers.Trainer``."""

from prefopt.train.config import PreferenceConfig

__all__ = ["PreferenceConfig"]
