"""What training shows in a terminal: one line for each log, in place of Trainer's dictionary."""

import math
import time
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer

from prefopt.train.methods import ANSWERS

MARGIN = "rewards/margins"


class LogLine:
    """Formats logs and prints them; a mixin for Trainer's two callbacks.

    Speed and time left come from the time between the ends of two steps, without evaluations and checkpoints.
    """

    _first_step = 0  # of this call of train
    _tokens: int | None = None  # up to the last log; not known before the first log of a resumed run
    _total = _since_log = _mark = 0.0  # seconds of training, since the last log, and when the last step ended

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._first_step = state.global_step
        self._tokens = None if state.global_step else 0
        self._total = self._since_log = 0.0
        self._mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        now = time.perf_counter()
        self._total += now - self._mark
        self._since_log += now - self._mark
        self._mark = now

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        self._mark = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        super().on_save(args, state, control, **kwargs)
        self._mark = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        line = self.line(args, state, logs or {})
        if line is None:
            super().on_log(args, state, control, logs=logs, **kwargs)
        else:
            self.write(line)

    def write(self, line: str) -> None:
        print(line, flush=True)

    def line(self, args: Any, state: Any, logs: Mapping[str, Any]) -> str | None:
        """The line of a log of training or of an evaluation; None for any other log."""
        if "train_runtime" in logs:
            steps, seconds = state.global_step - self._first_step, logs["train_runtime"]
            return f"trained {steps:,} step{'' if steps == 1 else 's'} in {duration(seconds)}"
        if "loss" in logs:
            return self._training(args, state, logs)
        prefix = next((name[: -len("_runtime")] for name in logs if name.endswith("_runtime")), None)
        if prefix is None:
            return None
        parts = [_step(state), prefix.replace("_", " ", 1)]
        parts += _measures(args, {k.removeprefix(f"{prefix}_"): v for k, v in logs.items()})
        return "  ".join([*parts, f"in {duration(logs[f'{prefix}_runtime'])}"])

    def _training(self, args: Any, state: Any, logs: Mapping[str, Any]) -> str:
        tokens = logs.get("num_tokens")
        speed = "-"
        if tokens is not None and self._tokens is not None and self._since_log > 0:
            speed = f"{(tokens - self._tokens) / self._since_log:,.0f}"
        self._tokens, self._since_log = tokens, 0.0
        done = state.global_step - self._first_step
        left = self._total / done * (state.max_steps - state.global_step) if done > 0 else None
        return "  ".join(
            [
                _step(state),
                *_measures(args, logs),
                f"lr {number(logs.get('learning_rate'), '.1e'):>7}",
                f"{speed:>7} tok/s",
                f"left {'-' if left is None else duration(left)}",
            ]
        )


class LinePrinter(LogLine, PrinterCallback):
    """One printed line for each log."""


class LineProgress(LogLine, ProgressCallback):
    """Trainer's progress bar, with one line for each log above it."""

    def write(self, line: str) -> None:
        if self.training_bar is None:
            super().write(line)
        else:
            self.training_bar.write(line)


def show_lines(trainer: Trainer) -> None:
    """Put the lines in place of what Trainer prints; a callback of another class, such as a notebook's, stays."""
    for kind, ours in ((PrinterCallback, LinePrinter), (ProgressCallback, LineProgress)):
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback) is kind:
                trainer.remove_callback(callback)
                trainer.add_callback(ours())


def number(value: Any, form: str) -> str:
    """A number in its format, in scientific notation where that would be 0 or very long; "-" for none.

    Example:
        >>> number(0.13204, "+.3f"), number(0.00001, "+.3f"), number(None, ".3f"), number(float("nan"), ".3f")
        ('+0.132', '+1e-05', '-', 'nan')
    """
    if value is None:
        return "-"
    text = f"{value:{form}}"
    if form.endswith("f") and value and math.isfinite(value) and not 5e-4 <= abs(value) < 1e4:
        text = f"{value:{form[: form.index('.')]}.0e}"
    return text


def duration(seconds: float) -> str:
    """Seconds in two units at most.

    Example:
        >>> duration(0.4), duration(192), duration(7300), duration(200000)
        ('0s', '3m12s', '2h01m', '2d07h')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    if hours:
        return f"{hours}h{minute:02d}m"
    return f"{minutes}m{second:02d}s" if minutes else f"{second}s"


def _step(state: Any) -> str:
    most = str(state.max_steps)
    return f"step {state.global_step:>{len(most)}}/{most}"


def _measures(args: Any, logs: Mapping[str, Any]) -> list[str]:
    """Loss, and what the method has of margin and KL."""
    found = [f"loss {number(logs.get('loss'), '.4f'):>8}"]
    if args.spec.data != ANSWERS:
        found.append(f"margin {number(logs.get(MARGIN), '+.3f'):>8}")
    if args.needs_kl:
        found.append(f"kl {number(logs.get('kl'), '.3f'):>7}")
    return found
