"""TRL's trainers on ``linear_logprob``, by a reversible patch of one function.

TRL 1.16's KTO, DPO, SFT, GRPO, RLOO and asynchronous GRPO trainers all score tokens through the model's fused head,
which calls one autograd function, ``trl.trainer.utils._ChunkedLogProbFunction``. ``patch`` replaces it by an object
with the same ``apply``. Existing trainers are affected too, and ``undo`` restores them.

On the CPU TRL scores every position, prompt and padding included, because it selects the scored tokens only on devices
with Triton. The patch also selects them on the CPU, with TRL's own code for GPUs.
"""

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from prefopt_kernels.integrations._optional import why_untested
from prefopt_kernels.ops.linear_logprob import linear_logprob

TESTED = "1.16"
PARAMETERS = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
NAMES = {"entropy": "entropy", "mean_logits": "mean_logit", "is_top1": "is_top1"}  # TRL's: ours


class FusedHead:
    """Replaces TRL's autograd function until ``remove``; one at a time, shared by all patches."""

    def __init__(self, utils: Any, backend: str):
        self.utils = utils
        self.backend = backend
        self.original = utils._ChunkedLogProbFunction
        self.original_use_triton = utils._use_triton
        self.users = 0
        self.calls = 0
        self.passed_on = 0

        utils._ChunkedLogProbFunction = self
        utils._use_triton = self._selects_tokens

    def remove(self) -> None:
        self.utils._ChunkedLogProbFunction = self.original
        self.utils._use_triton = self.original_use_triton

    def _selects_tokens(self, device: torch.device) -> bool:
        return device.type == "cpu" or self.original_use_triton(device)

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """TRL's arguments and results: log-probability, entropy, log sum p^2, mean logit, is_top1."""
        # DeepSpeed ZeRO-3 gathers the head for the forward only; TRL's function gathers it again in its backward
        if hasattr(weight, "ds_id") and torch.is_grad_enabled():
            self._count("passed_on")
            arguments = (hidden, weight, bias, targets, temperature, chunk_size)
            return self.original.apply(*arguments, softcap, logit_scale, outputs)
        self._count("calls")
        if not torch.is_autocast_enabled(hidden.device.type):  # which would cast all three
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        call: dict[str, Any] = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap, "backend": self.backend}
        wanted = tuple(NAMES[name] for name in outputs if name in NAMES)
        tokens = linear_logprob(hidden, weight, targets, temperature=temperature, outputs=wanted, **call)
        log_sum_sq_probs = None
        if "log_sum_sq_probs" in outputs:
            # sum p^2 = sum exp(2z) / (sum exp z)^2, and 2z are the logits at half the temperature
            with torch.no_grad():
                twice = linear_logprob(hidden, weight, targets, temperature=temperature / 2, **call)
                log_sum_sq_probs = twice.lse - 2 * tokens.lse
        return tokens.logp, tokens.entropy, log_sum_sq_probs, tokens.mean_logit, tokens.is_top1

    def _count(self, name: str) -> None:
        if not torch.compiler.is_compiling():  # a changing number would trigger recompilation
            setattr(self, name, getattr(self, name) + 1)


