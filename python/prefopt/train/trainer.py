"""The trainer: ``transformers.Trainer`` with a preference loss on fused log-probabilities.

Start here. An optimizer step: ``get_batch_samples`` weights every row or pair for the step's mean loss; the first
``compute_loss`` estimates the baselines from all rows of the step; every ``compute_loss`` scores its sequences under
policy and reference (scorer.py), applies the method's loss (methods.py) and accumulates metrics, without waiting for
the device. recorded.py writes logs, checkpoints and the run folder.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from prefopt.data.sampler import LabelBalancedSampler, ListSampler
from prefopt.data.tokenize import by_length
from prefopt.train import prepare
from prefopt.train.baselines import BaselineEstimators
from prefopt.train.config import PreferenceConfig
from prefopt.train.console import show_lines
from prefopt.train.describe import describe
from prefopt.train.inputs import COLUMNS, prepare_rows
from prefopt.train.layout import Layout
from prefopt.train.methods import PAIRS, Baselines, Sequences
from prefopt.train.metrics import RowMetrics
from prefopt.train.mismatched import MismatchedRows
from prefopt.train.objective import Objective
from prefopt.train.recorded import RecordedTrainer
from prefopt.train.reference import Reference
from prefopt.train.run_folder import RunFolder
from prefopt.train.scorer import Scorer
from prefopt.train.scoring import PassCollator, Scores, outputs, per_row, sequences
from prefopt.train.step_values import StepScores, StepValues
from prefopt.train.vocabulary import check_token_ids
from prefopt.train.window import Window, count_rows, make_window, set_counted, set_token_weights

if TYPE_CHECKING:
    from peft import PeftConfig


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

    Models are changed in place, as by ``Trainer``: adapter, dropout, device. If the trainer cannot be built, all
    changes but the device are undone.

    Raises:
        ValueError, TypeError: an argument does not fit, found before any training.
        DataError: rows that cannot be used.
        NonFiniteError: from ``train``; see ``FiniteWatch``.
    """

    # Rows are weighted for the mean loss of the whole window, so Trainer must not divide by the accumulation steps.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: PreferenceConfig,
        train_dataset: object = None,
        eval_dataset: object = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: PreTrainedModel | str | None = None,
        peft_config: "PeftConfig | None" = None,
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
            model = prepare.ready(model, ref_model, args, peft_config)
            pad_token_id = prepare.pad_token_id(processing_class, model)
            models = [model] if ref_model is None else [model, ref_model]
            check_token_ids(models, processing_class, [train, *evals.values()], pad_token_id)
            collator = PassCollator(pad_token_id, max_length=args.max_length, pairs=args.spec.data == PAIRS)
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
            self.layout = Layout(self)
            self.scorer = Scorer(self, collator, ref_model, fresh_adapter=peft_config is not None)
            reference_kind = "none" if self.reference is None else self.reference.kind
            self._reference_fingerprint = self.scorer.fingerprint
            ranks = self.accelerator.num_processes
            if isinstance(args.kl_rows, int) and args.kl_rows < ranks:
                raise ValueError(f"kl_rows is {args.kl_rows}; expected at least one for each of the {ranks} processes")
            if args.kl_estimator == "exact" and (reason := self.scorer.why_no_kl):
                raise ValueError(f"kl_estimator is 'exact' and {reason}; expected kl_estimator 'window' or 'ema'")
            if self._compilation.backend != DynamoBackend.NO:
                self.layout.check_compilable()
                for one in filter(None, (self.model, self.scorer.second_model)):
                    prepare.compile_layers(one, self._compilation)
            self.train_dataset = self.scorer.scored(train, args.per_device_train_batch_size)
            scored = {name: self.scorer.scored(rows, args.per_device_eval_batch_size) for name, rows in evals.items()}
            self.eval_dataset = scored.get("", scored or None)
            if args.precompute_ref_logps:  # the scores are columns of the data now
                self.scorer.free_reference()
            self.objective = Objective(args)
            self.baselines = BaselineEstimators(args)
            self.mismatched = None
            if args.needs_kl:
                self.mismatched = MismatchedRows(str(args.kl_estimator), collator, decay=args.kl_decay)
            # TRL's estimator and the order of the data need the micro-batches as they come.
            self.recuts = args.kl_estimator != "microbatch" and args.sampler != "sequential"
            passes, why_not = self.scorer.choose_layout()
            collator.packed, collator.shared = passes["packed"], passes["share_prompts"]
            self.step_scores = StepScores(self)
            self._window: Window | None = None
            self._values: StepValues | None = None  # of the window
            self._sampler: LabelBalancedSampler | None = None
            self.add_callback(_SamplerEpoch(self))
            self._reset_state()
            self.run_folder = RunFolder(str(args.output_dir), active=self.is_world_process_zero())
            describe(self, reference_kind, train, evals, passes | {"recut": self.recuts, "why_not": why_not})

    def _build_accelerator_args(self, **kwargs) -> dict:
        """Trainer's, without compilation of the whole model, which would remove the hooks of its head."""
        built = super()._build_accelerator_args(**kwargs)
        self._compilation, built["dynamo_plugin"] = built["dynamo_plugin"], TorchDynamoPlugin(backend="no")
        return built

    @property
    def reference(self) -> Reference | None:
        """The frozen reference; None for a method without one, and once its scores are precomputed."""
        return self.scorer.reference

    # ---- data and reference ----

    def _set_signature_columns_if_needed(self) -> None:
        vars(self)["_signature_columns"] = list(COLUMNS)  # Trainer declares it as None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        args = self.args
        if args.sampler != "label_balanced":
            return super()._get_train_sampler(train_dataset)
        rows = cast(Dataset, self.train_dataset if train_dataset is None else train_dataset)
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
        """The window's micro-batches, each row or pair with its weight in the step's mean loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        window = make_window(batches, self.accelerator, self.scorer.collator, recut=self.recuts)
        if self.objective.nll_weight > 0:
            set_token_weights(window, self.accelerator)
        # The first compute_loss makes the estimates: on resume the random state is restored in between.
        self._window, self._values, batches = window, None, window.batches
        if batches:
            self._sums["train"].add_step(self.accelerator.num_processes)
            self.baselines.step(self.state.global_step)
        return batches, None

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None  # Trainer would count label tokens; these labels are of rows

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's part of the step's mean loss, and on request the values that ``predict`` returns."""
        objective, mode = self.objective, "train" if model.training else "eval"
        values, ahead = self._step_values(inputs, mode)
        if ahead is None:
            policy = self.scorer.both(inputs, model)
        else:
            policy = self.scorer.policy(inputs, model)._replace(ref_logps=ahead.ref_logps, kls=ahead.kls)
        rows, kept = sequences(inputs, policy), len(inputs["features"])
        kls = None if policy.kls is None else policy.kls[:kept]
        baselines = self.step_scores.baselines(values, rows.first(kept), kls, mode)
        losses = objective.losses(rows, baselines) * inputs["row_weights"]
        if "token_weights" in inputs:
            nll = objective.nll(rows, len(losses))
            losses = losses + objective.nll_weight * nll * inputs["token_weights"]
        rewards = self._record(inputs, rows, policy, losses.detach(), baselines, mode)
        loss = losses.sum()
        return (loss, outputs(rows, rewards, len(losses))) if return_outputs else loss

    def _step_values(self, inputs: dict, mode: str) -> tuple[StepValues, Scores | None]:
        """The values of the micro-batch's window, and the micro-batch's scores if they were computed for them."""
        window = self._window
        assert window is not None
        if mode == "eval":
            values, position = self.step_scores.values(window, mode), 0
        else:
            if self._values is None:
                self._values = self.step_scores.values(window, mode)
            values, position = self._values, inputs["position"]
        if self.args.kl_estimator == "microbatch":
            alone = Window([inputs], window.rows, [window.places[position]], [window.kept[position]])
            point = self.step_scores.reference_point(alone, mode)
            values = replace(values, baselines=replace(values.baselines, reference_point=point))
        return values, values.ahead[position]

    def _record(
        self, inputs: dict, rows: Sequences, policy: Scores, losses: Tensor, baselines: Baselines, mode: str
    ) -> Tensor | None:
        """Add to the sums for the next log; returns the rewards."""
        assert policy.mean_logits is not None and policy.entropies is not None
        detached = replace(rows, logps=rows.logps.detach())
        metrics = RowMetrics(
            losses=losses,
            weights=inputs["row_weights"],
            labels=inputs["labels"],
            rewards=self.objective.rewards(detached),
            logps=detached.logps,
            mean_logits=policy.mean_logits,
            entropies=policy.entropies,
            kls=policy.kls,
            log_ratios=None if rows.ref_logps is None else detached.logps - rows.ref_logps,
            flat=self.objective.flat(detached, baselines),
            completion_tokens=rows.lengths,
            tokens=inputs["tokens"],
            positions=inputs["input_ids"].numel(),
            filled=inputs["filled"],
            gradient_components=self.objective.gradient_components(detached, baselines),
        )
        self._sums[mode].add_rows(metrics, self.accelerator.num_processes if mode == "train" else 1)
        if mode == "train":
            numbers = [int(row["row"]) for row in inputs["features"]]
            self._watch.add_rows(self.state.global_step + 1, numbers, _finite_probe(losses, detached)[: len(numbers)])
        return metrics.rewards

    # ---- evaluation ----

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        """Trainer's, or longest first, so that little is padded and a batch that does not fit fails early."""
        if not self.recuts:
            return super()._get_eval_sampler(eval_dataset)
        return ListSampler(by_length(eval_dataset))

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """Trainer's; predictions are in the order of the data."""
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        if not self.recuts or output.predictions is None:
            return output
        back = np.argsort(by_length(dataloader.dataset))
        predictions = {name: values[back] for name, values in output.predictions.items()}
        return output._replace(predictions=predictions, label_ids=output.label_ids[back])

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """Trainer's, for rows in any form that ``train_dataset`` takes, or a dictionary of them.

        A string is the name of one of several evaluation sets, or else a path or hub id.
        """
        self.layout.check_prepared(self.model)
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        named = isinstance(eval_dataset, str) and eval_dataset in sets
        # of a dictionary Trainer calls this again for each
        if eval_dataset is not None and not named and not isinstance(eval_dataset, dict):
            eval_dataset = self._prepared_later(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test"):
        """Trainer's, for rows in any form that ``train_dataset`` takes.

        Returns:
            PredictionOutput. ``metrics``: those of ``evaluate``, with the prefix. ``predictions``: a dictionary of
            numpy arrays with one entry per row, in the order of the data: ``logps`` and ``ref_logps`` (nats, of the
            whole completion) and ``rewards``, those that the method has. ``label_ids``: the labels. For pairs each
            array is (P, 2), the chosen answer first. Logits are not materialised.
        """
        self.layout.check_prepared(self.model)
        rows = self._prepared_later(test_dataset, "test_dataset")
        return super().predict(rows, ignore_keys, metric_key_prefix)

    def _prepared_later(self, data: object, name: str) -> Dataset:
        tokenizer = cast(PreTrainedTokenizerBase | None, self.processing_class)
        rows = prepare_rows(data, tokenizer, self.args, name)
        check_token_ids([self.model], tokenizer, [rows])
        return self.scorer.scored(rows, self.args.per_device_eval_batch_size)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The batch's summed loss, and the values of each row or pair that ``predict`` returns."""
        rows = list(inputs["features"])
        mine, _ = count_rows(inputs, self.accelerator, last=True)
        set_counted(inputs, mine)
        inputs = self._prepare_inputs(inputs)
        self._window = Window([inputs], rows, [list(range(len(rows)))], [mine])
        with torch.no_grad():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, values = self.compute_loss(model, inputs, return_outputs=True)
        return loss, values, per_row(inputs["labels"], len(inputs["row_weights"]))


class _SamplerEpoch(TrainerCallback):
    """Sets the sampler's epoch, which accelerate does not in a resumed distributed run."""

    def __init__(self, trainer: PreferenceTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


def _named(eval_dataset: object) -> dict[str, object]:
    if eval_dataset is None:
        return {}
    return eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}


def _finite_probe(losses: Tensor, rows: Sequences) -> Tensor:
    """(R,) finite exactly where a row or pair is: a log-probability of minus infinity may have a finite loss."""
    logps = rows.logps if rows.ref_logps is None else rows.logps - rows.ref_logps  # (B,)
    return losses + (0.0 * logps).view(-1, len(losses)).sum(0)
