"""setup.py: its decisions, what ends up in a wheel, and the pins of constraints.txt."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import prefopt
import prefopt_kernels
from support.trees import ROOT, copy_of_the_tree


@pytest.fixture
def setup_module():
    spec = importlib.util.spec_from_file_location("setup_under_test", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_version():
    assert prefopt.__version__ == prefopt_kernels.__version__


def test_none_builds_nothing(setup_module, capsys):
    assert setup_module.decide("none") is False
    assert capsys.readouterr().out.strip().endswith("to their first use: PREFOPT_BUILD=none")


def test_auto_without_a_compiler_says_so_and_goes_on(setup_module, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    assert setup_module.decide("auto") is False
    assert "no-such-compiler is not on the PATH" in capsys.readouterr().out


def test_cpu_without_a_compiler_stops(setup_module, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="PREFOPT_BUILD=cpu: .*no-such-compiler"):
        setup_module.decide("cpu")


@pytest.mark.parametrize("choice", ["auto", "cpu"])
def test_a_compiler_is_enough(setup_module, monkeypatch, tmp_path, capsys, choice):
    compiler = tmp_path / "a-compiler"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert setup_module.decide(choice) is True
    assert "builds the C++ kernels" in capsys.readouterr().out


def test_an_unknown_choice_is_refused_with_the_list():
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"PREFOPT_BUILD": "yes"},
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 1
    assert run.stderr.strip() == "PREFOPT_BUILD='yes' is not one of auto, none, cpu"


def test_the_decision_needs_no_torch(tmp_path):
    """PREFOPT_BUILD=none and auto work in an environment that has setuptools alone."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('no torch')", encoding="utf-8")
    for choice in ("none", "auto"):
        run = subprocess.run(
            [sys.executable, "setup.py", "--version"],
            cwd=ROOT,
            env=os.environ | {"PREFOPT_BUILD": choice, "CXX": "none", "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            encoding="utf-8",
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1] == prefopt_kernels.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The files of a wheel built without the extension, and its metadata."""
    tree = copy_of_the_tree(tmp_path_factory.mktemp("tree"))
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=tree,
        env=os.environ | {"PREFOPT_BUILD": "none"},
        capture_output=True,
        check=True,
    )
    (built,) = (tree / "dist").glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
        metadata = {name.split("/")[-1]: archive.read(name).decode("utf-8") for name in names if ".dist-info/" in name}
    return names, metadata


def test_every_source_and_data_file_is_in_the_wheel(wheel):
    names, _ = wheel
    for package, root in {"prefopt_kernels": ROOT, "prefopt": ROOT / "python"}.items():
        for path in (root / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
                assert path.relative_to(root).as_posix() in names


def test_the_sources_of_the_kernels_are_in_the_wheel(wheel):
    names, _ = wheel
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    assert {f"prefopt_kernels/{name}" for name in sources} <= names


def test_an_isolated_build_needs_no_torch():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r"^requires = (.+)$", text, re.MULTILINE).group(1) == '["setuptools>=77"]'


def test_nothing_else_is_in_the_wheel(wheel):
    names, _ = wheel
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"prefopt_kernels", "prefopt"}


def test_metadata(wheel):
    _, metadata = wheel
    lines = metadata["METADATA"].splitlines()
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Python: >=3.11" in lines
    for needed in ("torch>=2.10", "ninja>=1.11", "setuptools>=77"):
        assert f"Requires-Dist: {needed}" in lines
    assert {line for line in lines if line.startswith("Provides-Extra")} == {
        f"Provides-Extra: {extra}" for extra in ("train", "export", "quant", "eval", "test", "dev")
    }
    assert "prefopt = prefopt.cli:main" in metadata["entry_points.txt"]
    assert "Apache License" in metadata["LICENSE"]


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]
    assert len({canonicalize_name(pin.name) for pin in found}) == len(found)
    return {canonicalize_name(pin.name): pin for pin in found}


def test_every_pin_is_exact():
    inexact = [name for name, pin in pins().items() if not re.fullmatch(r"==[\w.]+", str(pin.specifier))]
    assert inexact == ["triton"]  # the reason stands in the file


def needed(setup_module) -> set[str]:
    """Every package that the extras pull in here, directly or not."""
    todo = ["wheel", *setup_module.NEEDED]
    todo += [*setup_module.TRAIN, *setup_module.TEST, *setup_module.DEV]
    found: set[str] = set()
    while todo:
        requirement = Requirement(todo.pop())
        for extra in requirement.extras or {""}:
            key = f"{canonicalize_name(requirement.name)}[{extra}]"
            if key in found:
                continue
            found.add(key)
            for line in importlib.metadata.requires(requirement.name) or []:
                below = Requirement(line)
                if below.marker is None or below.marker.evaluate({"extra": extra}):
                    todo.append(line)
    return {key.split("[")[0] for key in found}


def test_every_package_is_pinned(setup_module):
    # torch's builds with CUDA pin their own libraries, exactly
    cuda = re.compile(r"nvidia-|cuda-")
    assert {name for name in needed(setup_module) if not cuda.match(name)} <= set(pins())


def test_nothing_is_pinned_in_vain(setup_module):
    assert set(pins()) <= needed(setup_module)


def test_the_environment_has_the_pinned_torch():
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not the environment that the Makefile made, whose pins this checks")
    version = importlib.metadata.version("torch").split("+")[0]
    assert pins()["torch"].specifier.contains(version)
