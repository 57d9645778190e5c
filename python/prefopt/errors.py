"""The errors of prefopt that the command line knows. This file imports nothing."""


class UserError(ValueError):
    """Bad input. The message is one sentence that names the argument, file or line and the remedy.

    The command line prints the message alone and exits with code 2. Every other exception exits with code 1.
    """


class RunError(RuntimeError):
    """A run that failed although its input was accepted. The message is one sentence; the exit code is 1."""
