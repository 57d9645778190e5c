"""Load an export as a user would, and compare it with the exported model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel, load_peft_weights
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from prefopt.errors import UserError
from prefopt.models import apply_adapter, load_weights
from prefopt.train.reference import weights_fingerprint

NF4_GAP = 0.304  # largest distance of adjacent NF4 levels, which range from -1 to 1
# Error of quantised values relative to the largest of their block: half a gap, and 1/50 for the block's scale, which is
# stored in 8 bits, and for the dtype of the dequantised values.
NF4_ERROR = NF4_GAP / 2 + 0.02
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # options with their number


class Snapshot(NamedTuple):
    """What an export must reproduce."""

    fingerprint: str  # of the weights
    logits: Tensor  # (L, V) fp32, of the probe


def snapshot(model: PreTrainedModel) -> Snapshot:
    """Fingerprint and logits of a model, which is cast from its stored dtype to fp32 for small rounding errors."""
    model.float()
    return Snapshot(weights_fingerprint(model), probe_logits(model))


def probe_ids(rows: int) -> Tensor:
    """(L,) token ids: random ones, and the last of the vocabulary, where tokens are added."""
    some = torch.randint(rows, (24,), generator=torch.Generator().manual_seed(0))
    return torch.cat([some, torch.arange(max(rows - 8, 0), rows)])


def probe_logits(model: nn.Module) -> Tensor:
    """(L, V) fp32 logits of the probe."""
    weight = cast(Any, model).get_input_embeddings().weight
    ids = probe_ids(len(weight))[None].to(weight.device)
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits[0].float().cpu()


def rounding(model: nn.Module, logits: Tensor) -> float:
    """Largest difference of two fp32 computations of the same logits.

    The relative error of a sum of n terms is at most ``8 sqrt(n) 2**-24`` with probability 1 - 1e-13 (Higham and Mary,
    2019); n is the total length of the dot products along the model.
    """
    terms = sum(m.in_features for m in model.modules() if isinstance(m, nn.Linear))
    return 8 * terms**0.5 * 2.0**-24 * logits[logits.isfinite()].abs().max().item()


def check_logits(model: nn.Module, found: Tensor, expected: Tensor, what: str) -> None:
    """Raise ``UserError`` for logits that differ by more than rounding.

    Args:
        model: that computed ``found``.
        found, expected: (L, V) fp32.
        what: start of the message.
    """
    if found.shape != expected.shape:
        raise UserError(f"{what} has logits of shape {tuple(found.shape)}; expected {tuple(expected.shape)}")
    differences = torch.where(found == expected, 0.0, (found - expected).abs()).amax(1)  # (L,)
    # Rounding may route a few tokens to another expert.
    config = cast(Any, model.config).get_text_config()
    routed = any(getattr(config, name, None) for name in EXPERTS)
    difference = (differences.median() if routed else differences.max()).item()
    allowed = rounding(model, expected)
    if not difference <= allowed:
        raise UserError(
            f"{what} has logits that differ by {difference:.2g} from those of the trained model, where rounding "
            f"explains {allowed:.1g}; nothing was exported"
        )


def read_back(folder: Path, expected: Snapshot, trust_remote_code: bool = False) -> None:
    """Load a saved model and compare its logits, then its weights bit by bit.

    Args:
        folder: of the saved model.
        expected: of the model that was saved.
        trust_remote_code: run Python code that was saved with the model.

    Raises:
        UserError: it cannot be loaded, or differs.
    """
    model = load_weights(str(folder), "auto", trust_remote_code=trust_remote_code)
    found = snapshot(model)
    check_logits(model, found.logits, expected.logits, "the export, loaded again,")
    if found.fingerprint != expected.fingerprint:
        raise UserError(
            "the export, loaded again, has weights that differ from those of the trained model; nothing was exported"
        )


def read_back_adapter(
    folder: Path,
    trained: Path,
    bases: Iterable[tuple[str | None, str | None]],
    trust_remote_code: bool = False,
) -> bool:
    """Compare the tensors of an exported adapter with the run's, and its logits on the first base that is available.

    Args:
        folder: of the export.
        trained: of the run.
        bases: paths or hub ids, each with its revision.
        trust_remote_code: run Python code that comes with the base.

    Returns:
        whether a base was available.

    Raises:
        UserError: it cannot be loaded, or differs.
    """
    found, own = load_peft_weights(str(folder), "cpu"), load_peft_weights(str(trained), "cpu")
    if found.keys() != own.keys() or not all(torch.equal(found[name], own[name]) for name in own):
        raise UserError("the adapter, loaded again, has other tensors; nothing was exported")
    for path, revision in bases:
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        if path and (model := _adapted(trained, path, **options)) is not None:
            expected = probe_logits(model)
            del model
            model = _adapted(folder, path, **options)
            assert model is not None
            check_logits(model, probe_logits(model), expected, f"the adapter, loaded again on {path},")
            return True
    return False


def _adapted(folder: Path, base: str, **options: Any) -> PeftModel | None:
    """A base model with the adapter of a folder, fp32; None if the base is not available locally."""
    try:
        model = load_weights(base, "float32", local_files_only=True, **options)
    except UserError:
        if Path(base).is_dir():
            raise
        return None
    return apply_adapter(model, folder, base)


def check_four_bits(folder: Path, merged: Path, compute: torch.dtype, trust_remote_code: bool = False) -> None:
    """Load a model in 4 bits and compare it with the merged model.

    Quantised weights must be within NF4's rounding, all others equal. With these weights, the merged model must give
    the same logits in fp32.

    Args:
        folder: of the model in 4 bits.
        merged: of the merged model.
        compute: dtype of what is not quantised.
        trust_remote_code: run Python code that was saved with the model.

    Raises:
        UserError: they differ.
    """
    import bitsandbytes

    model = load_weights(str(folder), "auto", trust_remote_code=trust_remote_code)
    whole = load_weights(str(merged), "float32", trust_remote_code=trust_remote_code)
    originals = dict(whole.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        quantised = isinstance(module, bitsandbytes.nn.Linear4bit)
        if quantised:
            module.compute_dtype = torch.float32
            module.support_avx512bf16_for_cpu = False  # would pack the weights, and compute in bf16
        for part, parameter in module.named_parameters(recurse=False):
            key = f"{name}.{part}"
            original = originals[key].data
            if quantised and part == "weight":
                parameter.quant_state.dtype = torch.float32  # of the dequantised values
                values = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
                right = within_nf4(values.float().cpu(), original)
            else:
                values = parameter.data
                right = torch.equal(values.to("cpu", compute), original.to(compute))
                parameter.data = values.float()
            if not right:
                raise UserError(
                    f"{key} is stored in 4 bits and, loaded again, is not what was merged; nothing was exported"
                )
            original.copy_(values)
    found = probe_logits(model)
    check_logits(whole, found, probe_logits(whole), "the export in 4 bits, loaded again,")


def within_nf4(values: Tensor, original: Tensor) -> bool:
    """Whether quantised values are within NF4's rounding; a block is 64 consecutive values."""
    rest = -original.numel() % 64
    blocks, errors = (pad(tensor.abs().flatten(), (0, rest)).view(-1, 64) for tensor in (original, values - original))
    return bool((errors <= NF4_ERROR * blocks.amax(1, keepdim=True)).all())
