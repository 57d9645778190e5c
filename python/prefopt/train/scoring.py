"""Log-probabilities of whole completions, under the policy or the reference."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prefopt.data.collate import PairCollator, PreferenceCollator
from prefopt.train.methods import Sequences
from prefopt_kernels.integrations.transformers import LMHead, Packing, pack_completions
from prefopt_kernels.integrations.transformers.head import drop_virtual_tokens
from prefopt_kernels.modules import sequence_logps
from prefopt_kernels.ops.linear_logprob import TokenLogprobs


class Scores(NamedTuple):
    """Sums over the tokens of each completion; the last two are optional."""

    logps: Tensor  # (B,) fp32, nats
    entropies: Tensor | None = None  # (B,) fp32, nats
    mean_logits: Tensor | None = None  # (B,) fp32


class PackingCollator:
    """A collator whose batches contain the positions of their completion tokens.

    They are computed here, on the CPU and possibly in a worker process, so that no step waits for the device.
    """

    def __init__(self, collator: PreferenceCollator | PairCollator):
        self.collator = collator

    def __call__(self, features: Sequence[dict]) -> dict:
        """One micro-batch: ``PreferenceCollator``'s, with the fields of ``Packing`` in place of the mask."""
        return self._packed(self.collator(features))

    def mismatched(self, features: Sequence[dict], partners: Sequence[int]) -> dict | None:
        """Prompts with their partners' completions, in the same form; None if no row has a partner.

        ``index`` (n,) is the row of ``features`` of each sequence.
        """
        assert isinstance(self.collator, PreferenceCollator)
        batch = self.collator.build_mismatched(features, partners)
        batch = {name.removeprefix("kl_"): value for name, value in batch.items()}
        return self._packed(batch) if len(batch["index"]) else None

    def dummy_batch(self) -> dict:
        """A batch of two tokens that keeps an idle rank in the collectives; its scores are not used."""
        token = {"prompt_ids": [0], "completion_ids": [0], "label": True, "group": 0, "row": 0}
        return self([token])

    @staticmethod
    def _packed(batch: dict) -> dict:
        packing = pack_completions(batch["input_ids"], batch.pop("completion_mask"))
        return batch | packing._asdict()


def score(model: nn.Module, head: LMHead, batch: dict, *, backend: str, outputs: Iterable[str] = ()) -> Scores:
    """Run ``model`` over a batch of ``PackingCollator`` and sum over each completion; differentiable."""
    packing = Packing(*(batch[name] for name in Packing._fields))
    tokens = _scored_in_forward(model, head, batch, packing, tuple(outputs), backend)

    def per_sequence(values: Tensor | None) -> Tensor | None:
        return None if values is None else sequence_logps(values.detach(), packing.cu_seqlens)

    return Scores(
        sequence_logps(tokens.logp, packing.cu_seqlens),
        per_sequence(tokens.entropy),
        per_sequence(tokens.mean_logit),
    )


def _scored_in_forward(
    model: nn.Module, head: LMHead, batch: dict, packing: Packing, outputs: tuple, backend: str
) -> TokenLogprobs:
    """Score the rows that predict a completion token as they arrive at the head, where its weight is whole.

    What shards a model (FSDP2, ZeRO-3) gathers a layer's weights before the layer runs and again when the gradient of
    the layer's output arrives. So the scores must hang on that output: the head gives back an empty piece of them, the
    model returns it as its logits, and its sum, which is 0, is added to them.
    """
    input_ids, found = batch["input_ids"], []

    def score_rows(_module: nn.Module, args: tuple) -> tuple:
        hidden, *rest = args
        rows = drop_virtual_tokens(model, head, hidden, input_ids).flatten(0, 1)
        rows = rows.index_select(0, packing.positions)
        found.append(head.score(rows, packing.targets, outputs=outputs, backend=backend))
        return (hidden[:, :0], *rest)

    def piece_of_scores(_module: nn.Module, _args: tuple, logits: Tensor) -> Tensor:
        return found[-1].logp[:0].reshape(logits.shape)  # (B, 0, V)

    hooks = [
        head.module.register_forward_pre_hook(score_rows),
        # first, so that the hook of a head that is sharded by itself gets this output
        head.module.register_forward_hook(piece_of_scores, prepend=True),
    ]
    try:
        returned = model(input_ids=input_ids, attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) != 1:
        raise RuntimeError(
            f"{type(model).__name__} called its lm_head {len(found)} times in one forward pass; expected once"
        )
    (tokens,) = found
    return tokens._replace(logp=tokens.logp + returned[0].sum())


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on ``device``."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def sequences(batch: dict, logps: Tensor, ref_logps: Tensor | None) -> Sequences:
    """A scored micro-batch."""
    return Sequences(logps, ref_logps, batch["labels"], batch["cu_seqlens"].diff())


def outputs(rows: Sequences, rewards: Tensor | None, count: int) -> dict[str, Tensor]:
    """What ``predict`` returns for ``count`` rows or pairs, detached."""
    values = {"logps": rows.logps.detach(), "ref_logps": rows.ref_logps, "rewards": rewards}
    return {name: per_row(value, count) for name, value in values.items() if value is not None}


def per_row(values: Tensor, count: int) -> Tensor:
    """(R,) for unpaired rows; (P, 2) for pairs, given the chosen answers first and then the rejected ones."""
    return values if len(values) == count else values.view(2, count).T.contiguous()
