"""Log-probabilities of whole completions, under the policy or the reference."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefopt.data.collate import SIDES, RawFeatures
from prefopt.train.methods import Sequences
from prefopt.train.passes import Answer, attention_masks, lay_out
from prefopt_kernels.integrations.transformers import LMHead, Packing
from prefopt_kernels.integrations.transformers.head import drop_virtual_tokens
from prefopt_kernels.modules import sequence_logps
from prefopt_kernels.ops.linear_kl import TokenKL, linear_kl
from prefopt_kernels.ops.linear_logprob import TokenLogprobs
from prefopt_kernels.parallel.dtensor import ResolvedHead


class Scores(NamedTuple):
    """Sums over the tokens of each completion, all but the first optional, and the tokens' own."""

    logps: Tensor  # (B,) fp32, nats
    entropies: Tensor | None = None  # (B,) fp32, nats
    mean_logits: Tensor | None = None  # (B,) fp32
    ref_logps: Tensor | None = None  # (B,) fp32, nats
    kls: Tensor | None = None  # (B,) fp32, nats, of policy and reference at every token
    tokens: Tensor | None = None  # (T,) fp32, nats, of which logps are the sums


class RowsAtHead(NamedTuple):
    """What a model's head would have made log-probabilities of."""

    hidden: Tensor  # (T, H)
    head: ResolvedHead
    logit_scale: float
    softcap: float | None


class PassCollator:
    """Lays rows or pairs out for a pass, on the CPU and possibly in a worker process: no step waits for the device.

    Args:
        pad_token_id: fills the rows of a padded layout.
        max_length: tokens of a sequence; longer completions lose their end. None: no limit.
        pairs: whether a feature is a pair.
    """

    def __init__(self, pad_token_id: int, *, max_length: int | None, pairs: bool = False):
        self.pad_token_id, self.max_length, self.pairs = pad_token_id, max_length, pairs
        self.shared = self.packed = False

    def __call__(self, features: Sequence[Mapping]) -> dict[str, Any]:
        """One micro-batch of R rows or pairs, of B sequences: of pairs the chosen answers, then the rejected ones.

        Returns:
            ``row`` and ``group`` (R,) int64; ``labels`` (B,) bool; the tensors of ``lay_out``; ``features``, the raw
            rows or pairs; ``ref_logps`` (B,) fp32 if the features have its columns.
        """
        sides = SIDES if self.pairs else ("",)
        batch: dict[str, Any] = {name: torch.tensor([row[name] for row in features]) for name in ("row", "group")}
        labels = (
            [side == "chosen" for side in sides for _ in features] if self.pairs else [r["label"] for r in features]
        )
        batch["labels"] = torch.tensor(labels, dtype=torch.bool)
        batch |= self.lay_out([self.answer(row, side) for side in sides for row in features])
        columns = [f"ref_{side}_logps" if side else "ref_logps" for side in sides]
        if columns[0] in features[0]:
            batch["ref_logps"] = torch.tensor([row[name] for name in columns for row in features])
        batch["features"] = RawFeatures(features)
        return batch

    def lay_out(self, answers: Sequence[Answer]) -> dict:
        """The tensors of one pass."""
        return lay_out(answers, self.pad_token_id, shared=self.shared, packed=self.packed)

    def answer(self, row: Mapping, side: str = "") -> Answer:
        """The prompt and completion of a row, or of a side of a pair."""
        start = f"{side}_" if side else ""
        answer = self.cut(row[f"{start}prompt_ids"], row[f"{start}completion_ids"])
        if not answer.completion:
            raise ValueError(
                f"row {row['row']} has no completion token within max_length {self.max_length} (its prompt has "
                f"{len(answer.prompt)}); tokenize_rows reports such rows"
            )
        return answer

    def cut(self, prompt: Sequence[int], completion: Sequence[int]) -> Answer:
        """The completion cut to the room that the prompt leaves, perhaps none; the prompt is never cut."""
        room = len(completion) if self.max_length is None else max(0, self.max_length - len(prompt))
        return Answer(prompt, completion[:room])

    def dummy_pass(self) -> dict:
        """A pass of two tokens that keeps an idle rank in the collectives; its scores are not used."""
        return self.lay_out([Answer([0], [0])])


