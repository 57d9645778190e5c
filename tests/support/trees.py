"""Copies of the source tree, to build in without touching the one under test."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A C++ extension of one function, compiled in a second: what is tested is how it is built and found.
STAND_IN = """
#include <torch/csrc/stable/library.h>
#include <string>
#include "answer.h"
std::string isa() { return ANSWER; }
STABLE_TORCH_LIBRARY(prefopt_kernels_cpu, m) { m.def("isa() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(prefopt_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
}
"""


def copy_of_the_tree(folder: Path) -> Path:
    """The files that setup.py needs, without anything built."""
    tree = folder / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("prefopt_kernels", "python", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    return tree


def tree_with_stand_in(folder: Path, answer: str) -> Path:
    """The same with an extension of one function that returns ``answer``."""
    tree = copy_of_the_tree(folder)
    shutil.rmtree(tree / "csrc")
    (tree / "csrc" / "part").mkdir(parents=True)
    (tree / "csrc" / "part" / "registration.cpp").write_text(STAND_IN, encoding="utf-8")
    set_answer(tree, answer)
    return tree


def set_answer(tree: Path, answer: str) -> None:
    """Changes a header only."""
    (tree / "csrc" / "answer.h").write_text(f'#define ANSWER "{answer}"\n', encoding="utf-8")
