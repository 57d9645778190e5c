"""A call as the Triton kernels take it, and the launches that the forward and the backward share.

Nothing here reads a value back from the device. How many rows count is known there only, so grids are for all T rows
and programs without a row that counts end at once.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from prefopt_kernels.ops._launch import launch
from prefopt_kernels.ops.linear_logprob.operands import FILTER_TILE, Operands
from prefopt_kernels.ops.linear_logprob.transform import Transform
from prefopt_kernels.ops.linear_logprob.triton_kernels import config as choices
from prefopt_kernels.ops.linear_logprob.triton_kernels.forward import PARTIALS, combine, scan
from prefopt_kernels.ops.linear_logprob.triton_kernels.matmul import product

LOG2_E = math.log2(math.e)
PIECES = 3  # 16-bit numbers that together hold an fp32 number


class Call:
    """The operands of one call as the kernels take them: rows that count first, the others zero."""

    def __init__(self, operands: Operands, transform: Transform):
        hidden, weight, targets, bias, low_hidden, low_weight = operands
        self.T, self.H = hidden.shape
        self.V = weight.shape[0]
        self.operands, self.transform = operands, transform
        self.device, self.dtype = hidden.device, hidden.dtype
        self.target = choices.target_of(hidden.device)
        self.blocks = cdiv(self.T, choices.FILTER_ROWS)
        ignored = targets < 0
        self.order = torch.sort(ignored.byte(), stable=True).indices  # (T,)
        self.count = (self.T - ignored.sum()).to(torch.int32).reshape(1)
        self.ignored = ignored[self.order]
        self.targets = targets[self.order].clamp(max=self.V).to(torch.int32)  # V: no token id
        self.hidden = self.rows_of(hidden)
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.bias = None if bias is None else bias.float().contiguous()
        self.low: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if low_hidden is not None and low_weight is not None:
            self.low = _low_operands(self.rows_of(low_hidden), low_weight, self.dtype)
        # bf16 has fp32's exponents; fp16 exponentials or gradients would overflow or vanish
        self.work_dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        scale, softcap, temperature = transform
        self.factor = scale / temperature  # dz / draw at a slope of 1
        self.inner = self.factor * LOG2_E if softcap is None else scale / softcap
        self.outer = 0.0 if softcap is None else softcap / temperature * LOG2_E
        self.descriptors = self.describable(self.hidden, self.weight)
        self.tiles = choices.tiles(self.target, self.dtype, self.descriptors, adapter=low_hidden is not None)

    def rows_of(self, values: Tensor) -> Tensor:
        """The rows that count, first and in their order, then zeros: a row that does not count may hold NaN."""
        ignored = self.ignored.reshape(-1, *(1,) * (values.dim() - 1))
        return values.index_select(0, self.order).masked_fill_(ignored, 0)

    def to_places(self, rows: Tensor) -> Tensor:
        """The inverse of ``rows_of``."""
        return torch.zeros_like(rows).index_copy_(0, self.order, rows)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def describable(self, *matrices: Tensor) -> bool:
        """Whether the hardware can read tiles of them by descriptors: multiples of 16 bytes, and not empty."""
        return self.target.descriptors and all(
            matrix.numel() > 0
            and matrix.stride(0) * matrix.element_size() % 16 == 0
            and matrix.stride(0) >= matrix.shape[1]
            and matrix.data_ptr() % 16 == 0
            for matrix in matrices
        )

    def head(self) -> dict:
        """The arguments that describe the logits, for every kernel that computes them."""
        tiles, low = self.tiles, self.low
        return {
            "hidden": tiled(self.hidden, tiles.block_t, tiles.block_h, self.descriptors),
            "weight": tiled(self.weight, tiles.block_v, tiles.block_h, self.descriptors),
            "low_hidden": low[0],
            "low_weight": low[1],
            "bias_ptr": self.bias,
            "targets_ptr": self.targets,
            "count_ptr": self.count,
            "T": self.T,
            "V": self.V,
            "hidden_stride": self.hidden.stride(0),
            "weight_stride": self.weight.stride(0),
            "inner": self.inner,
            "outer": self.outer,
            "H": self.H,
            "LOW": 0 if low[0] is None else low[0].shape[1],
            "BLOCK_T": tiles.block_t,
            "BLOCK_V": tiles.block_v,
            "BLOCK_H": tiles.block_h,
            "BLOCK_LOW": 16,
            "STAGES": tiles.stages,
            "PARTS": tiles.parts,
            "SOFTCAP": self.transform.softcap is not None,
            "BIAS": self.bias is not None,
            "DESCRIPTOR": self.descriptors,
            "PRECISION": choices.precision(self.dtype),
        }

    def outputs(self, want: frozenset[str]) -> dict[str, Tensor]:
        """Every wanted output, 0 for rows that do not count."""
        out = {name: self.zeros(self.T) for name in want}
        if "is_top1" in want:
            out["is_top1"] = self.zeros(self.T, dtype=torch.bool)
        if "unit" in want:
            out["unit"] = self.zeros(self.T, self.H, dtype=self.dtype)
        if "tile_max" in want:
            out["tile_max"] = self.new_tile_max()
        return out

    def new_tile_max(self) -> Tensor:
        ids = -(-self.V // FILTER_TILE)
        return torch.full((ids, self.T), -math.inf, device=self.device)

    def new_partials(self, blocks: int) -> Tensor:
        parts = -(-self.V // self.tiles.block_v)
        return self.empty(PARTIALS, choices.splits(self.target, blocks, parts), self.T)

    def scan(
        self,
        want: frozenset[str],
        partials: Tensor,
        first_row: int,
        blocks: int,
        *,
        tile_max: Tensor | None = None,
        reference: Tensor | None = None,
        workspace: Tensor | None = None,
        again: Tensor | None = None,
    ) -> None:
        splits, tiles = partials.shape[1], self.tiles
        width = tiles.block_v // tiles.parts
        launch(
            scan,
            (blocks, splits),
            self.head()
            | {
                "reference_ptr": reference,
                "again_ptr": again,
                "partials_ptr": partials,
                "workspace": None if workspace is None else tiled(workspace, tiles.block_t, width, self.descriptors),
                "tile_max_ptr": tile_max,
                "first_row": first_row,
                "tiles_per_split": cdiv(cdiv(self.V, tiles.block_v), splits),
                "splits": splits,
                "workspace_stride": 0 if workspace is None else workspace.stride(0),
                "ENTROPY": "entropy" in want,
                "MEAN": "mean_logit" in want,
                "PRODUCT": workspace is not None,
                "TILE_MAX": tile_max is not None,
                "AGAIN": again is not None,
            },
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )

    def combine(
        self,
        want: frozenset[str],
        partials: Tensor,
        out: dict[str, Tensor],
        first_row: int,
        blocks: int,
        *,
        reference: Tensor | None = None,
        own: Tensor | None = None,
        share: Tensor | None = None,
    ) -> None:
        launch(
            combine,
            (blocks,),
            {
                "partials_ptr": partials,
                "order_ptr": self.order,
                "count_ptr": self.count,
                "reference_ptr": reference,
                "logp_ptr": out["logp"],
                "lse_ptr": out["lse"],
                "entropy_ptr": out.get("entropy"),
                "mean_ptr": out.get("mean_logit"),
                "top1_ptr": out.get("is_top1"),
                "own_ptr": own,
                "share_ptr": share,
                "T": self.T,
                "V": self.V,
                "first_row": first_row,
                "splits": partials.shape[1],
                "factor": self.factor,
                "outer": self.outer,
                "BLOCK_T": self.tiles.block_t,
                "SOFTCAP": self.transform.softcap is not None,
                "ENTROPY": "entropy" in want,
                "MEAN": "mean_logit" in want,
                "TOP1": "is_top1" in want,
                "PRODUCT": own is not None,
            },
            num_warps=4,
            num_stages=1,
        )

    def product(
        self,
        left: Tensor,
        right: Tensor,
        out: Tensor,
        *,
        first_row: int = 0,
        first_inner: int = 0,
        inner: int,
        transposed: bool = False,
        add: bool = False,
        live: Tensor | None = None,
    ) -> None:
        """``out[split] (+)= left right`` over ``inner``; ``live`` (row blocks, tiles) is what to visit."""
        splits, M, N = out.shape
        described = self.describable(left, right)
        aligned = all(matrix.stride(-2) * matrix.element_size() % 16 == 0 for matrix in (left, right, out))
        tile = choices.product(self.target, self.dtype, N, described, aligned)
        block = (tile.block_k, tile.block_m) if transposed else (tile.block_m, tile.block_k)
        launch(
            product,
            (-(-N // tile.block_n), -(-M // tile.block_m), splits),
            {
                "left": tiled(left, *block, described),
                "right": tiled(right, tile.block_k, tile.block_n, described),
                "out_ptr": out,
                # the live tiles of a row block first, in their order
                "list_ptr": None if live is None else torch.sort((~live).byte(), dim=1, stable=True).indices.int(),
                "live_ptr": None if live is None else live.sum(1).int(),
                "count_ptr": self.count,
                "M": M,
                "N": N,
                "K": inner,
                "first_row": first_row,
                "first_inner": first_inner,
                "right_rows": right.shape[0],
                "left_stride": left.stride(0),
                "right_stride": right.stride(0),
                "out_stride": out.stride(1),
                "entries": 0 if live is None else live.shape[1],
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "STAGES": tile.stages,
                "TILE": choices.FILTER_ROWS if transposed else FILTER_TILE,
                "TRANSPOSED": transposed,
                "LISTED": live is not None,
                "ADD": add,
                "DESCRIPTOR": described,
                "PRECISION": choices.precision(self.dtype),
            },
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def product_splits(self, rows: int, columns: int, inner: int) -> int:
        tile = choices.product(self.target, self.dtype, columns, self.descriptors, aligned=True)
        programs = cdiv(rows, tile.block_m) * max(1, cdiv(columns, tile.block_n))
        return choices.splits(self.target, programs, -(-inner // (8 * tile.block_k)))

    def peaks(self, tile_max: Tensor, lse: Tensor, rows: slice = slice(None)) -> Tensor:
        """(row blocks, tiles) of ``rows``: the largest probability of a tile, 1 where a target is in it.

        ``lse`` in units of log 2; ``rows`` begin at a block.
        """
        ignored, targets = self.ignored[rows], self.targets[rows]
        log_p = tile_max[:, rows] - lse[rows].masked_fill(ignored, math.inf)
        tiles, count = log_p.shape
        blocks = cdiv(count, choices.FILTER_ROWS)
        log_p = pad(log_p, (0, blocks * choices.FILTER_ROWS - count), value=-math.inf)
        peak = log_p.view(tiles, blocks, choices.FILTER_ROWS).amax(-1).exp2().T.contiguous()
        block = torch.arange(count, device=self.device) // choices.FILTER_ROWS
        place = block * tiles + targets.clamp(0, self.V - 1) // FILTER_TILE
        peak.view(-1).scatter_reduce_(0, place, (~ignored).float(), "amax")
        return peak


def tiled(matrix: Tensor, rows: int, columns: int, descriptor: bool) -> Tensor | TensorDescriptor:
    """``matrix`` as a kernel takes it that reads or writes blocks of (rows, columns)."""
    if not descriptor:
        return matrix
    return TensorDescriptor(matrix, matrix.shape, matrix.stride(), [rows, columns])


def _low_operands(low_hidden: Tensor, low_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(T, L) and (V, L) of ``dtype`` whose product is that of the fp32 factors, to fp32's last bit."""
    if dtype == torch.float32:
        return low_hidden, low_weight.contiguous()
    left = _pieces(low_hidden, dtype)
    right = _pieces(low_weight, dtype) if low_weight.dtype == torch.float32 else [low_weight]
    pairs = [(i, j) for j in range(len(right)) for i in range(len(left)) if i + j < PIECES]
    return torch.cat([left[i] for i, _ in pairs], 1), torch.cat([right[j] for _, j in pairs], 1)


def _pieces(values: Tensor, dtype: torch.dtype) -> list[Tensor]:
    pieces, rest = [], values
    for _ in range(PIECES):
        pieces.append(rest.to(dtype))
        rest = rest - pieces[-1].float()
    return pieces
