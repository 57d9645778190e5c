"""How the C++ extension is found, loaded, built on the fly and refused."""

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from prefopt_kernels.ops import _extension, _sources
from support.trees import copy_of_the_tree, set_answer, tree_with_stand_in

needs_compiler = pytest.mark.skipif(
    _sources.why_not_compile() is not None, reason=f"cannot compile: {_sources.why_not_compile()}"
)

ASK = """
import torch
from prefopt_kernels.ops import _extension
print(_extension.why_not())
print(_extension.library())
if _extension.why_not() is None:
    print(torch.ops.prefopt_kernels_cpu.isa())
"""

COMPILE = """
import torch
from prefopt_kernels.ops import _extension

@torch.compile(fullgraph=True, backend="eager")
def one_if_loaded():
    return torch.ones(()) if _extension.why_not() is None else torch.zeros(())

print(one_if_loaded().item())
"""


def run(tree: Path, code: str = ASK, **variables: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh process that sees only this tree, with its own cache of extensions."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=surroundings(tree) | variables,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )


def start(tree: Path) -> subprocess.Popen:
    """The same, without waiting for its end, and with a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", ASK],
        cwd=tree,
        env=surroundings(tree),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )


def surroundings(tree: Path) -> dict[str, str]:
    """The environment of such a process."""
    environment = {name: value for name, value in os.environ.items() if name != "PREFOPT_BUILD"}
    return environment | {
        "PYTHONPATH": str(tree),
        "TORCH_EXTENSIONS_DIR": str(tree / "cache"),
        "OMP_NUM_THREADS": "1",
    }


def build(tree: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env=os.environ | {"PREFOPT_BUILD": "cpu"},
        capture_output=True,
        check=True,
    )


@needs_compiler
def test_this_checkout_has_its_cpp_kernels():
    """So that no continuous integration goes green on the plain torch backend alone."""
    if os.environ.get("PREFOPT_BUILD") == "none":
        pytest.skip("PREFOPT_BUILD=none asks for a run without the C++ kernels")
    assert _extension.why_not() is None


@needs_compiler
def test_built_on_the_fly_once_and_again_after_a_change(tmp_path):
    tree = tree_with_stand_in(tmp_path, "first")
    first = run(tree)
    reason, library, answer = first.stdout.split("\n")[:3]
    assert (reason, answer) == ("None", "first")
    assert Path(library).is_relative_to(tree / "cache")
    assert "building the C++ kernels" in first.stderr
    again = run(tree, CXX="no-such-compiler")
    assert again.stdout == first.stdout
    assert again.stderr == ""
    set_answer(tree, "second")
    changed = run(tree)
    assert changed.stdout.split("\n")[2] == "second"
    assert "building the C++ kernels" in changed.stderr


@needs_compiler
def test_processes_that_start_together_build_once_and_a_killed_build_is_no_hindrance(tmp_path):
    tree = tree_with_stand_in(tmp_path, "shared")
    started = [start(tree) for _ in range(3)]
    ended = [process.communicate() for process in started]
    assert [out.split("\n")[2] for out, _ in ended] == ["shared"] * 3
    assert sum("building the C++ kernels" in err for _, err in ended) == 1
    set_answer(tree, "after the kill")
    killed = start(tree)
    killed.stderr.readline()  # the announcement: it is compiling
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    library, answer = run(tree).stdout.split("\n")[1:3]
    assert answer == "after the kill"
    assert not [path for path in Path(library).parent.iterdir() if path.is_dir()]
    assert_truncated_is_mended(tree, Path(library), answer)


def assert_truncated_is_mended(tree: Path, library: Path, answer: str) -> None:
    """Cut short in the cache, a library is built again; beside the package, the one in the cache takes its place."""
    size = library.stat().st_size
    for kept in (size - 1, size // 2):
        os.truncate(library, kept)
        assert not _sources.is_whole(library)
    mended = run(tree)
    assert mended.stdout.split("\n")[:3] == ["None", str(library), answer]
    assert "building the C++ kernels" in mended.stderr and library.stat().st_size == size
    installed = tree / "prefopt_kernels" / "_C_cpu.abi3.so"
    installed.write_bytes(library.read_bytes()[: size // 2])
    found = run(tree)
    assert found.stdout.split("\n")[1:3] == [str(library), answer] and found.stderr == ""


@needs_compiler
@pytest.mark.slow
def test_the_installed_library_is_taken_until_its_sources_change(tmp_path):
    tree = tree_with_stand_in(tmp_path, "installed")
    build(tree)
    taken = run(tree)
    assert taken.stdout.split("\n")[1] == str(tree / "prefopt_kernels" / "_C_cpu.abi3.so")
    assert taken.stderr == ""
    set_answer(tree, "changed")
    stale = run(tree)
    assert stale.stdout.split("\n")[2] == "changed"
    assert "was built from other sources" in stale.stderr
    refused = run(tree, PREFOPT_BUILD="none")
    assert "was built from other sources" in refused.stdout
    assert refused.stdout.split("\n")[1] == "None"
    build(tree)
    assert run(tree).stdout.split("\n")[1:3] == [taken.stdout.split("\n")[1], "changed"]
    shutil.rmtree(tree / "csrc")  # as where a wheel was installed
    assert run(tree).stdout.split("\n")[2] == "changed"


@needs_compiler
def test_one_wheel_for_every_python(tmp_path):
    tree = tree_with_stand_in(tmp_path, "from a wheel")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=tree,
        env=os.environ | {"PREFOPT_BUILD": "cpu"},
        capture_output=True,
        check=True,
    )
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.split("-", 2)[2].startswith("cp310-abi3-linux_")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert run(tmp_path / "site").stdout.split("\n")[2] == "from a wheel"


@needs_compiler
@pytest.mark.slow
def test_torch_compile_goes_through_the_first_loading(tmp_path):
    tree = tree_with_stand_in(tmp_path, "x")
    build(tree)
    assert run(tree, COMPILE).stdout == "1.0\n"
    assert run(tree, COMPILE, CXX="no-such-compiler").stdout == "1.0\n"
    set_answer(tree, "y")
    assert run(tree, COMPILE, CXX="no-such-compiler").stdout == "0.0\n"


@needs_compiler
def test_a_build_that_fails_is_a_reason_and_one_warning(tmp_path):
    tree = tree_with_stand_in(tmp_path, "x")
    (tree / "csrc" / "answer.h").write_text("#error the planted error\n", encoding="utf-8")
    failed = run(tree)
    assert "its build failed" in failed.stdout
    assert "the planted error" in failed.stdout.split("\n")[0]
    assert failed.stdout.count("\n") == 2  # the reason is one line
    assert failed.stderr.count("runs without its C++ kernels") == 1


@pytest.mark.parametrize("content", [b"no library", b"\x7fELF" + bytes(59) + b"\x01" + bytes(9000)])
def test_a_library_that_does_not_load_is_a_reason(tmp_path, content):
    tree = copy_of_the_tree(tmp_path)
    shutil.rmtree(tree / "csrc")
    (tree / "prefopt_kernels" / "_C_cpu.abi3.so").write_bytes(content)
    reason, library = run(tree).stdout.split("\n")[:2]
    said = "does not load" if content.startswith(b"\x7fELF") else "_C_cpu.abi3.so is incomplete"
    assert said in reason and library == "None"


@pytest.mark.parametrize(
    ("variables", "reason", "warned"),
    [
        ({"PREFOPT_BUILD": "none"}, "PREFOPT_BUILD=none", False),
        ({"PREFOPT_BUILD": "maybe"}, "PREFOPT_BUILD='maybe' is not one of", True),
        ({"CXX": "no-such-compiler"}, "no C++ compiler: no-such-compiler", True),
    ],
)
def test_what_cannot_be_built_is_a_reason(tmp_path, variables, reason, warned):
    told = run(copy_of_the_tree(tmp_path), **variables)
    assert reason in told.stdout
    assert told.stderr.count("runs without its C++ kernels") == warned


def test_the_import_loads_nothing(tmp_path):
    code = "import prefopt_kernels\nfrom prefopt_kernels.ops import _extension\nprint(_extension._tried)"
    told = run(copy_of_the_tree(tmp_path), code)
    assert (told.stdout, told.stderr) == ("False\n", "")


def test_the_library_needs_no_symbol_outside_the_stable_abi():
    """C++ names of torch (at::, c10::, torch::) change between versions; the stable ABI is plain C."""
    if _extension.why_not() is not None or shutil.which("nm") is None:
        pytest.skip("needs the C++ kernels and binutils' nm")
    command = ["nm", "--dynamic", "--undefined-only", _extension.library()]
    symbols = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    names = [line.split()[-1].split("@")[0] for line in symbols.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert [
        name for name in names if name.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch", "_ZNK2at", "_ZNK3c10", "Py"))
    ] == []
