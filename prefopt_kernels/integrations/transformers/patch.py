"""A causal LM of transformers whose loss comes from ``linear_logprob``, by the model's own forward.

Two things of the model change. Its head is called with an empty slice of the hidden states, which are caught on the
way; and its ``loss_function`` takes those in place of the logits. Everything else a model does in its forward stays:
the auxiliary loss of a mixture of experts, multimodal inputs, tuples as outputs. There is nothing a subclass of
``Trainer`` could add: Trainer calls ``model(**inputs, num_items_in_batch=...)`` and takes the loss it gets.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType

import torch
from torch import Tensor, nn

from prefopt_kernels.integrations.transformers.adapters import remove_row_hooks
from prefopt_kernels.integrations.transformers.head import (
    LMHead,
    base_model_of,
    check_lm_head,
    left_to,
    lm_head_of,
    refuse_context_parallel,
    reshard,
)
from prefopt_kernels.parallel.dtensor import plain_hidden

PROBE_TOKENS = 4
ATTRIBUTE = "_prefopt_fused_forward"  # of the patched model


class FusedForward:
    """What :func:`patch_forward` returns: a context manager, with ``undo`` for those who do not use it as one."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._before = model.__dict__.get("forward")  # put there by another library
        self._labels_at = _place_of_labels(model)
        self._applied = False
        setattr(model, ATTRIBUTE, self)
        model.forward = MethodType(_forward_like(model.forward), model)
        self._forward = model.forward

    def _apply(self, head: LMHead, backend: str, eval_logits: bool) -> None:
        """Start; see :func:`patch_forward`."""
        self.head, self.backend, self.eval_logits = head, backend, eval_logits
        self.calls = 0
        self._own_loss = self._model.__dict__.get("_loss_function")
        self._plain_loss = self._model.loss_function
        self._catching = self._forced = self._scored = False
        self._hidden = None
        self._handle = head.module.register_forward_pre_hook(self._catch)
        self._model.loss_function = self._loss
        self._applied = True

    def undo(self) -> None:
        """Give the model its own forward and loss back; calling it again does nothing."""
        if not self._applied:
            return
        self._applied = False
        self._handle.remove()
        _give_back_loss(self._model, self._own_loss)
        # Where another library has wrapped the forward since (accelerate does for mixed precision, for good), ours
        # stays inside it and passes everything on.
        if self._model.__dict__.get("forward") == self._forward:
            del self._model.forward
            delattr(self._model, ATTRIBUTE)
            if self._before is not None:
                self._model.forward = self._before

    def __enter__(self) -> "FusedForward":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def _run(self, model: nn.Module, args: tuple, kwargs: dict):
        """The model's forward; without logits where they would only be needed for the loss."""
        if self._before is not None:
            plain = self._before
        else:
            plain = functools.partial(type(model).forward, model)
        if not self._applied or not self._leaves_out_logits(model, args, kwargs):
            return plain(*args, **kwargs)
        if model is not self._model or model.get_output_embeddings() is not self.head.module:
            raise RuntimeError(
                f"{type(model).__name__} is not the model that was patched, or got another lm_head since (an adapter, "
                "more tokens, torch.nn.DataParallel); undo the patch, and call patch_forward last"
            )
        refuse_context_parallel()
        return_dict = kwargs.get("return_dict")
        as_tuple = (model.config.return_dict if return_dict is None else return_dict) is False
        if as_tuple:
            kwargs = kwargs | {"return_dict": True}
        self._catching, self._scored = True, False
        try:
            outputs = plain(*args, **kwargs)
        except BaseException:
            remove_row_hooks(model)
            raise
        finally:
            self._catching, self._hidden = False, None
        if not self._scored:
            raise RuntimeError(
                f"{type(model).__name__} did not call its loss_function for these labels; is its forward that of "
                "another library's fused loss? Expected the model's own"
            )
        if not torch.compiler.is_compiling():  # it would compile again for each number
            self.calls += 1
        without = type(outputs)(**{k: v for k, v in outputs.items() if k != "logits"})
        return without.to_tuple() if as_tuple else without

    def _leaves_out_logits(self, model: nn.Module, args: tuple, kwargs: dict) -> bool:
        labels = kwargs.get("labels")
        if labels is None and self._labels_at is not None and len(args) > self._labels_at:
            labels = args[self._labels_at]
        return labels is not None and (model.training or not self.eval_logits or self._forced)

    def _catch(self, _module: nn.Module, args: tuple) -> tuple | None:
        if not self._catching:
            return None
        hidden, *rest = args
        self._hidden = plain_hidden(hidden)
        return (left_to(self.head, hidden), *rest)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """transformers' loss of a causal LM, from the caught hidden states."""
        if not self._catching:
            kwargs |= {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
            return self._plain_loss(logits, labels, vocab_size, shift_labels=shift_labels, **kwargs)
        hidden = self._hidden
        if shift_labels is None:  # tokens up to n predict n + 1
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if hidden is None or hidden.shape[:-1] != shift_labels.shape:
            got = "none" if hidden is None else f"shape {tuple(hidden.shape)}"
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and the hidden states that reached the lm_head {got}; "
                "expected a hidden state for each label: leave logits_to_keep out"
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

    The loss is transformers': labels shifted inside, -100 ignored, the mean over the labels that count or, given
    ``num_items_in_batch``, their sum divided by it; an auxiliary loss of the model is added as always. Gradients are
    those of the unpatched model to rounding. ``outputs.logits`` is None then (and missing in a tuple). Without labels
    nothing changes, so ``generate`` and trainers that compute their own loss from logits work as before.

    A PEFT model is patched inside; call this after ``get_peft_model`` and before ``torch.compile``. An adapter on the
    head, ``modules_to_save``, trainable token indices and prompt learning are understood, as in :func:`lm_head_of`.

    Args:
        model: a causal LM of transformers 5, or a PEFT model of one.
        backend: as for :func:`prefopt_kernels.linear_logprob`.
        eval_logits: in evaluation mode leave the model's own forward, so that ``compute_metrics`` gets logits. False
            leaves them out there too, which a ``Trainer`` without ``compute_metrics`` does not notice.

    Returns:
        FusedForward: leave its ``with`` block, or call ``undo()``, to get the model's own forward back. Its ``calls``
        counts the losses computed this way, outside of compiled graphs.

    Raises:
        ValueError: the model is patched already; is compiled; is wrapped by PEFT's AdaptionPrompt; has no loss of a
            causal LM in the place where transformers keeps it; or processes its logits, or its loss, in a way that four
            probing tokens show and we do not know.

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
        raise ValueError("PEFT's CPT weighs the loss from logits; expected another prompt learning")
    base = base_model_of(model)
    if any(_is_compiled(each) for each in (model, base)):
        raise ValueError(f"{type(base).__name__} is compiled; call patch_forward before")
    fused = getattr(base, ATTRIBUTE, None)
    if fused is not None and fused._applied:
        raise ValueError(f"{type(base).__name__} is patched already; undo that patch first")
    head = lm_head_of(model)
    with _evaluating(model):
        check_lm_head(model, head)
        loss, allowed = _checked_loss(base, head)
        if fused is None:
            fused = FusedForward(base)
        with ExitStack() as on_failure:
            fused._apply(head, backend, eval_logits)
            on_failure.callback(fused.undo)
            _compare_loss(base, fused, loss, allowed)
            if model is not base:
                _check_reached(model, base, fused)
            on_failure.pop_all()
    fused.calls = 0
    return fused


def _forward_like(plain) -> MethodType:
    """A function for the place of ``plain``: Trainer reads its signature.

    It finds its state in the model that it is called on, so that a deep copy of the model has its own. And it does not
    say what it wraps: accelerate would unwrap it together with its own wrappers.
    """

    def forward(self, *args, **kwargs):
        return getattr(self, ATTRIBUTE)._run(self, args, kwargs)

    function = getattr(plain, "__func__", plain)
    forward.__signature__ = inspect.signature(function)
    forward.__doc__ = function.__doc__
    return forward


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _place_of_labels(model: nn.Module) -> int | None:
    names = list(inspect.signature(model.forward).parameters)
    return names.index("labels") if "labels" in names else None


def _give_back_loss(model: nn.Module, own_loss) -> None:
    """Where nobody had set one, transformers looks it up by the kind of model."""
    if own_loss is None:
        del model._loss_function
    else:
        model.loss_function = own_loss


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards each in its own again, and sharded as before.

    But for the 4-bit layers of bitsandbytes: on some CPUs their first pass in that mode packs the weights for good, in
    a form that has no gradient. They do the same in either mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.training = True
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        reshard(model)


def _probe(model: nn.Module) -> dict[str, Tensor]:
    weight = model.get_input_embeddings().weight
    ids = torch.arange(PROBE_TOKENS, device=weight.device)[None] % weight.shape[0]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@torch.no_grad()
def _checked_loss(model: nn.Module, head: LMHead) -> tuple[Tensor, Tensor]:
    """The model's own loss of the probe, and by how much rounding may move it.

    Raises:
        ValueError: the loss is not computed where transformers has it, from the model's logits and labels.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    name = type(model).__name__
    plain = getattr(model, "loss_function", None)
    if plain is not ForCausalLMLoss:
        got = getattr(plain, "__qualname__", plain)
        raise ValueError(
            f"the loss_function of {name} is {got}; expected ForCausalLMLoss of transformers: a loss of your own needs "
            "the logits"
        )
    seen, dtypes = [], []
    own_loss = model.__dict__.get("_loss_function")

    def recorder(logits, labels, *args, **kwargs):
        seen.append((logits, labels))
        return plain(logits, labels, *args, **kwargs)

    handle = head.module.register_forward_hook(lambda _module, _args, out: dtypes.append(out.dtype))
    model.loss_function = recorder
    try:
        probe = _probe(model)
        outputs = model(**probe, use_cache=False, return_dict=True)
    finally:
        handle.remove()
        _give_back_loss(model, own_loss)
    wanted = (outputs.logits, probe["labels"])
    if len(seen) != 1 or not all(map(_same, seen[0], wanted)):
        raise ValueError(
            f"{name} does not give its logits and its labels to its loss_function, once and as they are; its loss "
            "would have to be known"
        )
    # A logit is rounded to the head's dtype, and a loss is the difference of two: a few roundings of the largest.
    (dtype,) = dtypes
    size = outputs.logits.abs().amax() + outputs.loss.abs()
    return outputs.loss, 8 * torch.finfo(dtype).eps * size


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, up to the copy in fp32 that accelerate makes of a model's outputs."""
    return a.shape == b.shape and torch.equal(a.to(b.dtype), b)


@torch.no_grad()
def _check_reached(wrapper: nn.Module, base: nn.Module, fused: FusedForward) -> None:
    """Raise ValueError unless a call of PEFT's model arrives at the patched forward."""
    before = fused.calls
    fused._forced = True
    try:
        wrapper(**_probe(base), use_cache=False, return_dict=True)
    finally:
        fused._forced = False
    if fused.calls != before + 1:
        raise ValueError(
            f"{type(wrapper).__name__} calls {type(base).__name__} past the patched forward (PEFT's AdaptionPrompt "
            "keeps the forward that it found); use completion_logprobs, or another kind of adapter"
        )


@torch.no_grad()
def _compare_loss(model: nn.Module, fused: FusedForward, expected: Tensor, allowed: Tensor) -> None:
    fused._forced = True
    try:
        loss = model(**_probe(model), use_cache=False, return_dict=True).loss
    finally:
        fused._forced = False
    if not (loss - expected).abs() <= allowed:
        raise ValueError(
            f"the loss of {type(model).__name__} is {expected:.6g} and from its hidden states {loss:.6g}; it adds "
            "something to it that needs logits"
        )
