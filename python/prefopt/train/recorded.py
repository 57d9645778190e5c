"""What a run writes down: metrics, warnings, the state that a checkpoint holds beside Trainer's, and the run folder."""

import json
import logging
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prefopt.train.baselines import BaselineEstimators
from prefopt.train.diagnostics import Diagnostics
from prefopt.train.finite import FiniteWatch
from prefopt.train.metrics import MetricSums, quotients
from prefopt.train.mismatched import MismatchedRows
from prefopt.train.objective import Objective
from prefopt.train.run_folder import RunFolder

logger = logging.getLogger(__name__)

STATE_NAME = "prefopt_state.json"


class RecordedTrainer(Trainer):
    """The part of the trainer that does not compute. The subclass sets these before ``_reset_state``:"""

    objective: Objective
    baselines: BaselineEstimators
    mismatched: MismatchedRows | None  # None where the method has no reference point to estimate
    run_folder: RunFolder
    _reference_fingerprint: str | None

    def _reset_state(self) -> None:
        """A run's own state: everything that a checkpoint has to hold beside Trainer's."""
        device = self.args.device
        self._sums = {mode: MetricSums(device) for mode in ("train", "eval")}
        self._watch = FiniteWatch(self.args.output_dir)
        self._num_tokens = 0
        self.diagnostics = Diagnostics(fades=self.args.spec.fades)

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the metrics since the last log, and metrics.jsonl beside it."""
        if "loss" in logs:  # the training loop's; evaluation's keys have a prefix
            sums = self._read_sums()
            self._sums["train"].reset()
            self._num_tokens += round(sums["num_tokens"])
            metrics = quotients(sums, loss_count=sums["steps"], parts=self.objective.parts)
            logs.update(metrics, num_tokens=self._num_tokens)
            self.baselines.step(self.state.global_step, logs.get("rewards/margins"))
            self._diagnose(sums, logs)
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
        self.diagnostics.observe(
            step, {k: v for k, v in logs.items() if relative or not k.startswith("rewards/")}
        )
        self.diagnostics.observe_partners(step, sums["counted"], sums["rows_without_partner"])
        if len(self.diagnostics.findings) > known:
            self.run_folder.update(diagnostics=self.diagnostics.state_dict()["findings"])

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None):
        """Trainer's; on the CPU, where looking is free, the step is checked before the optimizer takes it."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        # A gradient scaler (fp16) meets infinite gradients on purpose and skips those steps itself.
        if self.accelerator.scaler is None:
            self._watch.add_gradient(self.state.global_step + 1, grad_norm)
            self._sums["train"].add_gradient(grad_norm)
        if self._looking_is_free:
            self._watch.check()
        return grad_norm

    @property
    def _looking_is_free(self) -> bool:
        return self.args.device.type == "cpu"

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None,
        metric_key_prefix="eval",
    ):  # fmt: skip
        """Trainer's, with the metrics of training, each weighted by its rows or tokens."""
        self._sums["eval"].reset()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        sums = self._sums["eval"].read()
        metrics = quotients(
            sums, sums["counted"], self.objective.nll_weight, parts=self.objective.parts
        )
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in metrics.items()})
        return output

    # ---- checkpoints, resume ----

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        sums = self._read_sums()
        folder = (
            Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        )
        kl = {} if self.mismatched is None else self.mismatched.estimator.state_dict()
        state = {
            "num_tokens": self._num_tokens,
            "sums": sums,
            "reference_point": {name: value.tolist() for name, value in kl.items()},
            "baselines": self.baselines.state_dict(),
            "diagnostics": self.diagnostics.state_dict(),
            "reference_fingerprint": self._reference_fingerprint,
        }
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer's; a model card that is there already stays as it is, where PEFT would write into it."""
        card = Path(output_dir or self.args.output_dir) / "README.md"
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
        if self.mismatched is not None:
            self.mismatched.reset()
        if resume_from_checkpoint is not None:
            self._load_state(Path(resume_from_checkpoint) / STATE_NAME)
        self.diagnostics.max_steps = max_steps
        self.run_folder.start_metrics(self.state.global_step)
        return found

    def _load_state(self, file: Path) -> None:
        if not file.is_file():
            logger.warning(
                "%s has no %s: num_tokens, metrics and estimates start anew", file.parent, file.name
            )
            return
        state = json.loads(file.read_text(encoding="utf-8"))
        fingerprints = {state["reference_fingerprint"], self._reference_fingerprint} - {None}
        if len(fingerprints) > 1:
            raise ValueError(
                f"the reference is not the one that {file.parent} was trained against (its weights differ); pass the "
                "starting model as model, or the same ref_model: the checkpoint itself is loaded by Trainer"
            )
        self._num_tokens = state["num_tokens"]
        if self.is_world_process_zero():  # they are the sums of all ranks
            self._sums["train"].load(state["sums"])
        if self.mismatched is not None:
            self.mismatched.estimator.load_state_dict(
                {name: torch.tensor(value) for name, value in state["reference_point"].items()}
            )
        self.baselines.load_state_dict(state["baselines"])
        self.diagnostics.load_state_dict(state["diagnostics"])

    # ---- run folder ----

    def train(self, *args, **kwargs):
        """Trainer's; run.json tells whether it is running, finished or stopped, and by what."""
        self.run_folder.update(status="running", stopped_by=None)
        status, reason = "stopped", "interrupted"
        try:
            result = super().train(*args, **kwargs)
            status, reason = "finished", None
            return result
        except (RuntimeError, ValueError, OSError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            findings = self.diagnostics.state_dict()["findings"]
            self.run_folder.update(status=status, stopped_by=reason, diagnostics=findings)
