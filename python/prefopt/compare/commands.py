"""The command `prefopt compare`."""

import argparse
from collections.abc import Callable
from typing import Any


def add_compare_command(
    commands: Any,
    command: Callable[..., argparse.ArgumentParser],
    no_more: Callable[[list[str], list[str]], None],
) -> None:
    """Add the command."""
