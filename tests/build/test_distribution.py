"""What is installed from an sdist or a wheel: complete, built at its first use, and the numbers of the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from prefopt_kernels.ops import _extension, _sources
from support.trees import ROOT, copy_of_the_tree, tree_with_stand_in

needs_compiler = pytest.mark.skipif(
    _sources.why_not_compile() is not None, reason=f"cannot compile: {_sources.why_not_compile()}"
)
OP_TESTS = ("linear_logprob_layouts.py::test_targets_of_both_dtypes", "sequence_loss_policy.py")
INFO = [sys.executable, "-m", "prefopt_kernels.info", "--build"]


def run(command: list, where: Path, **variables: str) -> subprocess.CompletedProcess:
    """Outside of every checkout, with the packages of ``where / "site"`` first."""
    environment = {name: value for name, value in os.environ.items() if name != "PREFOPT_BUILD"}
    environment |= {
        "PYTHONPATH": str(where / "site"),
        "TORCH_EXTENSIONS_DIR": str(where / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, cwd=where, env=environment | variables, capture_output=True, encoding="utf-8")


def setup(tree: Path, command: str) -> Path:
    """What ``setup.py command`` makes without torch, as an isolated build does."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", command],
        cwd=tree,
        env=os.environ | {"PREFOPT_BUILD": "none"},
        capture_output=True,
        check=True,
    )
    (made,) = (tree / "dist").iterdir()
    return made


@needs_compiler
@pytest.mark.slow
def test_a_wheel_that_was_made_without_torch_builds_its_kernels_once(tmp_path):
    with zipfile.ZipFile(setup(tree_with_stand_in(tmp_path, "first use"), "bdist_wheel")) as wheel:
        wheel.extractall(tmp_path / "site")
    refused = run(INFO, tmp_path, CXX="no-such-compiler")
    assert refused.returncode == 1
    assert refused.stdout.startswith("C++ kernels: no: the installation has none, and it cannot be")
    assert "no C++ compiler: no-such-compiler is not on the PATH" in refused.stdout
    # the environment is not activated: ninja lies beside the interpreter and not on the PATH
    path = os.pathsep.join(str(Path(shutil.which(name)).parent) for name in ("c++", "sh"))
    code = "from prefopt_kernels.ops import _extension as e; print(e.why_not(), e.ops().isa())"
    first = run([sys.executable, "-c", code], tmp_path, PATH=path)
    assert first.stdout == "None first use\n"
    assert first.stderr.count("building the C++ kernels, once") == 1
    second = run([sys.executable, "-c", code], tmp_path)
    assert (second.stdout, second.stderr) == ("None first use\n", "")


@pytest.mark.slow
@pytest.mark.skipif(_extension.why_not() is not None, reason=f"no kernels: {_extension.why_not()}")
def test_an_sdist_is_complete_installs_and_passes_op_tests(tmp_path):
    tree = copy_of_the_tree(tmp_path)
    for name in ("tests", "benchmarks", "docs", "examples"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("MANIFEST.in", "Makefile", "constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tree / name)
    kept = {path.relative_to(tree) for path in tree.rglob("*") if path.is_file()}
    sdist = setup(tree, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (source,) = (tmp_path / "sdist").iterdir()
    assert kept <= {path.relative_to(source) for path in source.rglob("*") if path.is_file()}

    pip = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--no-build-isolation"]
    site = tmp_path / "site"
    installed = run([*pip, "--target", str(site), str(sdist)], tmp_path, PREFOPT_BUILD="none")
    assert installed.returncode == 0, installed.stderr
    assert not list(site.rglob("_C_cpu*"))
    # what its first use would build in minutes, if its sources are those of the checkout
    name = f"prefopt_kernels_cpu_{_sources.digest()[:12]}"
    (tmp_path / "cache" / name).mkdir(parents=True)
    shutil.copy(_extension.library(), tmp_path / "cache" / name / f"{name}.so")
    tests = [f"{source}/tests/ops/test_{name}" for name in OP_TESTS]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not triton",
        "-o",
        f"pythonpath={site} {source / 'tests'}",
    ]
    ran = run([sys.executable, "-m", "pytest", *options, *tests], tmp_path)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout
    ended = run(INFO, tmp_path)
    assert ended.returncode == 0 and str(tmp_path / "cache") in ended.stdout, ended.stdout
