"""KTO as a module of Lightning: fused log-probabilities in ``training_step``, everything else is Lightning's.

``PrefoptModule`` is made when it is first asked for, a subclass of ``lightning.pytorch.LightningModule``, or of
``pytorch_lightning``'s where only that is installed.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor, nn

from prefopt_kernels.integrations.transformers import (
    LMHead,
    check_lm_head,
    completion_logprobs,
    lm_head_of,
    pack_completions,
)
from prefopt_kernels.losses import apo_zero_loss, kto_loss
from prefopt_kernels.modules import sequence_logps
from prefopt_kernels.reference_point import MicrobatchKL

METHODS = ("kto", "apo_zero")


def __getattr__(name: str):
    if name != "PrefoptModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _module()


def batch_logps(model: nn.Module, head: LMHead, batch: dict, prefix: str = "", backend: str = "auto") -> Tensor:
    """(B,) nats: sums over the completions in ``{prefix}input_ids``, ``attention_mask``, ``completion_mask``."""
    ids = batch[f"{prefix}input_ids"]
    packing = pack_completions(ids, batch[f"{prefix}completion_mask"])
    mask = batch[f"{prefix}attention_mask"]
    tokens = completion_logprobs(model, ids, mask, packing, head=head, backend=backend)
    return sequence_logps(tokens.logp, packing.cu_seqlens)


@cache
def _module() -> type:
    name = "lightning.pytorch" if importlib.util.find_spec("lightning") else "pytorch_lightning"
    LightningModule = importlib.import_module(name).LightningModule

    class PrefoptModule(LightningModule):
        """KTO or APO-zero of a causal LM of transformers.

        Args:
            model: the policy, PEFT-wrapped or not; put into training mode. Its trainable parameters are trained, with
                AdamW.
            ref_model: the reference; None is the policy without its adapter. It is kept in evaluation mode, is not
                trained, and is not saved with checkpoints.
            beta: inverse temperature, 1/nats.
            method: "kto" or "apo_zero".
            learning_rate: of AdamW; override ``configure_optimizers`` for another optimizer.
            desirable_weight, undesirable_weight: as for :func:`prefopt_kernels.kto_loss`.
            backend: as for :func:`prefopt_kernels.linear_logprob`.

        A batch is what ``prefopt.data.PreferenceCollator(..., mismatch="rotate")`` makes: ``input_ids``,
        ``attention_mask`` and ``completion_mask`` (B, L), ``labels`` (B,) bool, and, for "kto", the same three of
        mismatched completions under names that begin with ``kl_``. Logged: ``loss``, ``kl`` and ``rewards/margins``.

        Raises:
            ValueError: an unknown method, a model whose head or logits are not understood, or no reference.
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
                    f"ref_model is None and {type(model).__name__} has no adapter to switch off; expected a reference "
                    "model"
                )
            self.model, self.ref_model = model, ref_model
            self.beta, self.method, self.backend = beta, method, backend
            self.learning_rate = learning_rate
            self.weights = {
                "desirable_weight": desirable_weight,
                "undesirable_weight": undesirable_weight,
            }
            self.strict_loading = ref_model is None  # whose weights checkpoints do not have
            for each in (model, ref_model):
                if each is not None:
                    # in training mode: bitsandbytes packs 4-bit weights for good in the other, without gradient
                    check_lm_head(each.train(), lm_head_of(each))
            if ref_model is not None:
                ref_model.requires_grad_(False).eval()
            self._kl = MicrobatchKL()

        def train(self, mode: bool = True):
            """Lightning's; the reference stays in evaluation mode."""
            super().train(mode)
            if self.ref_model is not None:
                self.ref_model.eval()
            return self

        def on_save_checkpoint(self, checkpoint: dict) -> None:
            """Leave the reference out."""
            state = checkpoint["state_dict"]
            for name in [name for name in state if name.startswith("ref_model.")]:
                del state[name]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            """AdamW on what is trainable."""
            trained = [p for p in self.model.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=self.learning_rate)

        def training_step(self, batch: dict, batch_idx: int) -> Tensor:
            """The loss of one batch."""
            return self._step(batch, "")

        def validation_step(self, batch: dict, batch_idx: int) -> Tensor:
            """The loss of one batch, logged under names that begin with ``val_``."""
            return self._step(batch, "val_")

        def _step(self, batch: dict, prefix: str) -> Tensor:
            logps = self._logps(self.model, batch)
            ref_logps = self._reference(batch)
            labels, named = batch["labels"], {"beta": self.beta, **self.weights}
            z0 = logps.new_zeros(())
            if self.method == "kto":
                with torch.no_grad():
                    ratios = self._logps(self.model, batch, "kl_") - self._reference(batch, "kl_")
                z0 = self._kl.estimate(ratios, update=self.training)
                losses = kto_loss(logps, ref_logps, labels, reference_point=z0, **named)
            else:
                losses = apo_zero_loss(logps, ref_logps, labels, **named)
            rewards = self.beta * (logps.detach() - ref_logps)
            logged = {"loss": losses.detach().mean(), "kl": z0}
            if labels.any() and not labels.all():
                logged["rewards/margins"] = rewards[labels].mean() - rewards[~labels].mean()
            self.log_dict({prefix + name: value for name, value in logged.items()}, batch_size=len(labels))
            return losses.mean()

        def _logps(self, model: nn.Module, batch: dict, prefix: str = "") -> Tensor:
            return batch_logps(model, lm_head_of(model), batch, prefix, self.backend)

        @torch.no_grad()
        def _reference(self, batch: dict, prefix: str = "") -> Tensor:
            if self.ref_model is not None:
                return self._logps(self.ref_model, batch, prefix)
            with self.model.disable_adapter():
                return self._logps(self.model, batch, prefix)

    return PrefoptModule
