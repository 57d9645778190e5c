"""Log-probabilities of given answers under a model, by the fused op."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from prefopt.errors import UserError
from prefopt.train.scoring import PassCollator, score, to_device
from prefopt_kernels.integrations.transformers import check_lm_head, lm_head_of


@torch.no_grad()
def answer_logps(
    model: nn.Module,
    rows: Sequence[Mapping],
    *,
    pad_token_id: int,
    max_length: int | None,
    batch_size: int,
    backend: str = "auto",
    desc: str = "scores",
) -> np.ndarray:
    """Log-probability of each row's completion given its prompt, summed over its tokens.

    Args:
        model: in evaluation mode; its logits are not materialised.
        rows: with ``prompt_ids`` and ``completion_ids``.
        max_length: tokens of a sequence, beyond which a completion is truncated; None: no limit.
        batch_size: sequences in a forward pass.
        backend: of ``linear_logprob``.

    Returns:
        (n,) fp64, nats.

    Raises:
        UserError: the model's head is not supported.
    """
    try:
        head = lm_head_of(model)
        check_lm_head(model, head)
    except ValueError as error:
        raise UserError(f"the model's answers cannot be scored: {error}") from None
    device = next(model.parameters()).device
    collate = PassCollator(pad_token_id, max_length=max_length)
    # by length, for little padding, and longest first, so that a batch that does not fit into memory fails at once
    order = sorted(
        range(len(rows)), key=lambda place: -len(rows[place]["prompt_ids"]) - len(rows[place]["completion_ids"])
    )
    logps = np.empty(len(rows))
    with tqdm(total=len(rows), desc=desc, unit="row", dynamic_ncols=True) as bar:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            features = [{"label": True, "row": 0, "group": 0} | dict(rows[place]) for place in places]
            batch = to_device(collate(features), device)
            logps[places] = score(model, head, batch, backend=backend).logps.double().cpu().numpy()
            bar.update(len(places))
    return logps
