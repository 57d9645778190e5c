"""TRL's trainers on ``linear_logprob``: one symbol, put behind all of them and taken away again.

TRL 1.16's KTO, DPO, SFT, GRPO, RLOO and asynchronous GRPO trainers all score tokens through the model's fused head,
and that calls one autograd function, under the name ``trl.trainer.utils._ChunkedLogProbFunction``. ``patch`` puts an
object with the same ``apply`` there. Trainers that exist already change with it, and change back with ``undo``.

On the processor TRL scores every position, prompt and padding too, because it takes each device without Triton for
one that compiles a program per shape. The patch lets it pick out the tokens that count there as well, by TRL's own
code for GPUs.
"""

import importlib
import importlib.metadata
import inspect
import re
import sys
from types import ModuleType

import torch
from torch import Tensor

from prefopt_kernels.ops.linear_logprob import TokenLogprobs, linear_logprob

TESTED = ((1, 16), (1, 17))  # from the first, below the second
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
    """What stands in the place of TRL's autograd function; one at a time, shared by all who patched."""

    def __init__(self, utils: ModuleType, backend: str):
        self.utils = utils
        self.backend = backend
        self.original = utils._ChunkedLogProbFunction
        self.original_use_triton = utils._use_triton
        self.users = 0
        self.calls = 0
        self.passed_on = 0

    def install(self) -> None:
        self.utils._ChunkedLogProbFunction = self
        self.utils._use_triton = self._picks_tokens

    def remove(self) -> None:
        self.utils._ChunkedLogProbFunction = self.original
        self.utils._use_triton = self.original_use_triton

    def _picks_tokens(self, device: torch.device) -> bool:
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
        """TRL's call and TRL's answer: log-probability, entropy, log sum p^2, mean logit, is the target the top one."""
        # DeepSpeed ZeRO-3 lends the head for the forward only; TRL's function borrows it again in its backward.
        if hasattr(weight, "ds_id") and torch.is_grad_enabled():
            self._count("passed_on")
            arguments = (hidden, weight, bias, targets, temperature, chunk_size)
            return self.original.apply(*arguments, softcap, logit_scale, outputs)
        self._count("calls")
        if not torch.is_autocast_enabled(hidden.device.type):  # which would cast all three
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        call = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}
        call["backend"] = self.backend
        wanted = tuple(NAMES[name] for name in outputs if name in NAMES)
        tokens = linear_logprob(hidden, weight, targets, temperature=temperature, outputs=wanted, **call)
        log_sum_sq_probs = None
        if "log_sum_sq_probs" in outputs:
            # sum p^2 = sum exp(2z) / (sum exp z)^2, and half the temperature makes 2z of z.
            with torch.no_grad():
                twice = linear_logprob(hidden, weight, targets, temperature=temperature / 2, **call)
                log_sum_sq_probs = twice.lse - 2 * tokens.lse
        return _in_trls_order(tokens, log_sum_sq_probs)

    def _count(self, name: str) -> None:
        if not torch.compiler.is_compiling():  # a number that moves would compile again at each call
            setattr(self, name, getattr(self, name) + 1)


def _in_trls_order(tokens: TokenLogprobs, log_sum_sq_probs: Tensor | None):
    return tokens.logp, tokens.entropy, log_sum_sq_probs, tokens.mean_logit, tokens.is_top1


