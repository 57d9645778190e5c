"""What a run writes: metrics, warnings, the state in a checkpoint besides Trainer's, and the run folder."""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from prefopt.train.baselines import BaselineEstimators
from prefopt.train.checkpoint import CheckpointError, ResumableTrainer
from prefopt.train.config import PreferenceConfig
from prefopt.train.diagnostics import Diagnostics
from prefopt.train.finite import FiniteWatch
from prefopt.train.metrics import MetricSums, margin_error, quotients
from prefopt.train.mismatched import MismatchedRows
from prefopt.train.objective import Objective
from prefopt.train.run_folder import RunFolder
from prefopt.train.step_values import StepScores
from prefopt.train.vocabulary import embedding_rows, resized_from

logger = logging.getLogger(__name__)

STATE_NAME = "prefopt_state.json"


class RecordedTrainer(ResumableTrainer):
    """Logs, checkpoints and the run folder. The subclass sets these attributes before ``_reset_state``."""

    args: PreferenceConfig
    model: PreTrainedModel
    objective: Objective
    baselines: BaselineEstimators
    mismatched: MismatchedRows | None  # None for a method without a reference point
    step_scores: StepScores
    run_folder: RunFolder
    _reference_fingerprint: str | None

    def _reset_state(self) -> None:
        """Reset the state that a checkpoint holds besides Trainer's."""
        device = self.args.device
        self._sums = {mode: MetricSums(device) for mode in ("train", "eval")}
        self._watch = FiniteWatch(str(self.args.output_dir))
        self._num_tokens = 0
        self._loss_sum: float | None = 0.0  # over steps, up to the last log
        self._positions = self._filled = 0.0  # of the policy's passes, up to the last log
        self._resumed_between_logs = False
        self.diagnostics = Diagnostics(fades=self.args.spec.center is not None)

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the metrics since the last log, and metrics.jsonl beside it."""
        if "loss" in logs:  # the training loop's; evaluation's keys have a prefix
            sums = self._read_sums()
            self._sums["train"].reset()
            self._resumed_between_logs = False
            self._num_tokens += round(sums["num_tokens"])
            self._positions += sums["positions"]
            self._filled += sums["filled"]
            if self._loss_sum is not None:
                self._loss_sum += sums["loss"]
            metrics = quotients(sums, loss_count=sums["steps"], components=self.objective.components)
            logs.update(metrics, num_tokens=self._num_tokens)
            self.baselines.step(self.state.global_step, logs.get("rewards/margins"))
            self._diagnose(sums, logs)
        elif "train_loss" in logs and self._loss_sum is not None:
            # Trainer's is the mean of this call alone; a resumed run has steps before it.
            total, step = self._loss_sum, self.state.global_step
            if step != self._globalstep_last_logged or self._resumed_between_logs:
                total += self._read_sums()["loss"]
            logs["train_loss"] = total / max(1, step)
        super().log(logs, start_time)
        self.run_folder.metrics({"step": self.state.global_step, **logs})

    def _read_sums(self) -> dict[str, float]:
        """The sums since the last log; the only place where training waits for the device.

        Raises:
            NonFiniteError: something in them is not finite.
        """
        sums = self._sums["train"].read()
        if not all(math.isfinite(value) for value in sums.values()):
            self._watch.check()
            self._watch.stop_elsewhere(self.state.global_step)
        self._watch.forget()
        return sums

    def _diagnose(self, sums: dict[str, float], logs: dict[str, float]) -> None:
        step, known = self.state.global_step, len(self.diagnostics.findings)
        relative = self.args.spec.needs_reference
        self.diagnostics.observe(step, {k: v for k, v in logs.items() if relative or not k.startswith("rewards/")})
        if self.diagnostics.collapsed and self.args.on_collapse == "stop" and not self.control.should_training_stop:
            logger.warning("step %d: training stops, because on_collapse is 'stop'", step)
            self.control.should_training_stop = True
        self.diagnostics.observe_partners(step, sums["counted"], sums["rows_without_partner"])
        if len(self.diagnostics.findings) > known:
            self.run_folder.update(diagnostics=self.diagnostics.state_dict()["findings"])

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None):
        """Trainer's; on the CPU, where synchronising is cheap, the step is checked before the optimizer takes it."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        # A gradient scaler (fp16) produces infinite gradients on purpose and skips those steps itself.
        if self.accelerator.scaler is None:
            self._watch.add_gradient(self.state.global_step + 1, grad_norm)
            self._sums["train"].add_gradient(grad_norm)
        if self._sync_is_cheap:
            self._watch.check()
        return grad_norm

    @property
    def _sync_is_cheap(self) -> bool:
        return self.args.device.type == "cpu"

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None,
        metric_key_prefix="eval",
    ):  # fmt: skip
        """Trainer's, with the metrics of training, each weighted by its rows or tokens."""
        self._sums["eval"].reset()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = self._sums["eval"].read()
        metrics = quotients(sums, sums["counted"], self.objective.nll_weight, components=self.objective.components)
        metrics |= margin_error(sums)
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in metrics.items()})
        return output

    # ---- checkpoints, resume ----

    def _checkpoint_files(self) -> dict[str, str]:
        kl = {} if self.mismatched is None else self.mismatched.estimator.state_dict()
        state = {
            "num_tokens": self._num_tokens,
            "loss_sum": self._loss_sum,
            "positions": self._positions,
            "filled": self._filled,
            "sums": self._read_sums(),
            "reference_point": {name: value.tolist() for name, value in kl.items()},
            "baselines": self.baselines.state_dict(),
            "previous_step": self.step_scores.state_dict(),
            "diagnostics": self.diagnostics.state_dict(),
            "reference_fingerprint": self._reference_fingerprint,
        }
        return {STATE_NAME: json.dumps(state, indent=2) + "\n"}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer's; a model card that is there already stays as it is, where PEFT would write into it."""
        card = Path(output_dir or str(self.args.output_dir)) / "README.md"
        before = card.read_bytes() if self.args.should_save and card.is_file() else None
        super()._save(output_dir, state_dict)
        if before is not None:
            card.write_bytes(before)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; whole also where FSDP's checkpoints are in shards, of which Trainer would save nothing."""
        if self.is_fsdp_enabled and not _internal_call:
            plugin = self.accelerator.state.fsdp_plugin
            if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
                self._save(output_dir, self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save and hasattr(self.model, "get_base_model"):
            self._warn_of_resized_base()

    def _warn_of_resized_base(self) -> None:
        base = cast(PreTrainedModel, cast(PeftModel, self.model).get_base_model())
        published = resized_from(base)
        if published is None:
            return
        logger.warning(
            "the adapter was trained on a vocabulary of %d rows, which are saved with it, and %s has %d: to load it, "
            "resize the base in the same way (resize_token_embeddings), save it, and name it by --base",
            embedding_rows(self.model),
            base.name_or_path,
            published,
        )

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        found = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        findings = self.diagnostics.findings
        self._reset_state()
        self.diagnostics.findings = [finding for finding in findings if finding.step == 0]
        self.baselines.reset(max_steps)
        self.step_scores.reset()
        if self.mismatched is not None:
            self.mismatched.reset()
        if resume_from_checkpoint is not None:
            self._load_state(Path(resume_from_checkpoint))
            _log_new_schedule(_trainer_state(resume_from_checkpoint).max_steps, max_steps)
            self.state.compute_steps(self.args, max_steps)  # or the checkpoint's cadence would stay
        self.diagnostics.max_steps = max_steps
        self.run_folder.start_metrics(self.state.global_step)
        self.run_folder.update(steps={"planned": max_steps, "per_epoch": num_update_steps_per_epoch, "done": None})
        return found

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's; the first step of a changed budget, too, has its rate from the new schedule."""
        super()._load_optimizer_and_scheduler(checkpoint)
        changed = checkpoint is not None and (_trainer_state(checkpoint).max_steps != self.state.max_steps)
        if changed and isinstance(self.lr_scheduler, LambdaLR):
            self.lr_scheduler.last_epoch -= 1
            self.lr_scheduler.step()

    def _load_state(self, checkpoint: Path) -> None:
        state = _own_state(checkpoint)
        if state is None:
            logger.warning(
                "%s has no %s: num_tokens, metrics and estimates start from zero",
                checkpoint,
                STATE_NAME,
            )
            return
        self._num_tokens = state["num_tokens"]
        self._resumed_between_logs = state["sums"]["steps"] > 0
        self._loss_sum = state.get("loss_sum")  # not in a checkpoint of an earlier version
        self._positions, self._filled = (state.get(name, 0.0) for name in ("positions", "filled"))
        if self.is_world_process_zero():  # they are the sums of all ranks
            self._sums["train"].load(state["sums"])
        if self.mismatched is not None:
            self.mismatched.estimator.load_state_dict(
                {name: torch.tensor(value) for name, value in state["reference_point"].items()}
            )
        self.baselines.load_state_dict(state["baselines"])
        self.step_scores.load_state_dict(state.get("previous_step", {}))  # not in an earlier version's
        self.diagnostics.load_state_dict(state["diagnostics"])

    def verified(self, checkpoint: str | Literal[True] | None) -> str | None:
        """As above; also refuses a checkpoint that was trained against another reference."""
        path = super().verified(checkpoint)
        state = (_own_state(Path(path)) if path is not None else None) or {}
        known = {state.get("reference_fingerprint"), self._reference_fingerprint} - {None}
        if len(known) > 1:
            raise CheckpointError(
                f"the reference is not the one that {path} was trained against (its weights differ); pass the "
                "starting model as model, or the same ref_model: the checkpoint itself is loaded by Trainer"
            )
        return path

    # ---- run folder ----

    @contextmanager
    def _training(self, checkpoint: str | None) -> Iterator[None]:
        """Keep run.json up to date: running, finished, or stopped and by what."""
        from_step = 0 if checkpoint is None else _trainer_state(checkpoint).global_step
        self.run_folder.start(resumed_from=checkpoint, step=from_step)
        try:
            yield
        except BaseException as error:
            known = isinstance(error, (RuntimeError, ValueError, OSError))
            reason = f"{type(error).__name__}: {error}" if known else "interrupted"
            try:
                self._record_end("stopped", reason)
            except OSError as full:  # the first error says more
                logger.warning("run.json cannot be written: %s", full)
            raise
        self._record_end("finished", None)

    def _record_end(self, status: str, reason: str | None) -> None:
        padding = 1.0 - self._filled / self._positions if self._positions else None
        self.run_folder.update(
            status=status,
            passes=self.run_folder.record.get("passes", {}) | {"padding": padding},
            stopped_by=reason,
            diagnostics=self.diagnostics.state_dict()["findings"],
            steps=self.run_folder.record.get("steps", {}) | {"done": self.state.global_step},
        )


def _own_state(checkpoint: Path) -> dict | None:
    """What ``_checkpoint_files`` saved; None where it is missing."""
    file = checkpoint / STATE_NAME
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _trainer_state(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


def _log_new_schedule(before: int, now: int) -> None:
    if before != now:
        logger.warning(
            "the run now has %d steps instead of %d: from here on the learning rate follows the schedule of %d "
            "steps, so the result differs from a run planned for them from the start",
            now,
            before,
            now,
        )
