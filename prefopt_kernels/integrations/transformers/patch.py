"""Causal LMs of transformers whose loss is computed by ``linear_logprob``, through the model's own forward.

Two things of the model change. Its head is called with an empty slice of the hidden states, which a hook captures; and
its ``loss_function`` uses those in place of the logits. Everything else in the model's forward is unchanged: the
auxiliary loss of a mixture of experts, multimodal inputs, tuples as outputs. ``Trainer`` needs no change: it calls
``model(**inputs, num_items_in_batch=...)`` and uses the returned loss.
"""

import functools
import inspect
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from prefopt_kernels.integrations.transformers.adapters import remove_row_hooks
from prefopt_kernels.integrations.transformers.head import (
    LMHead,
    base_model_of,
    check_lm_head,
    empty_slice,
    evaluation_mode,
    lm_head_of,
    refuse_context_parallel,
)
from prefopt_kernels.parallel.dtensor import plain_hidden

PROBE_TOKENS = 4
ATTRIBUTE = "_prefopt_fused_forward"  # of the patched model


class FusedForward:
    """Result of :func:`patch_forward`: a context manager, or a handle with ``undo``."""

    def __init__(self, model: nn.Module):
        self._model: Any = model
        self._before = model.__dict__.get("forward")  # set by another library
        names = list(inspect.signature(model.forward).parameters)
        self._labels_at = names.index("labels") if "labels" in names else None
        self._applied = False
        setattr(model, ATTRIBUTE, self)
        self._forward = MethodType(_forward_like(model.forward), model)
        self._model.forward = self._forward

    def _apply(self, head: LMHead, backend: str, eval_logits: bool) -> None:
        """Activate the patch; arguments as for :func:`patch_forward`."""
        self.head, self.backend, self.eval_logits = head, backend, eval_logits
        self.calls = 0
        self._own_loss = self._model.__dict__.get("_loss_function")
        self._plain_loss = self._model.loss_function
        self._capturing = self._forced = self._scored = False
        self._hidden: Tensor | None = None
        self._handle = head.module.register_forward_pre_hook(self._capture)
        self._model.loss_function = self._loss
        self._applied = True

    def undo(self) -> None:
        """Restore the model's own forward and loss; further calls do nothing."""
        if not self._applied:
            return
        self._applied = False
        self._handle.remove()
        _restore_loss(self._model, self._own_loss)
        # If another library has wrapped the forward since (accelerate does so permanently for mixed precision), ours
        # stays inside and delegates.
        if self._model.__dict__.get("forward") == self._forward:
            del self._model.forward
            delattr(self._model, ATTRIBUTE)
            if self._before is not None:
                self._model.forward = self._before

    def __enter__(self) -> "FusedForward":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def _run(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward, without logits if only the loss would use them."""
        plain = self._before or functools.partial(type(model).forward, model)
        labels = kwargs.get("labels")
        if labels is None and self._labels_at is not None and len(args) > self._labels_at:
            labels = args[self._labels_at]
        skips_logits = labels is not None and self._applied and (model.training or not self.eval_logits or self._forced)
        if not skips_logits:
            return plain(*args, **kwargs)
        if model is not self._model or model.get_output_embeddings() is not self.head.module:
            raise RuntimeError(
                f"{type(model).__name__} is not the model that was patched, or its lm_head has been replaced since (by "
                "an adapter, resized embeddings or torch.nn.DataParallel); undo the patch, and call patch_forward last"
            )
        refuse_context_parallel()
        return_dict = kwargs.get("return_dict")
        as_tuple = (model.config.return_dict if return_dict is None else return_dict) is False
        if as_tuple:
            kwargs = kwargs | {"return_dict": True}
        self._capturing, self._scored = True, False
        try:
            outputs = plain(*args, **kwargs)
        except BaseException:
            remove_row_hooks(model)
            raise
        finally:
            self._capturing, self._hidden = False, None
        if not self._scored:
            raise RuntimeError(
                f"{type(model).__name__} did not call its loss_function for these labels; expected the model's own "
                "forward, not that of another library's fused loss"
            )
        if not torch.compiler.is_compiling():  # a changing number would trigger recompilation
            self.calls += 1
        without = type(outputs)(**{k: v for k, v in outputs.items() if k != "logits"})
        return without.to_tuple() if as_tuple else without

    def _capture(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._capturing:
            return None
        hidden, *rest = args
        self._hidden = plain_hidden(hidden)
        return (empty_slice(self.head, hidden), *rest)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """transformers' loss of a causal LM, from the captured hidden states."""
        if not self._capturing:
            kwargs |= {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
            return self._plain_loss(logits, labels, vocab_size, shift_labels=shift_labels, **kwargs)
        hidden = self._hidden
        if shift_labels is None:  # tokens up to n predict n + 1
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if hidden is None or hidden.shape[:-1] != shift_labels.shape:
            got = "none" if hidden is None else f"shape {tuple(hidden.shape)}"
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and the hidden states that reached the lm_head {got}; "
                "expected a hidden state for each label: do not pass logits_to_keep"
            )
        targets = shift_labels.flatten().to(hidden.device)
        targets = torch.where(targets == ignore_index, -100, targets)
        logp = self.head.score(hidden.flatten(0, 1), targets, backend=self.backend).logp
        self._scored = True
        count = (targets >= 0).sum() if num_items_in_batch is None else num_items_in_batch
        if isinstance(count, Tensor):
            count = count.to(logp.device)
        return -logp.sum() / count


def patch_forward(model: nn.Module, *, backend: str = "auto", eval_logits: bool = True) -> FusedForward:
    """Make ``model(input_ids, labels=...)`` compute its loss by ``linear_logprob``, without building the logits.

    The loss is transformers': labels are shifted inside, -100 is ignored, the mean is over the scored labels or, with
    ``num_items_in_batch``, their sum is divided by it; the model still adds its auxiliary loss. Gradients equal those
    of the unpatched model up to rounding. ``outputs.logits`` is None (and missing in a tuple). Without labels nothing
    changes, so ``generate`` and trainers that compute their own loss from logits work as before.

    PEFT models are patched inside; call this after ``get_peft_model`` and before ``torch.compile``. An adapter on the
    head, ``modules_to_save``, trainable token indices and prompt learning are supported, as in :func:`lm_head_of`.

    Args:
        model: a causal LM of transformers 5, or a PEFT model of one.
        backend: as for :func:`prefopt_kernels.linear_logprob`.
        eval_logits: keep the model's own forward in evaluation mode, so that ``compute_metrics`` gets logits. False
            skips them there too, which a ``Trainer`` without ``compute_metrics`` does not need.

    Returns:
        FusedForward: leave its ``with`` block, or call ``undo()``, to restore the model's own forward. ``calls`` counts
        the losses computed this way, outside of compiled graphs.

    Raises:
        ValueError: the model is already patched, is compiled, is wrapped by PEFT's AdaptionPrompt, does not compute
            transformers' causal LM loss with its ``loss_function``, or processes its logits or loss in an unsupported
            way, as shown by a probe of four tokens.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from prefopt_kernels.integrations.transformers import patch_forward
        >>> sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> expected = model(ids, labels=ids).loss
        >>> with patch_forward(model):
        ...     outputs = model(ids, labels=ids)
        >>> torch.allclose(outputs.loss, expected), outputs.logits
        (True, None)
    """
    if not isinstance(eval_logits, bool):
        raise TypeError(f"eval_logits is {eval_logits!r}; expected True or False")
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "peft_type", None) == "CPT":
        raise ValueError("PEFT's CPT weights the loss with logits; expected another prompt learning method")
    base = base_model_of(model)
    if any(hasattr(each, "_orig_mod") or getattr(each, "_compiled_call_impl", None) for each in (model, base)):
        raise ValueError(f"{type(base).__name__} is compiled; call patch_forward before torch.compile")
    fused = getattr(base, ATTRIBUTE, None)
    if fused is not None and fused._applied:
        raise ValueError(f"{type(base).__name__} is patched already; undo that patch first")
    head = lm_head_of(model)
    with evaluation_mode(model):
        check_lm_head(model, head)
        expected, tolerance = _own_loss(base, head)
        if fused is None:
            fused = FusedForward(base)
        with ExitStack() as on_failure:
            fused._apply(head, backend, eval_logits)
            on_failure.callback(fused.undo)
            loss = _patched_loss(base, base, fused)
            if not (loss - expected).abs() <= tolerance:
                raise ValueError(
                    f"the loss of {type(base).__name__} is {expected:.6g} and from its hidden states {loss:.6g}; it "
                    "adds a term that needs logits"
                )
            if model is not base:
                calls = fused.calls
                _patched_loss(model, base, fused)
                if fused.calls != calls + 1:
                    raise ValueError(
                        f"{type(model).__name__} bypasses the patched forward of {type(base).__name__} (PEFT's "
                        "AdaptionPrompt stores the original one); use completion_logprobs, or another kind of adapter"
                    )
            on_failure.pop_all()
    fused.calls = 0
    return fused


