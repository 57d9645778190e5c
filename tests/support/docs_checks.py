"""What test_docs.py checks: each function lists what in a page of the documentation is not real."""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import re
import shlex
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = "py|md|toml|txt|yaml|yml|json|jsonl|csv|html|cpp|h|cu|png|svg"
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OURS = ("prefopt_kernels", "prefopt")


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Every fenced block as (info string, code)."""
    return [(info.strip(), code) for info, code in FENCE.findall(text)]


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


@cache
def sources() -> dict[Path, str]:
    """Every file of the packages and of the build whose text may read a variable or write a file."""
    folders = ["prefopt_kernels", "python", "benchmarks", "studies"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {p: p.read_text(encoding="utf-8") for p in [*files, ROOT / "setup.py", ROOT / "Makefile"]}


# Paths


def path_problems(text: str, page: Path) -> list[str]:
    """Links and inline paths that lead nowhere."""
    found = []
    prose = FENCE.sub("", text)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if not target.startswith(("http://", "https://")) and not (page.parent / target).exists():
            found.append(f"link to {target}")
    bare = re.sub(r"`[^`\n]*`|\]\([^)]*\)", " ", prose)
    words = [*inline_code(text), *re.findall(rf"[\w./-]+\.(?:{SUFFIXES})\b", bare)]
    for word in words:
        if re.fullmatch(rf"[\w.*/-]*\w\.(?:{SUFFIXES})|[\w.*-]+/[\w.*/-]*", word):
            found += [f"path {word}"] if not path_exists(word, page) else []
    return found


def path_exists(word: str, page: Path) -> bool:
    """A path of the repository; a placeholder (capital letters); or a file that a run writes."""
    first = word.split("/")[0]
    if "/" in word and first.isupper():
        return True  # RUN/report.html
    if re.search(r"\b(?:NAME|RECIPE)\b|_NAME", word):
        return (ROOT / word).parent.is_dir() if "/" in word else True
    if any(ROOT.glob(word)) or any(page.parent.glob(word)):
        return True
    quoted = any(f'"{word}"' in source for source in sources().values())
    if "/" in word:
        return first == "runs" or quoted  # a logged metric
    return quoted or any(word == p.name for folder in (*OURS, "python", "csrc") for p in (ROOT / folder).rglob(word))


# Commands


def command_lines(text: str) -> list[str]:
    """Commands in shell blocks (comments dropped) and in inline code."""
    lines = [
        line
        for info, code in code_blocks(text)
        if info.split(" ")[0] in ("sh", "bash", "shell", "console")
        for line in code.replace("\\\n", " ").splitlines()
    ]
    spans = [span for span in inline_code(text) if re.match(r"(make|prefopt|python -m|pip) ", span)]
    return [line for line in (*lines, *spans) if line.strip() and not line.startswith("#")]


def command_problems(text: str) -> list[str]:
    return [f"{line}: {p}" for line in command_lines(text) if (p := command_problem(line)) is not None]


def command_problem(line: str) -> str | None:
    """What is wrong with a command line; None where each of its words is real."""
    words = shlex.split(line.lstrip("$ "), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "make":
        return make_problem(rest)
    if program == "prefopt":
        return prefopt_problem(rest)
    if program.startswith("python") and rest[:1] == ["-m"]:
        return module_problem(rest[1])
    if program == "pip":
        return extras_problem(rest)
    if program in ("git", "cd", "pre-commit"):
        return None
    return f"unknown program {program}"


def make_problem(words: list[str]) -> str | None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE).group(1).split()
    for word in words:
        name, assigned, _ = word.partition("=")
        if assigned and not re.search(rf"^{name} \?=", makefile, re.MULTILINE):
            return f"the Makefile has no variable {name}"
        if not assigned and word != "..." and name not in targets:
            return f"the Makefile has no word {name}"
    return None


@cache
def prefopt_help(*commands: str) -> str | None:
    """What ``prefopt COMMANDS --help`` prints; None where the command line refuses the commands."""
    cli = importlib.import_module("prefopt.cli")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.main([*commands, "--help"])
        except SystemExit as stop:
            return out.getvalue() if stop.code in (0, None) else None
    return out.getvalue()


def prefopt_problem(words: list[str]) -> str | None:
    commands: list[str] = []
    text = prefopt_help()
    while text is not None and "COMMAND" in text.split("\n\n")[0]:  # the usage asks for one more
        if len(commands) == len(words):
            return f"prefopt {' '.join(commands)} lacks its command"
        commands.append(words[len(commands)])
        text = prefopt_help(*commands)
    if text is None:
        return f"there is no command prefopt {' '.join(commands)}"
    for flag in (word.split("=")[0] for word in words if word.startswith("--")):
        if not re.search(rf"(?<![\w.-]){re.escape(flag)}(?![\w.-])", text):
            return f"prefopt {' '.join(commands)} has no flag {flag}"
    return None


def module_problem(module: str) -> str | None:
    if module in ("pytest", "venv", "pip"):
        return None
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return f"no module {module}"
    main = Path(spec.origin).with_name("__main__.py")
    has_main = "__main__" in Path(spec.origin).read_text(encoding="utf-8")
    has_main |= spec.submodule_search_locations is not None and main.exists()  # a package
    return None if has_main else f"{module} is no program"


def extras_problem(words: list[str]) -> str | None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = re.findall(r"(\w+)=[A-Z]+", re.search(r"EXTRAS = dict\((.+)\)", setup).group(1))
    for word in words:
        asked = re.fullmatch(r"(?:\.|prefopt-kernels)\[([\w,]+)\]", word)
        for extra in asked.group(1).split(",") if asked else ():
            if extra not in extras:
                return f"no extra {extra}"
    return None


# Environment variables


def variables_read(source: str) -> set[str]:
    """Names of the environment variables that Python source reads or writes by a constant name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        named = None
        if isinstance(node, ast.Subscript):
            owner, named = node.value, node.slice
        elif isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute):
            owner, named = node.func, node.args[0]
        if isinstance(named, ast.Constant) and isinstance(named.value, str):
            if re.search(r"\b(environ|getenv)\b", ast.unparse(owner)):
                found.add(named.value)
    return found


