"""Score completions of a Hugging Face causal LM with the fused op; the model never builds its logits.

The model runs as always. When its hidden states arrive at the head they are caught, the rows that predict a
completion token are picked out, and ``linear_logprob`` scores those with the head's own weight; the head itself is
left with an empty slice. So whatever a model does before its head stays right, as do tied heads, PEFT, DDP and
autocast, and prompt tokens cost nothing. What a model does *after* its head has to be known: ``lm_head_of`` reads it
from the configuration, ``check_lm_head`` compares with the model's own logits.

Nothing here imports transformers or peft: a model is whatever has ``get_output_embeddings`` and ``config``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prefopt_kernels.ops.linear_logprob import TokenLogprobs, linear_logprob

PROBE_ROWS = 4096  # entries of the vocabulary that the check looks at, evenly spaced
PROBE_GAIN = 16.0  # the second probe's hidden state is this much longer: a softcap bends its logits


@dataclass(frozen=True)
class LMHead:
    """The last layer of a causal LM: ``z = softcap * tanh(logit_scale * (W h + b) / softcap)``."""

    module: nn.Module  # where the hidden states arrive
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def projections(self) -> list[nn.Module]:
        """The layers that may do the product: one, or with PEFT's modules_to_save the original and its copies."""
        if hasattr(self.module, "modules_to_save"):
            return [self.module.original_module, *self.module.modules_to_save.values()]
        return [self.module]

    @property
    def weight(self) -> Tensor:
        """(V, H), that of the active adapter where PEFT keeps a copy of the head."""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """(V,) or None."""
        return getattr(self.module, "bias", None)


class Packing(NamedTuple):
    """Where the completion tokens of a padded batch are; all index tensors, made on the CPU beside the batch."""

    positions: (
        Tensor  # (T,) int64, row of the flattened (B * L, H) hidden states that predicts each token
    )
    targets: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B + 1,) int64, first token of each sequence, and T


def pack_completions(input_ids: Tensor, completion_mask: Tensor) -> Packing:
    """Find the completion tokens of a padded batch.

    Args:
        input_ids: (B, L) int64.
        completion_mask: (B, L), nonzero at the tokens to score. A sequence's first token has no predecessor, so it is
            never scored.

    Example:
        >>> import torch
        >>> from prefopt_kernels.integrations.transformers import pack_completions
        >>> ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[0, 1, 1], [0, 1, 0]])
        >>> pack_completions(ids, mask)
        Packing(positions=tensor([0, 1, 3]), targets=tensor([6, 7, 9]), cu_seqlens=tensor([0, 2, 3]))
    """
    if input_ids.ndim != 2 or completion_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} and completion_mask {tuple(completion_mask.shape)}; "
            "expected (B, L) for both"
        )
    scored = completion_mask[:, 1:].bool()  # (B, L - 1), at the predicting position
    row, column = scored.nonzero(as_tuple=True)
    counts = scored.sum(1)
    cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Packing(row * input_ids.shape[1] + column, input_ids[row, column + 1], cu_seqlens)


def lm_head_of(model: nn.Module) -> LMHead:
    """Head, logit scale and final softcap of a causal LM, PEFT-wrapped or not; follow it by ``check_lm_head``.

    Args:
        model: has ``get_output_embeddings()`` and ``config``; not wrapped by DDP.

    Raises:
        ValueError: the model has no output embedding, it is quantised, or an adapter sits on it.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from prefopt_kernels.integrations.transformers import lm_head_of
        >>> class Tiny(torch.nn.Module):
        ...     config = SimpleNamespace(final_logit_softcapping=30.0)
        ...     lm_head = torch.nn.Linear(2, 4, bias=False)
        ...     def get_output_embeddings(self):
        ...         return self.lm_head
        >>> head = lm_head_of(Tiny())
        >>> head.softcap, head.logit_scale, tuple(head.weight.shape)
        (30.0, 1.0, (4, 2))
    """
    name = type(model).__name__
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    find = getattr(base, "get_output_embeddings", None)
    module = find() if find is not None else None
    if module is None:
        raise ValueError(f"{name} has no output embedding; expected a causal language model")
    if hasattr(module, "base_layer") or hasattr(module, "token_adapter"):
        raise ValueError(
            f"an adapter ({type(module).__name__}) sits on {name}'s lm_head, which is scored from its own weight and "
            "would leave the adapter untrained; take lm_head out of target_modules (and of trainable_token_indices, "
            "if it is tied to the embedding), or train all of it with modules_to_save=['lm_head']"
        )
    config = (
        base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    )
    softcap = getattr(config, "final_logit_softcapping", None)
    head = LMHead(module, _logit_scale(config), None if softcap is None else float(softcap))
    for projection in head.projections:
        weight = getattr(projection, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            got = (
                f"{weight.dtype} {tuple(weight.shape)}"
                if isinstance(weight, Tensor)
                else type(weight).__name__
            )
            raise ValueError(
                f"the lm_head of {name} ({type(projection).__name__}) has a weight that is {got}; expected a floating "
                "point (V, H) matrix: leave the head out of quantisation"
            )
    return head


def _logit_scale(config) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    model_type = getattr(config, "model_type", None)
    if (
        scaling is None or model_type == "minicpm3"
    ):  # MiniCPM3 divides the hidden states, before the head
        return 1.0
    return float(scaling) if model_type == "hyperclovax" else 1.0 / float(scaling)


def completion_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    packing: Packing,
    *,
    head: LMHead | None = None,
    outputs: Sequence[str] = (),
    backend: str = "auto",
) -> TokenLogprobs:
    """Run the model and score its completion tokens.

    Args:
        model: the causal LM, or a wrapper of it (DDP, PEFT) that is called the same way.
        input_ids, attention_mask: (B, L) on the model's device.
        packing: of ``pack_completions``, on the same device.
        head: of ``lm_head_of``; found again when left out. Needed where ``model`` is wrapped by DDP.
        outputs, backend: as for ``linear_logprob``.

    Returns:
        TokenLogprobs, every tensor (T,), in the order of ``packing``; differentiable in the model's parameters.
    """
    head = lm_head_of(model) if head is None else head

    def score(projection: nn.Module, hidden: Tensor) -> TokenLogprobs:
        _check_positions(model, hidden, input_ids)
        return linear_logprob(
            hidden.flatten(0, 1).index_select(0, packing.positions),
            projection.weight,
            packing.targets,
            getattr(projection, "bias", None),
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            outputs=outputs,
            backend=backend,
        )

    with _caught_at(head, score, keep=0) as caught:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    if len(caught) != 1:
        raise RuntimeError(
            f"{type(model).__name__} called its lm_head {len(caught)} times in one forward pass; expected once"
        )
    return caught[0]


