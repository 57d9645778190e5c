"""The options of `prefopt eval`, checked before anything heavy is imported."""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path

from prefopt.errors import UserError
from prefopt.options import QUANTIZATIONS

SUITES = {
    "benchmarks": "HellaSwag 10-shot, TruthfulQA MC2 0-shot and MMLU-mini 5-shot",
    "preference": "margin, accuracy, KL and likelihoods on held-out rows, and win rate of sampled answers by a rule",
    "classify": "one of 14 fields for each question: by likelihood, and by what is generated",
}
# The suites that accept an option.
OPTIONS = {
    "data": ("preference", "classify"),
    "split": ("preference", "classify"),
    "tasks_dir": ("benchmarks",),
    "rule": ("preference",),
    "temperature": ("preference",),
    "max_new_tokens": ("preference", "classify"),
}


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """One evaluation of one run; an option that is not given is None.

    Raises:
        UserError: an unknown suite, an option of another suite, or a number out of range.

    Example:
        >>> EvalRequest(run=Path("runs/kto"), suite="benchmarks").folder
        PosixPath('runs/kto')
        >>> EvalRequest(run=Path("runs/kto"), suite="benchmarks", rule="demo")
        Traceback (most recent call last):
        prefopt.errors.UserError: --rule belongs to the suite preference, not to benchmarks
    """

    run: Path
    suite: str
    data: str | None = None
    split: str | None = None
    base: str | None = None
    quantization: str | None = None
    limit: int | None = None
    tasks_dir: Path | None = None
    out: Path | None = None
    rule: str | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.suite == "thesis":
            raise UserError("--suite is 'thesis', which is now called benchmarks")
        if self.suite not in SUITES:
            near = difflib.get_close_matches(self.suite, SUITES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--suite is {self.suite!r}; expected one of {', '.join(SUITES)}{hint}")
        for name, suites in OPTIONS.items():
            if getattr(self, name) is not None and self.suite not in suites:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} belongs to the suite {' and '.join(suites)}, not to {self.suite}")
        for name in ("limit", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; expected at least 1")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise UserError(f"--quantization is {self.quantization!r}; expected {' or '.join(QUANTIZATIONS)}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}; expected a number from 0 to {2**32 - 1}")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature is {self.temperature}; expected a number above 0")

    @property
    def folder(self) -> Path:
        """Where the results are written: ``out``, by default the run folder."""
        return self.out or self.run

    def settings(self) -> dict:
        """The given options, for eval.json; paths as text."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in given.items()
            if name not in ("run", "out", "suite") and value is not None
        }
