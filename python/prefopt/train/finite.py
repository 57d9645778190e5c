"""Stops a run at the first loss or gradient that is not finite, and names the rows."""

import math
from typing import NoReturn

import torch
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from prefopt.errors import RunError


class NonFiniteError(RunError):
    """A loss or gradient was NaN or infinite. ``step`` counts from 1; ``rows`` are positions in the training data."""

    def __init__(self, message: str, step: int, rows: list[int]):
        super().__init__(message)
        self.step = step
        self.rows = rows


class FiniteWatch:
    """Keeps row losses of every micro-batch and gradient norms of every step until they are checked.

    A check waits for the device. On the CPU that is cheap, so every optimizer step is checked. Elsewhere the sums that
    are read for each log and each checkpoint show whether a check is needed, so no checkpoint is saved after a bad
    step.
    """

    def __init__(self, output_dir: str):
        self.output_dir = output_dir
        self._losses: list[tuple[int, list[int], Tensor]] = []  # step, rows, (B,) per-row values
        self._norms: list[tuple[int, Tensor]] = []  # step, 0-dim

    def add_rows(self, step: int, rows: list[int], values: Tensor) -> None:
        """A micro-batch of optimizer step ``step``: something of each row that is finite if the row is."""
        self._losses.append((step, rows, values))

    def add_gradient(self, step: int, norm: Tensor | float) -> None:
        """The gradient norm of optimizer step ``step``, before clipping."""
        self._norms.append((step, torch.as_tensor(norm)))

    def check(self) -> None:
        """Check everything added since the last check.

        Raises:
            NonFiniteError: naming the first bad step.
        """
        losses, self._losses = self._losses, []
        norms, self._norms = self._norms, []
        if not losses and not norms:
            return
        flat = torch.cat([values for _, _, values in losses] or [torch.zeros(0)]).tolist()  # waits
        found: list[tuple[int, int, float]] = []  # step, row, value
        for step, rows, values in losses:
            here, flat = flat[: len(values)], flat[len(values) :]
            pairs = zip(rows, here, strict=True)
            found += [(step, row, value) for row, value in pairs if not math.isfinite(value)]
        if found:
            step, _, value = found[0]
            self._stop(step, "loss", value, [row for at, row, _ in found if at == step])
        sizes = torch.stack([norm for _, norm in norms]).tolist() if norms else []
        for (step, _), value in zip(norms, sizes, strict=True):
            if not math.isfinite(value):
                rows = [row for at, window, _ in losses if at == step for row in window]
                self._stop(step, "gradient norm", value, rows)

    def forget(self) -> None:
        """Drop what was added: it is known to be finite."""
        self._losses, self._norms = [], []

    def stop_elsewhere(self, step: int) -> NoReturn:
        """Stop because the sums over all processes are not finite, while this one's part is."""
        raise NonFiniteError(
            f"step {step} or one shortly before: a loss on another process is not finite; its message names the rows. "
            f"Last good checkpoint: {get_last_checkpoint(self.output_dir) or 'none yet'}.",
            step,
            [],
        )

    def _stop(self, step: int, what: str, value: float, rows: list[int]) -> NoReturn:
        last = get_last_checkpoint(self.output_dir)
        shown = ", ".join(str(row) for row in rows[:32]) + (", ..." if len(rows) > 32 else "")
        raise NonFiniteError(
            f"step {step}: the {what} is {value}, with rows [{shown}] of the training data. "
            f"Last good checkpoint: {last or 'none yet'}. "
            "Look at these rows, lower the learning rate, or train in fp32 or bf16 rather than fp16.",
            step,
            rows,
        )
