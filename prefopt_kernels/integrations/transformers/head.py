"""The last layer of a causal LM: where it is, what it computes, and the check that this is what the model does."""

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefopt_kernels.integrations.transformers.adapters import HeadOperands, operands_of
from prefopt_kernels.ops.linear_logprob import TokenLogprobs
from prefopt_kernels.parallel.dtensor import ResolvedHead, is_dtensor, plain_hidden, resolve_head

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
PROBE_ROWS = 4096  # entries of the vocabulary that the check looks at, evenly spaced
PROBE_GAIN = 16.0  # the second probe's hidden state is this much longer: a softcap bends its logits


@dataclass(frozen=True)
class LMHead:
    """The last layer of a causal LM: ``z = softcap * tanh(logit_scale * (W h + r B A h + b) / softcap)``.

    W, b and the adapter (A, B, r) are those of the moment they are asked for: an adapter that is switched off, or
    merged into W, is None.
    """

    module: nn.Module  # where the hidden states arrive
    logit_scale: float = 1.0
    softcap: float | None = None
    virtual_tokens: int = 0  # that prompt learning puts before each sequence

    @property
    def operands(self) -> HeadOperands:
        """Weight, bias and adapter in use."""
        return operands_of(self.module)

    @property
    def weight(self) -> Tensor:
        """(V, H), that of the active adapter where PEFT keeps a copy of the head."""
        return self.operands.weight

    @property
    def bias(self) -> Tensor | None:
        """(V,) or None."""
        return self.operands.bias

    @property
    def lora(self) -> tuple[Tensor, Tensor, float] | None:
        """(A, B, r) of the adapter on the head, as ``linear_logprob`` takes it, or None."""
        return self.operands.lora

    def score(
        self, hidden: Tensor, targets: Tensor, *, outputs: Sequence[str] = (), backend: str = "auto"
    ) -> TokenLogprobs:
        """Log-probabilities of ``targets`` (T,) from ``hidden`` (T, H); arguments as for ``linear_logprob``."""
        units = fsdp_units(self.module)
        gathered = bool(units) and is_dtensor(self.weight)  # the head's forward is over
        for unit in units:
            unit.unshard()
        tokens = self.resolved(hidden.dtype).logprob(
            hidden,
            targets,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            outputs=outputs,
            backend=backend,
        )
        if tokens.logp.requires_grad:
            return whole_in_backward(units, tokens)
        if gathered:  # no backward will do it
            reshard(self.module)
        return tokens

    def resolved(self, dtype: torch.dtype) -> ResolvedHead:
        """The operands as this rank's tensors, for hidden states in ``dtype``."""
        weight, bias, lora = self.operands
        if lora is not None:
            *pair, scale = lora
            # PEFT keeps an adapter in fp32; one in another half precision than the model's is taken up to that.
            fits = (dtype, torch.float32)
            lora = (*(each if each.dtype in fits else each.float() for each in pair), scale)
        if not any(map(is_dtensor, (weight, bias, *(lora or ())))):
            return ResolvedHead(weight, bias, lora)
        return resolve_head(weight, bias, lora, dtype=dtype)


def lm_head_of(model: nn.Module) -> LMHead:
    """Head, logit scale, final softcap and adapter of a causal LM, PEFT-wrapped or not; follow it by ``check_lm_head``.

    A LoRA adapter on the head, ``modules_to_save=["lm_head"]``, trainable token indices in tied embeddings and prompt
    learning are understood, in the state they have when tokens are scored.

    Args:
        model: has ``get_output_embeddings()`` and ``config``; not wrapped by DDP.

    Raises:
        ValueError: the model has an encoder or no output embedding, or that is quantised, or an adapter sits on it that
            is not a plain LoRA without dropout.

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
        >>> head.softcap, head.logit_scale, tuple(head.weight.shape), head.lora
        (30.0, 1.0, (4, 2), None)
    """
    base = base_model_of(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(base).__name__} is an encoder-decoder model; expected a causal language model")
    find = getattr(base, "get_output_embeddings", None)
    module = find() if find is not None else None
    if module is None:
        raise ValueError(f"{type(model).__name__} has no output embedding; expected a causal language model")
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    head = LMHead(module, _logit_scale(config), _softcap(config), _virtual_tokens(model))
    _ = head.operands  # refuses here what it could not score later
    return head


