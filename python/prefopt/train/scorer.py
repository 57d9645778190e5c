"""The forward passes of a trainer without gradient: policy, reference, and the precomputed scores of a data set."""

import copy
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from torch import Tensor, nn

from prefopt.train.inputs import Prepared
from prefopt.train.methods import PAIRS
from prefopt.train.precompute import fixed_partners, with_reference
from prefopt.train.probe import why_not
from prefopt.train.reference import AdapterOff, Reference, choose_reference
from prefopt.train.scoring import PassCollator, Scores, rows_at_head, score, to_device
from prefopt.train.vocabulary import embedding_rows
from prefopt_kernels.integrations.transformers import LMHead, check_lm_head, lm_head_of
from prefopt_kernels.parallel.dtensor import is_dtensor

if TYPE_CHECKING:
    from prefopt.train.trainer import PreferenceTrainer

POLICY_OUTPUTS = ("entropy", "mean_logit")


class Scorer:
    """Scores passes of ``PassCollator`` under the policy and the reference.

    Args:
        trainer: built, with its ``layout``.
        collator: of unpaired rows.
        ref_model, fresh_adapter: as for ``choose_reference``.
    """

    def __init__(
        self,
        trainer: "PreferenceTrainer",
        collator: PassCollator,
        ref_model: nn.Module | None,
        *,
        fresh_adapter: bool,
    ):
        self.trainer, self.args, self.collator = trainer, trainer.args, collator
        self.head = self.reference_head = _checked_head(trainer.model)
        self.reference: Reference | None = None
        self.fingerprint: str | None = None
        layout, model, precompute = trainer.layout, trainer.model, self.args.precompute_ref_logps
        if not self.args.spec.needs_reference:
            return
        reference = choose_reference(
            model, ref_model, fresh_adapter=fresh_adapter, precompute=precompute, may_copy=layout.may_copy
        )
        if precompute and layout.prepared_later and reference.model is model:
            # Training shards or moves the model's own weights, so a copy gives the scores.
            reference.model = copy.deepcopy(model)
        if reference.model is not model:
            self.reference_head = _checked_head(reference.model)
        # With an adapter the reference cannot be mistaken for a checkpoint, so its weights need not be read.
        if precompute or not isinstance(reference, AdapterOff):
            self.fingerprint = reference.fingerprint()
        if reference.model is not model:
            reference.model = layout.frozen(reference.model)
        self.reference = reference

    @property
    def second_model(self) -> nn.Module | None:
        """The reference model, if it is not the policy."""
        second = None if self.reference is None else self.reference.model
        return None if second is self.trainer.model else second

    @property
    def _policy(self) -> nn.Module:
        """The model for passes without gradient. Not DDP's wrapper, whose forward pass needs all processes."""
        return self.trainer.model_wrapped if self.trainer.layout.by_engine else self.trainer.model

    def policy(self, batch: dict, model: nn.Module | None = None) -> Scores:
        """The policy's scores; with gradient, unless it is off, under ``model``, which is Trainer's wrapped one."""
        batch = to_device(batch, self.args.device)
        with self.trainer.accelerator.autocast():
            model = self._policy if model is None else model
            return score(model, self.head, batch, backend=self.args.backend, outputs=POLICY_OUTPUTS)

    def both(self, batch: dict, model: nn.Module | None = None) -> Scores:
        """The policy's scores with the reference's, if the method has one, and, if both are computed here, their KL."""
        if not self.has_kl:
            ref_logps = self.known_ref_logps(batch)
            return self.policy(batch, model)._replace(ref_logps=ref_logps)
        assert self.reference is not None
        batch = to_device(batch, self.args.device)
        with self.trainer.accelerator.autocast():
            with torch.no_grad(), self.reference.running(self.trainer.model.training) as reference:
                reference = self._policy if reference is self.trainer.model else reference
                rows = rows_at_head(reference, self.reference_head, batch)
            model = self._policy if model is None else model
            return score(model, self.head, batch, backend=self.args.backend, outputs=POLICY_OUTPUTS, reference=rows)

    @property
    def has_kl(self) -> bool:
        """Whether the exact KL comes with the scores."""
        return self.reference is not None and not self.args.precompute_ref_logps and self.why_no_kl is None

    @cached_property
    def why_no_kl(self) -> str | None:
        """Why policy and reference cannot be scored by one call of ``linear_kl``."""
        layout, own, ref = self.trainer.layout, self.head.weight, self.reference_head.weight
        if layout.in_lockstep:
            return f"the model is sharded ({layout.kind})"
        if is_dtensor(own) or is_dtensor(ref):
            return "a head is a DTensor"
        if len(own) != len(ref):
            return f"the policy's vocabulary has {len(own)} entries and the reference model's {len(ref)}"
        if own.dtype != ref.dtype and self.trainer.accelerator.mixed_precision == "no":
            return f"the policy is in {own.dtype} and the reference model in {ref.dtype}"
        return None

    @torch.no_grad()
    def policy_logps(self, batch: dict) -> Tensor:
        """(B,) nats, without gradient."""
        batch = to_device(batch, self.args.device)
        with self.trainer.accelerator.autocast():
            return score(self._policy, self.head, batch, backend=self.args.backend).logps

    @torch.no_grad()
    def reference_logps(self, batch: dict) -> Tensor:
        """(B,) nats, in the policy's mode (training or evaluation, autocast): equal weights give equal bits."""
        assert self.reference is not None
        batch = to_device(batch, self.args.device)
        with self.reference.running(self.trainer.model.training) as model, self.trainer.accelerator.autocast():
            model = self._policy if model is self.trainer.model else model
            return score(model, self.reference_head, batch, backend=self.args.backend).logps

    def known_ref_logps(self, batch: dict) -> Tensor | None:
        """(B,) nats, precomputed or computed here; None for a method without a reference."""
        if not self.args.spec.needs_reference:
            return None
        return batch["ref_logps"] if "ref_logps" in batch else self.reference_logps(batch)

    @torch.no_grad()
    def log_ratios(self, batch: dict) -> Tensor:
        """(n,) nats, policy minus reference."""
        batch = to_device(batch, self.args.device)
        logps, ref_logps = self.policy_logps(batch), self.known_ref_logps(batch)
        assert ref_logps is not None
        return logps - ref_logps

    def choose_layout(self) -> tuple[dict[str, bool], dict[str, str]]:
        """Whether passes are packed and prompts shared, and why not where they could have been.

        Raises:
            ValueError: ``packing`` is "packed", and the model does not keep packed sequences apart.
        """
        args, model, reasons = self.args, self.trainer.model, {}
        implementation = str(getattr(model.config.get_text_config(), "_attn_implementation", None))
        packed = args.packing == "packed" or (
            args.packing == "auto" and implementation.removeprefix("paged|").startswith(("flash", "flex"))
        )
        if packed and (reason := self._why_not(packed=True)):
            if args.packing == "packed":
                raise ValueError(f"packing is 'packed'; {type(model).__name__} cannot take it: {reason}")
            packed, reasons["packed"] = False, reason
        shared = args.share_prompts == "auto" and not packed and (args.spec.data == PAIRS or self.trainer.recuts)
        if shared and (reason := self._why_not(shared=True)):
            shared, reasons["share_prompts"] = False, reason
        return {"packed": packed, "share_prompts": shared}, reasons

    def _why_not(self, **layout: bool) -> str | None:
        if self.head.virtual_tokens:
            return "prompt learning puts tokens before every row"
        vocabulary = embedding_rows(self.trainer.model)
        return why_not(self.trainer.model, self._plain_policy_logps, vocabulary, **layout)

    def _plain_policy_logps(self, batch: dict) -> Tensor:
        """As ``policy_logps``, of the model before it is wrapped."""
        model = self.trainer.model
        with torch.no_grad(), self.trainer.accelerator.autocast():
            batch = to_device(batch, next(model.parameters()).device)
            return score(model, self.head, batch, backend=self.args.backend).logps

    def scored(self, prepared: Prepared, batch_size: int) -> Dataset:
        """The rows, with the reference's scores as columns under ``precompute_ref_logps``."""
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
            self.reference_logps,
            self.collator,
            identity=(str(self.fingerprint), str(self.trainer.accelerator.mixed_precision)),
            cache_dir=args.reference_cache_dir,
            batch_size=args.precompute_batch_size or args.per_device_eval_batch_size,
            accelerator=self.trainer.accelerator,
            in_lockstep=self.trainer.layout.in_lockstep,
        )

    def free_reference(self) -> None:
        """Drop a second model; an adapter that is switched off costs nothing and can score further rows."""
        kept = isinstance(self.reference, AdapterOff)
        self.reference, self.reference_head = (AdapterOff(self.trainer.model) if kept else None), self.head


def _checked_head(model: nn.Module) -> LMHead:
    head = lm_head_of(model)
    check_lm_head(model, head)
    return head
