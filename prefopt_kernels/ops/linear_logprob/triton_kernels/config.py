"""Every launch choice of the Triton kernels of linear_logprob, and why. Nothing here is tuned at run time.

No row was measured on a GPU yet. The reasons are what the compiler says for the architecture (`make static-report`:
registers, spills, shared memory) and arithmetic; a measured row says so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch

FILTER_ROWS = 128  # tokens of a tile that a filter keeps or leaves out, and of every tile of logits
WORKSPACE_BYTES = 256 * 2**20  # exponentials or logit gradients; every chunk streams the head once, so few chunks


class Target(NamedTuple):
    """What the choices depend on."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # that one program may have

    @property
    def descriptors(self) -> bool:
        return self.capability >= (9, 0)


class Tiles(NamedTuple):
    """Tile of logits (tokens x token ids x hidden) of ``scan`` and ``logit_gradients``; ``parts`` of its columns."""

    block_t: int
    block_v: int
    block_h: int
    parts: int
    warps: int
    stages: int


class Product(NamedTuple):
    """Tile of ``product``: rows, columns, inner."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


H100 = Target((9, 0), 132, 232_448)
INTERPRETER = Target((9, 0), 4, 232_448)  # few programs, so that small tests meet several splits and several tiles each
_pretended: Target | None = None


@contextmanager
def pretending(target: Target) -> Iterator[None]:
    """Inside, tensors that are on no GPU are served as if on ``target``: for compile checks and the interpreter."""
    global _pretended
    outer, _pretended = _pretended, target
    try:
        yield
    finally:
        _pretended = outer


def target_of(device: torch.device) -> Target:
    if device.type != "cuda":
        return _pretended or INTERPRETER
    return _cuda_target(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _cuda_target(index: int) -> Target:
    properties: Any = torch.cuda.get_device_properties(index)  # torch's stub lacks the last one
    return Target(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def tiles(target: Target, dtype: torch.dtype, descriptors: bool, adapter: bool) -> Tiles:
    """``parts`` are of FILTER_TILE columns; ``block_t`` is FILTER_ROWS."""
    if dtype == torch.float32:
        # Three tf32 products keep both halves of each operand in registers: wider or deeper, sm_80 and sm_100 spill.
        return Tiles(FILTER_ROWS, 64, 16, 1, 8, 2)
    if descriptors and not adapter and target.capability < (10, 0):
        # 48 KiB from L2 for 4.2 MFLOP, where 128 x 128 asks a third more. In one part it spills 117 registers, in two
        # 12, in four none; on sm_100, where sums come back from tensor memory, also in four.
        return Tiles(FILTER_ROWS, 256, 64, 4, 8, 3)
    if adapter and (not descriptors or target.capability >= (10, 0)):
        # a further pair of operands, by addresses, takes the registers that a wider tile would spill
        return Tiles(FILTER_ROWS, 64, 32, 1, 8, 3)
    if target.shared_bytes >= 160 * 1024:
        return Tiles(FILTER_ROWS, 128, 64, 2, 8, 3)
    return Tiles(FILTER_ROWS, 128, 32, 2, 8, 3)  # sm_86, sm_89: 99 KiB of shared memory


def product(target: Target, dtype: torch.dtype, columns: int, descriptors: bool, aligned: bool) -> Product:
    """``columns`` of the result: H, or the rank of an adapter. ``aligned``: rows of 16 bytes, as any usual H gives."""
    inner = 16 if dtype == torch.float32 else 32
    if columns <= 64:
        return Product(FILTER_ROWS, max(16, 1 << (columns - 1).bit_length()), inner, 4, 2)
    if dtype == torch.float32 or not aligned:
        # unaligned rows need an address for each number: 128 columns spill
        return Product(FILTER_ROWS, 64, inner, 8, 2)
    if dtype == torch.bfloat16 and descriptors:
        wide = 256 if target.capability < (10, 0) else 128  # sm_100: 256 spill
        return Product(FILTER_ROWS, wide, 64, 8, 3)
    return Product(FILTER_ROWS, 128, 32, 8, 3)  # fp16: the workspace is fp32


def splits(target: Target, programs: int, parts: int) -> int:
    """How many programs share one block's ``parts``, so that ``programs`` blocks fill the multiprocessors evenly.

    The smallest number within 3 % of the best use of the last wave: each split costs partials.
    """

    def use(count: int) -> float:
        waves = -(-programs * count // target.multiprocessors)
        return programs * count / (waves * target.multiprocessors)

    most = max(1, min(parts, target.multiprocessors // max(1, programs), 64))
    if programs > target.multiprocessors // 2:
        most = min(parts, 4)
    best = max(use(count) for count in range(1, most + 1))
    return next(count for count in range(1, most + 1) if use(count) >= best - 0.03)


def precision(dtype: torch.dtype) -> str:
    """fp32 operands are multiplied as fp32: three tf32 products, whose error is that of an fp32 product."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
