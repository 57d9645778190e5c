"""What the losses of a window need before its first micro-batch: the reference point, the shift, the decision mean.

They come from passes without gradient over rows of the whole window. Policy and reference score the same passes, so
that rounding cancels in the log-ratio: equal weights give 0.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from prefopt.train.methods import Baselines, Sequences
from prefopt.train.mismatched import Mismatched
from prefopt.train.passes import by_prompt, cut, width
from prefopt.train.scoring import Scores, sequences
from prefopt.train.window import Window
from prefopt_kernels.reference_point import EMAKL, MicrobatchKL, WindowKL

if TYPE_CHECKING:
    from prefopt.train.trainer import PreferenceTrainer


@dataclass(frozen=True)
class StepValues:
    """Of a window: its baselines, and each micro-batch's scores where they were computed for them.

    ``made``: whether the baselines were made "ahead" of the passes with gradient, are completed "here", from the one
    pass that has all rows of the step, or are those of the step "before".
    """

    baselines: Baselines
    ahead: list[Scores | None]
    made: Literal["ahead", "here", "before"] = "ahead"


class StepScores:
    """Runs the passes of a window or micro-batch that have no gradient."""

    def __init__(self, trainer: "PreferenceTrainer"):
        self.trainer = trainer
        self.exact = trainer.args.kl_estimator == "exact"
        self.reset()

    def reset(self) -> None:
        """Forget the step before."""
        self._previous: Baselines | None = None
        self._scored: list[tuple[Sequences, Tensor | None]] = []  # micro-batches of the present window

    def values(self, window: Window, mode: str) -> StepValues:
        """Of the window of an optimizer step, or of one evaluation batch, which changes no running average."""
        args, baselines = self.trainer.args, Baselines()
        nothing: list[Scores | None] = [None] * len(window.batches)
        if args.kl_estimator in ("window", "ema"):
            baselines = Baselines(reference_point=self.reference_point(window, mode))
        if not args.needs_window:
            return StepValues(baselines, nothing)
        if len(window.batches) == 1:
            return StepValues(baselines, nothing, "here")
        if args.window_values == "previous" and self._previous is not None:
            point = self._previous.reference_point if self.exact else baselines.reference_point
            previous = replace(self._previous, reference_point=point, gate=self.trainer.baselines.gate)
            return StepValues(previous, nothing, "before")
        with torch.no_grad():
            ahead = [self.trainer.scorer.both(batch) for batch in window.batches]
        parts = list(zip(window.batches, ahead, window.kept, strict=True))
        rows = [sequences(batch, scores).first(kept) for batch, scores, kept in parts]
        kls = [scores.kls[:kept] for _, scores, kept in parts if scores.kls is not None]
        baselines = self._completed(baselines, Sequences.joined(rows), torch.cat(kls) if kls else None, mode)
        return StepValues(baselines, list(ahead))

    def baselines(self, values: StepValues, rows: Sequences, kls: Tensor | None, mode: str) -> Baselines:
        """For a micro-batch that has just been scored: its rows, each once, and their exact KL (n,)."""
        if values.made == "here":
            return self._completed(values.baselines, rows, kls, mode)
        if values.made == "before":
            self._scored.append((replace(rows, logps=rows.logps.detach()), kls))
            if len(self._scored) == len(values.ahead):
                parts, found = zip(*self._scored, strict=True)
                known = [one for one in found if one is not None]
                self._completed(Baselines(), Sequences.joined(parts), torch.cat(known) if known else None, mode)
                self._scored = []
        return values.baselines

    def _completed(self, baselines: Baselines, rows: Sequences, kls: Tensor | None, mode: str) -> Baselines:
        """With the shift, the decision mean and the exact reference point of all rows of the step."""
        point = baselines.reference_point
        if self.exact:
            assert kls is not None
            point = self._estimator.estimate(kls.detach(), update=mode == "train")
            self.trainer._sums[mode].add_estimate(point)
        found = self.trainer.baselines.estimate(rows, update=mode == "train")
        if found.shift is not None:
            self.trainer._sums[mode].add_shift(found.shift, found.gate)
        found = replace(found, reference_point=point)
        if mode == "train":
            self._previous = found
        return found

    def state_dict(self) -> dict[str, float]:
        """The values of the last step, if the next one needs them; JSON-ready, fp32 numbers come back to the bit."""
        last = self._previous
        if last is None or self.trainer.args.window_values != "previous":
            return {}
        values = {"shift": last.shift, "decision_mean": last.decision_mean}
        if self.exact:
            values["reference_point"] = torch.as_tensor(last.reference_point)
        return {name: value.item() for name, value in values.items() if value is not None}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from ``state_dict``."""
        if state:
            device = self.trainer.args.device
            values: dict[str, Any] = {name: torch.tensor(value, device=device) for name, value in state.items()}
            self._previous = Baselines(**values)

    def reference_point(self, window: Window, mode: str) -> Tensor:
        """0-dim, nats, from passes over mismatched completions, at most as many as the window has micro-batches."""
        trainer, mismatched = self.trainer, self.trainer.mismatched
        assert mismatched is not None
        rows = [window.rows[place] for place in window.counted]
        found, collator = mismatched.answers(rows), trainer.scorer.collator
        without = len(rows) - len(found)
        if mode == "train":
            found = self._chosen(found)
        log_ratios = torch.zeros(len(found), device=trainer.args.device)
        for piece in self._pieces(found, window):
            answers = [found[number].answer for number in piece]
            if answers or trainer.layout.in_lockstep:  # an idle rank runs a dummy pass
                batch = collator.lay_out(answers) if answers else collator.dummy_pass()
                known = [found[number].ref_logp for number in piece]
                if trainer.args.precompute_ref_logps:
                    batch["ref_logps"] = torch.tensor(known if answers else [0.0], dtype=torch.float32)
                ratios = trainer.scorer.log_ratios(batch)
                if answers:
                    log_ratios[piece] = ratios
        point = self._estimator.estimate(log_ratios, update=mode == "train")
        error = self._estimator.standard_error if mode == "train" else 0.0
        trainer._sums[mode].add_estimate(point, without, error**2 / trainer.accelerator.num_processes)
        return point

    def _chosen(self, found: list[Mismatched]) -> list[Mismatched]:
        """This rank's share of ``kl_rows``, another one in each step."""
        args, accelerator = self.trainer.args, self.trainer.accelerator
        if not isinstance(args.kl_rows, int):
            return found
        rank, ranks = accelerator.process_index, accelerator.num_processes
        share = args.kl_rows // ranks + (rank < args.kl_rows % ranks)
        chosen = random.Random(f"{args.seed} {self.trainer.state.global_step} {rank}")
        return [found[n] for n in sorted(chosen.sample(range(len(found)), min(share, len(found))))]

    @property
    def _estimator(self) -> WindowKL | MicrobatchKL | EMAKL:
        assert self.trainer.mismatched is not None
        return self.trainer.mismatched.estimator

    def _pieces(self, found: list[Mismatched], window: Window) -> list[list[int]]:
        """By length, or in the micro-batch of the prompt's row."""
        answers, collator = [one.answer for one in found], self.trainer.scorer.collator
        if not self.trainer.recuts:
            counted = window.counted
            batch_of = {place: number for number, here in enumerate(window.places) for place in here}
            pieces: list[list[int]] = [[] for _ in window.places]
            for n, one in enumerate(found):
                pieces[batch_of[counted[one.row]]].append(n)
            return pieces
        groups = by_prompt(answers) if collator.shared else [[n] for n in range(len(answers))]
        widths = [width(answers, group) for group in groups]
        most = len(window.batches)
        if isinstance(rows := self.trainer.args.kl_rows, int):
            largest = self.trainer.args.per_device_train_batch_size * self.trainer.accelerator.num_processes
            most = min(most, math.ceil(rows / largest))  # the same on all ranks
        pieces = cut(widths, most, packed=collator.packed)
        return [[n for group in piece for n in groups[group]] for piece in pieces]
