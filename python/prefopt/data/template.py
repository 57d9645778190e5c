"""Arguments of a chat template, checked before a row is rendered."""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase


def template_problems(kwargs: Mapping[Any, Any], key: str) -> list[str]:
    """One sentence for each argument that ``apply_chat_template`` takes for itself or cannot pass on.

    Args:
        kwargs: for the template, by name.
        key: names the option in the sentences.

    Example:
        >>> template_problems({"enable_thinking": False, "tokenize": True}, "--template")
        ['--template has tokenize, which is set for every row; leave it out']
    """
    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
    taken = taken - {"tools", "documents"} | {"messages"}
    found = []
    for name, value in kwargs.items():
        if not isinstance(name, str):
            found.append(f"{key} has the key {name!r}; expected names")
        elif name in taken:
            found.append(f"{key} has {name}, which is set for every row; leave it out")
        elif name in ("tools", "documents") and not isinstance(value, list):
            found.append(f"{key} has {name} {value!r:.60}; expected a list")
    return found