def score(
    model: nn.Module,
    head: LMHead,
    batch: dict,
    *,
    backend: str,
    outputs: Iterable[str] = (),
    reference: RowsAtHead | None = None,
) -> Scores:
    """Run ``model`` over a batch of ``PassCollator`` and sum over each completion; differentiable.

    With ``reference``, the rows of the same batch at the reference's head, the scores include the reference's
    log-probabilities and the exact KL.
    """
    outputs = tuple(outputs)

    def at_head(hidden: Tensor, targets: Tensor) -> TokenLogprobs | TokenKL:
        if reference is None:
            return head.score(hidden, targets, outputs=outputs, backend=backend)
        own, other = head.resolved(hidden.dtype), reference.head
        same = other.weight is own.weight and other.bias is own.bias
        return linear_kl(
            hidden,
            own.weight,
            targets,
            reference.hidden,
            None if same else other.weight,
            own.bias,
            None if same else other.bias,
            logit_scale=(head.logit_scale, reference.logit_scale),
            softcap=(head.softcap, reference.softcap),
            outputs=outputs,
            lora=own.lora,
            ref_lora=other.lora,
            backend=backend,
        )

    tokens, zero = _run_to_head(model, head, batch, at_head)

    def per_sequence(name: str) -> Tensor | None:
        values = getattr(tokens, name, None)
        return None if values is None else sequence_logps(values.detach(), batch["cu_seqlens"])

    logp = tokens.logp + zero
    return Scores(
        logps=sequence_logps(logp, batch["cu_seqlens"]),
        entropies=per_sequence("entropy"),
        mean_logits=per_sequence("mean_logit"),
        ref_logps=per_sequence("ref_logp"),
        kls=per_sequence("kl"),
        tokens=logp,
    )


@torch.no_grad()
def rows_at_head(model: nn.Module, head: LMHead, batch: dict) -> RowsAtHead:
    """The hidden states that predict the completions of a batch, and the head they arrive at."""

    def keep(hidden: Tensor, _targets: Tensor) -> RowsAtHead:
        return RowsAtHead(hidden, head.resolved(hidden.dtype), head.logit_scale, head.softcap)

    return _run_to_head(model, head, batch, keep)[0]


def _run_to_head(
    model: nn.Module, head: LMHead, batch: dict, at_head: Callable[[Tensor, Tensor], Any]
) -> tuple[Any, Tensor]:
    """Score the rows that predict a completion token as they arrive at the head, where its weight is whole.

    What shards a model (FSDP2, ZeRO-3) gathers a layer's weights before the layer runs and again when the gradient of
    the layer's output arrives. So the scores must hang on that output: the head gives back an empty piece of them, the
    model returns it as its logits, and its sum, which is 0, is to be added to them.

    Returns:
        What ``at_head`` makes of the rows (T, H) and the targets (T,), and the sum.
    """
    input_ids, found = batch["input_ids"], []
    packing = Packing(*(batch[name] for name in Packing._fields))

    def score_rows(_module: nn.Module, args: tuple) -> tuple:
        hidden, *rest = args
        rows = drop_virtual_tokens(model, head, hidden, input_ids).flatten(0, 1)
        rows = rows.index_select(0, packing.positions)
        found.append(at_head(rows, packing.targets))
        return (hidden[:, :0], *rest)

    def piece_of_scores(_module: nn.Module, _args: tuple, logits: Tensor) -> Tensor:
        return found[-1][0][:0].reshape(logits.shape)  # (B, 0, V), of logp or hidden

    hooks = [
        head.module.register_forward_pre_hook(score_rows),
        # first, so that the hook of a head that is sharded by itself gets this output
        head.module.register_forward_hook(piece_of_scores, prepend=True),
    ]
    try:
        returned = model(input_ids=input_ids, use_cache=False, **_attention(model, batch))
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) != 1:
        raise RuntimeError(
            f"{type(model).__name__} called its lm_head {len(found)} times in one forward pass; expected once"
        )
    return found[0], returned[0].sum()


def _attention(model: nn.Module, batch: dict) -> dict:
    """The model's arguments that keep the answers of a pass apart."""
    if "attention_mask" in batch:
        return {"attention_mask": batch["attention_mask"]}
    given = {"position_ids": batch["position_ids"]}
    if "segments" in batch:
        base: Any = getattr(model, "module", model)  # of DDP or DeepSpeed's engine
        given["attention_mask"] = attention_masks(batch, base.config.get_text_config(), base.dtype)
    return given


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on ``device``."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def sequences(batch: dict, scores: Scores) -> Sequences:
    """A scored micro-batch."""
    return Sequences(scores.logps, scores.ref_logps, batch["labels"], batch["cu_seqlens"].diff(), scores.tokens)


def outputs(rows: Sequences, rewards: Tensor | None, count: int) -> dict[str, Tensor]:
    """What ``predict`` returns for ``count`` rows or pairs, detached."""
    values = {"logps": rows.logps.detach(), "ref_logps": rows.ref_logps, "rewards": rewards}
    return {name: per_row(value, count) for name, value in values.items() if value is not None}


def per_row(values: Tensor, count: int) -> Tensor:
    """(R,) for unpaired rows; (P, 2) for pairs, given the chosen answers first and then the rejected ones."""
    return values if len(values) == count else values.view(2, count).T.contiguous()
