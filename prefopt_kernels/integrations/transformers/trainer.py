"""transformers' ``Trainer`` with the loss of ``linear_logprob``.

``FusedTrainer`` applies :func:`prefopt_kernels.integrations.transformers.patch_forward` during ``train`` and
``evaluate`` and restores the model afterwards. Evaluation has logits if ``compute_metrics`` is given. Arguments that
compute the loss from logits, on which the patch would have no effect, are refused. The class is defined on first use.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from prefopt_kernels.integrations._optional import lazy_classes
from prefopt_kernels.integrations.transformers import patch_forward


@cache
def _trainer() -> type:
    from transformers import Trainer

    class FusedTrainer(Trainer):
        """``transformers.Trainer`` for causal LMs that does not build logits in training.

        Args:
            args, named: as for ``Trainer``.
            backend: as for :func:`prefopt_kernels.linear_logprob`.

        ``fused_calls`` counts the losses computed by the op, outside of compiled graphs.

        Raises:
            ValueError: label smoothing or ``compute_loss_func``, which need logits; ``model_init``; and, from ``train``
                and ``evaluate``, a model that ``patch_forward`` refuses.
        """

        backend: str
        fused_calls: int
        _fused: bool

        def __init__(self, *args: Any, backend: str = "auto", **named: Any):
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

        def train(self, *args: Any, **named: Any) -> Any:
            """As in Trainer."""
            with self._patched():
                return super().train(*args, **named)

        def evaluate(self, *args: Any, **named: Any) -> Any:
            """As in Trainer; with logits if ``compute_metrics`` is given."""
            with self._patched():
                return super().evaluate(*args, **named)

        @contextmanager
        def _patched(self) -> Iterator[None]:
            if self._fused:  # evaluation during training
                yield
                return
            logits = self.compute_metrics is not None
            assert self.model is not None
            with patch_forward(self.model, backend=self.backend, eval_logits=logits) as patched:
                self._fused = True
                try:
                    yield
                finally:
                    self._fused = False
                    self.fused_calls += patched.calls

    return FusedTrainer


__getattr__ = lazy_classes(__name__, FusedTrainer=_trainer)
