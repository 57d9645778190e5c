"""The thin trainer: ``transformers.Trainer`` with a preference loss on fused log-probabilities.

Start here. An optimizer step goes: ``get_batch_samples`` gives every row or pair of the window its share in the step's
mean loss; the first ``compute_loss`` of the window estimates what its rows are compared with, from all of them; every
``compute_loss`` scores its sequences under the reference and the policy, takes the method's loss (objective.py) and adds up
metrics. Nothing in between waits for the device. What is written down, and when, stands in recorded.py.
"""

import copy
from dataclasses import replace

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, TrainerCallback

from prefopt.data import LabelBalancedSampler, PreferenceCollator
from prefopt.data.collate import PairCollator
from prefopt.train import prepare
from prefopt.train.baselines import BaselineEstimators
from prefopt.train.config import PreferenceConfig
from prefopt.train.console import show_lines
from prefopt.train.describe import describe
from prefopt.train.inputs import COLUMNS, Prepared, prepare_rows
from prefopt.train.methods import PAIRS
from prefopt.train.metrics import RowMetrics
from prefopt.train.mismatched import MismatchedRows
from prefopt.train.objective import Baselines, Objective, Sequences
from prefopt.train.precompute import fixed_partners, with_reference
from prefopt.train.recorded import RecordedTrainer
from prefopt.train.reference import AdapterOff, NoReference, choose_reference
from prefopt.train.run_folder import RunFolder
from prefopt.train.scoring import PackingCollator, Scores, score, to_device
from prefopt.train.spread import Spread
from prefopt.train.vocabulary import check_token_ids
from prefopt.train.window import drop_repeats, share_out
from prefopt_kernels.integrations.transformers import check_lm_head, lm_head_of

POLICY_OUTPUTS = ("entropy", "mean_logit")


