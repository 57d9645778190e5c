"""TRL's KTO trainer on ``linear_logprob`` by a subclass, for frameworks that build on a version without a fused head.

TRL 1.9 has none: its trainer takes a softmax over the whole vocabulary at every position, prompt and padding too, and
keeps the logits for what it logs. ``fused_kto_trainer`` makes a subclass of any such trainer in which the model runs as
always, the hidden states are caught at its head, and only the tokens of the completions are scored. Data, reference
model, mismatched completions, the names of what is logged and what is saved stay TRL's. With TRL 1.16 alone, the patch
of :mod:`prefopt_kernels.integrations.trl` serves more trainers; this class works there too.
"""

import importlib.metadata
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from prefopt_kernels.integrations.transformers import pack_completions
from prefopt_kernels.integrations.transformers.head import (
    caught_at,
    check_lm_head,
    lm_head_of,
    own_positions,
)
from prefopt_kernels.integrations.trl import major_minor
from prefopt_kernels.losses import apo_zero_loss, kto_loss
from prefopt_kernels.modules import sequence_logps
from prefopt_kernels.ops.linear_logprob import TokenLogprobs
from prefopt_kernels.reference_point import MicrobatchKL

TESTED = ((1, 9), (1, 16))
LOSSES = ("kto", "apo_zero_unpaired")


def why_not() -> str | None:
    """Why :func:`fused_kto_trainer` would refuse here; None where it would not.

    Example:
        >>> from prefopt_kernels.integrations.trl import kto as trl_kto
        >>> trl_kto.why_not() is None
        True
    """
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return "TRL is not installed"
    if major_minor(version) not in TESTED:
        tested = " and ".join(".".join(map(str, each)) for each in TESTED)
        return f"TRL is {version}; tested with {tested}"
    return None


def fused_kto_trainer(base: type, backend: str = "auto") -> type:
    """A subclass of TRL's ``KTOTrainer``, or of a subclass of it, that never builds the logits of a batch.

    In fp32 loss, gradients and what is logged are TRL's to rounding. ``evaluate`` with ``compute_metrics`` asks for
    logits, and is left to TRL.

    Args:
        base: the trainer class.
        backend: as for :func:`prefopt_kernels.linear_logprob`.

    Raises:
        RuntimeError: TRL is not installed or not of a tested version; :func:`why_not` returns the same sentence.

    The class raises ValueError for a model whose head or logits are not understood (see
    :func:`prefopt_kernels.integrations.transformers.lm_head_of`), for an unknown loss type, for rows with images, for
    ``use_liger_kernel`` and under DeepSpeed ZeRO-3.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"TRL's KTO trainer cannot be fused: {reason}")
    return type(f"Fused{base.__name__}", (FusedScores, base), {"backend": backend})


def refuse_partitioned(model: nn.Module) -> None:
    """Raise ValueError for a model whose weights DeepSpeed ZeRO-3 lends to one forward pass at a time."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError("DeepSpeed ZeRO-3 has partitioned the model; expected stage 2 or below")


