"""What run.json says of a run before it starts, and what is told about its data and its model."""

from torch import Tensor

from prefopt.train.diagnostics import Diagnostics
from prefopt.train.inputs import Prepared
from prefopt.train.methods import RATED
from prefopt.train.recorded import RecordedTrainer


def describe(trainer: RecordedTrainer, reference_kind: str, train: Prepared, evals: dict[str, Prepared]) -> None:
    """Look at data and model, and note what run.json will say of them.

    Args:
        trainer: built.
        reference_kind: in words.
        train, evals: the rows as they were prepared.
    """
    args, model, head = trainer.args, trainer.model, trainer.head
    if args.spec.data == RATED:
        _observe_labels(trainer.diagnostics, args, train.tokenized.counts)
    if not train.tokenized.conversational and getattr(trainer.processing_class, "chat_template", None):
        trainer.diagnostics.add(
            "text_beside_template",
            0,
            "The training rows are plain text and are trained on as they are, but the tokenizer has a chat template, "
            "which is not used",
            "Either keep to text when the model generates, as `prefopt chat` and `prefopt eval` do for this run, or set "
            "data.as_chat: true (in python load_rows(..., as_chat=True)), which makes a user turn of each prompt and an "
            "assistant turn of each completion",
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
        world_size=args.world_size,
        diagnostics=trainer.diagnostics.state_dict()["findings"],
    )


def _numbers(parameter: Tensor) -> int:
    """How many numbers a parameter stands for: bitsandbytes packs two of 4 bits into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()


def _observe_labels(diagnostics: Diagnostics, args, counts: dict[str, int]) -> None:
    labels = counts["desirable"], counts["undesirable"]
    if args.needs_kl:  # KTO's advice on the weights is KTO's
        diagnostics.observe_data(*labels, args.desirable_weight, args.undesirable_weight)
    elif not all(labels):
        diagnostics.observe_data(*labels, 1.0, 1.0)
