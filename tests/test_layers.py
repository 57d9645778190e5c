"""Who may import whom (the rules stand in CONTRIBUTING.md), read from the sources without importing them."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"prefopt_kernels": ROOT, "prefopt": ROOT / "python"}

# What each part of prefopt_kernels may import of ours, by the first name below the package.
BELOW_MODULES = {"ops", "losses", "reference_point"}
KERNELS_MAY = {
    "_backends": set(),
    "ops": {"ops", "_backends", "losses"},  # losses: the reference writes none twice
    "losses": {"losses"},
    "reference_point": {"reference_point"},
    "parallel": {"parallel", "ops"},
    "chunked": {"ops"},  # parts of modules, in files of their own
    "_packed": set(),
    "modules": {"chunked", "_packed", "parallel"} | BELOW_MODULES,
    "integrations": {"modules", "parallel", "integrations"} | BELOW_MODULES,
    "info": {"", "ops"},  # a program, imported by nobody
    "": {"modules", "parallel"} | BELOW_MODULES,  # __init__.py: the public names
}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> list[tuple[str, bool, int]]:
    """Every imported module as (name, at the top level of the file?, line)."""
    top = set(map(id, ast.iter_child_nodes(tree)))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append(("." * node.level, id(node) in top, node.lineno))
            elif node.module in ("prefopt_kernels", "prefopt_kernels.ops", "prefopt"):
                # `from package import name`: the name may be a module, so it is part of what is imported
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found += [(name, id(node) in top, node.lineno) for name in names]
            else:
                found.append((node.module, id(node) in top, node.lineno))
    return found


def part(module: str) -> str:
    """The part of prefopt_kernels a dotted name belongs to; "" for the package's own public names."""
    name = (module.split(".") + [""])[1]
    return name if name in KERNELS_MAY else ""


def violations(module: str, source: str) -> list[str]:
    """One sentence per import that the rules forbid."""
    found = []
    package = module.split(".")[0]
    here = part(module)
    for name, at_top, line in imports(ast.parse(source)):
        where = f"{module} line {line}: imports {name}"
        first = name.split(".")[0]
        if name.startswith("."):
            found.append(f"{module} line {line}: a relative import")
        elif first in ("tests", "benchmarks", "studies"):
            found.append(f"{where}, which no package may")
        elif package == "prefopt_kernels" and first == "prefopt":
            found.append(f"{where}; prefopt imports prefopt_kernels, never the reverse")
        elif package == "prefopt_kernels" and first == "prefopt_kernels":
            if part(name) not in KERNELS_MAY[here]:
                found.append(f"{where}, which {here or '__init__'} may not")
        elif package == "prefopt_kernels" and first not in sys.stdlib_module_names:
            if first == "triton":
                if ".triton_kernels." not in module:
                    found.append(f"{where} outside triton_kernels")
            elif first != "torch":
                if here != "integrations":
                    found.append(f"{where}; only torch, and triton in triton_kernels")
                elif at_top:
                    found.append(f"{where} at the top; integrations import inside functions")
    return found


def sources() -> list[tuple[str, Path]]:
    return [
        (module_name(path, root), path)
        for package, root in PACKAGES.items()
        for path in sorted((root / package).rglob("*.py"))
    ]


def test_every_import_keeps_the_rules():
    assert {module.split(".")[0] for module, _ in sources()} == set(PACKAGES)
    found = [
        sentence for module, path in sources() for sentence in violations(module, path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("prefopt_kernels.losses.kto", "from prefopt_kernels.ops.linear_logprob import op"),
        ("prefopt_kernels.losses.kto", "from prefopt_kernels import ops"),
        ("prefopt_kernels.ops.linear_logprob.op", "import prefopt_kernels.reference_point"),
        ("prefopt_kernels.ops.linear_logprob.op", "from prefopt_kernels import linear_logprob"),
        ("prefopt_kernels.losses.kto", "import prefopt_kernels.reference_point"),
        (
            "prefopt_kernels.reference_point",
            "from prefopt_kernels.modules import FusedLinearKTOLoss",
        ),
        ("prefopt_kernels.modules", "from prefopt_kernels.integrations import trl"),
        ("prefopt_kernels.modules", "def f():\n    import prefopt.train"),
        ("prefopt_kernels.modules", "from . import losses"),
        ("prefopt_kernels.modules", "import numpy"),
        ("prefopt_kernels.modules", "import transformers.modeling_utils"),
        ("prefopt_kernels.ops.linear_logprob.op", "import triton.language as tl"),
        ("prefopt_kernels.integrations.trl", "import trl"),
        ("prefopt.train.trainer", "from tests.support import numerics"),
        ("prefopt.cli", "import benchmarks.cases"),
        ("prefopt.cli", "from studies.bco_stability import grid"),
        ("prefopt_kernels", "from prefopt_kernels.integrations import trl"),
    ],
)
def test_a_planted_violation_is_found(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("prefopt_kernels.ops.linear_logprob.triton_kernels.backend", "import triton"),
        ("prefopt_kernels.ops.sequence_loss.op", "from prefopt_kernels.losses import kto_loss"),
        ("prefopt_kernels.integrations.trl", "def f():\n    import trl"),
        ("prefopt_kernels.modules", "from prefopt_kernels.ops import linear_logprob"),
        ("prefopt_kernels.modules", "import math\nimport torch.nn"),
        ("prefopt_kernels", "from prefopt_kernels.losses import kto_loss"),
        (
            "prefopt.train.trainer",
            "import transformers\nfrom prefopt_kernels import linear_logprob",
        ),
    ],
)
def test_what_is_allowed_is_not_reported(module, source):
    assert violations(module, source) == []
