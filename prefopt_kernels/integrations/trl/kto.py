"""TRL's KTO trainer on ``linear_logprob`` as a subclass, for frameworks on a TRL version without a fused head.

TRL 1.9 has none: its trainer computes a softmax over the whole vocabulary at every position, prompt and padding
included, and keeps the logits for its metrics. ``fused_kto_trainer`` makes a subclass of any such trainer that captures
the hidden states at the model's head and scores only the tokens of the completions. Data, reference model, mismatched
completions, metric names and checkpoints stay TRL's. With TRL 1.16 the patch of :mod:`prefopt_kernels.integrations.trl`
covers more trainers; this class works there too.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prefopt_kernels.integrations._optional import why_untested
from prefopt_kernels.integrations.transformers import (
    check_lm_head,
    lm_head_of,
    pack_completions,
    score_completions,
)
from prefopt_kernels.modules import sequence_logps, unpaired_losses
from prefopt_kernels.ops.linear_logprob import TokenLogprobs
from prefopt_kernels.reference_point import MicrobatchKL

TESTED = ("1.9", "1.16")
METHODS = {"kto": "kto", "apo_zero_unpaired": "apo_zero"}  # TRL's loss_type: our method
Mixin: Any = object  # FusedScores comes before TRL's trainer in the method resolution order


def why_not() -> str | None:
    """Why :func:`fused_kto_trainer` would raise; None if it would not.

    Example:
        >>> from prefopt_kernels.integrations.trl import kto as trl_kto
        >>> trl_kto.why_not() is None
        True
    """
    return why_untested("trl", "TRL", TESTED)


def fused_kto_trainer(base: type, backend: str = "auto") -> type:
    """A subclass of TRL's ``KTOTrainer``, or of a subclass of it, that does not build the logits of a batch.

    In fp32, loss, gradients and metrics are TRL's up to rounding. ``evaluate`` with ``compute_metrics`` needs logits
    and runs TRL's code.

    Args:
        base: the trainer class.
        backend: as for :func:`prefopt_kernels.linear_logprob`.

    Raises:
        RuntimeError: TRL is not installed or not of a tested version; :func:`why_not` returns the reason.

    The class raises ValueError for a model whose head is not supported (see
    :func:`prefopt_kernels.integrations.transformers.lm_head_of`), for an unknown loss type, for rows with images, for
    ``use_liger_kernel`` and under DeepSpeed ZeRO-3.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"TRL's KTO trainer cannot be fused: {reason}")
    return type(f"Fused{base.__name__}", (FusedScores, base), {"backend": backend})