class Patch:
    """What :func:`patch` returns: a context manager, with ``undo`` for those who do not use it as one."""

    def __init__(self, head: FusedHead):
        self._head = head
        self._applied = True
        head.users += 1

    @property
    def calls(self) -> int:
        """Calls that ``linear_logprob`` answered since TRL was patched, outside of compiled graphs."""
        return self._head.calls

    @property
    def passed_on(self) -> int:
        """Calls left to TRL's own function: those with gradients under DeepSpeed ZeRO-3."""
        return self._head.passed_on

    def undo(self) -> None:
        """Give TRL its own function back, once nobody else's patch needs ours. Calling it again does nothing.

        Raises:
            RuntimeError: something has been put on top of the patch since; undo that first.
        """
        if not self._applied:
            return
        head = self._head
        if head.users == 1:
            found = head.utils._ChunkedLogProbFunction
            if found is not head:
                raise RuntimeError(
                    f"trl.trainer.utils._ChunkedLogProbFunction is {found!r} and no longer this patch; undo first what "
                    "was put on top of it"
                )
            head.remove()
        head.users -= 1
        self._applied = False

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()


def patch(*, backend: str = "auto") -> Patch:
    """Put ``linear_logprob`` behind every TRL trainer that scores tokens through its fused head.

    Those are KTO, DPO (all its losses), SFT, GRPO, RLOO and the experimental asynchronous GRPO. Log-probabilities and
    gradients are the same to rounding: in fp32 on the processor TRL's trainers log the same log-probabilities to 1e-4
    nat. With half-precision models ours keep fp32 logits where TRL rounds them. ``is_top1`` differs in ties: a target
    that shares the first place with an earlier token counts here and not in TRL.

    Patching twice is harmless: the last ``undo`` gives TRL its own function back. Calls with gradients under DeepSpeed
    ZeRO-3 are left to TRL's function, and counted in ``passed_on``.

    Args:
        backend: as for :func:`prefopt_kernels.linear_logprob`. Patched already, "auto" takes what is in force.

    Returns:
        Patch: leave its ``with`` block, or call ``undo()``, to get TRL's own function back.

    Raises:
        RuntimeError: TRL is not installed, or not of a tested version (1.16), or its function was changed already, by
            Unsloth or another; :func:`why_not` returns the same sentence.
        ValueError: ``backend`` differs from that of a patch in force.

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
    head = FusedHead(importlib.import_module("trl.trainer.utils"), backend)
    head.install()
    return Patch(head)


def why_not() -> str | None:
    """Why :func:`patch` would refuse here; None where it would not.

    Example:
        >>> from prefopt_kernels.integrations import trl
        >>> trl.why_not() is None
        True
    """
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return "TRL is not installed"
    first, last = (".".join(map(str, bound)) for bound in TESTED)
    if not TESTED[0] <= major_minor(version) < TESTED[1]:
        return f"TRL is {version}; tested from {first}, below {last}"
    # Unsloth writes TRL's trainers anew from their source, with log-probabilities of its own.
    unsloth = next((name for name in ("unsloth", "unsloth_zoo") if name in sys.modules), None)
    if unsloth is not None:
        return f"{unsloth} is loaded, which rewrites TRL's trainers; use one of the two, in a process without the other"
    utils = importlib.import_module("trl.trainer.utils")
    kernels = importlib.import_module("trl.kernels")
    for module, name in (
        (kernels, "ChunkedLogProbFunction"),
        (utils, "_ChunkedLogProbFunction"),
        (utils, "_use_triton"),
    ):
        if not hasattr(module, name):
            return f"{module.__name__} has no {name}; expected it in TRL from {first}, below {last}"
    found = utils._ChunkedLogProbFunction
    if isinstance(found, FusedHead):
        return None
    if found is not kernels.ChunkedLogProbFunction:
        return f"trl.trainer.utils._ChunkedLogProbFunction is {found!r}, which is not TRL's own; undo that change first"
    parameters = tuple(inspect.signature(found.forward).parameters)
    if parameters != PARAMETERS:
        return (
            f"ChunkedLogProbFunction.forward of TRL {version} takes ({', '.join(parameters)}); expected "
            f"({', '.join(PARAMETERS)})"
        )
    return None


def major_minor(version: str) -> tuple[int, int]:
    """The first two numbers of a version.

    >>> major_minor("1.16rc1")
    (1, 16)
    """
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
    return int(major), int(minor)
