"""ms-swift's KTO on ``linear_logprob``: an external plugin.

    swift rlhf --rlhf_type kto --external_plugins path/to/ms_swift.py ...

ms-swift 4.6 runs TRL below 1.0, whose trainer builds the logits of every batch. When ms-swift loads this file, its KTO
trainer becomes ``FusedKTOTrainer``, a subclass of its own whose two passes over a batch, on matched and on mismatched
completions, score the tokens that count without logits. Everything else stays as it is. From Python, call ``register``.

``FusedKTOTrainer`` is made when it is first asked for, because this package does not need ms-swift otherwise. Calls and
signatures are those of ms-swift 4.6.0 with TRL 0.29.1, read and run on 21 November 2026.
"""

import importlib.metadata
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from prefopt_kernels.integrations.transformers.head import caught_at, lm_head_of
from prefopt_kernels.integrations.trl import major_minor
from prefopt_kernels.integrations.trl.kto import refuse_partitioned
from prefopt_kernels.modules import sequence_logps

MODULE = "prefopt_kernels.integrations.ms_swift"  # also where ms-swift gave this file another name
TESTED = (4, 6)


def __getattr__(name: str):
    if name != "FusedKTOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _trainer()


def register() -> None:
    """Make ms-swift train ``rlhf_type="kto"`` with :class:`FusedKTOTrainer`.

    Raises:
        RuntimeError: ms-swift is not installed, not of the tested version (4.6), or has another trainer for KTO
            already.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"ms-swift's KTO cannot be fused: {reason}")
    from swift.trainers import TrainerFactory

    TrainerFactory.TRAINER_MAPPING["kto"] = f"{MODULE}.FusedKTOTrainer"


def why_not() -> str | None:
    """Why :func:`register` would refuse here; None where it would not.

    Example:
        >>> from prefopt_kernels.integrations import ms_swift
        >>> reason = ms_swift.why_not()
        >>> reason is None or "ms-swift" in reason
        True
    """
    try:
        version = importlib.metadata.version("ms-swift")
    except importlib.metadata.PackageNotFoundError:
        return "ms-swift is not installed"
    if major_minor(version) != TESTED:
        return f"ms-swift is {version}; tested with {'.'.join(map(str, TESTED))}"
    from swift.trainers import TrainerFactory

    found = TrainerFactory.TRAINER_MAPPING.get("kto")
    if found not in ("swift.rlhf_trainers.KTOTrainer", f"{MODULE}.FusedKTOTrainer"):
        return f"ms-swift's KTO trainer is {found} already; expected its own"
    return None


class FusedScores:
    """What stands before ms-swift's trainer in the order of its classes: its passes over the model."""

    backend = "auto"

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        if self.is_encoder_decoder:
            raise ValueError("the model is an encoder-decoder; expected a causal language model")
        if self.template.sequence_parallel_size > 1:
            raise ValueError(
                f"sequence_parallel_size is {self.template.sequence_parallel_size}; expected 1, because a token's "
                "target may lie on another rank"
            )
        refuse_partitioned(self.model)

    def forward(self, model: nn.Module, batch: dict) -> tuple:
        """ms-swift's answer: log-probabilities and sums of logits of the good, bad and mismatched rows."""
        kl_logps = self._compute_kl_logps(model, batch)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        logps, logits, outputs = self._score(model, batch, "completion_", **router)
        labels = torch.as_tensor(batch["label"], dtype=torch.bool, device=logps.device)
        if labels.shape != logps.shape:
            raise ValueError(f"{len(logps)} sequences were scored for {len(labels)} labels")
        result = (logps[labels], logps[~labels], logits[labels], logits[~labels], kl_logps)
        return (*result, outputs.aux_loss) if self.aux_loss_enabled else result

    def _compute_kl_logps(self, model: nn.Module, batch: dict) -> Tensor | None:
        if not self.calculate_KL:
            return None
        from swift.trainers import disable_gradient_checkpointing

        kwargs = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(model, kwargs):
            return self._score(model, batch, "KL_completion_")[0]

    def _score(self, model: nn.Module, batch: dict, prefix: str, **more) -> tuple[Tensor, Tensor, object]:
        """(B,) nats and (B,) sums of logits over the tokens that count, and the model's outputs."""
        inputs, labels = self._get_model_kwargs(batch, prefix)
        targets = labels.roll(-1, dims=1)  # tokens up to n predict n + 1
        head = lm_head_of(self.accelerator.unwrap_model(model))

        def use(hidden: Tensor):
            hidden = hidden[:, -targets.shape[1] :]  # a vision model puts its image's before them
            flat = targets.flatten().to(hidden.device)
            return head.score(hidden.flatten(0, 1), flat, outputs=("mean_logit",), backend=self.backend)

        with caught_at(head, use, keep=0) as caught:
            outputs = model(**inputs, **more)
        (tokens,) = caught
        V = head.weight.shape[0]
        logits = V * tokens.mean_logit * (targets.flatten() >= 0).to(tokens.logp.device)
        cu_seqlens = self._bounds(inputs, targets).to(tokens.logp.device)
        return sequence_logps(tokens.logp, cu_seqlens), sequence_logps(logits, cu_seqlens), outputs

    def _bounds(self, inputs: dict, targets: Tensor) -> Tensor:
        """(B + 1,) the row at which each sequence begins: in one packed row, or every row by itself."""
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


if __name__.startswith("_swift_external_"):
    # ms-swift puts a plugin's folder before all others, and there are files in this one that are called like trl
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [folder for folder in sys.path if folder != here]
    register()
