"""The package as a folder that Hugging Face ``kernels`` loads, from the Hub or from a disk.

    python -m prefopt_kernels.integrations.hub_kernels OUT

writes OUT/build with one folder per variant: ``torch-cpu`` and ``torch-cuda`` are Python alone, the definition in torch
and the Triton kernels; where the C++ kernels are built, a third one for this processor and system carries their library,
which needs nothing of torch but its stable interface. Each is a copy of this package, without the integrations, with
relative imports and with its own names in torch's registries, so that it runs beside an installed prefopt_kernels.

The layout is that of kernels 0.17.2: a metadata.json in each variant, and a build.toml.
"""

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

from prefopt_kernels.ops import _extension, _sources

PACKAGE = "prefopt_kernels"
LEFT_OUT = ("integrations", "info.py")
LAYERS = "hub_layers.py"  # of the integrations; `layers` in the copy
# What is registered with torch under the package's name. The C++ library's is a string inside it, so it is as long.
REGISTERED = {"prefopt_kernels::": "prefopt_hub::", "prefopt_kernels_cpu": "prefopt_kernels_hub"}
BUILD = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[torch-noarch]
"""


def export(folder: str | Path, *, name: str = "prefopt-kernels", version: int = 1) -> list[str]:
    """Write the package in the layout of Hugging Face ``kernels``.

    Args:
        folder: a new or an empty one; written whole or not at all.
        name: of the kernel: lower-case letters, digits and dashes.
        version: of the kernel, 1 or above.

    Returns:
        list[str]: the variants that were written. The one with the C++ kernels is missing where they cannot be loaded;
        ``prefopt_kernels.info`` says why.

    Raises:
        ValueError: a name or a version that ``kernels`` does not take.
        FileExistsError: the folder holds something.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     variants = export(f"{folder}/kernel")
        >>> variants[:2]
        ['torch-cpu', 'torch-cuda']
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ValueError(f"name is {name!r}; expected lower-case letters, digits and dashes")
    if version < 1:
        raise ValueError(f"version is {version}; expected 1 or above")
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something; expected a new or an empty folder")
    files = {path: _rewritten(path) for path in _python_files()}
    variants = {"torch-cpu": "cpu", "torch-cuda": "cuda"}
    library = _renamed_library()
    if library is not None:
        variants[_variant_of_this_machine()] = "cpu"

    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(folder)
    prefix = f".{folder.name}.export-{os.getpid()}-"
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as unfinished:
        made = Path(unfinished) / "kernel"
        for variant, backend in variants.items():
            inside = made / "build" / variant
            with_library = variant not in ("torch-cpu", "torch-cuda")
            _write(inside, files, library if with_library else None)
            digest = hashlib.sha1("".join(files.values()).encode(), usedforsecurity=False)
            metadata = {
                "id": f"_{name.replace('-', '_')}_{version}_{variant.replace('-', '_')}_{digest.hexdigest()[:8]}",
                "name": name,
                "version": version,
                "license": "Apache-2.0",
                "python-depends": [],
                "backend": {"type": backend},
            }
            text = json.dumps(metadata, indent=2) + "\n"
            (inside / "metadata.json").write_text(text, encoding="utf-8")
        build = BUILD.format(name=name, version=version)
        (made / "build.toml").write_text(build, encoding="utf-8")
        made.replace(folder)
    return list(variants)


def _remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed left of their exports to ``folder``."""
    for left in folder.parent.glob(f".{folder.name}.export-*-*"):
        pid = left.name.split("-")[-2]
        try:
            os.kill(int(pid), 0)  # sends nothing, on POSIX
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (OSError, ValueError):  # another user's process; a name of another program
            pass


def _python_files() -> list[Path]:
    """Of the package, with the layers in place of the integrations."""
    root = _sources.PACKAGE
    files = [path for path in sorted(root.rglob("*.py")) if _inside(path)[0] not in LEFT_OUT]
    return [*files, root / "integrations" / LAYERS]


def _inside(path: Path) -> tuple[str, ...]:
    return path.relative_to(_sources.PACKAGE).parts


def _target(path: Path) -> Path:
    return Path("layers.py") if path.name == LAYERS else Path(*_inside(path))


def _rewritten(path: Path) -> str:
    """The source with relative imports and its own names in torch's registries.

    >>> path = _sources.PACKAGE / "ops" / "linear_logprob" / "op.py"
    >>> "from ...ops.linear_logprob" in _rewritten(path), "prefopt_kernels::" in _rewritten(path)
    (True, False)
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    up = "." * len(_target(path).parts)
    for node in ast.walk(ast.parse("".join(lines))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == PACKAGE:
            below = node.module.removeprefix(PACKAGE).removeprefix(".")
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {up}{below} ", 1)
        elif isinstance(node, ast.Import) and any(n.name.startswith(PACKAGE) for n in node.names):
            raise RuntimeError(f"{path} line {node.lineno} imports the package by its name")
    text = "".join(lines)
    for old, new in REGISTERED.items():
        text = text.replace(old, new)
    if path == _sources.PACKAGE / "__init__.py":
        text += "\nfrom . import layers as layers  # what `kernelize` looks into\n"
    return text


def _renamed_library() -> bytes | None:
    """The loaded C++ library under its other name; None where there is none."""
    if _extension.why_not() is not None:
        return None
    old, new = (b"\0%b\0" % each.encode() for each in list(REGISTERED.items())[1])
    content = _extension.library().read_bytes()
    if content.count(old) != 1:
        raise RuntimeError(f"{_extension.library()} names {old!r} {content.count(old)} times; expected once")
    return content.replace(old, new)


def _variant_of_this_machine() -> str:
    """As ``kernels`` calls it: the oldest stable interface of torch that the library runs with, and the machine."""
    (flag,) = [flag for flag in _sources.CXX_FLAGS if "TORCH_TARGET_VERSION" in flag]
    target = int(flag.split("=")[1], 16)
    torch = f"{target >> 56}{target >> 48 & 255}"
    return f"torch-stable-abi{torch}-cpu-{platform.machine()}-{platform.system().lower()}"


def _write(folder: Path, files: dict[Path, str], library: bytes | None) -> None:
    for path, text in files.items():
        target = folder / _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    if library is not None:
        (folder / "_C_cpu.abi3.so").write_bytes(library)


def main(words: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {PACKAGE}.integrations.hub_kernels",
        description="Write the package in the layout of Hugging Face kernels.",
    )
    parser.add_argument("out", metavar="OUT", help="a new or an empty folder")
    parser.add_argument("--name", default="prefopt-kernels", help="of the kernel")
    parser.add_argument("--version", type=int, default=1, help="of the kernel")
    given = parser.parse_args(words)
    try:
        variants = export(given.out, name=given.name, version=given.version)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for variant in variants:
        print(f"{given.out}/build/{variant}")
    if len(variants) == 2:
        print(f"without the C++ kernels: {_extension.why_not()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
