"""YAML from a file or the command line: the safe loader, with unique keys and bounds on size, depth and aliases."""

from pathlib import Path
from typing import Any

import yaml

from prefopt.errors import UserError

MAX_CHARACTERS = 256 * 1024
MAX_DEPTH = 40
MAX_VALUES = 5_000  # keys and values, with aliases expanded


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; see ``parse_yaml``.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read; the message names the file.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or a NUL byte in the path
        raise UserError(f"{path} cannot be read: {error}") from None
    try:
        return parse_yaml(text)
    except UserError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None


def parse_yaml(text: str) -> Any:
    """The content of a YAML document; None if it is empty.

    Raises:
        UserError: invalid YAML, a repeated key, or a document beyond the bounds. The message is one sentence without
            the name of the file.

    Example:
        >>> parse_yaml("{beta: 0.2, report_to: [none]}")
        {'beta': 0.2, 'report_to': ['none']}
        >>> parse_yaml("&a [*a]")
        Traceback (most recent call last):
        prefopt.errors.UserError: an alias contains itself
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"more than {MAX_CHARACTERS:,} characters")
    try:
        loader = _Loader(text)
        try:
            return loader.construct_bounded()
        finally:
            loader.dispose()
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = ", ".join(one for one in (error.context, error.problem) if one)
        raise UserError(f"{what}{where}") from None
    except yaml.YAMLError as error:
        raise UserError(" ".join(str(error).split())) from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        # the constructors of dates, numbers and explicit tags do not check what they are given
        raise UserError(f"a value does not fit its type ({error})") from None


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._count = 0

    def construct_bounded(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MAX_VALUES:
            raise UserError(f"more than {MAX_VALUES:,} keys and values with aliases expanded")
        return self.construct_document(node)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth, self._count = self._depth + 1, self._count + 1
        if self._count > MAX_VALUES:
            raise UserError(f"more than {MAX_VALUES:,} keys and values")
        if self._depth > MAX_DEPTH:
            line = self.peek_event().start_mark.line + 1
            raise UserError(f"nested more than {MAX_DEPTH} deep at line {line}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        """A repeated key is an error; the base class keeps the last one."""
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} appears twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Nodes at and below ``node``, counting every use of an alias; ``sizes`` has None for what is being counted."""
    known = sizes.get(id(node), 0)
    if known is None:
        raise UserError("an alias contains itself")
    if known:
        return known
    sizes[id(node)] = None
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [one for pair in children for one in pair]
    size = 1 + sum(_size(child, sizes) for child in children)
    sizes[id(node)] = size
    return size
