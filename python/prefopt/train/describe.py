"""What run.json contains about a run before it starts, and warnings about its data and its model."""

from typing import TYPE_CHECKING

from torch import Tensor

from prefopt.train.diagnostics import Diagnostics
from prefopt.train.inputs import Prepared
from prefopt.train.methods import UNPAIRED, Options

if TYPE_CHECKING:
    from prefopt.train.trainer import PreferenceTrainer


def describe(
    trainer: "PreferenceTrainer", reference_kind: str, train: Prepared, evals: dict[str, Prepared], passes: dict
) -> None:
    """Warn about data and model, and record what run.json says of them.

    Args:
        trainer: built.
        reference_kind: in words.
        train, evals: the prepared rows.
        passes: the layout of the passes, with reasons.
    """
    args, model, head = trainer.args, trainer.model, trainer.scorer.head
    if args.spec.data == UNPAIRED:
        _observe_labels(trainer.diagnostics, args, train.tokenized.counts)
    if not train.tokenized.conversational and getattr(trainer.processing_class, "chat_template", None):
        trainer.diagnostics.add(
            "text_beside_template",
            0,
            "The training rows are plain text and are trained on as they are, but the tokenizer has a chat template, "
            "which is not used",
            "Either generate from plain text, as `prefopt chat` and `prefopt eval` do for this run, or set "
            "data.as_chat: true (in Python load_rows(..., as_chat=True)), which makes each prompt a user turn and each "
            "completion an assistant turn",
        )
    text = model.config.get_text_config()
    if getattr(text, "router_aux_loss_coef", None) and hasattr(text, "output_router_logits"):
        trainer.diagnostics.add(
            "no_router_loss",
            0,
            "The model is a mixture of experts, and its load-balancing loss is not part of the objective",
            "Freeze the router, for example by training an adapter on the attention layers",
        )
    parameters = list(model.parameters())
    trainer.run_folder.describe(
        [row for rows in [train, *evals.values()] for row in rows.bad],
        status="prepared",
        method=args.method,
        config=args.to_dict(),
        model={
            "class": type(model).__name__,
            "parameters": sum(map(_numbers, parameters)),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "logit_scale": head.logit_scale,
            "softcap": head.softcap,
        },
        reference={"kind": reference_kind, "fingerprint": trainer._reference_fingerprint},
        data={"train": train.summary()}
        | {f"eval_{name}" if name else "eval": rows.summary() for name, rows in evals.items()},
        passes=passes,
        world_size=args.world_size,
        diagnostics=trainer.diagnostics.state_dict()["findings"],
    )


def _numbers(parameter: Tensor) -> int:
    """The number of weights in a parameter; bitsandbytes packs two of 4 bits into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()


def _observe_labels(diagnostics: Diagnostics, args: Options, counts: dict[str, int]) -> None:
    labels = counts["desirable"], counts["undesirable"]
    if args.needs_kl:  # the advice on weights is KTO's
        diagnostics.observe_data(*labels, args.desirable_weight, args.undesirable_weight)
    elif not all(labels):
        diagnostics.observe_data(*labels, 1.0, 1.0)