def _forward_like(plain: Any) -> Any:
    """A replacement of ``plain`` with its signature, which Trainer inspects.

    It finds its state on the model that it is called on, so that a deep copy of the model has its own. It has no
    ``__wrapped__``, through which accelerate would unwrap it together with its own wrappers.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, ATTRIBUTE)._run(self, args, kwargs)

    function: Any = forward
    original = getattr(plain, "__func__", plain)
    function.__signature__ = inspect.signature(original)
    function.__doc__ = original.__doc__
    return function


def _restore_loss(model: Any, own_loss: Any) -> None:
    """Restore the loss function; None means that transformers selects it by the kind of model."""
    if own_loss is None:
        del model._loss_function
    else:
        model.loss_function = own_loss


def _probe(model: Any) -> dict[str, Any]:
    weight = model.get_input_embeddings().weight
    ids = torch.arange(PROBE_TOKENS, device=weight.device)[None] % weight.shape[0]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return inputs | {"use_cache": False, "return_dict": True}


@torch.no_grad()
def _own_loss(model: Any, head: LMHead) -> tuple[Tensor, Tensor]:
    """The unpatched model's loss of the probe, and its rounding tolerance.

    Raises:
        ValueError: ``loss_function`` is not transformers', or does not get the model's logits and labels.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    name = type(model).__name__
    plain = getattr(model, "loss_function", None)
    if plain is not ForCausalLMLoss:
        got = getattr(plain, "__qualname__", plain)
        raise ValueError(
            f"the loss_function of {name} is {got}; expected ForCausalLMLoss of transformers: a custom loss needs the "
            "logits"
        )
    seen: list[tuple[Tensor, Tensor]] = []
    dtypes: list[torch.dtype] = []
    own_loss = model.__dict__.get("_loss_function")

    def record(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((logits, labels))
        return ForCausalLMLoss(logits, labels, *args, **kwargs)

    handle = head.module.register_forward_hook(lambda _module, _args, out: dtypes.append(out.dtype))
    model.loss_function = record
    try:
        probe = _probe(model)
        outputs = model(**probe)
    finally:
        handle.remove()
        _restore_loss(model, own_loss)
    expected = (outputs.logits, probe["labels"])
    # equal up to the fp32 copy that accelerate makes of a model's outputs
    if len(seen) != 1 or not all(
        a.shape == b.shape and torch.equal(a.to(b.dtype), b) for a, b in zip(seen[0], expected, strict=True)
    ):
        raise ValueError(
            f"{name} does not pass its logits and labels unchanged, and once, to its loss_function; its loss cannot be "
            "reproduced from hidden states"
        )
    # logits are rounded to the head's dtype, and the loss is the difference of two: a few roundings of the largest
    (dtype,) = dtypes
    size = outputs.logits.abs().amax() + outputs.loss.abs()
    return outputs.loss, 8 * torch.finfo(dtype).eps * size


@torch.no_grad()
def _patched_loss(model: nn.Module, base: nn.Module, fused: FusedForward) -> Tensor:
    """The loss of the probe through ``model``, without logits although in evaluation mode."""
    fused._forced = True
    try:
        return model(**_probe(base)).loss
    finally:
        fused._forced = False
