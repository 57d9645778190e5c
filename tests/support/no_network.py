"""Run by test_offline.py in a fresh process: every command on a local model and local rows, with the network taken
away.

The Hugging Face libraries read their offline switches when they are imported, and tests/conftest.py sets those; here
they are unset. Prints one JSON object as its last line: the exit code of each command, and the connections that were
tried.
"""

import io
import json
import os
import socket
import sys
from pathlib import Path

TRIED: list[str] = []


def _refuse(name: str):
    def refused(*arguments, **options):
        TRIED.append(f"{name} {arguments[-2:]}")
        raise OSError(f"{name} was called, and there is no network")

    return refused


if __name__ == "__main__":  # pytest imports this file too, to look for doctests
    socket.getaddrinfo = _refuse("getaddrinfo")
    for method in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, method, _refuse(method))

from prefopt.cli import main  # noqa: E402  (without network from here on)


def _inputs() -> None:
    """``base`` and ``rows.jsonl`` in the current folder, under names that could be the hub's."""
    from prefopt.demo.tiny.families import family_of, save_tiny
    from support.tiny_models import make_rows

    rows = make_rows(True)
    texts = [message["content"] for row in rows for message in row["prompt"] + row["completion"]]
    save_tiny(family_of("Qwen/Qwen3-0.6B"), texts, Path("base"), seed=0)
    with open("rows.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    options = {"max_steps": 2, "logging_steps": 1, "use_cpu": True, "save_strategy": "steps"}
    recipe = {
        "model": {"path": "base"},
        "data": {"path": "rows.jsonl", "eval_fraction": 0.3},
        "lora": {"r": 2},
        "training": {"output_dir": "run", "save_steps": 2, **options},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")


def _kernel_is_local() -> None:
    """bitsandbytes asks for its kernel when it is imported, but only on CPUs with AVX512-BF16; so ask as it would."""
    import bitsandbytes.backends.cpu.ops as ops
    from kernels import get_kernel

    from prefopt.cli.arguments import BNB_KERNEL

    assert f'"{BNB_KERNEL}"' in Path(ops.__file__).read_text(encoding="utf-8")
    try:
        get_kernel(BNB_KERNEL, version=1)
    except FileNotFoundError:
        return
    raise AssertionError("the kernel was found")


def run(quantized: bool) -> dict:
    """{command: exit code}"""
    changes = ["--model.quantization", "nf4"] if quantized else []
    commands = [
        ["train", "recipe.yaml", *changes],
        ["eval", "run", "--suite", "preference", "--limit", "4"],
        ["chat", "run", "--max-new-tokens", "2", "--device", "cpu"],
        ["export", "run", "--format", "merged"],
        ["report", "run"],
    ]
    codes = {}
    for words in commands:
        sys.stdin = io.StringIO("Hello\n/quit\n" if words[0] == "chat" else "")
        codes[words[0]] = main(words)
    return codes


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    _inputs()
    codes = run(quantized="nf4" in sys.argv)
    if "kernels" in sys.argv:
        _kernel_is_local()
    print(json.dumps({"codes": codes, "tried": TRIED}))
