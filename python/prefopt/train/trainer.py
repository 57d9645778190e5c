"""The thin trainer: ``transformers.Trainer`` with a preference loss on fused log-probabilities.

Start here. An optimizer step goes: ``get_batch_samples`` gives every row of the window its share in the step's mean
loss; the first ``compute_loss`` of the window estimates KTO's reference point from all its rows; every ``compute_loss``
scores its rows under the reference and the policy and adds up metrics. Nothing in between waits for the device.
"""

import json
import logging
import math
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prefopt.data import LabelBalancedSampler, PreferenceCollator
from prefopt.data.collate import RawFeatures
from prefopt.train import prepare
from prefopt.train.config import PreferenceConfig
from prefopt.train.diagnostics import Diagnostics
from prefopt.train.finite import FiniteWatch
from prefopt.train.inputs import COLUMNS, Prepared, prepare_rows
from prefopt.train.metrics import CLASSES, MetricSums, RowMetrics, quotients
from prefopt.train.mismatched import MismatchedRows
from prefopt.train.precompute import fixed_partners, with_reference
from prefopt.train.reference import AdapterOff, choose_reference
from prefopt.train.run_folder import RunFolder
from prefopt.train.scoring import PackingCollator, Scores, score, to_device
from prefopt_kernels.integrations.transformers import check_lm_head, lm_head_of
from prefopt_kernels.losses import apo_zero_loss, kto_loss

logger = logging.getLogger(__name__)

STATE_NAME = "prefopt_state.json"
POLICY_OUTPUTS = ("entropy", "mean_logit")


