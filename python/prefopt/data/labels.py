"""Labels other than true and false: the user's mapping, and a suggestion of one.

Labels are compared by type and value, because ``1 == True == 1.0`` in Python.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from prefopt.data.rows import LabelTable, key_of, show
from prefopt.errors import DataError

USUAL: tuple[tuple[Any, Any], ...] = (  # (desirable, undesirable)
    (1, 0),
    (1.0, 0.0),
    ("1", "0"),
    ("true", "false"),
    ("True", "False"),
    ("TRUE", "FALSE"),
    ("yes", "no"),
    ("Yes", "No"),
    ("YES", "NO"),
    ("👍", "👎"),
)


def label_table(label_map: Mapping | None) -> LabelTable:
    """The checked mapping, by type and value of its keys.

    Args:
        label_map: from labels (text or numbers) to true and false; both must occur. None is an empty mapping.

    Raises:
        DataError: it is not such a mapping.

    Example:
        >>> label_table({1: True, 0: False})
        {(<class 'int'>, 1): True, (<class 'int'>, 0): False}
    """
    if label_map is None:
        return {}
    if not isinstance(label_map, Mapping) or not label_map:
        raise DataError(f"label_map is {show(label_map)}; expected a mapping such as {{1: true, 0: false}}")
    for label, value in label_map.items():
        if isinstance(label, bool):
            raise DataError(
                f"label_map has the key {str(label).lower()}; true and false need no conversion. If the rows have the "
                'words yes and no (or on and off), quote them, {"yes": true, "no": false}: YAML reads them as true and '
                "false"
            )
        if not isinstance(label, (str, int, float)) or label != label or label in (math.inf, -math.inf):
            raise DataError(f"label_map has the key {show(label)}; expected text or a number")
        if not isinstance(value, bool):
            raise DataError(f"label_map converts {show(label)} to {show(value)}; expected true or false")
    if len(set(label_map.values())) == 1:
        only = str(next(iter(label_map.values()))).lower()
        raise DataError(f"label_map converts every label to {only}; expected labels for true and for false")
    return {key_of(label): value for label, value in label_map.items()}


def suggestion(labels: Iterable[tuple[type, Any]]) -> str:
    """A sentence with a usual mapping that converts all these labels; empty if there is none.

    Args:
        labels: type and value of each, from ``LabelError.label``.

    Example:
        >>> suggestion({(int, 1), (int, 0)})[:80]
        'If 1 marks desirable rows and 0 undesirable ones, convert them with data.label_m'
    """
    found = set(labels)
    for good, bad in USUAL:
        if found and found <= {key_of(good), key_of(bad)}:
            good, bad = (json.dumps(one, ensure_ascii=False) for one in (good, bad))
            return (
                f"If {good} marks desirable rows and {bad} undesirable ones, convert them with data.label_map "
                f"{{{good}: true, {bad}: false}} (--data.label_map in training, --label-map in `prefopt data check`, "
                "label_map of load_rows)."
            )
    return ""
