"""ms-swift's KTO on ``linear_logprob``: an external plugin.

    swift rlhf --rlhf_type kto --external_plugins path/to/ms_swift.py ...

ms-swift 4.6 uses TRL below 1.0, whose trainer builds the logits of every batch. Loading this file as a plugin replaces
ms-swift's KTO trainer by ``FusedKTOTrainer``, a subclass that scores matched and mismatched completions without logits.
Everything else is unchanged. From Python, call ``register``.

``FusedKTOTrainer`` is defined on first use. Calls and signatures are those of ms-swift 4.6.0 with TRL 0.29.1.
"""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefopt_kernels.integrations._optional import lazy_classes, why_untested
from prefopt_kernels.integrations.transformers.head import capture_hidden, lm_head_of
from prefopt_kernels.integrations.trl.kto import refuse_partitioned
from prefopt_kernels.modules import sequence_logps
from prefopt_kernels.ops.linear_logprob import TokenLogprobs

FUSED = "prefopt_kernels.integrations.ms_swift.FusedKTOTrainer"  # not by __name__, which differs in a plugin
Mixin: Any = object  # FusedScores comes before ms-swift's trainer in the method resolution order


def register() -> None:
    """Make ms-swift train ``rlhf_type="kto"`` with :class:`FusedKTOTrainer`.

    Raises:
        RuntimeError: ms-swift is not installed, is not of the tested version (4.6), or has another KTO trainer
            registered.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"ms-swift's KTO cannot be fused: {reason}")
    from swift.trainers import TrainerFactory

    TrainerFactory.TRAINER_MAPPING["kto"] = FUSED


def why_not() -> str | None:
    """Why :func:`register` would raise; None if it would not.

    Example:
        >>> from prefopt_kernels.integrations import ms_swift
        >>> reason = ms_swift.why_not()
        >>> reason is None or "ms-swift" in reason
        True
    """
    reason = why_untested("ms-swift", "ms-swift", ("4.6",))
    if reason is not None:
        return reason
    from swift.trainers import TrainerFactory

    found = TrainerFactory.TRAINER_MAPPING.get("kto")
    if found not in ("swift.rlhf_trainers.KTOTrainer", FUSED):
        return f"ms-swift's KTO trainer is {found} already; expected its own"
    return None


class FusedScores(Mixin):
    """Overrides of ms-swift's trainer: its forward passes."""

    backend = "auto"

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named)
        if self.is_encoder_decoder:
            raise ValueError("the model is an encoder-decoder model; expected a causal language model")
        if self.template.sequence_parallel_size > 1:
            raise ValueError(
                f"sequence_parallel_size is {self.template.sequence_parallel_size}; expected 1, because the "
                "target of a token may be on another rank"
            )
        refuse_partitioned(self.model)

    def forward(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Any, ...]:
        """ms-swift's results: log-probabilities of desirable, undesirable and mismatched rows, and sums of logits."""
        kl_logps = self._compute_kl_logps(model, batch)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        logps, logits, outputs = self._score(model, batch, "completion_", **router)
        labels = torch.as_tensor(batch["label"], dtype=torch.bool, device=logps.device)
        if labels.shape != logps.shape:
            raise ValueError(f"{len(logps)} sequences were scored for {len(labels)} labels")
        result = (logps[labels], logps[~labels], logits[labels], logits[~labels], kl_logps)
        return (*result, outputs.aux_loss) if self.aux_loss_enabled else result

    def _compute_kl_logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
        if not self.calculate_KL:
            return None
        from swift.trainers import disable_gradient_checkpointing

        kwargs = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(model, kwargs):
            return self._score(model, batch, "KL_completion_")[0]

    def _score(
        self, model: nn.Module, batch: dict[str, Any], prefix: str, **more: object
    ) -> tuple[Tensor, Tensor, Any]:
        """(B,) nats and (B,) sums of logits over the scored tokens, and the model's outputs."""
        inputs, labels = self._get_model_kwargs(batch, prefix)
        targets = labels.roll(-1, dims=1)  # tokens up to n predict n + 1
        head = lm_head_of(self.accelerator.unwrap_model(model))

        def score(hidden: Tensor) -> TokenLogprobs:
            hidden = hidden[:, -targets.shape[1] :]  # a vision model prepends those of images
            flat = targets.flatten().to(hidden.device)
            return head.score(hidden.flatten(0, 1), flat, outputs=("mean_logit",), backend=self.backend)

        with capture_hidden(head, score) as scored:
            outputs = model(**inputs, **more)
        (tokens,) = scored
        assert tokens.mean_logit is not None
        V = head.weight.shape[0]
        logits = V * tokens.mean_logit * (targets.flatten() >= 0).to(tokens.logp.device)
        cu_seqlens = self._bounds(inputs, targets).to(tokens.logp.device)
        return sequence_logps(tokens.logp, cu_seqlens), sequence_logps(logits, cu_seqlens), outputs

    def _bounds(self, inputs: dict[str, Any], targets: Tensor) -> Tensor:
        """(B + 1,) first token of each sequence, in one packed row or with one sequence per row."""
        if self.template.padding_free:
            positions = inputs.get("text_position_ids")
            if positions is None:
                positions = inputs.get("position_ids")
            return self.get_cu_seqlens(positions, inputs.get("logits_to_keep"))
        B, L = targets.shape
        return L * torch.arange(B + 1, device=targets.device)


@cache
def _trainer() -> type:
    from swift.rlhf_trainers import KTOTrainer

    return type("FusedKTOTrainer", (FusedScores, KTOTrainer), {})


__getattr__ = lazy_classes(__name__, FusedKTOTrainer=_trainer)


if __name__.startswith("_swift_external_"):
    # ms-swift prepends a plugin's folder to sys.path, and this one has a package named trl
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [folder for folder in sys.path if folder != here]
    register()
