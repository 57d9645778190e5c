"""The arguments of `prefopt compare`, checked before anything heavy is imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

from prefopt.errors import UserError
from prefopt.option_values import nearest
from prefopt.options import Loss

KNOWN = get_args(get_type_hints(Loss)["method"])


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """Which methods, how many runs of each, and where the results go.

    Args:
        methods: two or more of the recipe's ``loss.method``, in the order of the table.
        runs: number of runs of each method; run k has the recipe's seed plus k.
        out: folder, new or of an earlier start of the same comparison.

    Raises:
        UserError: an unknown or repeated method, one method alone, ``runs`` below 1, ``out`` is a file.

    Example:
        >>> CompareRequest(methods=("kto", "dop"), runs=3, out=Path("comparison"))
        Traceback (most recent call last):
        prefopt.errors.UserError: --methods has 'dop'; expected some of kto, ...; did you mean dpo?
    """

    methods: tuple[str, ...]
    runs: int
    out: Path

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in KNOWN:
                known = ", ".join(KNOWN)
                raise UserError(f"--methods has {method!r}; expected some of {known}{nearest(method, KNOWN)}")
            if self.methods.count(method) > 1:
                raise UserError(f"--methods has {method} twice; --runs repeats every method")
        if len(self.methods) < 2:
            raise UserError(f"--methods is {', '.join(self.methods) or 'empty'}; expected two or more to compare")
        if self.runs < 1:
            raise UserError(f"--runs is {self.runs}; expected a number from 1")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; expected a folder")
