"""What the C++ extension is built from, for setup.py and for the build on the fly.

Standard library only: setup.py loads this file by its path, before torch is needed.
"""

import hashlib
import os
import shlex
import shutil
import struct
import sys
from pathlib import Path

BUILD_CHOICES = ("auto", "none", "cpu")  # values of PREFOPT_BUILD

PACKAGE = Path(__file__).resolve().parents[1]
# inside the package where it is installed, beside it in a checkout
CSRC = (PACKAGE if (PACKAGE / "csrc").is_dir() else PACKAGE.parent) / "csrc"

CXX_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    # Stable ABI of torch 2.10: one build serves every later torch. No -march: the kernels name their
    # instruction sets themselves, and the choice is made at run time.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    # GCC 12 takes its own AVX-512 intrinsics for uninitialised; Clang does not know the name.
    "-Wno-maybe-uninitialized",
    "-Wno-unknown-warning-option",
    *shlex.split(os.environ.get("PREFOPT_CXXFLAGS", "")),
)


def sources() -> list[Path]:
    """Every C++ source under csrc/, in a fixed order."""
    return sorted(CSRC.glob("**/*.cpp"))


def digest() -> str:
    """SHA-1 of every source, header and flag: equal digests, the same library."""
    sha = hashlib.sha1("\0".join(CXX_FLAGS).encode(), usedforsecurity=False)
    for path in sorted([*CSRC.glob("**/*.cpp"), *CSRC.glob("**/*.h")]):
        content = path.read_bytes()
        sha.update(f"{path.relative_to(CSRC).as_posix()}\0{len(content)}\0".encode())
        sha.update(content)
    return sha.hexdigest()


def link_flags() -> list[str]:
    """Makes the linker write ``digest()`` into the library, as its build id, for ``is_current``."""
    sanitizers = [flag for flag in CXX_FLAGS if flag.startswith("-fsanitize")]
    return [*(sanitizers or ["-Wl,--strip-all"]), f"-Wl,--build-id=0x{digest()}"]


def is_current(library: Path) -> bool:
    """Whether ``library`` was built from the sources that lie in csrc/ now."""
    return bytes.fromhex(digest()) in library.read_bytes()


def is_whole(library: Path) -> bool:
    """Whether an ELF file reaches its section headers, which are at its end: loading a truncated one can crash."""
    with library.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or not head.startswith(b"\x7fELF"):
        return False
    (offset,), (size, count) = (
        struct.unpack_from("<Q", head, 40),
        struct.unpack_from("<HH", head, 58),
    )
    return library.stat().st_size >= offset + size * count


def build_choice() -> str:
    """The value of PREFOPT_BUILD; ValueError where it is not in BUILD_CHOICES."""
    choice = os.environ.get("PREFOPT_BUILD", "auto")
    if choice not in BUILD_CHOICES:
        raise ValueError(f"PREFOPT_BUILD={choice!r} is not one of {', '.join(BUILD_CHOICES)}")
    return choice


def why_not_compile() -> str | None:
    """Why the C++ sources cannot be compiled on this machine; None where they can."""
    if sys.platform != "linux":
        return f"the C++ kernels are built on Linux only, this is {sys.platform}"
    if not sources():
        return f"there are no C++ sources in {CSRC}"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[:1]
    if not compiler or shutil.which(compiler[0]) is None:
        name = compiler[0] if compiler else "''"
        return f"no C++ compiler: {name} is not on the PATH (set CXX to name another)"
    return None


if __name__ == "__main__":
    print(*CXX_FLAGS)  # for `make lint`
