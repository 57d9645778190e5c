"""The one error of recipes and of the command line, in a file that imports nothing heavy."""

from prefopt.errors import UserError


class RecipeError(UserError):
    """A recipe that cannot be run; the message lists every problem with its file and dotted key."""
