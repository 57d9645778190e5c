"""KTO as a ``LightningModule`` with fused log-probabilities.

``PrefoptModule`` is defined on first use, as a subclass of ``lightning.pytorch.LightningModule``, or of
``pytorch_lightning``'s if only that is installed.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from prefopt_kernels.integrations._optional import lazy_classes
from prefopt_kernels.integrations.transformers import (
    check_lm_head,
    completion_logprobs,
    lm_head_of,
    pack_completions,
)
from prefopt_kernels.modules import METHODS, sequence_logps, unpaired_losses
from prefopt_kernels.reference_point import MicrobatchKL


@cache
def _module() -> type:
    name = "lightning.pytorch" if importlib.util.find_spec("lightning") else "pytorch_lightning"
    LightningModule: Any = importlib.import_module(name).LightningModule

    class PrefoptModule(LightningModule):
        """KTO or APO-zero of a causal LM of transformers.

        Args:
            model: the policy, with or without PEFT; set to training mode. AdamW trains its trainable parameters.
            ref_model: the reference model, by default the policy without its adapter. It is frozen, in evaluation
                mode, and is not saved in checkpoints.
            beta: inverse temperature, 1/nats.
            method: "kto" or "apo_zero".
            learning_rate: for AdamW; override ``configure_optimizers`` for another optimizer.
            desirable_weight, undesirable_weight: as for :func:`prefopt_kernels.kto_loss`.
            backend: as for :func:`prefopt_kernels.linear_logprob`.

        A batch has the format of ``prefopt.data.PreferenceCollator(..., mismatch="rotate")``: ``input_ids``,
        ``attention_mask`` and ``completion_mask`` (B, L), ``labels`` (B,) bool, and, for "kto", the first three of
        mismatched completions with the prefix ``kl_``. Logged: ``loss``, ``kl`` and ``rewards/margins``.

        Raises:
            ValueError: unknown method, unsupported head, or no reference.
        """

        def __init__(
            self,
            model: nn.Module,
            ref_model: nn.Module | None = None,
            *,
            beta: float = 0.1,
            method: str = "kto",
            learning_rate: float = 1e-6,
            desirable_weight: float = 1.0,
            undesirable_weight: float = 1.0,
            backend: str = "auto",
        ):
            super().__init__()
            if method not in METHODS:
                raise ValueError(f"method is {method!r}; expected one of {METHODS}")
            if ref_model is None and not hasattr(model, "disable_adapter"):
                raise ValueError(
                    f"ref_model is None and {type(model).__name__} has no adapter to disable; expected a "
                    "reference model"
                )
            self.model, self.ref_model = model, ref_model
            self.beta, self.method, self.backend = beta, method, backend
            self.learning_rate = learning_rate
            self.weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
            self.strict_loading = ref_model is None  # checkpoints lack the reference's weights
            for each in (model, ref_model):
                if each is not None:
                    check_lm_head(each.train(), lm_head_of(each))
            if ref_model is not None:
                ref_model.requires_grad_(False).eval()
            self._kl = MicrobatchKL()

        def train(self, mode: bool = True) -> Any:
            """As in Lightning; the reference stays in evaluation mode."""
            super().train(mode)
            if self.ref_model is not None:
                self.ref_model.eval()
            return self

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            """Remove the reference."""
            state = checkpoint["state_dict"]
            for name in [name for name in state if name.startswith("ref_model.")]:
                del state[name]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            """AdamW over the trainable parameters."""
            trained = [p for p in self.model.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=self.learning_rate)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            """The loss of one batch."""
            return self._step(batch, "")

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            """The loss of one batch, logged with the prefix ``val_``."""
            return self._step(batch, "val_")

        def _step(self, batch: dict[str, Tensor], prefix: str) -> Tensor:
            logps = self._logps(self.model, batch)
            ref_logps = self._reference(batch)
            labels, z0 = batch["labels"], logps.new_zeros(())
            if self.method == "kto":
                with torch.no_grad():
                    ratios = self._logps(self.model, batch, "kl_") - self._reference(batch, "kl_")
                z0 = self._kl.estimate(ratios, update=self.training)
            losses = unpaired_losses(
                self.method, logps, ref_logps, labels, reference_point=z0, beta=self.beta, **self.weights
            )
            rewards = self.beta * (logps.detach() - ref_logps)
            logged = {"loss": losses.detach().mean(), "kl": z0}
            if labels.any() and not labels.all():
                logged["rewards/margins"] = rewards[labels].mean() - rewards[~labels].mean()
            self.log_dict({prefix + name: value for name, value in logged.items()}, batch_size=len(labels))
            return losses.mean()

        def _logps(self, model: nn.Module, batch: dict[str, Tensor], prefix: str = "") -> Tensor:
            """(B,) nats: sums over the completions of ``{prefix}input_ids``."""
            ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
            packing = pack_completions(ids, batch[f"{prefix}completion_mask"])
            tokens = completion_logprobs(model, ids, mask, packing, backend=self.backend)
            return sequence_logps(tokens.logp, packing.cu_seqlens)

        @torch.no_grad()
        def _reference(self, batch: dict[str, Tensor], prefix: str = "") -> Tensor:
            if self.ref_model is not None:
                return self._logps(self.ref_model, batch, prefix)
            policy: Any = self.model
            with policy.disable_adapter():
                return self._logps(self.model, batch, prefix)

    return PrefoptModule


__getattr__ = lazy_classes(__name__, PrefoptModule=_module)
