"""The choice of a backend, the same for every op."""

import os
from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from prefopt_kernels._checks import nearest


def select_backend(backends: Mapping[str, ModuleType], backend: str, *operands: Tensor) -> str:
    """The name of the backend that runs a call: the named one, or for "auto" the first that can.

    Args:
        backends: modules by name, in the order in which "auto" tries them. ``why_not(*operands)`` returns the reason
            why a module cannot run the call, or None.
        backend: a name, or "auto", which the environment variable PREFOPT_BACKEND replaces.
        operands: of the call.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the named backend cannot run the call, with the reason.
    """
    if backend == "auto":
        backend = os.environ.get("PREFOPT_BACKEND", "auto")
    if backend == "auto":
        return next(name for name, module in backends.items() if module.why_not(*operands) is None)
    if backend not in backends:
        names = ["auto", *backends]
        raise ValueError(f"backend is {backend!r}; expected one of {names}{nearest(backend, names)}")
    reason = backends[backend].why_not(*operands)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run this call: {reason}")
    return backend
