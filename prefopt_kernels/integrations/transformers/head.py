"""The last layer of a causal LM: where it is, what it computes, and a check against the model's own logits."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from prefopt_kernels.integrations.transformers.adapters import HeadOperands, operands_of
from prefopt_kernels.ops.linear_logprob import TokenLogprobs
from prefopt_kernels.parallel.dtensor import ResolvedHead, is_dtensor, plain_hidden, resolve_head
from prefopt_kernels.parallel.vocab import Lora

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
PROBE_ROWS = 4096  # vocabulary entries that the check compares, evenly spaced
PROBE_GAIN = 16.0  # scales the second probe's hidden state, so that a softcap has an effect

T = TypeVar("T")


@dataclass(frozen=True)
class LMHead:
    """The last layer of a causal LM: ``z = softcap * tanh(logit_scale * (W h + r B A h + b) / softcap)``.

    W, b and the adapter (A, B, r) are read at each access; a disabled or merged adapter is None.
    """

    module: nn.Module  # receives the hidden states
    logit_scale: float = 1.0
    softcap: float | None = None
    virtual_tokens: int = 0  # number that prompt learning puts before each sequence

    @property
    def operands(self) -> HeadOperands:
        """Weight, bias and adapter in use."""
        return operands_of(self.module)

    @property
    def weight(self) -> Tensor:
        """(V, H); with ``modules_to_save`` that of the active adapter."""
        return self.operands.weight

    @property
    def bias(self) -> Tensor | None:
        """(V,) or None."""
        return self.operands.bias

    @property
    def lora(self) -> Lora | None:
        """(A, B, r) of the adapter on the head, as for ``linear_logprob``, or None."""
        return self.operands.lora

    def score(
        self, hidden: Tensor, targets: Tensor, *, outputs: Sequence[str] = (), backend: str = "auto"
    ) -> TokenLogprobs:
        """Log-probabilities of ``targets`` (T,) from ``hidden`` (T, H); arguments as for ``linear_logprob``."""
        units = fsdp_units(self.module)
        sharded = bool(units) and is_dtensor(self.weight)  # the head's own forward has ended
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
            return unshard_in_backward(units, tokens)
        if sharded:  # no backward reshards it
            reshard(self.module)
        return tokens

    def resolved(self, dtype: torch.dtype) -> ResolvedHead:
        """The operands as this rank's tensors, for hidden states in ``dtype``."""
        weight, bias, lora = self.operands
        if lora is not None:
            # PEFT keeps adapters in fp32; those in a half precision other than the model's are converted to fp32
            supported = (dtype, torch.float32)
            A, B = (each if each.dtype in supported else each.float() for each in lora[:2])
            lora = (A, B, lora[2])
        return resolve_head(weight, bias, lora, dtype=dtype)


def lm_head_of(model: nn.Module) -> LMHead:
    """Head, logit scale, final softcap and adapter of a causal LM, with or without PEFT; call ``check_lm_head`` next.

    A LoRA adapter on the head, ``modules_to_save=["lm_head"]``, trainable token indices in tied embeddings and prompt
    learning are supported, and read when tokens are scored.

    Args:
        model: has ``get_output_embeddings()`` and ``config``; not wrapped by DDP.

    Raises:
        ValueError: the model has an encoder or no output embedding, the head is quantised, or an adapter on it is not
            plain LoRA without dropout.

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
    base: Any = base_model_of(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(base).__name__} is an encoder-decoder model; expected a causal language model")
    find = getattr(base, "get_output_embeddings", None)
    module = find() if find is not None else None
    if module is None:
        raise ValueError(f"{type(model).__name__} has no output embedding; expected a causal language model")
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    prompt: Any = getattr(model, "active_peft_config", None)
    virtual_tokens = int(prompt.num_virtual_tokens) if prompt is not None and prompt.is_prompt_learning else 0
    head = LMHead(module, _logit_scale(config), _first_setting(config, SOFTCAPS), virtual_tokens)
    _ = head.operands  # raises for an unsupported head
    return head


def base_model_of(model: nn.Module) -> nn.Module:
    """The model inside a PEFT model, or the model itself."""
    wrapper: Any = model
    if hasattr(wrapper, "get_base_model"):
        return wrapper.get_base_model()
    # by class names, because PEFT is not imported
    if any(kind.__name__ == "PeftMixedModel" for kind in type(wrapper).__mro__):  # has no get_base_model
        wrapper = wrapper.base_model
    return wrapper.model if any(kind.__name__ == "BaseTuner" for kind in type(wrapper).__mro__) else wrapper


def _first_setting(config: object, names: Sequence[str]) -> float | None:
    """The first of ``names`` that the configuration sets."""
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if value is not None), None)


def _logit_scale(config: object) -> float:
    scale = _first_setting(config, LOGIT_SCALES)
    if scale is not None:
        return scale
    scaling = _first_setting(config, ["logits_scaling"])
    model_type = getattr(config, "model_type", None)
    if scaling is None or model_type == "minicpm3":  # MiniCPM3 divides the hidden states, before the head
        return 1.0
    return scaling if model_type == "hyperclovax" else 1.0 / scaling


@contextmanager
def capture_hidden(head: LMHead, use: Callable[[Tensor], T], *, run_head: bool = False) -> Iterator[list[T]]:
    """Collect ``use(hidden)`` for every call of the head, which gets an empty slice unless ``run_head``.

    ``use`` runs inside the model's forward pass, under the autocast, DDP and parameter gathering of the head.
    """
    refuse_context_parallel()
    results: list[T] = []

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        results.append(use(plain_hidden(hidden)))
        return (hidden if run_head else empty_slice(head, hidden), *rest)

    handle = head.module.register_forward_pre_hook(hook)
    try:
        yield results
    finally:
        handle.remove()


def empty_slice(head: LMHead, hidden: Tensor) -> Tensor:
    """No positions, or one if the head's weight is a DTensor, which has no empty products."""
    return hidden[:, : int(is_dtensor(head.weight))]