def base_model_of(model: nn.Module) -> nn.Module:
    """The model inside PEFT's, or the model itself."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    if _is_a(model, "PeftMixedModel"):  # which has no get_base_model
        model = model.base_model
    return model.model if _is_a(model, "BaseTuner") else model


def _is_a(model: nn.Module, name: str) -> bool:
    """By the name of its class or of one above: PEFT is not imported."""
    return any(kind.__name__ == name for kind in type(model).__mro__)


def _softcap(config) -> float | None:
    for name in SOFTCAPS:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return None


def _logit_scale(config) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    model_type = getattr(config, "model_type", None)
    if scaling is None or model_type == "minicpm3":  # MiniCPM3 divides the hidden states, before the head
        return 1.0
    return float(scaling) if model_type == "hyperclovax" else 1.0 / float(scaling)


def _virtual_tokens(model: nn.Module) -> int:
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return 0
    return int(config.num_virtual_tokens)


@contextmanager
def caught_at(head: LMHead, use, keep: int | None) -> Iterator[list]:
    """Collect ``use(hidden)`` for every call of the head, which then sees ``keep`` positions only, or all.

    Inside the model's forward pass, so that autocast, DDP and parameter gathering are those of the head.
    """
    refuse_context_parallel()
    caught = []

    def hook(_module: nn.Module, args: tuple) -> tuple:
        hidden, *rest = args
        caught.append(use(plain_hidden(hidden)))
        return (hidden if keep is None else left_to(head, hidden, keep), *rest)

    handle = head.module.register_forward_pre_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()


def left_to(head: LMHead, hidden: Tensor, keep: int = 0) -> Tensor:
    """``keep`` positions for the head; one at least where its weight is a DTensor, which has no empty products."""
    return hidden[:, : max(keep, int(is_dtensor(head.weight)))]


def whole_in_backward(units: list[nn.Module], tokens: TokenLogprobs) -> TokenLogprobs:
    """The same scores. In the backward, ``units`` of FSDP2 are whole before what lies below needs their parameters.

    FSDP2 itself sees to that when the gradient of what a unit returned arrives. The head's output is empty, and of the
    model's nobody takes the logits.
    """
    if not units:
        return tokens
    names = [name for name in ("logp", "lse", "entropy") if getattr(tokens, name) is not None]
    values = _Unshard.apply(units, *(getattr(tokens, name) for name in names))
    return tokens._replace(**dict(zip(names, values, strict=True)))


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, units: list[nn.Module], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.units = units
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads):
        for unit in ctx.units:
            unit.unshard()
        return (None, *grads)


def fsdp_units(module: nn.Module) -> list[nn.Module]:
    """What FSDP2 shards of a module apart from what is around it; each has its parameters gathered by itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not loaded, not used
    if fsdp is None or torch.compiler.is_compiling():
        return []
    return [each for each in module.modules() if isinstance(each, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Give up what FSDP2 has gathered for a forward pass without a backward.

    The root of a model keeps its parameters until then, and an optimizer that is made in between would get the gathered
    ones, which nobody reads again.
    """
    for unit in fsdp_units(model):
        unit.reshard()


def refuse_context_parallel() -> None:
    """Sequences that accelerate spreads over processes: nobody has the whole of one."""
    state = sys.modules.get("accelerate.state")
    if torch.compiler.is_compiling() or state is None or not state.is_initialized():
        return
    config = getattr(state.AcceleratorState(), "parallelism_config", None)
    for name in ("cp_size", "sp_size"):
        size = getattr(config, name, None) or 1
        if size > 1:
            raise ValueError(
                f"parallelism_config has {name} {size}, so that each process has a part of every sequence; expected 1: "
                "context and sequence parallel are not supported"
            )


def own_positions(model: nn.Module, head: LMHead, hidden: Tensor, input_ids: Tensor) -> Tensor:
    """The hidden states (B, L, H) of ``input_ids`` (B, L), without those of a learned prompt.

    Raises:
        ValueError: there are more or fewer of them than tokens.
    """
    B, L = input_ids.shape
    if head.virtual_tokens and hidden.shape[:2] == (B, head.virtual_tokens + L):
        return hidden[:, head.virtual_tokens :]
    if hidden.shape[:2] != (B, L):
        prompt = f", after {head.virtual_tokens} of the prompt" if head.virtual_tokens else ""
        raise ValueError(
            f"{type(model).__name__} brings hidden states of shape {tuple(hidden.shape)} to its head for input_ids of "
            f"shape {tuple(input_ids.shape)}; expected one per token{prompt}"
        )
    return hidden


@torch.no_grad()
def check_lm_head(model: nn.Module, head: LMHead) -> None:
    """Compare ``head``'s formula with the logits that the model itself computes for two tokens.

    The second token's hidden state is lengthened on its way into the head, so that a softcap shows. A second sequence
    differs in the second token, which must not change the logits of the first. Without dropout, so nothing random is
    drawn; a model on the meta device is not checked.

    Raises:
        ValueError: they differ by more than rounding, so the model does something to its logits that its
            configuration does not tell us; or the model is not causal.
    """
    weight = head.weight
    if weight.is_meta:
        return
    # a weight that DeepSpeed has partitioned has no rows outside of the forward pass
    ids = torch.tensor([[0, 1], [0, 2]], device=weight.device) % max(1, weight.shape[0])

    def stretch(_module: nn.Module, args: tuple) -> tuple:
        hidden, *rest = args
        own_positions(model, head, hidden, ids)
        gain = hidden.new_ones(hidden.shape[1], 1)
        gain[-1] = PROBE_GAIN
        return (hidden * gain, *rest)

    dtypes = []
    handles = [
        head.module.register_forward_pre_hook(stretch),
        head.module.register_forward_hook(lambda _module, _args, out: dtypes.append(out.dtype)),
    ]
    try:
        # inside the forward pass, where the head's parameters are whole
        expect = functools.partial(_expected_logits, head, ids.shape[1])
        with _without_dropout(model), caught_at(head, expect, keep=None) as caught:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
        reshard(model)
    ((V, some, expected, terms, weight_dtype),) = caught
    if logits.shape[-1] != V:
        raise ValueError(
            f"{type(model).__name__} gives {logits.shape[-1]} logits per token and its lm_head has {V} rows; expected "
            "as many: a vocabulary that is cut after the head is not supported yet"
        )
    logits = logits.full_tensor() if is_dtensor(logits) else logits
    _check_causal(model, logits[:, -ids.shape[1]])
    if not some.numel():  # this rank's part of the vocabulary is empty
        return
    logits = logits[0, -ids.shape[1] :, some]
    # Rounding of the stored logits in the head's dtype, a few times over (scale, division, tanh), and of an fp32
    # accumulation of H products, or of products of operands that were rounded to TF32 or by autocast.
    (dtype,) = dtypes
    per_term = 8 * torch.finfo(torch.float32).eps
    if logits.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        per_term = 2**-10
    if dtype != weight_dtype:
        per_term = torch.finfo(dtype).eps
    allowed = 8 * torch.finfo(dtype).eps * expected.abs().amax() + per_term * terms
    off = (logits.double() - expected).abs()
    if not (off <= allowed).all():
        worst = (off - allowed).argmax()
        raise ValueError(
            f"the logits of {type(model).__name__} are not those of its lm_head with logit_scale {head.logit_scale} "
            f"and softcap {head.softcap}: the model gives {logits.flatten()[worst]:.6g} where the formula gives "
            f"{expected.flatten()[worst]:.6g}; it processes its logits in a way that is not supported yet"
        )


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for layers of weights: bitsandbytes packs 4-bit ones for good in it, without a gradient."""
    changed = [
        module
        for module in model.modules()
        if module.training and (any(True for _ in module.children()) or not module._parameters)
    ]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


def _check_causal(model: nn.Module, logits: Tensor) -> None:
    """Raise ``ValueError`` if two tokens have different logits (2, V), which differ in the token after them only.

    A causal model computes both from equal numbers: a difference is rounding, where kernels treat the rows of a batch
    differently, a few units of the coarsest dtype. A model that attends to later tokens changes a large share of the
    logits. The limit is half-way between on a logarithmic scale: the square root of that unit.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} | {logits.dtype}
    unit = max(torch.finfo(dtype).eps for dtype in dtypes)
    if logits.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        unit = max(unit, 2**-10)
    first, second = logits.double()
    change = (first - second).norm() / first.norm()
    if change > unit**0.5:
        raise ValueError(
            f"{type(base_model_of(model)).__name__} is not causal: the logits of a token change by {change:.1%} with "
            "the token after it; expected a causal language model"
        )


def _expected_logits(head: LMHead, L: int, hidden: Tensor) -> tuple:
    """Of the last ``L`` positions: V, some ids, their logits (L, ids) in fp64, the sizes of the terms that these are
    sums of, and the dtype of the weight.
    """
    V = head.weight.shape[0]
    weight, bias, lora, _group, start = head.resolved(hidden.dtype)
    n = weight.shape[0]
    rows = torch.linspace(0, n - 1, min(n, PROBE_ROWS), device=hidden.device).long()
    hidden = hidden[0, -L:].double()
    products = [(hidden, weight[rows].double())]
    if lora is not None:
        A, B, scale = lora
        products.append((scale * (hidden @ A.double().T), B[rows].double()))
    raw = sum(left @ right.T for left, right in products)
    terms = sum(left.abs() @ right.abs().T for left, right in products)
    if bias is not None:
        raw = raw + bias[rows].double()
    scaled = head.logit_scale * raw
    if head.softcap is not None:
        scaled = head.softcap * torch.tanh(scaled / head.softcap)
    return V, start + rows, scaled, abs(head.logit_scale) * terms, weight.dtype
