"""Registers, spills, shared memory and matrix instructions of the Triton kernels, cross-compiled for sm_80 to sm_100.

    python -m benchmarks.static_report [--arch 80 90 100] [--dtype bf16 fp16 fp32] [--json]

Each case runs a backend on meta tensors and records every launch with its arguments; each recorded kernel is compiled
with the ptxas of Triton's wheel. No GPU, driver or toolkit is needed. TRITON_INTERPRET must not be set.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from prefopt_kernels.ops._launch import Launch, recording
from prefopt_kernels.ops.linear_kl.operands import Saved as KLSaved
from prefopt_kernels.ops.linear_kl.operands import Transforms
from prefopt_kernels.ops.linear_kl.operands import Upstream as KLUpstream
from prefopt_kernels.ops.linear_kl.triton_kernels import backend as linear_kl
from prefopt_kernels.ops.linear_logprob.operands import Operands, Saved, Upstream
from prefopt_kernels.ops.linear_logprob.transform import Transform
from prefopt_kernels.ops.linear_logprob.triton_kernels import backend as backend_triton
from prefopt_kernels.ops.linear_logprob.triton_kernels import config as backend_triton_choices
from prefopt_kernels.ops.sequence_loss.parameters import TENSORS, Form, Parameters
from prefopt_kernels.ops.sequence_loss.triton_kernels import backend as sequence_loss

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    80: backend_triton_choices.Target((8, 0), 108, 166_912),
    90: backend_triton_choices.H100,
    100: backend_triton_choices.Target((10, 0), 148, 232_448),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
MATRIX = r"\bwgmma\.mma_async|\bmma\.sync|\btcgen05\.mma"  # in PTX: Hopper, Ampere, Blackwell
T, H, V, RANK, SEQUENCES = 4096, 1024, 151_936, 16, 64


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture; ``flags`` are its constexprs, ``calls`` the cases in which it came up."""

    arch: int
    dtype: str
    kernel: str
    flags: str
    warps: int
    stages: int
    registers: int
    spill_bytes: int  # of local memory that a thread needs; nothing else in these kernels uses any
    shared_bytes: int
    matrix_instructions: int
    needs_matrix: bool
    calls: str


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    """Calls of the backend that between them launch every kernel with every flag."""
    meta = {"device": "meta"}
    hidden, weight = torch.empty(T, H, dtype=dtype, **meta), torch.empty(V, H, dtype=dtype, **meta)
    targets, row = torch.empty(T, dtype=torch.int64, **meta), torch.empty(T, **meta)
    bias = torch.empty(V, dtype=dtype, **meta)
    low = torch.empty(T, RANK, **meta), torch.empty(V, RANK, dtype=dtype, **meta)
    plain, capped = Transform(1.0, None, 1.0), Transform(1.2, 30.0, 0.7)
    operands = Operands(hidden, weight, targets)
    odd = Operands(hidden[:, :-1], weight[:, :-1], targets)  # rows no descriptor can read
    full = operands._replace(bias=bias, low_hidden=low[0], low_weight=low[1])
    basic = frozenset({"logp", "lse"})
    every = basic | {"entropy", "mean_logit", "is_top1"}
    tile_max = torch.empty(-(-V // 128), T, **meta)
    saved = partial(Saved, row)
    forward, backward = backend_triton.forward, backend_triton.backward
    yield "forward", partial(forward, operands, plain, basic, 0.0)
    yield "forward, pointers", partial(forward, odd, plain, basic, 0.0)
    yield "forward, every output", partial(forward, full, capped, every | {"tile_max"}, 0.0)
    yield "unit", partial(forward, operands, plain, basic | {"unit"}, 0.0)
    yield "unit, pointers", partial(forward, odd, plain, basic | {"unit"}, 0.0)
    yield "unit, filter", partial(forward, operands, plain, basic | {"unit"}, 2.0**-12)
    yield "unit, every output", partial(forward, full, capped, every | {"unit"}, 0.0)
    head = frozenset({"hidden", "weight"})
    every = frozenset({"hidden", "weight", "bias", "low_hidden", "low_weight"})
    by_logp = Upstream(row, None, None)
    yield "backward", partial(backward, operands, by_logp, saved(None, None, 0.0, 0.0), plain, head)
    yield (
        "backward, pointers",
        partial(backward, odd, by_logp, saved(None, None, 0.0, 0.0), plain, head),
    )
    filters = saved(None, None, 2.0**-12, 0.0)
    yield "backward, filter", partial(backward, operands, by_logp, filters, plain, head)
    filters = saved(None, tile_max, 2.0**-12, 2.0**-12)
    yield "backward, head filter", partial(backward, operands, by_logp, filters, plain, head)
    through = Upstream(row, row, row)
    yield (
        "backward, everything",
        partial(backward, full, through, saved(row, None, 0.0, 0.0), capped, every),
    )


def kl_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    """Calls of linear_kl with one head and with two, with every flag between them."""
    meta = {"device": "meta"}
    hidden, weight = torch.empty(T, H, dtype=dtype, **meta), torch.empty(V, H, dtype=dtype, **meta)
    targets, row = torch.empty(T, dtype=torch.int64, **meta), torch.empty(T, **meta)
    bias = torch.empty(V, dtype=dtype, **meta)
    low = torch.empty(T, RANK, **meta), torch.empty(V, RANK, dtype=dtype, **meta)
    plain, capped = Transform(1.0, None, 1.0), Transform(1.2, 30.0, 0.7)
    one, other = Operands(hidden, weight, targets), Operands(hidden, torch.empty_like(weight), targets)
    odd = Operands(hidden[:, :-1], weight[:, :-1], targets)  # rows no descriptor can read
    full = one._replace(bias=bias, low_hidden=low[0], low_weight=low[1])
    basic = frozenset({"logp", "ref_logp", "lse", "ref_lse", "kl"})
    every = basic | {"entropy", "mean_logit", "is_top1"}
    forward, backward = linear_kl.forward, linear_kl.backward
    same, apart = Transforms(plain, plain), Transforms(capped, capped)
    yield "kl forward", partial(forward, one, one, same, basic)
    yield "kl forward, two heads", partial(forward, one, other, same, basic)
    yield "kl forward, pointers", partial(forward, odd, odd, same, basic)
    yield "kl forward, every output", partial(forward, full, full, apart, every)
    through, saved = KLUpstream(None, None, None, row), KLSaved(row, row, row, row)
    head = frozenset({"hidden", "weight"})
    yield "kl backward", partial(backward, one, one, through, saved, same, head)
    yield "kl backward, two heads", partial(backward, one, other, through, saved, same, head)
    yield "kl backward, pointers", partial(backward, odd, odd, through, saved, same, head)
    everything = frozenset({"hidden", "weight", "bias", "low_hidden", "low_weight"})
    through = KLUpstream(row, row, row, row)
    yield "kl backward, everything", partial(backward, full, full, through, saved, apart, everything)


def sequence_calls() -> Iterator[tuple[str, Callable]]:
    """Calls of sequence_loss, whose kernels have one dtype, that cover every method, weighting and kind of argument."""
    win, decision = ("tversky-kahneman", "prelec")
    forms = {
        "kto": Form("kto", None, None),
        "apo_zero": Form("apo_zero", None, None),
        "bco": Form("bco", None, None),
        "enhanced": Form("enhanced_kto", None, None),
        "enhanced, weightings": Form("enhanced_kto", win, decision),
        "enhanced, the other weightings": Form("enhanced_kto", decision, win),
    }
    meta = {"device": "meta"}
    settings = dict.fromkeys(Parameters._fields, 0.5)
    for name, form in forms.items():
        for plain in (False, True):
            numbers = settings if plain else settings | {t: torch.empty((), **meta) for t in TENSORS}
            offsets = torch.empty(SEQUENCES + 1, dtype=torch.int32 if plain else torch.int64, **meta)
            lengths = None if plain else torch.empty(SEQUENCES, dtype=torch.int64, **meta)
            yield (
                f"{name}, {'numbers' if plain else 'tensors'}",
                partial(_sequence_call, offsets, lengths, form, Parameters(**numbers)),
            )


def _sequence_call(offsets: Tensor, lengths: Tensor | None, form: Form, parameters: Parameters):
    rows = torch.empty(SEQUENCES, device="meta")
    logp = torch.empty(T, device="meta")
    out = sequence_loss.forward(logp, offsets, rows, rows.bool(), lengths, form, parameters)
    sequence_loss.backward(rows, rows, offsets, out[-1], T)


def argument_type(value) -> str:
    """How the compiler writes the type of an argument; as the launcher would specialise it."""
    if value is None or (type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, TensorDescriptor):
        block = ",".join(map(str, value.block_shape))
        return f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
    return f"*{TYPES[value.dtype]}"


def aligned(value) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return type(value) is int and value % 16 == 0 and value != 1


def source_of(launch: Launch) -> tuple[ASTSource, str]:
    """What to compile, and a key that tells different kernels apart."""
    signature, constexprs, attrs = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        signature[parameter.name] = "constexpr" if parameter.is_constexpr else argument_type(value)
        if signature[parameter.name] == "constexpr":
            constexprs[(i,)] = value
        elif aligned(value):
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    names = {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr}
    key = json.dumps([signature, names, sorted(attrs)], default=str)
    return source, key


def compile_launch(launch: Launch, arch: int, dtype: str, names: list[str]) -> Compiled:
    source, _ = source_of(launch)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    flags = [
        name if value is True else f"{name}={value}"
        for name, value in launch.arguments.items()
        if name.isupper() and value not in (False, 0, None) and name not in ("T", "V", "M", "N", "K")
    ]
    return Compiled(
        arch=arch,
        dtype=dtype,
        kernel=launch.kernel.__name__,
        flags=" ".join(flags),
        warps=launch.num_warps,
        stages=launch.num_stages,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spill_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared_bytes=kernel.metadata.shared,
        matrix_instructions=len(re.findall(MATRIX, kernel.asm["ptx"])),
        needs_matrix="tt.dot" in kernel.asm["ttir"],
        calls="; ".join(names),
    )


def compile_all(arch: int, dtype: str) -> list[Compiled]:
    """Every kernel that the cases launch, each once."""
    jobs: dict[tuple, tuple[Launch, list[str]]] = {}
    own = calls(DTYPES[dtype]), kl_calls(DTYPES[dtype])
    cases = itertools.chain(*own, sequence_calls() if dtype == "fp32" else ())
    for name, call in cases:
        with backend_triton_choices.pretending(TARGETS[arch]), recording() as launches:
            call()
        for launch in launches:
            key = (launch.kernel.__name__, source_of(launch)[1])
            names = jobs.setdefault(key, (launch, []))[1]
            if name not in names:
                names.append(name)
    return [compile_launch(launch, arch, dtype, names) for launch, names in jobs.values()]


def report(archs: list[int], dtypes: list[str]) -> list[Compiled]:
    """One process for each architecture and dtype, as many at a time as there are cores."""
    pairs = [(arch, dtype) for arch in archs for dtype in dtypes]
    if len(pairs) == 1:
        return compile_all(*pairs[0])
    with ProcessPoolExecutor(min(len(pairs), os.cpu_count() or 1), get_context("spawn")) as pool:
        return [row for rows in pool.map(compile_all, *zip(*pairs, strict=True)) for row in rows]


def table(rows: list[Compiled]) -> str:
    lines = [
        "| sm | dtype | kernel | cases | warps | stages | registers | spills, bytes | shared, bytes | "
        "matrix instructions |",
        "|--:|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r.arch} | {r.dtype} | {r.kernel} | {r.calls} | {r.warps} | {r.stages} | {r.registers} | "
        f"{r.spill_bytes} | {r.shared_bytes} | {r.matrix_instructions} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    rows = report(options.arch, options.dtype)
    print("\n".join(json.dumps(asdict(row)) for row in rows) if options.json else table(rows))


if __name__ == "__main__":
    main()
