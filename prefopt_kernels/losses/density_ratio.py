"""Weights for BCO where desirable and undesirable rows answer different prompts.

The paper's underlying distribution matching (arXiv:2404.04656): a logistic regression on
prompt embeddings tells the classes apart, and its odds weigh the undesirable rows as if their prompts came
from the desirable rows' distribution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt_kernels._checks import check_tensor


class DensityRatio:
    r"""Density ratio of desirable over undesirable prompts, from a logistic regression.

    .. math:: \min_{w, b} \; \tfrac12 \|w\|^2 + C \sum_i -c_i \,
              \log\sigma(s_i (w^\top e_i + b)), \qquad
              \mathrm{ratio}(e) = \mathrm{clip}(e^{w^\top e + b})

    with :math:`c_i = n / (2 n_{\mathrm{class}})`, so that both classes count the same. Solved with LBFGS in
    fp64; the state is two tensors.

    Args:
        clip: (low, high), 0 < low <= high; TRL's defaults.
        C: inverse strength of the penalty, above 0.

    Raises:
        ValueError: ``clip`` or ``C`` is out of range.

    Example:
        >>> import torch
        >>> ratio = DensityRatio()
        >>> ratio.fit(torch.tensor([[1.0], [1.0]]), torch.tensor([[-1.0], [1.0]]))
        >>> embeddings, labels = torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([True, False, False])
        >>> ratio.weights(embeddings, labels)  # a desirable row, a prompt both have, one it never has
        tensor([1.0000, 1.3225, 0.5000])
    """

    def __init__(self, *, clip: tuple[float, float] = (0.5, 10.0), C: float = 1.0):
        if not 0 < clip[0] <= clip[1] < float("inf"):
            raise ValueError(f"clip is {clip!r}; expected (low, high) with 0 < low <= high")
        if not 0 < C < float("inf"):
            raise ValueError(f"C is {C}; expected a finite number above 0")
        self.clip, self.C = clip, C
        self.weight: Tensor | None = None  # (D,) fp64
        self.bias: Tensor | None = None  # 0-dim fp64

    def fit(self, desirable: Tensor, undesirable: Tensor) -> None:
        """Learn the ratio from prompt embeddings of both classes.

        Args:
            desirable: (n, D) floating point, finite; n above 0.
            undesirable: (m, D) the same; m above 0.

        Raises:
            TypeError, ValueError: wrong type, shape or dtype, no rows, or a value that is not finite.
        """
        for name, rows in (("desirable", desirable), ("undesirable", undesirable)):
            _check_embeddings(name, rows)
            if rows.shape[0] == 0:
                raise ValueError(f"{name} has no rows; expected at least one embedding")
            if not rows.isfinite().all():
                raise ValueError(f"{name} has values that are not finite; expected finite ones")
        if desirable.shape[1] != undesirable.shape[1]:
            raise ValueError(
                f"undesirable has {undesirable.shape[1]} columns; expected {desirable.shape[1]}, as desirable"
            )
        n, m = desirable.shape[0], undesirable.shape[0]
        rows = torch.cat([desirable, undesirable.to(desirable.device)]).detach().double()
        ones = torch.ones_like(rows[:, 0])
        sign = torch.cat([ones[:n], -ones[n:]])
        share = torch.cat([ones[:n] / (2 * n), ones[n:] / (2 * m)]) * (n + m)
        parameters = torch.zeros(rows.shape[1] + 1, dtype=rows.dtype, device=rows.device)
        parameters.requires_grad_()
        solver = torch.optim.LBFGS(
            [parameters],
            max_iter=500,
            tolerance_grad=1e-8,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            solver.zero_grad()
            logits = rows @ parameters[:-1] + parameters[-1]
            loss = -(share * F.logsigmoid(sign * logits)).sum()
            loss = self.C * loss + parameters[:-1].square().sum() / 2
            loss.backward()
            return loss

        with torch.enable_grad():
            solver.step(objective)
        self.weight, self.bias = parameters.detach()[:-1], parameters.detach()[-1]

    def weights(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """One weight per row, to multiply its loss with.

        Args:
            embeddings: (B, D) floating point, of the rows' prompts.
            labels: (B,) bool. True is desirable.

        Returns:
            (B,) fp32 on the device of ``embeddings``: 1 where desirable, elsewhere the clipped ratio.

        Raises:
            RuntimeError: nothing was fitted or loaded.
            TypeError, ValueError: wrong type, shape or dtype.
        """
        if self.weight is None or self.bias is None:
            raise RuntimeError("DensityRatio has no fit; call fit or load_state_dict first")
        _check_embeddings("embeddings", embeddings)
        if embeddings.shape[1] != self.weight.shape[0]:
            raise ValueError(f"embeddings has {embeddings.shape[1]} columns; expected {self.weight.shape[0]}")
        if not isinstance(labels, Tensor) or labels.dtype != torch.bool:
            raise TypeError("labels is not a tensor of torch.bool (True = desirable)")
        if labels.shape != embeddings.shape[:1]:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; expected {tuple(embeddings.shape[:1])}")
        self.weight, self.bias = (x.to(embeddings.device) for x in (self.weight, self.bias))
        logits = embeddings.detach().double() @ self.weight + self.bias
        ratio = logits.exp().clamp(*self.clip)
        return torch.where(labels, torch.ones_like(ratio), ratio).float()

    def state_dict(self) -> dict[str, Tensor]:
        """``{"weight": (D,) fp64, "bias": 0-dim fp64}``, copies; empty before a fit."""
        if self.weight is None or self.bias is None:
            return {}
        return {"weight": self.weight.clone(), "bias": self.bias.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: the keys are neither none nor exactly ``weight`` and ``bias``, or a shape is wrong.
        """
        if not state:
            self.weight = self.bias = None
            return
        if set(state) != {"weight", "bias"}:
            raise ValueError(f"state has the keys {sorted(state)}; expected ['bias', 'weight']")
        for name, ndim in (("weight", 1), ("bias", 0)):
            if not isinstance(state[name], Tensor) or state[name].ndim != ndim:
                raise ValueError(f"state['{name}'] is no {ndim}-dim tensor; expected one")
        self.weight, self.bias = (state[name].detach().double().clone() for name in ("weight", "bias"))


def _check_embeddings(name: str, rows: Tensor) -> None:
    check_tensor(name, rows, "(n, D)", 2)
    if not rows.is_floating_point():
        raise TypeError(f"{name} has dtype {rows.dtype}; expected floating point")