def refuse_partitioned(model: nn.Module) -> None:
    """Raise ValueError for a model partitioned by DeepSpeed ZeRO-3, whose weights exist during a forward pass only."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError("DeepSpeed ZeRO-3 has partitioned the model; expected stage 2 or below")


class FusedScores(Mixin):
    """Overrides of TRL's trainer: its forward passes and its loss."""

    backend = "auto"

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named)
        if self.loss_type not in METHODS:
            raise ValueError(f"loss_type is {self.loss_type!r}; expected one of {tuple(METHODS)}")
        if self._is_vision_dataset:
            raise ValueError("train_dataset has images; the fused KTO trainer supports text only")
        if self.args.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel is True; expected False, because Liger's loss would replace the fused one"
            )
        refuse_partitioned(self.model)
        check_lm_head(self.model, lm_head_of(self.model))
        self._kl = MicrobatchKL()

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """(B,) reference scores of the completions and, if the loss needs them, of the mismatched ones."""
        from trl.models.utils import disable_gradient_checkpointing

        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self._reference_adapter(),
        ):
            return self._score(model, inputs)[0], self._compute_kl_logps(model, inputs)

    def _reference_adapter(self) -> AbstractContextManager[Any]:
        """Without a reference model: disables the policy's adapter, or selects the one named "ref"."""
        from accelerate.utils import is_peft_model
        from trl.trainer.utils import use_adapter

        if self.ref_model is not None or not is_peft_model(self.model):
            return nullcontext()
        model = self.accelerator.unwrap_model(self.model)
        return use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)

    def _compute_kl_logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
        """(B,) nats of the mismatched completions, without gradient; None if the loss needs none."""
        if not self.calculate_KL:
            return None
        with torch.no_grad():
            return self._score(model, batch, "KL_")[0]

    def _score(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        prefix: str = "",
        outputs: tuple[str, ...] = (),
        **inputs: object,
    ) -> tuple[Tensor, TokenLogprobs, Tensor, Any]:
        """(B,) sums in nats, the values per token, ``cu_seqlens``, and the model's outputs."""
        ids = batch[f"{prefix}input_ids"]
        packing = pack_completions(ids, batch[f"{prefix}completion_mask"])
        head = lm_head_of(self.accelerator.unwrap_model(model))
        mask = batch[f"{prefix}attention_mask"]
        tokens, result = score_completions(model, head, ids, mask, packing, outputs, self.backend, **inputs)
        return sequence_logps(tokens.logp, packing.cu_seqlens), tokens, packing.cu_seqlens, result

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if return_outputs:  # needs logits
            return super()._compute_loss(model, inputs, return_outputs)
        batch = self._prepare_inputs(inputs)
        kl_logps = self._compute_kl_logps(model, batch)
        router: dict[str, Any] = {"output_router_logits": True} if self.aux_loss_enabled else {}
        logps, tokens, cu_seqlens, result = self._score(model, batch, outputs=("entropy", "mean_logit"), **router)
        if self.precompute_ref_logps:
            ref_logps, ref_kl_logps = batch["ref_logps"], batch.get("ref_KL_logps")
        else:
            reference = self.model if self.ref_model is None else self.ref_model
            ref_logps, ref_kl_logps = self.compute_ref_log_probs(reference, batch)
        z0 = logps.new_zeros(())
        if self.calculate_KL:
            z0 = self._kl.estimate(kl_logps - ref_kl_logps, update=self.model.training)
        labels = torch.as_tensor(batch["label"], dtype=torch.bool, device=logps.device)
        loss = unpaired_losses(
            METHODS[self.loss_type],
            logps,
            ref_logps,
            labels,
            reference_point=z0,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        ).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * result.aux_loss

        assert tokens.mean_logit is not None and tokens.entropy is not None
        rows = {
            "rewards": self.beta * (logps.detach() - ref_logps),
            "logps": logps.detach(),
            "logits": sequence_logps(tokens.mean_logit, cu_seqlens),
            "entropy": sequence_logps(tokens.entropy.detach(), cu_seqlens),
            "tokens": cu_seqlens.diff().float(),
            "rows": torch.ones_like(logps),
        }
        self._log_batch(rows, labels, z0, batch["attention_mask"].sum(), result)
        return loss

    def _log_batch(self, rows: dict[str, Tensor], labels: Tensor, z0: Tensor, token_count: Tensor, result: Any) -> None:
        """TRL's metrics of a micro-batch, from sums over all ranks that take one reduction and one transfer."""
        values = torch.stack([value.float() for value in rows.values()])  # (names, B)
        sides = torch.stack([labels, ~labels]).float()  # (2, B)
        local = torch.cat([(values[:, None] * sides).sum(-1).flatten(), token_count.float()[None]])
        *flat, seen = self.accelerator.reduce(local, reduction="sum").tolist()
        sums = {name: flat[2 * i : 2 * i + 2] for i, name in enumerate(rows)}

        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._total_train_tokens += int(seen)
        tokens = sum(sums["tokens"])
        logged = {"kl": z0.item(), "entropy": sum(sums["entropy"]) / tokens if tokens > 0 else 0.0}
        for i, side in enumerate(("chosen", "rejected")):
            for name, unit in (("logits", "tokens"), ("rewards", "rows"), ("logps", "rows")):
                if sums[unit][i] > 0:
                    logged[f"{name}/{side}"] = sums[name][i] / sums[unit][i]
        if min(sums["rows"]) > 0:
            logged["rewards/margins"] = logged["rewards/chosen"] - logged["rewards/rejected"]
        if self.aux_loss_enabled:
            logged["aux_loss"] = self.accelerator.reduce(result.aux_loss.detach(), reduction="mean").item()
        for name, value in logged.items():
            self._metrics[mode][name].append(value)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
