"""TRL's KTOTrainer with our losses and one reference point per optimizer step; needs TRL 1.16.

What TRL does stays TRL's: data, reference model, forward passes, metrics, checkpoints. Its ``_compute_loss`` runs as it
is, on reference log-probabilities that are computed here, and its loss is replaced by ours. A window's
micro-batches are scored under the reference, and their mismatched completions under the policy, at its first
micro-batch: the same number of forward passes in another order. BCO's shift needs the policy's scores of the whole
window, so with several micro-batches each is scored once more, without gradient.
"""

import difflib
import inspect
import json
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import KTOConfig, KTOTrainer

from prefopt.options import in_force
from prefopt.train.checkpoint import ResumableTrainer
from prefopt_kernels.integrations.trl import patch
from prefopt_kernels.losses import apo_zero_loss, bco_loss, enhanced_kto_loss, kto_loss
from prefopt_kernels.reference_point import MicrobatchKL, WindowKL, WindowShift

# The loss type that TRL's trainer runs with: one with the same data, above all the same mismatched completions.
TRL_LOSS_TYPE = {
    "kto": "kto",
    "enhanced_kto": "kto",
    "apo_zero_unpaired": "apo_zero_unpaired",
    "bco": "apo_zero_unpaired",
}
KL_ESTIMATORS: dict[str, type[WindowKL] | type[MicrobatchKL]] = {"window": WindowKL, "microbatch": MicrobatchKL}
ENHANCED_KTO = {  # of prefopt's defaults, those that enhanced_kto_loss does not have itself
    name: in_force({"method": "enhanced_kto"})[name]
    for name in ("loss_aversion", "alpha", "decision_weighting", "odds_weight")
}
LOSS_KWARGS = ("beta", "reference_point", "shift", "desirable_weight", "undesirable_weight")
POSITION = "prefopt_window_position"
STATE_NAME = "prefopt_shift.json"