class Patch:
    """Result of :func:`patch`: a context manager, or a handle with ``undo``."""

    def __init__(self, head: FusedHead):
        self._head = head
        self._applied = True
        head.users += 1

    @property
    def calls(self) -> int:
        """Calls computed by ``linear_logprob`` since TRL was patched, outside of compiled graphs."""
        return self._head.calls

    @property
    def passed_on(self) -> int:
        """Calls delegated to TRL's own function: those with gradients under DeepSpeed ZeRO-3."""
        return self._head.passed_on

    def undo(self) -> None:
        """Restore TRL's own function, once every patch is undone. Further calls do nothing.

        Raises:
            RuntimeError: the function has been replaced again since; undo that first.
        """
        if not self._applied:
            return
        head = self._head
        if head.users == 1:
            found = head.utils._ChunkedLogProbFunction
            if found is not head:
                raise RuntimeError(
                    f"trl.trainer.utils._ChunkedLogProbFunction is {found!r} and no longer this patch; undo the "
                    "later replacement first"
                )
            head.remove()
        head.users -= 1
        self._applied = False

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def patch(*, backend: str = "auto") -> Patch:
    """Use ``linear_logprob`` in every TRL trainer that scores tokens through its fused head.

    Those are KTO, DPO (all its losses), SFT, GRPO, RLOO and the experimental asynchronous GRPO. Log-probabilities and
    gradients are equal up to rounding: in fp32 on the CPU, TRL's trainers log the same log-probabilities to 1e-4 nat.
    With half-precision models ours keep fp32 logits, which TRL rounds. ``is_top1`` differs in ties: a target that is
    tied with an earlier token is top-1 here and not in TRL.

    Patching twice is safe: the last ``undo`` restores TRL's function. Calls with gradients under DeepSpeed ZeRO-3 are
    delegated to TRL's function, and counted in ``passed_on``.

    Args:
        backend: as for :func:`prefopt_kernels.linear_logprob`. If TRL is patched already, "auto" keeps that backend.

    Returns:
        Patch: leave its ``with`` block, or call ``undo()``, to restore TRL's own function.

    Raises:
        RuntimeError: TRL is not installed, is not of the tested version (1.16), or its function was replaced before, by
            Unsloth for example; :func:`why_not` returns the reason.
        ValueError: ``backend`` differs from that of the patch in effect.

    Example:
        >>> from prefopt_kernels.integrations import trl
        >>> with trl.patch() as patched:
        ...     pass  # KTOTrainer(...).train()
        >>> patched.calls
        0
    """
    utils = sys.modules.get("trl.trainer.utils")
    head = getattr(utils, "_ChunkedLogProbFunction", None)
    if isinstance(head, FusedHead):
        if backend not in ("auto", head.backend):
            raise ValueError(
                f"backend is {backend!r}, but TRL is patched already with {head.backend!r}; undo that patch first"
            )
        return Patch(head)
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"TRL cannot be patched: {reason}")
    return Patch(FusedHead(importlib.import_module("trl.trainer.utils"), backend))


def why_not() -> str | None:
    """Why :func:`patch` would raise; None if it would not.

    Example:
        >>> from prefopt_kernels.integrations import trl
        >>> trl.why_not() is None
        True
    """
    reason = why_untested("trl", "TRL", (TESTED,))
    if reason is not None:
        return reason
    # Unsloth rewrites the source of TRL's trainers, with log-probabilities of its own
    unsloth = next((name for name in ("unsloth", "unsloth_zoo") if name in sys.modules), None)
    if unsloth is not None:
        return f"{unsloth} is loaded, which rewrites TRL's trainers; use only one of the two in a process"
    utils: Any = importlib.import_module("trl.trainer.utils")
    kernels: Any = importlib.import_module("trl.kernels")
    required: tuple[tuple[ModuleType, str], ...] = (
        (kernels, "ChunkedLogProbFunction"),
        (utils, "_ChunkedLogProbFunction"),
        (utils, "_use_triton"),
    )
    for module, name in required:
        if not hasattr(module, name):
            return f"{module.__name__} has no {name}; expected it in TRL {TESTED}"
    found = utils._ChunkedLogProbFunction
    if isinstance(found, FusedHead):
        return None
    if found is not kernels.ChunkedLogProbFunction:
        return f"trl.trainer.utils._ChunkedLogProbFunction is {found!r}, which is not TRL's own; undo that change first"
    parameters = tuple(inspect.signature(found.forward).parameters)
    if parameters != PARAMETERS:
        return (
            f"ChunkedLogProbFunction.forward of TRL takes ({', '.join(parameters)}); expected ({', '.join(PARAMETERS)})"
        )
    return None