@contextmanager
def _caught_at(head: LMHead, use, keep: int | None) -> Iterator[list]:
    """Collect ``use(projection, hidden)`` for every call of the head, which then sees ``keep`` positions only.

    Inside the model's forward pass, so that autocast, DDP and parameter gathering are those of the head.
    """
    caught = []

    def hook(projection: nn.Module, args: tuple) -> tuple:
        hidden, *rest = args
        caught.append(use(projection, hidden))
        return (hidden[:, :keep], *rest)

    handles = [projection.register_forward_pre_hook(hook) for projection in head.projections]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def _check_positions(model: nn.Module, hidden: Tensor, input_ids: Tensor) -> None:
    if hidden.shape[:2] != input_ids.shape:
        raise ValueError(
            f"{type(model).__name__} brings hidden states of shape {tuple(hidden.shape)} to its head for input_ids of shape "
            f"{tuple(input_ids.shape)}; expected one per token: prompt tuning is not supported, nor are encoders"
        )


@torch.no_grad()
def check_lm_head(model: nn.Module, head: LMHead) -> None:
    """Compare ``head``'s formula with the logits that the model itself computes for two tokens.

    The second token's hidden state is lengthened on its way into the head, so that a softcap shows.

    Raises:
        ValueError: they differ by more than rounding, so the model does something to its logits that its
            configuration does not tell us.
    """
    ids = torch.tensor([[0, 1]], device=head.weight.device) % head.weight.shape[0]

    def stretch(projection: nn.Module, args: tuple) -> tuple:
        hidden, *rest = args
        _check_positions(model, hidden, ids)
        gain = hidden.new_tensor([1.0, PROBE_GAIN])[:, None]
        return (hidden * gain, *rest)

    handles = [projection.register_forward_pre_hook(stretch) for projection in head.projections]
    try:
        with _caught_at(head, lambda projection, hidden: (projection, hidden), keep=None) as caught:
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits
    finally:
        for handle in handles:
            handle.remove()
    ((projection, hidden),) = caught
    V = projection.weight.shape[0]
    some = torch.linspace(0, V - 1, min(V, PROBE_ROWS), device=ids.device).long()
    logits, hidden, weight = (
        logits[0, :, some],
        hidden[0].double(),
        projection.weight[some].double(),
    )
    bias = getattr(projection, "bias", None)
    expected = hidden @ weight.T + (0.0 if bias is None else bias[some].double())
    expected = head.logit_scale * expected
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    # Rounding of the stored logits in their own dtype, a few times over (scale, division, tanh), and of an fp32
    # accumulation of H products, or of products of operands that were rounded to TF32.
    terms = abs(head.logit_scale) * (hidden.abs() @ weight.abs().T)
    tf32 = projection.weight.is_cuda and torch.backends.cuda.matmul.allow_tf32
    allowed = 8 * torch.finfo(projection.weight.dtype).eps * expected.abs().amax()
    allowed = allowed + (2**-10 if tf32 else 8 * torch.finfo(torch.float32).eps) * terms
    off = (logits.double() - expected).abs()
    if not (off <= allowed).all():
        worst = (off - allowed).argmax()
        raise ValueError(
            f"the logits of {type(model).__name__} are not those of its lm_head with logit_scale {head.logit_scale} "
            f"and softcap {head.softcap}: the model gives {logits.flatten()[worst]:.6g} where the formula gives "
            f"{expected.flatten()[worst]:.6g}; it processes its logits in a way that is not supported yet"
        )