class FusedKTOTrainer(ResumableTrainer, KTOTrainer):
    """``trl.KTOTrainer`` with fused log-probabilities, a window's reference point, and two more losses.

    ``KTOConfig(loss_type=...)`` may also be "enhanced_kto" (:func:`prefopt_kernels.losses.enhanced_kto_loss`) and "bco"
    (arXiv:2404.04656, with one shift per optimizer step, of all its rows and ranks:
    :class:`prefopt_kernels.reference_point.WindowShift`). Every argument of TRL's trainer and of its configuration
    keeps its meaning. ``kl_estimator="microbatch"`` with "kto" or "apo_zero_unpaired" logs what TRL's trainer logs.

    Args:
        model, ref_model, args, and all further ones: as for ``trl.KTOTrainer``.
        kl_estimator: "window", one z0 from all micro-batches and ranks of an optimizer step, or "microbatch", TRL's.
            The mismatched completions are TRL's in either case: rotated by one within each batch of the data.
        loss_options: keyword arguments of :func:`prefopt_kernels.losses.enhanced_kto_loss`, for "enhanced_kto" only,
            on top of ``loss_aversion=2.25, alpha=0.88, decision_weighting="tversky-kahneman", odds_weight=0.1``. With
            ``shift_gate`` the window's shift is estimated too.
        backend: as for :func:`prefopt_kernels.linear_logprob`.

    Logged beside TRL's values: ``shift``, in reward units, where there is one.

    Raises:
        ValueError: an unknown loss type, estimator or option, class weights with "bco" (it has none), or vision data.
        RuntimeError: TRL cannot be patched; see :func:`prefopt_kernels.integrations.trl.patch`.

    Example:
        >>> FusedKTOTrainer("model", args=KTOConfig("run", loss_type="bc0", use_cpu=True, bf16=False))
        Traceback (most recent call last):
            ...
        ValueError: loss_type: 'bc0' is not one of kto, enhanced_kto, apo_zero_unpaired, bco; did you mean 'bco'?
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: KTOConfig | None = None,
        *further,
        kl_estimator: str = "window",
        loss_options: dict | None = None,
        backend: str = "auto",
        **named,
    ):
        method = "kto" if args is None else args.loss_type
        _check(method, args, kl_estimator, loss_options or {})
        self.method = method
        self.loss_options = ENHANCED_KTO | (loss_options or {})
        self.kl_estimator = kl_estimator
        self.backend = backend
        self._z0: Tensor | None = None
        self._window: list[dict] = []
        if args is not None:
            args.loss_type = TRL_LOSS_TYPE[method]
        try:
            with patch(backend=backend):  # the reference may be scored in there
                super().__init__(model, ref_model, args, *further, **named)
        finally:
            if args is not None:
                args.loss_type = method
        if self._is_vision_dataset:
            raise ValueError("train_dataset has images; FusedKTOTrainer takes text only")
        self._kl = KL_ESTIMATORS[kl_estimator]()
        self._shift = WindowShift()

    @property
    def _needs_shift(self) -> bool:
        gate = self.loss_options.get("shift_gate", 0.0)
        return self.method == "bco" or (self.method == "enhanced_kto" and gate != 0.0)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """TRL's; the window's micro-batches are kept and numbered."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = [dict(batch) for batch in batches]
        for position, batch in enumerate(batches):
            batch[POSITION] = position
        return batches, count

    def _precompute_ref_logps(self, *args, **kwargs):
        with patch(backend=self.backend):
            return super()._precompute_ref_logps(*args, **kwargs)

    def _compute_kl_logps(self, model: nn.Module, batch: dict) -> Tensor | None:
        """z0 in place of the policy's scores, beside a reference of 0, once it is known: TRL's mean of it is z0."""
        return super()._compute_kl_logps(model, batch) if self._z0 is None else self._z0[None]

    def _compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool):
        inputs = dict(inputs)
        position = inputs.pop(POSITION, None)  # None in evaluation, where a batch is its own window
        with patch(backend=self.backend):
            if position is None:
                (known,) = self._known(model, [inputs])
            else:
                if position == 0:
                    self._window_scores = self._known(model, self._window)
                known = self._window_scores[position]
            return self._loss(model, inputs | known["inputs"], return_outputs, **known["points"])

    def _loss(self, model, inputs: dict, return_outputs: bool, z0: Tensor | None, shift: Tensor | None):
        """TRL's metrics, and our loss of the same forward pass."""
        passes = []

        def scored(**arguments):
            passes.append(model(**arguments))
            return passes[-1]

        self._z0, precomputed = z0, self.precompute_ref_logps
        self.precompute_ref_logps = True
        try:
            result = super()._compute_loss(scored, inputs, return_outputs)
        finally:
            self._z0, self.precompute_ref_logps = None, precomputed
        logps, ref_logps = _summed(passes[0].log_probs, inputs), inputs["ref_logps"]
        labels = torch.as_tensor(inputs["label"], dtype=torch.bool, device=logps.device)
        if self._needs_shift:
            mode = "train" if cast(nn.Module, self.model).training else "eval"
            if shift is None:
                rewards = self.beta * (logps.detach() - ref_logps)
                shift = self._shift.estimate(rewards, labels, update=mode == "train")
            self._metrics[mode]["shift"].append(shift.item())
        lengths = inputs["completion_mask"][:, 1:].sum(1)
        loss = self._losses(logps, ref_logps, labels, lengths, z0, shift).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * passes[0].aux_loss
        return (loss, result[1]) if return_outputs else loss

    def _losses(self, logps, ref_logps, labels, lengths, z0, shift) -> Tensor:
        rows: dict[str, Any] = {"logps": logps, "ref_logps": ref_logps, "labels": labels, "beta": self.beta}
        if self.method == "bco":
            return bco_loss(**rows, shift=shift)
        weights: dict[str, Any] = {
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }
        if self.method == "apo_zero_unpaired":
            return apo_zero_loss(**rows, **weights)
        if self.method == "kto":
            return kto_loss(**rows, reference_point=z0, **weights)
        options = self.loss_options | ({} if shift is None else {"shift": shift})
        return enhanced_kto_loss(**rows, lengths=lengths, reference_point=z0, **weights, **options)

    def _checkpoint_files(self) -> dict[str, str]:
        """The shift: a window with one class takes the last one."""
        if not self._needs_shift:
            return {}
        return {STATE_NAME: json.dumps({"shift": float(self._shift.value)}) + "\n"}

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        self._shift = WindowShift()
        if self._needs_shift and resume_from_checkpoint is not None:
            file = Path(resume_from_checkpoint) / STATE_NAME
            value = json.loads(file.read_text(encoding="utf-8"))["shift"]
            self._shift.load_state_dict({"value": torch.tensor(value)})
        return super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )

    @torch.no_grad()
    def _known(self, model: nn.Module, window: list[dict]) -> list[dict]:
        """For each micro-batch: the reference's scores, as TRL names them, and the two points where they are known."""
        window = [self._prepare_inputs(batch) for batch in window]
        update = cast(nn.Module, self.model).training
        references = [self._reference(batch) for batch in window]
        known: list[dict[str, dict]] = [{"inputs": {"ref_logps": logps}} for logps, _ in references]
        points: list[Tensor | None] = [None] * len(window)
        if self.calculate_KL:
            ratios = [
                super(FusedKTOTrainer, self)._compute_kl_logps(model, batch) - kl_logps
                for batch, (_, kl_logps) in zip(window, references, strict=True)
            ]
            if self.kl_estimator == "window":
                points = [self._kl.estimate(torch.cat(ratios), update=update)] * len(window)
            else:
                points = [self._kl.estimate(ratio, update=update) for ratio in ratios]
            for entry in known:
                entry["inputs"]["ref_KL_logps"] = ratios[0].new_zeros(1)
        shift = None
        if self._needs_shift and len(window) > 1:  # for one, the pass with the gradient gives the rewards
            rewards = [
                self.beta * (self._policy(model, batch) - logps)
                for batch, (logps, _) in zip(window, references, strict=True)
            ]
            labels = torch.cat([torch.as_tensor(batch["label"]) for batch in window]).bool()
            together = torch.cat(rewards)
            shift = self._shift.estimate(together, labels.to(together.device), update=update)
        for entry, z0 in zip(known, points, strict=True):
            entry["points"] = {"z0": z0, "shift": shift}
        return known

    def _reference(self, batch: dict) -> tuple[Tensor, Tensor | None]:
        """(B,) reference scores of the completions, and of the mismatched ones where there are any."""
        if self.precompute_ref_logps:
            return batch["ref_logps"], batch.get("ref_KL_logps")
        return self.compute_ref_log_probs(self.ref_model or self.model, batch)

    def _policy(self, model: nn.Module, batch: dict) -> Tensor:
        """(B,) nats, as the pass with the gradient will give them."""
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100),
            use_cache=False,
            fused_lm_head=True,
        )
        return _summed(output.log_probs, batch)


