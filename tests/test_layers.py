"""The layers of both packages (see CONTRIBUTING.md): which module may import which, read from the sources."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"prefopt_kernels": ROOT, "prefopt": ROOT / "python"}

# What each part of prefopt_kernels may import of ours, by the first name below the package.
BELOW_MODULES = {"ops", "losses", "reference_point"}
KERNELS_MAY = {
    "_checks": set(),
    "_backends": {"_checks"},
    "ops": {"ops", "_backends", "_checks", "losses"},  # losses: the reference writes none twice
    "losses": {"losses", "_checks"},
    "reference_point": {"reference_point", "_checks"},
    "parallel": {"parallel", "ops"},
    "chunked": {"ops"},  # parts of modules, in files of their own
    "_packed": {"_checks"},
    "modules": {"chunked", "_packed", "_checks", "parallel"} | BELOW_MODULES,
    "integrations": {"modules", "parallel", "integrations"} | BELOW_MODULES,
    "info": {"", "ops"},  # a program
    "": {"modules", "parallel"} | BELOW_MODULES,  # __init__.py: the public names
}

# The floors of prefopt from the ground up. A part imports the floors below its own; parts of one floor do not import
# each other.
FLOORS = (
    {"errors", "option_values"},
    {"files", "options", "paths", "read_yaml", "redact", ""},  # "": __init__.py, with the version
    {"models"},
    {"runs", "data"},
    {"generation"},  # renders prompts with data.template
    {"train"},
    {"report"},
    {"recipe"},
    {"evaluate", "use", "export", "demo"},
    {"compare"},
    {"cli"},
    {"__main__"},
)
FLOOR = {part: number for number, floor in enumerate(FLOORS) for part in floor}
PUBLIC = {"data", "train"}  # `prefopt/__init__.py` imports their public names on first use
# Exceptions as (importing part, imported part), with the reason.
EXCEPTIONS: dict[tuple[str, str], str] = {}


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
    """The part of its package that a dotted name belongs to; "" for the package's own public names."""
    package, name = (module.split(".") + [""])[:2]
    return name if name in (KERNELS_MAY if package == "prefopt_kernels" else FLOOR) else ""


def climbs(module: str, imported: str) -> bool:
    """Whether an import within prefopt does not go to a lower floor."""
    here, there = part(module), part(imported)
    if here == there or (here == "" and there in PUBLIC) or (here, there) in EXCEPTIONS:
        return False
    return FLOOR[there] >= FLOOR[here]


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
        elif package == first == "prefopt":
            if climbs(module, name):
                found.append(f"{where}, which is not on a lower floor")
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


def test_every_import_follows_the_rules():
    assert {module.split(".")[0] for module, _ in sources()} == set(PACKAGES)
    found = [
        sentence for module, path in sources() for sentence in violations(module, path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_every_part_of_prefopt_is_on_a_floor():
    modules = {(module.split(".") + [""])[1] for module, _ in sources() if module.split(".")[0] == "prefopt"}
    assert modules <= FLOOR.keys()


def test_every_exception_is_needed():
    used = {
        (part(module), part(name))
        for module, path in sources()
        if module.split(".")[0] == "prefopt"
        for name, _, _ in imports(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] == "prefopt"
    }
    unused = EXCEPTIONS.keys() - used
    assert not unused, f"remove from EXCEPTIONS: {unused}"


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
        ("prefopt.errors", "from prefopt.files import temporary"),
        ("prefopt.files", "from prefopt import paths"),
        ("prefopt.models", "from prefopt.data import load_rows"),
        ("prefopt.data.read", "def f():\n    from prefopt.recipe.load import load_recipe"),
        ("prefopt.data.read", "import prefopt.train"),
        ("prefopt.train.trainer", "from prefopt.report.write import write"),
        ("prefopt.report.read", "from prefopt.cli import main"),
        ("prefopt.use.chat", "from prefopt.export.run import export_run"),
        ("prefopt.export.run", "from prefopt import demo"),
        ("prefopt.evaluate.run", "from prefopt.compare.run import compare"),
        ("prefopt.compare.run", "from prefopt.cli.arguments import at_least"),
        ("prefopt", "from prefopt.recipe import load"),
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
        ("prefopt.train.trainer", "import transformers\nfrom prefopt_kernels import linear_logprob"),
        ("prefopt.data.read", "from prefopt.data.rows import show\nfrom prefopt.errors import UserError"),
        ("prefopt.compare.run", "from prefopt.evaluate.run import evaluate"),
        ("prefopt", "def f():\n    from prefopt.data import load_rows"),
        ("prefopt.data.build.run", "import prefopt"),
    ],
)
def test_what_is_allowed_is_not_reported(module, source):
    assert violations(module, source) == []