def unshard_in_backward(units: list[Any], tokens: TokenLogprobs) -> TokenLogprobs:
    """The same scores; at the start of their backward, ``units`` of FSDP2 are unsharded.

    FSDP2 itself unshards when a gradient of a unit's output arrives. The head's output is empty and the logits are
    never consumed, so its hook does not fire.
    """
    if not units:
        return tokens
    names = [name for name in ("logp", "lse", "entropy") if getattr(tokens, name) is not None]
    values = _Unshard.apply(units, *(getattr(tokens, name) for name in names))
    return tokens._replace(**dict(zip(names, values, strict=True)))


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, units: list[Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.units = units
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        for unit in ctx.units:
            unit.unshard()
        return (None, *grads)


def fsdp_units(module: nn.Module) -> list[Any]:
    """The submodules that FSDP2 gathers separately, as FSDPModule."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported means not used
    if fsdp is None or torch.compiler.is_compiling():
        return []
    return [each for each in module.modules() if isinstance(each, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free parameters that FSDP2 has gathered for a forward pass without a backward.

    The root unit keeps its parameters until the backward; an optimizer created in between would hold the gathered ones.
    """
    for unit in fsdp_units(model):
        unit.reshard()


def refuse_context_parallel() -> None:
    """Raise ValueError if accelerate shards sequences over ranks."""
    state: Any = sys.modules.get("accelerate.state")
    if torch.compiler.is_compiling() or state is None or not state.is_initialized():
        return
    config = getattr(state.AcceleratorState(), "parallelism_config", None)
    for name in ("cp_size", "sp_size"):
        size = getattr(config, name, None) or 1
        if size > 1:
            raise ValueError(
                f"parallelism_config has {name} {size}, which shards every sequence over ranks; expected 1: context "
                "and sequence parallel are not supported"
            )


def drop_virtual_tokens(model: nn.Module, head: LMHead, hidden: Tensor, input_ids: Tensor) -> Tensor:
    """The hidden states (B, L, H) of ``input_ids`` (B, L), without those of a learned prompt.

    Raises:
        ValueError: their number differs from that of the tokens.
    """
    B, L = input_ids.shape
    if head.virtual_tokens and hidden.shape[:2] == (B, head.virtual_tokens + L):
        return hidden[:, head.virtual_tokens :]
    if hidden.shape[:2] != (B, L):
        prompt = f", after {head.virtual_tokens} of the prompt" if head.virtual_tokens else ""
        raise ValueError(
            f"{type(model).__name__} passes hidden states of shape {tuple(hidden.shape)} to its head for input_ids of "
            f"shape {tuple(input_ids.shape)}; expected one per token{prompt}"
        )
    return hidden


@torch.no_grad()
def check_lm_head(model: nn.Module, head: LMHead) -> None:
    """Compare ``head``'s formula with the logits that the model itself computes for two tokens.

    The second token's hidden state is scaled up on its way into the head, so that a softcap has an effect. A second
    sequence differs in the second token, which must not change the logits of the first. Dropout is off, so no random
    number is drawn; a model on the meta device is not checked.

    Raises:
        ValueError: they differ by more than rounding, so the model processes its logits in a way that its configuration
            does not describe; or the model is not causal.
    """
    weight = head.weight
    if weight.is_meta:
        return
    # a weight partitioned by ZeRO-3 has no rows outside of the forward pass
    ids = torch.tensor([[0, 1], [0, 2]], device=weight.device) % max(1, weight.shape[0])

    def scale_second(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        drop_virtual_tokens(model, head, hidden, ids)
        gain = hidden.new_ones(hidden.shape[1], 1)
        gain[-1] = PROBE_GAIN
        return (hidden * gain, *rest)

    dtypes: list[torch.dtype] = []
    handles = [
        head.module.register_forward_pre_hook(scale_second),
        head.module.register_forward_hook(lambda _module, _args, out: dtypes.append(out.dtype)),
    ]
    try:
        with evaluation_mode(model), capture_hidden(head, lambda h: _expected_logits(head, h), run_head=True) as found:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    (expected,) = found
    if logits.shape[-1] != expected.vocabulary:
        raise ValueError(
            f"{type(model).__name__} gives {logits.shape[-1]} logits per token and its lm_head has "
            f"{expected.vocabulary} rows; expected as many: slicing the vocabulary after the head is not supported"
        )
    logits = logits.full_tensor() if is_dtensor(logits) else logits
    _check_causal(model, logits[:, -ids.shape[1]])
    if not expected.rows.numel():  # this rank's shard of the vocabulary is empty
        return
    logits = logits[0, -ids.shape[1] :, expected.rows]
    # Rounding of the stored logits in the head's dtype, a few times over (scale, division, tanh), and of an fp32
    # accumulation of H products, or of products of operands that were rounded to TF32 or by autocast.
    (dtype,) = dtypes
    per_term = 8 * torch.finfo(torch.float32).eps
    if logits.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        per_term = 2**-10
    if dtype != expected.weight_dtype:
        per_term = torch.finfo(dtype).eps
    allowed = 8 * torch.finfo(dtype).eps * expected.logits.abs().amax() + per_term * expected.magnitude
    error = (logits.double() - expected.logits).abs()
    if not (error <= allowed).all():
        worst = (error - allowed).argmax()
        raise ValueError(
            f"the logits of {type(model).__name__} are not those of its lm_head with logit_scale {head.logit_scale} "
            f"and softcap {head.softcap}: the model gives {logits.flatten()[worst]:.6g} where the formula gives "
            f"{expected.logits.flatten()[worst]:.6g}; it processes its logits in a way that is not supported yet"
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a probe; afterwards every module has its own mode again, and FSDP2's units are resharded.

    Except for 4-bit layers of bitsandbytes: on some CPUs their first pass in that mode permanently packs the weights
    into a form without gradients. Their results are the same in both modes.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = hasattr(module, "support_avx512bf16_for_cpu")
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        reshard(model)


def _check_causal(model: nn.Module, logits: Tensor) -> None:
    """Raise ValueError if the logits (2, V) of a token differ between two sequences that differ only in the next token.

    For a causal model the difference is rounding, where kernels treat the rows of a batch differently: a few units of
    the coarsest dtype. A model that attends to later tokens changes a large fraction of the logits. The limit is the
    geometric mean: the square root of that unit.
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


class ExpectedLogits(NamedTuple):
    """Logits of some vocabulary entries by the formula."""

    vocabulary: int  # V
    rows: Tensor  # (n,) ids of the entries
    logits: Tensor  # (L, n) fp64
    magnitude: Tensor  # (L, n) fp64, sums of the absolute terms of the products
    weight_dtype: torch.dtype


def _expected_logits(head: LMHead, hidden: Tensor) -> ExpectedLogits:
    """The formula in fp64 for the last two positions of the first sequence."""
    V = head.weight.shape[0]
    weight, bias, lora, _group, start = head.resolved(hidden.dtype)
    n = weight.shape[0]
    rows = torch.linspace(0, n - 1, min(n, PROBE_ROWS), device=hidden.device).long()
    hidden = hidden[0, -2:].double()
    some = weight[rows].double()
    raw, magnitude = hidden @ some.T, hidden.abs() @ some.abs().T
    if lora is not None:
        A, B, scale = lora
        low, high = scale * (hidden @ A.double().T), B[rows].double()
        raw, magnitude = raw + low @ high.T, magnitude + low.abs() @ high.abs().T
    if bias is not None:
        raw = raw + bias[rows].double()
    logits = head.logit_scale * raw
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return ExpectedLogits(V, start + rows, logits, abs(head.logit_scale) * magnitude, weight.dtype)