class PreferenceTrainer(Trainer):
    """Train a causal language model on desirable and undesirable answers.

    Args:
        model: the policy, a ``PreTrainedModel`` or a ``PeftModel``; its weights as passed are the starting point.
        args: see ``PreferenceConfig``.
        train_dataset: ``prefopt.data``'s ``Tokenized`` or ``LoadedRows``, or what ``load_rows`` reads (a
            ``datasets.Dataset`` of raw rows, a list of them, a path).
        eval_dataset: the same, or a dictionary of them.
        processing_class: the tokenizer.
        ref_model: the reference. Left out, it is the model without its adapter where there is one (``peft_config``, or
            a ``PeftModel`` that still equals its base), and otherwise a frozen copy of ``model`` made here, before any
            checkpoint is loaded; with ``precompute_ref_logps`` no copy is made.
        peft_config: wraps ``model``, seeded by ``args.seed``.
        callbacks, optimizers: as for ``Trainer``.

    Raises:
        ValueError, TypeError: an argument does not fit, found before any training.
        DataError: rows that cannot be used.
        NonFiniteError: from ``train``; see ``FiniteWatch``.
    """

    # Each row carries its share of the whole window's mean loss: Trainer has nothing left to divide.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: PreferenceConfig,
        train_dataset: object = None,
        eval_dataset: object = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: nn.Module | None = None,
        peft_config: object = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        prepare.check_arguments(model, args, train_dataset)
        train = prepare_rows(train_dataset, processing_class, args, "train_dataset")
        evals = {
            name: prepare_rows(data, processing_class, args, "eval_dataset")
            for name, data in _named(eval_dataset).items()
        }
        if peft_config is not None:
            model = prepare.with_adapter(model, peft_config, args.seed)
        if args.disable_dropout:
            for module in [model] if ref_model is None else [model, ref_model]:
                prepare.disable_dropout(module)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"no parameter of {type(model).__name__} requires a gradient; nothing to train"
            )
        if hasattr(model, "peft_config") and args.activation_checkpointing:
            model.enable_input_require_grads()
        pad_token_id = prepare.pad_token_id(processing_class, model)
        collator = PackingCollator(PreferenceCollator(pad_token_id, max_length=args.max_length))
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train.tokenized.dataset,
            eval_dataset={name: rows.tokenized.dataset for name, rows in evals.items()} or None,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._refuse_unsupported()
        self.head = lm_head_of(self.model)
        check_lm_head(self.model, self.head)
        self._set_up_reference(ref_model, fresh_adapter=peft_config is not None)
        self.train_dataset = self._scored(train, args.per_device_train_batch_size)
        scored = {
            name: self._scored(rows, args.per_device_eval_batch_size)
            for name, rows in evals.items()
        }
        self.eval_dataset = scored if isinstance(eval_dataset, dict) else scored.get("")
        if args.precompute_ref_logps and not isinstance(self.reference, AdapterOff):
            self.reference = self._reference_head = (
                None  # their scores are columns now; frees memory
            )
        self.mismatched = MismatchedRows(args.kl_estimator, collator, self._log_ratios, args.device)
        self._sampler: LabelBalancedSampler | None = None
        self.add_callback(_SamplerEpoch(self))
        self._reset_state()
        self.run_folder = RunFolder(args.output_dir, active=self.is_world_process_zero())
        self._describe(train, evals)

    def _refuse_unsupported(self) -> None:
        """Ways of spreading a model over devices that nobody has tried with this trainer."""
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs are visible to one process, which Trainer would use through nn.DataParallel; start with "
                "torchrun or accelerate launch, or make one GPU visible"
            )
        for name, used in (
            ("DeepSpeed", self.is_deepspeed_enabled),
            ("FSDP", self.is_fsdp_enabled),
            ("a parallelism_config", self.accelerator.parallelism_config is not None),
            ("a model sharded while loading", self.is_distributed_loading_by_transformers),
        ):
            if used:
                raise ValueError(f"{name} is not supported yet; expected one process or plain DDP")

    # ---- data and reference ----

    def _set_up_reference(self, ref_model: nn.Module | None, fresh_adapter: bool) -> None:
        args = self.args
        if ref_model is not None and self.place_model_on_device:
            ref_model = ref_model.to(args.device)
        self.reference = choose_reference(
            self.model,
            ref_model,
            fresh_adapter=fresh_adapter,
            precompute=args.precompute_ref_logps,
        )
        self._reference_kind = self.reference.kind
        self._reference_head = self.head
        if self.reference.model is not self.model:
            self._reference_head = lm_head_of(self.reference.model)
            check_lm_head(self.reference.model, self._reference_head)
        # With an adapter the reference cannot be mistaken for a checkpoint, so its weights need not be read.
        wanted = args.precompute_ref_logps or not isinstance(self.reference, AdapterOff)
        self._reference_fingerprint = self.reference.fingerprint() if wanted else None

    def _scored(self, prepared: Prepared, batch_size: int) -> Dataset:
        """The rows, with the reference's scores as columns if they are to be computed beforehand."""
        args, rows = self.args, prepared.tokenized.dataset
        if not args.precompute_ref_logps:
            return rows
        if self.reference is None:
            raise ValueError(
                "the reference was freed once its scores were computed, so new rows cannot be scored; pass them as "
                "eval_dataset when the trainer is built, or set precompute_ref_logps=False"
            )
        partners = None
        if args.needs_kl:
            block = batch_size if args.kl_estimator == "microbatch" else None
            partners = fixed_partners(rows["group"][:], block)
        return with_reference(
            prepared.tokenized,
            partners,
            self._reference_logps,
            self.data_collator,
            identity=(self._reference_fingerprint, str(self.accelerator.mixed_precision)),
            cache_dir=args.reference_cache_dir,
            batch_size=args.precompute_batch_size or args.per_device_eval_batch_size,
            accelerator=self.accelerator,
        )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        args = self.args
        if args.sampler != "label_balanced":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        # The whole step is balanced, so that its rows do not depend on how it is cut into micro-batches; a reference
        # point of the micro-batch alone wants the micro-batches balanced instead.
        batch_size = self._train_batch_size
        if args.kl_estimator == "window":
            batch_size *= args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        self._sampler = LabelBalancedSampler(rows["label"][:], batch_size, seed)
        return self._sampler

    # ---- one optimizer step ----

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The window's micro-batches, each row with its share in the window's mean loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        total = sum(self._drop_repeats(batch, last=batch is batches[-1]) for batch in batches)
        for batch in batches:
            batch["shares"] *= self.accelerator.num_processes / total
        # The estimate waits for the first compute_loss: on resume the random state is restored in between.
        self._window = [list(batch["features"]) for batch in batches]
        self._z0 = None
        if batches:
            self._sums["train"].add_step(self.accelerator.num_processes)
        return batches, None

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None  # Trainer would count label tokens; these labels are of rows

    def _drop_repeats(self, batch: dict, last: bool) -> int:
        """Set ``shares`` (B,): 1, or 0 for a row that the dataloader repeats to give every rank a full last batch.

        Returns:
            How many rows of all ranks' micro-batches are not repeats; by arithmetic, without a reduction.
        """
        rows, state = list(batch["features"]), self.accelerator.gradient_state
        everywhere = len(rows) * self.accelerator.num_processes
        if last and state.end_of_dataloader and 0 < state.remainder < everywhere:
            everywhere = state.remainder
        mine = everywhere - len(rows) * self.accelerator.process_index
        mine = max(0, min(len(rows), mine))
        device = batch["input_ids"].device
        batch["shares"] = (torch.arange(len(rows), device=device) < mine).float()
        batch["features"] = RawFeatures(rows[:mine])
        return everywhere

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of this micro-batch's row losses times their shares."""
        args, mode = self.args, "train" if model.training else "eval"
        z0 = self._reference_point(inputs, mode) if args.needs_kl else None
        ref_logps = inputs["ref_logps"] if "ref_logps" in inputs else self._reference_logps(inputs)
        with self.accelerator.autocast():
            policy = score(model, self.head, inputs, backend=args.backend, outputs=POLICY_OUTPUTS)
        losses = self._losses(policy.logps, ref_logps, inputs["labels"], z0)
        self._record(inputs, policy, ref_logps, losses.detach(), mode)
        return (losses * inputs["shares"]).sum()

    def _losses(
        self, logps: Tensor, ref_logps: Tensor, labels: Tensor, z0: Tensor | None
    ) -> Tensor:
        args = self.args
        options = {
            "beta": args.beta,
            "desirable_weight": args.desirable_weight,
            "undesirable_weight": args.undesirable_weight,
        }
        if args.method == "apo_zero":
            return apo_zero_loss(logps, ref_logps, labels, **options)
        return kto_loss(logps, ref_logps, labels, reference_point=z0, **options)

    def _reference_point(self, inputs: dict, mode: str) -> Tensor:
        """z0 of the window, or of the micro-batch; in evaluation of the batch."""
        windowed = mode == "train" and self.args.kl_estimator == "window"
        if windowed and self._z0 is not None:
            return self._z0
        pieces = self._window if windowed else [list(inputs["features"])]
        estimate = self.mismatched.estimate(pieces, update=mode == "train")
        self._sums[mode].add_estimate(estimate.value, estimate.rows_without_partner)
        if windowed:
            self._z0 = estimate.value
        return estimate.value

    @torch.no_grad()
    def _log_ratios(self, batch: dict) -> Tensor:
        """Policy less reference of mismatched sequences, (n,) nats."""
        batch = to_device(batch, self.args.device)
        with self.accelerator.autocast():
            logps = score(self.model, self.head, batch, backend=self.args.backend).logps
        return logps - (
            batch["ref_logps"] if "ref_logps" in batch else self._reference_logps(batch)
        )

    @torch.no_grad()
    def _reference_logps(self, batch: dict) -> Tensor:
        """(B,) nats, in the policy's mode (training or evaluation, autocast): equal weights give equal bits."""
        batch = to_device(batch, self.args.device)
        with self.reference.running(self.model.training) as model, self.accelerator.autocast():
            return score(model, self._reference_head, batch, backend=self.args.backend).logps

    def _record(
        self, inputs: dict, policy: Scores, ref_logps: Tensor, losses: Tensor, mode: str
    ) -> None:
        log_ratios = policy.logps.detach() - ref_logps
        rows = RowMetrics(
            losses=losses,
            shares=inputs["shares"],
            labels=inputs["labels"],
            rewards=self.args.beta * log_ratios,
            logps=policy.logps.detach(),
            mean_logits=policy.mean_logits,
            entropies=policy.entropies,
            completion_tokens=inputs["cu_seqlens"].diff(),
            tokens=inputs["attention_mask"].sum(1),
        )
        self._sums[mode].add_rows(rows, self.accelerator.num_processes if mode == "train" else 1)
        if mode == "train":
            numbers = [int(row["row"]) for row in inputs["features"]]
            # Plus 0 * log-ratio: a row at minus infinity has a finite loss.
            finite = (losses + 0.0 * log_ratios)[: len(numbers)]
            self._watch.add_rows(self.state.global_step + 1, numbers, finite)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None):
        """Trainer's; on the CPU, where looking is free, the step is checked before the optimizer takes it."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
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

    # ---- evaluation ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """Trainer's, for rows in any form that ``train_dataset`` takes."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            rows = prepare_rows(eval_dataset, self.processing_class, self.args, "eval_dataset")
            eval_dataset = self._scored(rows, self.args.per_device_eval_batch_size)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The batch's summed loss, and no predictions: the logits are never built."""
        self._drop_repeats(inputs, last=True)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs), None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None,
        metric_key_prefix="eval",
    ):  # fmt: skip
        """Trainer's, with the metrics of training, each weighted by its rows or tokens."""
        self._sums["eval"].reset()
        output = super().evaluation_loop(
            dataloader, description, True, ignore_keys, metric_key_prefix
        )
        sums = self._sums["eval"].read()
        metrics = quotients(sums, loss_count=sum(sums[f"rows/{side}"] for side in CLASSES))
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in metrics.items()})
        return output

    # ---- logs, checkpoints, resume ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the metrics since the last log, and metrics.jsonl beside it."""
        if "loss" in logs:  # the training loop's; evaluation's keys have a prefix
            sums = self._read_sums()
            self._sums["train"].reset()
            self._num_tokens += round(sums["num_tokens"])
            logs.update(quotients(sums, loss_count=sums["steps"]), num_tokens=self._num_tokens)
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
        self.diagnostics.observe(step, logs)
        rows = sum(sums[f"rows/{side}"] for side in CLASSES)
        self.diagnostics.observe_partners(step, rows, sums["rows_without_partner"])
        if len(self.diagnostics.findings) > known:
            self.run_folder.update(diagnostics=self.diagnostics.state_dict()["findings"])

    def _reset_state(self) -> None:
        """A run's own state: everything that a checkpoint has to hold beside Trainer's."""
        device = self.args.device
        self._sums = {mode: MetricSums(device) for mode in ("train", "eval")}
        self._watch = FiniteWatch(self.args.output_dir)
        self._num_tokens = 0
        self._window: list[list[dict]] = []
        self._z0: Tensor | None = None
        self.diagnostics = Diagnostics()

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        sums = self._read_sums()
        folder = (
            Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        )
        state = {
            "num_tokens": self._num_tokens,
            "sums": sums,
            "reference_point": float(self.mismatched.estimator.value),
            "diagnostics": self.diagnostics.state_dict(),
            "reference_fingerprint": self._reference_fingerprint,
        }
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        super()._save_checkpoint(model, trial)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        found = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        findings = self.diagnostics.findings
        self._reset_state()
        self.diagnostics.findings = [finding for finding in findings if finding.step == 0]
        if resume_from_checkpoint is not None:
            self._load_state(Path(resume_from_checkpoint) / STATE_NAME)
        self.diagnostics.max_steps = max_steps
        self.run_folder.start_metrics(self.state.global_step)
        return found

    def _load_state(self, file: Path) -> None:
        if not file.is_file():
            logger.warning(
                "%s has no %s: num_tokens and metrics start anew", file.parent, file.name
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
        value = torch.tensor(state["reference_point"], device=self.args.device)
        self.mismatched.estimator.load_state_dict({"value": value})
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

    def _describe(self, train: Prepared, evals: dict[str, Prepared]) -> None:
        args, counts = self.args, train.tokenized.counts
        if args.method == "kto":
            self.diagnostics.observe_data(
                counts["desirable"],
                counts["undesirable"],
                args.desirable_weight,
                args.undesirable_weight,
            )
        text = self.model.config.get_text_config()
        if getattr(text, "router_aux_loss_coef", None) and hasattr(text, "output_router_logits"):
            self.diagnostics.add(
                "no_router_loss",
                0,
                "The model is a mixture of experts, and its load-balancing loss is not part of the objective",
                "Freeze the router, for example by training an adapter on the attention layers",
            )
        parameters = list(self.model.parameters())
        self.run_folder.bad_rows(row for rows in [train, *evals.values()] for row in rows.bad)
        self.run_folder.update(
            status="prepared",
            method=args.method,
            config=args.to_dict(),
            model={
                "class": type(self.model).__name__,
                "parameters": sum(parameter.numel() for parameter in parameters),
                "trainable": sum(p.numel() for p in parameters if p.requires_grad),
                "logit_scale": self.head.logit_scale,
                "softcap": self.head.softcap,
            },
            reference={"kind": self._reference_kind, "fingerprint": self._reference_fingerprint},
            data={"train": train.summary()}
            | {f"eval_{name}" if name else "eval": rows.summary() for name, rows in evals.items()},
            world_size=args.world_size,
            diagnostics=self.diagnostics.state_dict()["findings"],
        )


class _SamplerEpoch(TrainerCallback):
    """Tells the sampler the epoch; accelerate does not reach it in a resumed run of several processes."""

    def __init__(self, trainer: PreferenceTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


def _named(eval_dataset: object) -> dict[str, object]:
    if eval_dataset is None:
        return {}
    return eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
