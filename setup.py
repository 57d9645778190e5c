"""What the distribution is called, needs and builds.

PREFOPT_BUILD controls the extension: ``auto`` builds the C++ kernels if a compiler and torch are found, ``none``
builds nothing, ``cpu`` builds or fails. Kernels that are not built here are built at their first use, from the copy of
csrc/ in the package.
"""

import importlib.util
import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (ROOT / "prefopt_kernels" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
).group(1)

NEEDED = ["torch>=2.10", "ninja>=1.11", "setuptools>=77"]  # the last two build the kernels
TRAIN = [
    *("transformers>=5,<6", "peft>=0.18", "datasets>=4", "accelerate>=1.10", "safetensors>=0.6"),
    *("filelock>=3.20", "huggingface_hub>=1", "jinja2>=3.1", "matplotlib>=3.11", "psutil>=7", "pyyaml>=6"),
]
EXPORT, QUANT = ["gguf>=0.19,<1"], ["bitsandbytes>=0.50,<1"]
# Pinned, because its task definitions determine the scores. Not in constraints.txt: its dependency typepy needs an
# older python-dateutil than the one pinned there.
EVAL = ["lm-eval==0.4.13"]
TEST = [
    *("pytest>=8", "pytest-xdist>=3.8", "hypothesis>=6"),
    *("trl==1.16.0", "liger-kernel==0.8.5", "kernels==0.17.2", "deepspeed==0.19.8"),
    *("pytorch-lightning>=2.6,<3", *EXPORT, *QUANT),
]
DEV = ["ruff>=0.14", "mypy>=2", "clang-format==23.1.5", "pre-commit>=4"]
EXTRAS = dict(train=TRAIN, export=EXPORT, quant=QUANT, eval=EVAL, test=TEST, dev=DEV)


def _load_sources():
    """prefopt_kernels/ops/_sources.py by its path: the package itself needs torch."""
    path = ROOT / "prefopt_kernels" / "ops" / "_sources.py"
    spec = importlib.util.spec_from_file_location("_sources", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOURCES = _load_sources()


def why_no_cpu_build() -> str | None:
    """Why the C++ kernels cannot be built here; None where they can."""
    reason = SOURCES.why_not_compile()
    if reason is None and importlib.util.find_spec("torch") is None:
        reason = "torch is not in the environment that builds (that needs pip's --no-build-isolation)"
    return reason


def decide(choice: str) -> bool:
    """Whether to build the C++ kernels; prints the decision, and exits if ``cpu`` cannot be built."""
    reason = "PREFOPT_BUILD=none" if choice == "none" else why_no_cpu_build()
    if reason is None:
        print(f"prefopt_kernels: builds the C++ kernels from {len(SOURCES.sources())} sources", flush=True)
    elif choice == "cpu":
        raise SystemExit(f"PREFOPT_BUILD=cpu: {reason}")
    else:
        print(f"prefopt_kernels: leaves the C++ kernels to their first use: {reason}", flush=True)
    return reason is None


def extension_arguments() -> dict:
    """The arguments of ``setup`` that build the C++ kernels."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    os.environ.setdefault("CXX", "c++")  # the compiler that was looked for is the one that is used
    inside = [path.relative_to(ROOT).as_posix() for path in SOURCES.sources()]
    headers = [path.relative_to(ROOT).as_posix() for path in sorted(SOURCES.CSRC.glob("**/*.h"))]
    extension = CppExtension(
        "prefopt_kernels._C_cpu",
        inside,
        depends=[*headers, "prefopt_kernels/ops/_sources.py"],
        include_dirs=[str(SOURCES.CSRC)],
        extra_compile_args=list(SOURCES.CXX_FLAGS),
        extra_link_args=SOURCES.link_flags(),
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def main() -> None:
    """Calls ``setup``."""
    try:
        choice = SOURCES.build_choice()
    except ValueError as error:
        raise SystemExit(str(error)) from None
    data = ["py.typed", "**/*.j2", "**/*.yaml", "**/*.json", "**/*.jsonl", "**/*.html", "**/*.css", "**/*.md"]
    setup(
        name="prefopt-kernels",
        version=VERSION,
        description="Fused log-probabilities and preference losses for PyTorch, with a trainer",
        long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        license_expression="Apache-2.0",
        license_files=["LICENSE"],
        python_requires=">=3.11",
        install_requires=NEEDED,
        extras_require=EXTRAS,
        packages=[
            *find_packages(".", include=["prefopt_kernels*"]),
            *find_packages("python"),
            "prefopt_kernels.csrc",
        ],
        package_dir={
            "prefopt_kernels": "prefopt_kernels",
            "prefopt_kernels.csrc": "csrc",
            "prefopt": "python/prefopt",
        },
        package_data={
            "prefopt_kernels": data,
            "prefopt_kernels.csrc": ["**/*.cpp", "**/*.h"],
            "prefopt": data,
        },
        entry_points={"console_scripts": ["prefopt = prefopt.cli:main"]},
        **(extension_arguments() if decide(choice) else {}),
    )


if __name__ == "__main__":
    main()
