"""Peak extra memory of a forward and a backward of the head operators, each in a process of its own.

``benchmarks.measure_cpu.extra_bytes_of`` measures: whoever allocates is counted, C++, torch or the libraries below;
pages that are never touched cost nothing.
"""

import multiprocessing
from collections.abc import Callable

import torch

from benchmarks.measure_cpu import extra_bytes_of
from prefopt_kernels import linear_kl, linear_logprob
from prefopt_kernels.ops.linear_logprob import cpu
from support.forked import start

T, H, V = 512, 64, 50_000
MIB = 2**20


def peak_bytes(step: Callable[..., Callable[[int, int, int], Callable[[], None]]], *arguments) -> int:
    """Of one call of ``step(*arguments)`` at T, H, V, what it returns included.

    ``step`` is a function of this module.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = start(_measure, sender, step, arguments)
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _measure(sender, step, arguments) -> None:
    torch.set_num_threads(2)
    prepare = step(*arguments)
    prepare(33, 40, 300)()  # loads the library and starts the threads
    run = prepare(T, H, V)
    sender.send(extra_bytes_of(run))


def logprob_step(dtype, wanted, outputs, backend, instruction_set):
    """Operands with gradients for ``wanted``, and a forward and a backward through ``logp`` and ``outputs``."""
    cpu.instruction_set = lambda: instruction_set

    def prepare(T: int, H: int, V: int) -> Callable[[], None]:
        x = _operands(T, H, V, dtype, ("hidden",), wanted)
        targets, upstream = torch.randint(0, V, (T,)), torch.randn(T)

        def run() -> None:
            out = linear_logprob(**x, targets=targets, outputs=outputs, backend=backend)
            sum((getattr(out, name) * upstream).sum() for name in ("logp", *outputs)).backward()
            assert out.logp.isfinite().all() and all(x[name].grad.any() for name in wanted)

        return run

    return prepare


def kl_step(dtype, wanted, through, backend):
    """The same for linear_kl with one head for both models, through ``logp`` or ``kl``."""

    def prepare(T: int, H: int, V: int) -> Callable[[], None]:
        x = _operands(T, H, V, dtype, ("hidden", "ref_hidden"), wanted)
        targets = torch.randint(0, V, (T,))

        def run() -> None:
            out = linear_kl(**x, targets=targets, keep_unit=through == "logp", backend=backend)
            getattr(out, through).sum().backward()

        return run

    return prepare


def two_tensors(size):
    """Two tensors one after the other, of ``size`` bytes and of half of it, whatever T, H, V."""

    def run() -> None:
        torch.ones(size // 4).sum(), torch.ones(size // 8).sum()

    return lambda T, H, V: run


def _operands(T, H, V, dtype, states, wanted) -> dict[str, torch.Tensor]:
    x = {name: torch.randn(T, H, dtype=dtype) for name in states}
    x["weight"] = torch.randn(V, H, dtype=dtype).mul_(H**-0.5)
    for name in wanted:
        x[name].requires_grad_()
    return x
