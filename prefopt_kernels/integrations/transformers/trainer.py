"""transformers' ``Trainer`` with the loss of ``linear_logprob``: the patch of the model, for as long as it is needed.

``FusedTrainer`` is made when it is first asked for, because this package does not need transformers otherwise. What it
adds to :func:`prefopt_kernels.integrations.transformers.patch_forward` is care: the model is its own again when
``train`` and ``evaluate`` return, logits are there in evaluation where something asks for them, and arguments with
which the loss would come from logits are refused, where the patch would quietly have no effect.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from prefopt_kernels.integrations.transformers import patch_forward


def __getattr__(name: str):
    if name != "FusedTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _trainer()


@cache
def _trainer() -> type:
    from transformers import Trainer

    class FusedTrainer(Trainer):
        """``transformers.Trainer`` of a causal LM, without the logits of a batch.

        Args:
            all: as for ``Trainer``.
            backend: as for :func:`prefopt_kernels.linear_logprob`.

        ``fused_calls`` counts the losses computed this way, outside of compiled graphs.

        Raises:
            ValueError: label smoothing or ``compute_loss_func``, which need logits; ``model_init``; and, from ``train``
                and ``evaluate``, a model that ``patch_forward`` refuses.
        """

        def __init__(self, *args, backend: str = "auto", **named):
            super().__init__(*args, **named)
            if self.model_init is not None:
                raise ValueError("model_init is given; expected a model, which is patched in place")
            if self.compute_loss_func is not None:
                raise ValueError("compute_loss_func is given; expected none: it needs the logits")
            if self.label_smoother is not None:
                raise ValueError(
                    f"label_smoothing_factor is {self.args.label_smoothing_factor}; expected 0: smoothing needs the "
                    "logits"
                )
            self.backend, self.fused_calls, self._fused = backend, 0, False

        def train(self, *args, **named):
            """Trainer's."""
            with self._patched():
                return super().train(*args, **named)

        def evaluate(self, *args, **named):
            """Trainer's; with logits where ``compute_metrics`` wants them."""
            with self._patched():
                return super().evaluate(*args, **named)

        @contextmanager
        def _patched(self) -> Iterator[None]:
            if self._fused:  # evaluation in the course of training
                yield
                return
            logits = self.compute_metrics is not None
            with patch_forward(self.model, backend=self.backend, eval_logits=logits) as patched:
                self._fused = True
                try:
                    yield
                finally:
                    self._fused = False
                    self.fused_calls += patched.calls

    return FusedTrainer
