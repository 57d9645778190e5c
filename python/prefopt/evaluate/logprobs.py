"""Log-probabilities of answers under base and run, by the fused op."""

from collections.abc import Sequence

import numpy as np
from torch import nn
from tqdm import tqdm

from prefopt.errors import UserError
from prefopt.train.scoring import PassCollator, score, to_device
from prefopt_kernels.integrations.transformers import LMHead, check_lm_head, lm_head_of


def head_of(model: nn.Module) -> LMHead:
    """The model's head, checked; an ``UserError`` where the fused op cannot score it."""
    try:
        head = lm_head_of(model)
        check_lm_head(model, head)
    except ValueError as error:
        raise UserError(f"the model's answers cannot be scored: {error}") from None
    return head


def answer_logps(
    model: nn.Module,
    rows: Sequence[dict],
    *,
    pad_token_id: int,
    max_length: int | None,
    batch_size: int,
    backend: str = "auto",
    desc: str = "scores",
) -> np.ndarray:
    """Log-probability of each row's completion given its prompt, summed over its tokens.

    Args:
        model: in evaluation mode and without gradients; the fused op never builds its logits.
        rows: with ``prompt_ids`` and ``completion_ids``.
        max_length: tokens of both, at which a completion is cut; None for no limit.
        backend: of ``linear_logprob``.

    Returns:
        (n,) fp64, nats, in the order of the rows.
    """
    device = next(model.parameters()).device
    collate = PassCollator(pad_token_id, max_length=max_length)
    head = head_of(model)
    # Rows of like length together, the longest first: little padding, and too big a batch fails at once.
    order = sorted(
        range(len(rows)),
        key=lambda place: -len(rows[place]["prompt_ids"]) - len(rows[place]["completion_ids"]),
    )
    logps = np.empty(len(rows))
    with tqdm(total=len(rows), desc=desc, unit="row", dynamic_ncols=True) as bar:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            features = [{"label": True, "row": 0, "group": 0} | rows[place] for place in places]
            batch = to_device(collate(features), device)
            logps[places] = score(model, head, batch, backend=backend).logps.double().cpu().numpy()
            bar.update(len(places))
    return logps
