"""Log-probabilities of whole completions, under the policy or the reference."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prefopt.data.collate import PreferenceCollator
from prefopt_kernels.integrations.transformers import (
    LMHead,
    Packing,
    completion_logprobs,
    pack_completions,
)
from prefopt_kernels.modules import sequence_logps


class Scores(NamedTuple):
    """Sums over the completion's tokens; the last two only where asked for."""

    logps: Tensor  # (B,) fp32, nats
    entropies: Tensor | None = None  # (B,) fp32, nats
    mean_logits: Tensor | None = None  # (B,) fp32


class PackingCollator:
    """A collator whose batches also say where their completion tokens are.

    Found here, on the CPU and possibly in a worker process, so that no step has to wait for the device to learn it.
    """

    def __init__(self, collator: PreferenceCollator):
        self.collator = collator

    def __call__(self, features: Sequence[dict]) -> dict:
        """One micro-batch: ``PreferenceCollator``'s, with the fields of ``Packing`` in place of the mask."""
        return self._packed(self.collator(features))

    def mismatched(self, features: Sequence[dict], partners: Sequence[int]) -> dict | None:
        """Prompts with their partners' completions, in the same form; None if no row has a partner.

        ``index`` (n,) names the row of ``features`` that each sequence stands for.
        """
        batch = self.collator.build_mismatched(features, partners)
        batch = {name.removeprefix("kl_"): value for name, value in batch.items()}
        return self._packed(batch) if len(batch["index"]) else None

    @staticmethod
    def _packed(batch: dict) -> dict:
        packing = pack_completions(batch["input_ids"], batch.pop("completion_mask"))
        return batch | packing._asdict()


def score(
    model: nn.Module, head: LMHead, batch: dict, *, backend: str, outputs: Iterable[str] = ()
) -> Scores:
    """Run ``model`` over a batch of ``PackingCollator`` and sum over each completion; differentiable."""
    packing = Packing(*(batch[name] for name in Packing._fields))
    tokens = completion_logprobs(
        model,
        batch["input_ids"],
        batch["attention_mask"],
        packing,
        head=head,
        outputs=tuple(outputs),
        backend=backend,
    )

    def per_sequence(values: Tensor | None) -> Tensor | None:
        return None if values is None else sequence_logps(values.detach(), packing.cu_seqlens)

    return Scores(
        sequence_logps(tokens.logp, packing.cu_seqlens),
        per_sequence(tokens.entropy),
        per_sequence(tokens.mean_logit),
    )


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on ``device``."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