class PreferenceTrainer(RecordedTrainer):
    """Train a causal language model on desirable and undesirable answers, or on pairs of a better and a worse one.

    Args:
        model: the policy, a ``PreTrainedModel`` or a ``PeftModel``; its weights as passed are the starting point.
        args: see ``PreferenceConfig``; its ``method`` decides which rows are needed.
        train_dataset: ``prefopt.data``'s ``Tokenized`` or ``LoadedRows``, or what ``load_rows`` reads (a
            ``datasets.Dataset`` of raw rows, a list of them, a path).
        eval_dataset: the same, or a dictionary of them.
        processing_class: the tokenizer.
        ref_model: the reference, loaded, or the folder or hub id to load it from. It may share frozen weights with
            ``model``, but none that are trained. Left out, it is the model without its adapter where there is one
            (``peft_config``, or a ``PeftModel`` that still equals its base), and otherwise a frozen copy of ``model``
            made here, before any checkpoint is loaded; with ``precompute_ref_logps``, or a method without a reference,
            no copy is made.
        peft_config: wraps ``model``, seeded by ``args.seed``.
        callbacks, optimizers: as for ``Trainer``.

    Models are changed in place, as by ``Trainer``: they get the adapter, lose their dropout and move to the device. If the
    trainer cannot be built, all but the device is undone.

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
        ref_model: nn.Module | str | None = None,
        peft_config: object = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        prepare.check_arguments(model, args, train_dataset, ref_model, peft_config)
        train = prepare_rows(train_dataset, processing_class, args, "train_dataset")
        evals = {
            name: prepare_rows(data, processing_class, args, "eval_dataset")
            for name, data in _named(eval_dataset).items()
        }
        if isinstance(ref_model, str):
            ref_model = prepare.load_reference(ref_model, model)
        with prepare.unchanged_if_refused(model, ref_model):
            self._build(
                prepare.ready(model, ref_model, args, peft_config),
                args,
                train,
                evals,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                ref_model=ref_model,
                fresh_adapter=peft_config is not None,
            )

    def _build(
        self,
        model: nn.Module,
        args: PreferenceConfig,
        train: Prepared,
        evals: dict[str, Prepared],
        *,
        processing_class: PreTrainedTokenizerBase | None,
        callbacks: list[TrainerCallback] | None,
        optimizers: tuple,
        ref_model: nn.Module | None,
        fresh_adapter: bool,
    ) -> None:
        pad_token_id = prepare.pad_token_id(processing_class, model)
        models = [model] if ref_model is None else [model, ref_model]
        check_token_ids(models, processing_class, [train, *evals.values()], pad_token_id)
        self._row_collator = PackingCollator(PreferenceCollator(pad_token_id, max_length=args.max_length))
        collator = self._row_collator
        if args.spec.data == PAIRS:
            collator = PackingCollator(PairCollator(pad_token_id, max_length=args.max_length))
        prepare.check_best(args, evals)
        prepare.check_steps(args, len(train.tokenized.dataset))
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
        show_lines(self)
        self.spread = Spread(self)
        self.head = lm_head_of(self.model)
        check_lm_head(self.model, self.head)
        self._set_up_reference(ref_model, fresh_adapter)
        self._compile()
        self.train_dataset = self._scored(train, args.per_device_train_batch_size)
        scored = {name: self._scored(rows, args.per_device_eval_batch_size) for name, rows in evals.items()}
        self.eval_dataset = scored.get("", scored or None)
        if args.precompute_ref_logps:  # their scores are columns now; frees memory
            kept = AdapterOff(self.model) if isinstance(self.reference, AdapterOff) else None
            self.reference, self._reference_head = kept, kept and self.head
        self.objective = Objective(args)
        self.baselines = BaselineEstimators(args)
        self.mismatched = None
        if args.needs_kl:
            self.mismatched = MismatchedRows(
                args.kl_estimator,
                collator,
                self._log_ratios,
                args.device,
                decay=args.kl_decay,
                keep_up=self._keep_up if self.spread.in_lockstep else lambda: None,
            )
        self._window: list[dict] = []
        self._z0: Tensor | None = None  # of the window
        self._ahead: tuple[list[Tensor], Baselines] | None = None  # of the window
        self._sampler: LabelBalancedSampler | None = None
        self.add_callback(_SamplerEpoch(self))
        self._reset_state()
        self.run_folder = RunFolder(args.output_dir, active=self.is_world_process_zero())
        describe(self, self._reference_kind, train, evals)

    def _build_accelerator_args(self, **kwargs) -> dict:
        """Trainer's, without compilation of the whole model, whose head could then not be hooked; see ``compile_layers``."""
        built = super()._build_accelerator_args(**kwargs)
        self._compilation, built["dynamo_plugin"] = (
            built["dynamo_plugin"],
            TorchDynamoPlugin(backend="no"),
        )
        return built

    def _compile(self) -> None:
        plugin = self._compilation
        if plugin.backend == DynamoBackend.NO:
            return
        self.spread.check_compilable()
        options = {"backend": plugin.backend.value.lower(), "mode": plugin.mode}
        prepare.compile_layers(self.model, options)
        if self.reference.model not in (None, self.model):
            prepare.compile_layers(self.reference.model, options)

    # ---- data and reference ----

    def _set_up_reference(self, ref_model: nn.Module | None, fresh_adapter: bool) -> None:
        args = self.args
        if args.spec.needs_reference:
            self.reference = choose_reference(
                self.model,
                ref_model,
                fresh_adapter=fresh_adapter,
                precompute=args.precompute_ref_logps,
                may_copy=self.spread.may_copy,
            )
        else:
            self.reference = NoReference()
        if args.precompute_ref_logps and self.spread.prepared_later:
            # The model's own weights are placed when training starts, so a copy of them gives the scores.
            if self.reference.model is self.model:
                self.reference.model = copy.deepcopy(self.model)
        self._reference_kind = self.reference.kind
        self._reference_head = self.head
        if self.reference.model not in (None, self.model):
            self._reference_head = lm_head_of(self.reference.model)
            check_lm_head(self.reference.model, self._reference_head)
        # With an adapter the reference cannot be mistaken for a checkpoint, so its weights need not be read.
        wanted = args.precompute_ref_logps or not isinstance(self.reference, AdapterOff)
        self._reference_fingerprint = self.reference.fingerprint() if wanted else None
        if self.reference.model not in (None, self.model):
            self.reference.model = self.spread.frozen(self.reference.model)

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
            self._row_collator,
            identity=(self._reference_fingerprint, str(self.accelerator.mixed_precision)),
            cache_dir=args.reference_cache_dir,
            batch_size=args.precompute_batch_size or args.per_device_eval_batch_size,
            accelerator=self.accelerator,
            in_lockstep=self.spread.in_lockstep,
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
        if args.kl_estimator != "microbatch":
            batch_size *= args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        self._sampler = LabelBalancedSampler(rows["label"][:], batch_size, seed)
        return self._sampler

    # ---- one optimizer step ----

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The window's micro-batches, each row or pair with its share in the window's mean loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        share_out(batches, self.accelerator, by_tokens=self.objective.nll_weight > 0)
        # The estimates wait for the first compute_loss: on resume the random state is restored in between.
        self._window, self._z0, self._ahead = batches, None, None
        if batches:
            self._sums["train"].add_step(self.accelerator.num_processes)
            self.baselines.step(self.state.global_step)
        return batches, None

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None  # Trainer would count label tokens; these labels are of rows

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of what this micro-batch's rows or pairs add to the step's mean loss, and ``predict``'s values of each."""
        args, objective, mode = self.args, self.objective, "train" if model.training else "eval"
        z0 = self._reference_point(inputs, mode) if args.needs_kl else None
        ahead = mode == "train" and args.needs_window and len(self._window) > 1
        if ahead and self._ahead is None:
            self._ahead = self._look_ahead()
        ref_logps = self._ahead[0][inputs["position"]] if ahead else self._known_ref_logps(inputs)
        with self.accelerator.autocast():
            policy = score(model, self.head, inputs, backend=args.backend, outputs=POLICY_OUTPUTS)
        rows = _sequences(inputs, policy.logps, ref_logps)
        if ahead:
            baselines = self._ahead[1]
        else:  # these are all the rows of the step, or of the batch that is evaluated
            baselines = self._estimate(rows.first(len(inputs["features"])), mode)
        baselines = replace(baselines, reference_point=z0)
        losses = objective.losses(rows, baselines) * inputs["shares"]
        if "token_shares" in inputs:
            nll = objective.nll(rows, len(losses))
            losses = losses + objective.nll_weight * nll * inputs["token_shares"]
        rewards = self._record(inputs, rows, policy, losses.detach(), baselines, mode)
        loss = losses.sum()
        return (loss, _outputs(rows, rewards, len(losses))) if return_outputs else loss

    def _reference_point(self, inputs: dict, mode: str) -> Tensor:
        """z0 of the window, or of the micro-batch; in evaluation of the batch."""
        windowed = mode == "train" and self.args.kl_estimator != "microbatch"
        if windowed and self._z0 is not None:
            return self._z0
        batches = self._window if windowed else [inputs]
        pieces = [list(batch["features"]) for batch in batches]
        estimate = self.mismatched.estimate(pieces, update=mode == "train")
        self._sums[mode].add_estimate(estimate.value, estimate.rows_without_partner)
        if windowed:
            self._z0 = estimate.value
        return estimate.value

    @torch.no_grad()
    def _look_ahead(self) -> tuple[list[Tensor], Baselines]:
        """The reference's scores of every micro-batch of the window, and what all its rows together say."""
        references, parts = [], []
        for batch in self._window:
            batch = to_device(batch, self.args.device)
            references.append(self._known_ref_logps(batch))
            with self.accelerator.autocast():
                logps = score(self._policy, self.head, batch, backend=self.args.backend).logps
            parts.append(_sequences(batch, logps, references[-1]).first(len(batch["features"])))
        return references, self._estimate(Sequences.joined(parts), "train")

    def _estimate(self, rows: Sequences, mode: str) -> Baselines:
        baselines = self.baselines.estimate(rows, update=mode == "train")
        if baselines.shift is not None:
            self._sums[mode].add_shift(baselines.shift, baselines.gate)
        return baselines

    @torch.no_grad()
    def _log_ratios(self, batch: dict) -> Tensor:
        """Policy less reference of mismatched sequences, (n,) nats."""
        batch = to_device(batch, self.args.device)
        with self.accelerator.autocast():
            logps = score(self._policy, self.head, batch, backend=self.args.backend).logps
        return logps - self._known_ref_logps(batch)

    def _keep_up(self) -> None:
        """The passes of ``_log_ratios`` for no row."""
        batch = self._row_collator.of_nobody()
        known = {"ref_logps": torch.zeros(1)} if self.args.precompute_ref_logps else {}
        self._log_ratios(batch | known)

    @property
    def _policy(self) -> nn.Module:
        """What passes without a gradient call. Not DDP's wrapper, which would make them need all processes."""
        return self.model_wrapped if self.spread.by_engine else self.model

    def _known_ref_logps(self, batch: dict) -> Tensor | None:
        """(B,) nats, computed beforehand or now; None for a method without a reference."""
        if not self.args.spec.needs_reference:
            return None
        return batch["ref_logps"] if "ref_logps" in batch else self._reference_logps(batch)

    @torch.no_grad()
    def _reference_logps(self, batch: dict) -> Tensor:
        """(B,) nats, in the policy's mode (training or evaluation, autocast): equal weights give equal bits."""
        batch = to_device(batch, self.args.device)
        with self.reference.running(self.model.training) as model, self.accelerator.autocast():
            model = self._policy if model is self.model else model
            return score(model, self._reference_head, batch, backend=self.args.backend).logps

    def _record(
        self,
        inputs: dict,
        rows: Sequences,
        policy: Scores,
        losses: Tensor,
        baselines: Baselines,
        mode: str,
    ) -> Tensor | None:
        """Add to the sums that are logged; returns the rewards."""
        detached = replace(rows, logps=rows.logps.detach())
        metrics = RowMetrics(
            losses=losses,
            shares=inputs["shares"],
            labels=inputs["labels"],
            rewards=self.objective.rewards(detached),
            logps=detached.logps,
            mean_logits=policy.mean_logits,
            entropies=policy.entropies,
            completion_tokens=rows.lengths,
            tokens=inputs["attention_mask"].sum(1),
            pulls=self.objective.pulls(detached, baselines),
        )
        self._sums[mode].add_rows(metrics, self.accelerator.num_processes if mode == "train" else 1)
        if mode == "train":
            numbers = [int(row["row"]) for row in inputs["features"]]
            self._watch.add_rows(self.state.global_step + 1, numbers, _telling(losses, detached)[: len(numbers)])
        return metrics.rewards

    # ---- evaluation ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """Trainer's, for rows in any form that ``train_dataset`` takes, or a dictionary of them.

        A string is the name of one of several evaluation sets, or else a path or hub id.
        """
        self.spread.check_prepared(self.model)
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        named = isinstance(eval_dataset, str) and eval_dataset in sets
        # of a dictionary Trainer calls this again for each
        if eval_dataset is not None and not named and not isinstance(eval_dataset, dict):
            eval_dataset = self._prepared_later(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test"):
        """Trainer's, for rows in any form that ``train_dataset`` takes.

        Returns:
            PredictionOutput. ``metrics``: those of ``evaluate``, with the prefix. ``predictions``: a dictionary of numpy
            arrays, one entry a row in the order of the data: ``logps`` and ``ref_logps`` (nats, of the whole completion)
            and ``rewards``, without those that the method does not have. ``label_ids``: the labels. Of pairs each array is
            (P, 2), the chosen answer first. The logits are never built.
        """
        self.spread.check_prepared(self.model)
        rows = self._prepared_later(test_dataset, "test_dataset")
        return super().predict(rows, ignore_keys, metric_key_prefix)

    def _prepared_later(self, data: object, name: str) -> Dataset:
        rows = prepare_rows(data, self.processing_class, self.args, name)
        check_token_ids([self.model], self.processing_class, [rows])
        return self._scored(rows, self.args.per_device_eval_batch_size)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The batch's summed loss, and the values of each row or pair that ``predict`` returns."""
        drop_repeats(inputs, self.accelerator, last=True)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs, _per_row(inputs["labels"], len(inputs["shares"]))


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


def _sequences(batch: dict, logps: Tensor, ref_logps: Tensor | None) -> Sequences:
    return Sequences(logps, ref_logps, batch["labels"], batch["cu_seqlens"].diff())


def _outputs(rows: Sequences, rewards: Tensor | None, count: int) -> dict[str, Tensor]:
    """What ``predict`` returns of ``count`` rows or pairs; detached."""
    values = {"logps": rows.logps.detach(), "ref_logps": rows.ref_logps, "rewards": rewards}
    return {name: _per_row(value, count) for name, value in values.items() if value is not None}


def _per_row(values: Tensor, count: int) -> Tensor:
    """(R,) of rated rows; (P, 2) of pairs, whose chosen answers come first and then the rejected ones."""
    return values if len(values) == count else values.view(2, count).T.contiguous()


def _telling(losses: Tensor, rows: Sequences) -> Tensor:
    """(R,) finite where a row or pair is: a row at minus infinity may have a finite loss."""
    logps = rows.logps if rows.ref_logps is None else rows.logps - rows.ref_logps  # (B,)
    return losses + (0.0 * logps).view(-1, len(losses)).sum(0)