class FusedScores:
    """What stands before TRL's trainer in the order of its classes: its passes over the model, and its loss."""

    backend = "auto"

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        if self.loss_type not in LOSSES:
            raise ValueError(f"loss_type is {self.loss_type!r}; expected one of {LOSSES}")
        if self._is_vision_dataset:
            raise ValueError("train_dataset has images; the fused KTO trainer takes text only")
        if self.args.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel is True; expected False, because Liger's KTO loss would run in place of this one"
            )
        refuse_partitioned(self.model)
        # in training mode: bitsandbytes packs 4-bit weights for good in evaluation mode, and those have no gradient
        check_lm_head(self.model, lm_head_of(self.model))
        self._kl = MicrobatchKL()

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict) -> tuple[Tensor, Tensor | None]:
        """(B,) reference scores of the completions, and of the mismatched ones where there are any."""
        from trl.models.utils import disable_gradient_checkpointing

        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self._reference_adapter(),
        ):
            return self._logps(model, inputs), self._compute_kl_logps(model, inputs)

    def _reference_adapter(self):
        """The policy without its adapter, or with the one called "ref", where there is no reference model."""
        from accelerate.utils import is_peft_model
        from trl.trainer.utils import use_adapter

        if self.ref_model is not None or not is_peft_model(self.model):
            return nullcontext()
        model = self.accelerator.unwrap_model(self.model)
        return use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)

    def _compute_kl_logps(self, model: nn.Module, batch: dict) -> Tensor | None:
        """(B,) nats of the mismatched completions, without gradient; None for a loss that needs none."""
        if not self.calculate_KL:
            return None
        with torch.no_grad():
            return self._logps(model, batch, "KL_")

    def _logps(self, model: nn.Module, batch: dict, prefix: str = "") -> Tensor:
        return self._score(model, batch, prefix)[0]

    def _score(
        self, model: nn.Module, batch: dict, prefix: str = "", outputs: tuple[str, ...] = (), **more
    ) -> tuple[Tensor, TokenLogprobs, Tensor, object]:
        """(B,) sums in nats, the tokens' values, the row that each sequence begins at, and the model's outputs."""
        ids = batch[f"{prefix}input_ids"]
        packing = pack_completions(ids, batch[f"{prefix}completion_mask"])
        head = lm_head_of(self.accelerator.unwrap_model(model))

        def use(hidden: Tensor) -> TokenLogprobs:
            rows = own_positions(model, head, hidden, ids).flatten(0, 1)
            rows = rows.index_select(0, packing.positions)
            return head.score(rows, packing.targets, outputs=outputs, backend=self.backend)

        with caught_at(head, use, keep=0) as caught:
            result = model(
                input_ids=ids,
                attention_mask=batch[f"{prefix}attention_mask"],
                use_cache=False,
                **more,
            )
        (tokens,) = caught
        return sequence_logps(tokens.logp, packing.cu_seqlens), tokens, packing.cu_seqlens, result

    def _compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool):
        if return_outputs:  # whose logits are wanted
            return super()._compute_loss(model, inputs, return_outputs)
        batch = self._prepare_inputs(inputs)
        kl_logps = self._compute_kl_logps(model, batch)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
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
        loss = self._losses(logps, ref_logps, labels, z0).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * result.aux_loss

        rows = {
            "rewards": self.beta * (logps.detach() - ref_logps),
            "logps": logps.detach(),
            "logits": sequence_logps(tokens.mean_logit, cu_seqlens),
            "entropy": sequence_logps(tokens.entropy.detach(), cu_seqlens),
            "tokens": cu_seqlens.diff().float(),
        }
        self._log_batch(rows, labels, z0, batch["attention_mask"].sum(), result)
        return loss

    def _losses(self, logps: Tensor, ref_logps: Tensor, labels: Tensor, z0: Tensor) -> Tensor:
        named = {"beta": self.beta, "desirable_weight": self.desirable_weight}
        named["undesirable_weight"] = self.undesirable_weight
        if self.loss_type == "apo_zero_unpaired":
            return apo_zero_loss(logps, ref_logps, labels, **named)
        return kto_loss(logps, ref_logps, labels, reference_point=z0, **named)

    def _log_batch(self, rows: dict[str, Tensor], labels: Tensor, z0: Tensor, seen: Tensor, result) -> None:
        """TRL's values of a micro-batch, from sums over all ranks that travel and are read back together."""
        names = list(rows)
        values = torch.stack([rows[name].float() for name in names])  # (names, B)
        sides = torch.stack([labels, ~labels]).float()  # (2, B)
        sums = (values[:, None] * sides).sum(-1)  # (names, 2)
        counts = torch.cat([sides.sum(1), seen.float()[None]])
        flat = self.accelerator.reduce(torch.cat([sums.flatten(), counts]), reduction="sum")
        flat = flat.tolist()
        sums = {name: flat[2 * i : 2 * i + 2] for i, name in enumerate(names)}
        *counts, seen = flat[2 * len(names) :]

        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._total_train_tokens += int(seen)
        logged = {"kl": z0.item()}
        tokens = sum(sums["tokens"])
        logged["entropy"] = sum(sums["entropy"]) / tokens if tokens > 0 else 0.0
        for place, side in enumerate(("chosen", "rejected")):
            for name, count in (
                ("logits", sums["tokens"][place]),
                ("rewards", counts[place]),
                ("logps", counts[place]),
            ):
                if count > 0:
                    logged[f"{name}/{side}"] = sums[name][place] / count
        if min(counts) > 0:
            logged["rewards/margins"] = logged["rewards/chosen"] - logged["rewards/rejected"]
        if self.aux_loss_enabled:
            aux_loss = self.accelerator.reduce(result.aux_loss.detach(), reduction="mean")
            logged["aux_loss"] = aux_loss.item()
        for name, value in logged.items():
            self._metrics[mode][name].append(value)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