def variables_documented() -> set[str]:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE))


def variable_problems(text: str) -> list[str]:
    named = set(re.findall(r"\bPREFOPT_[A-Z_]+\b", text))
    return [f"variable {name}" for name in sorted(named - variables_documented())]


# Code


def code_problems(text: str, folder: Path, monkeypatch) -> list[str]:
    """Runs the blocks of a page in order, in one namespace; checks the names of those marked no-run."""
    namespace: dict = {"__name__": "__main__"}
    monkeypatch.chdir(folder)
    found = []
    for info, code in code_blocks(text):
        if info == "python no-run":
            found += name_problems(code)
        elif info == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, "<documentation>", "exec"), namespace)
        elif info.startswith("py"):
            found.append(f"a block is marked {info!r}; expected 'python' or 'python no-run'")
    return found


def name_problems(code: str) -> list[str]:
    """Imports, attributes and keyword arguments of a block that do not exist."""
    tree = ast.parse(code)
    known: dict[str, object] = {}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    found.append(f"{node.module} has no {alias.name}")
                known[alias.asname or alias.name] = getattr(module, alias.name, None)
    for node in ast.walk(tree):  # trainer = PreferenceTrainer(...): trainer's attributes are the class's
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            made = known.get(ast.unparse(node.value.func))
            if inspect.isclass(made):
                known |= {target.id: made for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = known.get(node.value.id)
            if owner is not None and not hasattr(owner, node.attr):
                found.append(f"{node.value.id} has no attribute {node.attr}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = known.get(node.func.id)
            if callable(called):
                try:
                    positional = [None] * len(node.args)
                    keywords = {k.arg: None for k in node.keywords if k.arg is not None}
                    inspect.signature(called).bind(*positional, **keywords)
                except TypeError as error:
                    found.append(f"{node.func.id}: {error}")
    return found


def reference_problems(text: str) -> list[str]:
    """Dotted names of ours in inline code that do not resolve."""
    found = []
    for word in inline_code(text):
        dotted = re.fullmatch(r"(?:help\()?((?:prefopt_kernels|prefopt)(?:\.\w+)+)\)?(?:\(.*\))?", word)
        if dotted is not None and not resolves(dotted.group(1)):
            found.append(f"name {word}")
    return found


def resolves(dotted: str) -> bool:
    module, _, name = dotted.rpartition(".")
    try:
        if importlib.util.find_spec(dotted) is not None:
            return True
    except ModuleNotFoundError:
        pass
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False
