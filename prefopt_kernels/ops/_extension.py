"""Finds the C++ extension and loads it at its first use.

The installed library is used if it was built from the present sources. If it is missing or was built from other
sources, it is built at the first use into torch's cache of extensions.
"""

import contextlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from prefopt_kernels.ops import _sources

_lock = threading.Lock()
_tried = False
_reason: str | None = None
_library: Path | None = None


def why_not() -> str | None:
    """Why the C++ kernels cannot be used; None where they are loaded (this call loads them).

    >>> reason = why_not()
    >>> reason is None or isinstance(reason, str)
    True
    """
    if not _tried:
        _load_once()
    return _reason


# torch.compile calls it without tracing: a trace of the first load would not be valid later. This is the mark of
# torch.compiler.assume_constant_result, which would import torch._dynamo at every start.
setattr(why_not, "_dynamo_marked_constant", True)  # noqa: B010 (a function has no such attribute)


def ops() -> Any:
    """The ops of the C++ kernels, loaded by this call if need be: an exported graph selects no backend.

    Raises:
        RuntimeError: they cannot be loaded.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"backend 'cpu' cannot run this call: {reason}")
    return torch.ops.prefopt_kernels_cpu


def library() -> Path | None:
    """The shared library that ``why_not`` loaded, if it did."""
    return _library


def installed_library() -> Path | None:
    """The library that the installation left beside the package, current or not."""
    return next(iter(sorted(_sources.PACKAGE.glob("_C_cpu*.so"))), None)


def _load_once() -> None:
    global _tried, _reason, _library
    with _lock:
        if _tried:
            return
        _library, _reason = _find_and_load()
        _tried = True
        expected = _sources.sources() or installed_library()  # an export for Hugging Face kernels has neither
        if _reason is not None and expected and os.environ.get("PREFOPT_BUILD") != "none":
            warnings.warn(f"prefopt_kernels runs without its C++ kernels: {_reason}", stacklevel=3)


def _find_and_load() -> tuple[Path | None, str | None]:
    """The library loaded and None, or None and the reason."""
    if hasattr(torch.ops.prefopt_kernels_cpu, "instruction_sets"):
        # by Hugging Face kernels, in another version: torch aborts the process when a name is registered again
        return None, "another copy of the C++ kernels is loaded in this process"
    installed = installed_library()
    if installed is None:
        missing = "the installation has none"
    elif not _sources.is_whole(installed):
        missing = f"{installed.name} is incomplete"
    elif _sources.sources() and not _sources.is_current(installed):
        missing = f"{installed.name} was built from other sources than csrc/ holds"
    else:
        try:
            torch.ops.load_library(installed)
        except OSError as error:  # built for another torch or another machine
            return None, f"{installed} does not load: {error}"
        return installed, None
    reason = why_not_build()
    if reason is not None:
        # without setuptools torch cannot even name its cache
        may_load = os.environ.get("PREFOPT_BUILD") != "none" and importlib.util.find_spec("setuptools")
        if may_load and _loads(built := _cached()):  # which needs no compiler
            return built, None
        return None, f"{missing}, and it cannot be built now: {reason}"
    try:
        return _build(missing), None
    except (RuntimeError, OSError) as error:
        return None, f"{missing}, and its build failed (`make build` shows all): {_first(error)}"


def _first(error: Exception) -> str:
    """The compiler's first error out of the whole log that torch puts into its exception."""
    lines = str(error).splitlines()
    return next((line for line in lines if "error:" in line), lines[0])


def why_not_build() -> str | None:
    """Why the library cannot be built on the fly; None where it can."""
    try:
        choice = _sources.build_choice()
    except ValueError as error:
        return str(error)
    if choice == "none":
        return "PREFOPT_BUILD=none"
    reason = _sources.why_not_compile()
    if reason is not None:
        return reason
    if importlib.util.find_spec("setuptools") is None:
        return "torch needs setuptools for it, which is not installed"
    from torch.utils.cpp_extension import is_ninja_available

    with _scripts_on_path():
        return None if is_ninja_available() else "ninja is not installed (pip install ninja)"


def _cached() -> Path:
    """Where the library for these sources is, or will be, in torch's cache of extensions."""
    from torch.utils.cpp_extension import get_default_build_root

    name = f"prefopt_kernels_cpu_{_sources.digest()[:12]}"
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(cache) / name / f"{name}.so"


def _loads(built: Path) -> bool:
    """Load a library of the cache; False where it is missing, incomplete, or does not load."""
    if not built.is_file() or not _sources.is_whole(built):
        return False
    try:
        torch.ops.load_library(built)
    except OSError:
        return False
    return True


def _build(missing: str) -> Path:
    """Compile csrc/ into torch's cache, one folder per version of the sources, and load it.

    Of several processes one compiles and the others wait. It compiles in a temporary folder and moves the finished
    library out of it, so that a killed build leaves neither an incomplete library nor a lock.
    """
    from torch.utils import cpp_extension

    built = _cached()
    folder = built.parent
    folder.mkdir(parents=True, exist_ok=True)
    with _only_process(folder / "building"), _scripts_on_path():
        for left in folder.iterdir():
            if left.is_dir():  # of a build that was killed
                shutil.rmtree(left, ignore_errors=True)
        if _loads(built):
            return built
        print(
            f"prefopt_kernels: building the C++ kernels, once, because {missing}: in {folder}",
            file=sys.stderr,
            flush=True,
        )
        with tempfile.TemporaryDirectory(dir=folder) as work:
            cpp_extension.load(
                built.stem,
                [str(path) for path in _sources.sources()],
                extra_cflags=list(_sources.CXX_FLAGS),
                extra_ldflags=_sources.link_flags(),
                extra_include_paths=[str(_sources.CSRC)],
                build_directory=work,
                is_python_module=False,
            )
            os.replace(Path(work) / built.name, built)
    return built


@contextlib.contextmanager
def _scripts_on_path() -> Iterator[None]:
    """torch starts ``ninja`` by its name, which an environment that is not activated does not have on the PATH."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{before}{os.pathsep}{sysconfig.get_path('scripts')}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextlib.contextmanager
def _only_process(path: Path) -> Iterator[None]:
    """Waits until no other process is inside; the system ends the wait when that process dies."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