def _summed(log_probs: Tensor, batch: dict) -> Tensor:
    """(B,) of (B, L): sums over the positions of real tokens, past any virtual ones of prompt learning."""
    return log_probs[:, 1 - batch["input_ids"].shape[1] :].sum(-1)


def _check(method: str, args: KTOConfig | None, kl_estimator: str, options: dict) -> None:
    """Raise ValueError for the first thing that does not fit."""
    _check_name("loss_type", method, TRL_LOSS_TYPE)
    _check_name("kl_estimator", kl_estimator, KL_ESTIMATORS)
    if options and method != "enhanced_kto":
        raise ValueError(f"loss_options is given for loss_type {method!r}; expected it for 'enhanced_kto' only")
    parameters = inspect.signature(enhanced_kto_loss).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in LOSS_KWARGS]
    for name in options:
        _check_name("loss_options", name, names)
    if method == "bco" and args is not None and (args.desirable_weight, args.undesirable_weight) != (1.0, 1.0):
        raise ValueError(
            f"desirable_weight is {args.desirable_weight} and undesirable_weight {args.undesirable_weight}; expected 1 "
            "for loss_type 'bco', which has no class weights"
        )


def _check_name(argument: str, got: object, names) -> None:
    if got not in names:
        near = difflib.get_close_matches(str(got), names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{argument}: {got!r} is not one of {', '.join(names)}{hint}")
