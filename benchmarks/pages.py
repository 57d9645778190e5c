"""Tables in pages, between two markers: written by a program, and checked to be what it would write."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"


def replace(page: str, made: str, name: str = "README.md") -> str:
    """The text of a page with ``made`` between the two markers."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"{name} must have {BEGIN} and, after it, {END}, each exactly once")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{made}{END}{after}"


def run(module: str, arguments: Sequence[str] | None, page: Path, made: str, source: str) -> int:
    """The command line of a program that writes a page: its exit status.

    Args:
        module: to be run by ``python -m``; its docstring is the help.
        arguments: of the command line, or None for those of this process.
        page: with the markers.
        made: what belongs between them.
        source: what it is made from, in words.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=importlib.import_module(module).__doc__,
    )
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if it would change")
    check = parser.parse_args(arguments).check
    old = page.read_text(encoding="utf-8")
    new = replace(old, made, page.name)
    if new != old and check:
        print(f"{page.name}: its tables are not those of the {source}; run python -m {module}")
    elif new != old:
        page.write_text(new, encoding="utf-8")
    return int(check and new != old)
