"""Export of the package for Hugging Face ``kernels``, which loads it from the Hub or from disk.

    python -m prefopt_kernels.integrations.hub_kernels OUT

writes OUT/build with the variants ``torch-cpu`` and ``torch-cuda``: the reference in torch and the Triton kernels,
without the C++ kernels. Each is a copy of this package without the integrations, with relative imports and a namespace
of its own for torch's custom ops, so that a process can load several versions and an installed prefopt_kernels.

The layout is that of kernels 0.17.2: a metadata.json in each variant, and a build.toml.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from prefopt_kernels.ops import _sources

PACKAGE = "prefopt_kernels"
EXCLUDED = ("integrations", "info.py")
LAYERS = "hub_layers.py"  # named layers.py in the copy
NAMESPACE = f"{PACKAGE}::"  # of the custom ops
VARIANTS = {"torch-cpu": "cpu", "torch-cuda": "cuda"}  # and their device types
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
        folder: a new or an empty folder; written atomically.
        name: name of the kernel: lower-case letters, digits and dashes.
        version: version of the kernel, 1 or above.

    Returns:
        list[str]: the variants that were written.

    Raises:
        ValueError: ``kernels`` does not accept the name or the version.
        FileExistsError: the folder is not empty.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     variants = export(f"{folder}/kernel")
        >>> variants
        ['torch-cpu', 'torch-cuda']
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ValueError(f"name is {name!r}; expected lower-case letters, digits and dashes")
    if version < 1:
        raise ValueError(f"version is {version}; expected 1 or above")
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; expected a new or an empty folder")
    trees = {path: ast.parse(path.read_text(encoding="utf-8"), path) for path in _python_files()}
    digest = hashlib.sha1("".join(map(ast.dump, trees.values())).encode(), usedforsecurity=False).hexdigest()[:8]

    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(folder)
    prefix = f".{folder.name}.export-{os.getpid()}-"
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as unfinished:
        made = Path(unfinished) / "kernel"
        for variant, device in VARIANTS.items():
            inside = made / "build" / variant
            module = f"_{name.replace('-', '_')}_{version}_{variant.replace('-', '_')}_{digest}"
            for path, tree in trees.items():
                target = inside / _target(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(_relocated(path, tree, module), encoding="utf-8")
            metadata = {
                "id": module,
                "name": name,
                "version": version,
                "license": "Apache-2.0",
                "python-depends": [],
                "backend": {"type": device},
            }
            text = json.dumps(metadata, indent=2) + "\n"
            (inside / "metadata.json").write_text(text, encoding="utf-8")
        build = BUILD.format(name=name, version=version)
        (made / "build.toml").write_text(build, encoding="utf-8")
        made.replace(folder)
    return list(VARIANTS)


def _remove_unfinished(folder: Path) -> None:
    """Remove unfinished exports to ``folder`` left by killed processes."""
    for left in folder.parent.glob(f".{folder.name}.export-*-*"):
        pid = left.name.split("-")[-2]
        try:
            os.kill(int(pid), 0)  # signal 0 only checks, on POSIX
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (OSError, ValueError):  # another user's process, or an unrelated name
            pass


def _python_files() -> list[Path]:
    """The files of the package, with the layers in place of the integrations."""
    root = _sources.PACKAGE
    files = [path for path in sorted(root.rglob("*.py")) if path.relative_to(root).parts[0] not in EXCLUDED]
    return [*files, root / "integrations" / LAYERS]


def _target(path: Path) -> Path:
    return Path("layers.py") if path.name == LAYERS else path.relative_to(_sources.PACKAGE)


class _Relocation(ast.NodeTransformer):
    """Rewrites a file ``depth`` folders below the package to relative imports and the op namespace ``module``."""

    def __init__(self, path: Path, depth: int, module: str):
        self.path, self.depth, self.module = path, depth, module

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        first, _, rest = (node.module or "").partition(".")
        if first == PACKAGE and node.level == 0:
            return ast.ImportFrom(rest or None, node.names, level=self.depth + 1)
        return node

    def visit_Import(self, node: ast.Import) -> ast.Import:
        if any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
            raise RuntimeError(
                f"{self.path} line {node.lineno} imports the package by its name; expected from ... import"
            )
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if isinstance(node.value, str) and node.value.startswith(NAMESPACE):
            return ast.Constant(f"{self.module}::{node.value.removeprefix(NAMESPACE)}")
        return node


def _relocated(path: Path, tree: ast.Module, module: str) -> str:
    """The source of the copy.

    >>> path = _sources.PACKAGE / "ops" / "linear_logprob" / "op.py"
    >>> code = _relocated(path, ast.parse(path.read_text(encoding="utf-8")), "_copy")
    >>> "from ...ops.linear_logprob" in code, "_copy::linear_logprob" in code, "prefopt_kernels::" in code
    (True, True, False)
    """
    depth = len(_target(path).parts) - 1
    copy = _Relocation(path, depth, module).visit(ast.parse(ast.unparse(tree)))
    if path == _sources.PACKAGE / "__init__.py":
        copy.body.append(ast.ImportFrom(None, [ast.alias("layers")], level=1))  # ``kernelize`` reads it
    return ast.unparse(ast.fix_missing_locations(copy)) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {PACKAGE}.integrations.hub_kernels",
        description="Write the package in the layout of Hugging Face kernels.",
    )
    parser.add_argument("out", metavar="OUT", help="a new or empty folder")
    parser.add_argument("--name", default="prefopt-kernels", help="name of the kernel (default: %(default)s)")
    parser.add_argument("--version", type=int, default=1, help="version of the kernel (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        variants = export(options.out, name=options.name, version=options.version)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for variant in variants:
        print(f"{options.out}/build/{variant}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
