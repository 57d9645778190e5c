"""Whether a model keeps the answers of a pass apart: a few tokens scored in one pass and in passes of their own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from prefopt.train.passes import Answer, lay_out

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # nats per token
HALF_PRECISION = 0.05
CONTRAST = 0.1  # of what one answer after the other would change: small weights hide a mixture


def why_not(
    model: nn.Module, score: Callable[[dict], Tensor], vocabulary: int, *, shared: bool = False, packed: bool = False
) -> str | None:
    """The reason why a layout does not fit the model; None if its scores are those of the padded layout.

    Args:
        model: the policy.
        score: (B,) log-probabilities of a pass, in nats.
        vocabulary: rows of the embedding.
        shared, packed: the layout.
    """
    ids = [(7 * place + place * place) % vocabulary for place in range(40)]
    answers = [Answer(ids[:9], ids[20:25]), Answer(ids[:9] if shared else ids[9:20], ids[25:32])]
    training, failed = model.training, None
    model.eval()
    try:
        apart = score(lay_out(answers, 0))
        together = score(lay_out(answers, 0, shared=shared, packed=packed))
        first, second = answers
        before = [*first.prompt, *first.completion] + ([] if shared else [*second.prompt])
        mixed = score(lay_out([first, Answer(before, second.completion)], 0))
    except Exception as error:  # noqa: BLE001  a model's code can raise anything
        failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        model.train(training)
    if failed is not None:
        return failed
    lengths = torch.tensor([5, 7], device=apart.device)
    off, contrast = (((scores - apart).abs() / lengths).max().item() for scores in (together, mixed))
    allowed = min(TOLERANCE.get(next(model.parameters()).dtype, HALF_PRECISION), CONTRAST * contrast)
    return None if off <= allowed else f"scores differ by {off:.1g} nats a token from those of separate passes"
