"""The error of everything a user gives: options, files, data, models. This file imports nothing."""


class UserError(ValueError):
    """Bad input. The message is one sentence that names the argument, file or line and the remedy.

    The command line prints the message alone and exits with code 2. Every other exception exits with code 1.
    """
