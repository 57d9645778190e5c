"""What the losses of a window need before its first micro-batch: the reference point, the shift, the decision mean.

They come from passes without gradient over rows of the whole window. Policy and reference score the same passes, so
that rounding cancels in the log-ratio: equal weights give 0.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prefopt.train.methods import Baselines, Sequences
from prefopt.train.mismatched import Mismatched
from prefopt.train.passes import by_prompt, cut, width
from prefopt.train.scoring import sequences, to_device
from prefopt.train.window import Window

if TYPE_CHECKING:
    from prefopt.train.trainer import PreferenceTrainer


@dataclass(frozen=True)
class StepValues:
    """Of a window: ``ref_logps`` (B,) nats of each micro-batch, None where they are not computed yet.

    ``baselines`` is complete if ``estimated``; otherwise only its reference point is.
    """

    ref_logps: list[Tensor | None]
    baselines: Baselines
    estimated: bool


class StepScores:
    """Runs the passes of a window or micro-batch that have no gradient."""

    def __init__(self, trainer: "PreferenceTrainer"):
        self.trainer = trainer

    def values(self, window: Window, mode: str, *, reference_point: bool, ahead: bool) -> StepValues:
        """Score the window.

        Args:
            window: of an optimizer step, or one micro-batch or evaluation batch.
            mode: "train" or "eval"; evaluation does not change running averages.
            reference_point: estimate KTO's.
            ahead: estimate the shift and the decision mean from all rows; otherwise each micro-batch does.
        """
        trainer, scorer = self.trainer, self.trainer.scorer
        baselines, exact = Baselines(), trainer.args.kl_estimator == "exact"
        if reference_point and trainer.mismatched is not None and not exact:
            baselines = Baselines(reference_point=self._reference_point(window, mode))
        alone = len(window.batches) == 1  # then the pass with gradient has the exact KL of all rows
        if not ahead and (alone or not exact):
            return StepValues([None] * len(window.batches), baselines, estimated=False)
        parts: list[Sequences] = []
        refs: list[Tensor | None] = []
        kls: list[Tensor] = []
        for batch, kept in zip(window.batches, window.kept, strict=True):
            batch = to_device(batch, trainer.args.device)
            if exact:
                with torch.no_grad():
                    scores = scorer.policy_with_kl(batch)
                assert scores.kls is not None
                logps, ref_logps = scores.logps, scores.ref_logps
                kls.append(scores.kls[:kept])
            else:
                logps, ref_logps = scorer.policy_logps(batch), scorer.known_ref_logps(batch)
            refs.append(ref_logps)
            parts.append(sequences(batch, logps, ref_logps).first(kept))
        if exact:
            baselines = Baselines(reference_point=self.exact_point(torch.cat(kls), mode))
        if not ahead:
            return StepValues(refs, baselines, estimated=False)
        estimated = self.trainer.estimate(Sequences.joined(parts), mode)
        return StepValues(refs, replace(estimated, reference_point=baselines.reference_point), estimated=True)

    def exact_point(self, kls: Tensor, mode: str) -> Tensor:
        """0-dim, nats: the mean over all ranks of the rows' exact KL (n,), each summed over its completion."""
        assert self.trainer.mismatched is not None
        point = self.trainer.mismatched.estimator.estimate(kls.detach(), update=mode == "train")
        self.trainer._sums[mode].add_estimate(point)
        return point

    def _reference_point(self, window: Window, mode: str) -> Tensor:
        """0-dim, nats, from as many passes as the window has micro-batches."""
        trainer, mismatched = self.trainer, self.trainer.mismatched
        assert mismatched is not None
        rows = [window.rows[place] for place in window.counted]
        found, collator = mismatched.answers(rows), trainer.scorer.collator
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
        point = mismatched.estimator.estimate(log_ratios, update=mode == "train")
        trainer._sums[mode].add_estimate(point, len(rows) - len(found))
        return point

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
        pieces = cut(widths, len(window.batches), packed=collator.packed)
        return [[n for group in piece for n in groups[group]] for piece in pieces]
