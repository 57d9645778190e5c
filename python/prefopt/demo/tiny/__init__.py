"""`prefopt train RECIPE --tiny`: a recipe on a model of under a million parameters and built-in rows."""

from prefopt.demo.tiny.shrink import tiny_recipe

__all__ = ["tiny_recipe"]
