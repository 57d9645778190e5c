"""Every path, command, flag, environment variable, name and code block in the documentation is real."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from support.docs_checks import (
    ROOT,
    code_problems,
    command_problems,
    path_problems,
    reference_problems,
    sources,
    variable_problems,
    variables_documented,
    variables_read,
)

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@pages
def test_paths_exist(page):
    assert path_problems(page.read_text(encoding="utf-8"), page) == []


@pages
def test_commands_and_flags_exist(page):
    assert command_problems(page.read_text(encoding="utf-8")) == []


@pages
def test_variables_are_documented(page):
    assert variable_problems(page.read_text(encoding="utf-8")) == []


@pages
def test_code_runs_and_names_resolve(page, tmp_path, monkeypatch):
    text = page.read_text(encoding="utf-8")
    with torch.random.fork_rng():
        assert code_problems(text, tmp_path, monkeypatch) + reference_problems(text) == []


def test_every_variable_of_ours_is_documented_and_read():
    python = [source for path, source in sources().items() if path.suffix == ".py"]
    read = {name for source in python for name in variables_read(source)}
    ours = {name for name in variables_documented() if name.startswith("PREFOPT_")}
    assert {name for name in read if name.startswith("PREFOPT_")} == ours
    assert read <= variables_documented()


def test_documented_values_of_variables_are_the_real_ones():
    from prefopt_kernels.ops import _sources
    from prefopt_kernels.ops.linear_logprob.op import BACKENDS

    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    values = {
        name: set(re.findall(r"`(\w+)`", cell))
        for name, cell in re.findall(r"^\| `(PREFOPT_\w+)` \| ([^|]+) \|", page, re.MULTILINE)
    }
    assert values["PREFOPT_BUILD"] == set(_sources.BUILD_CHOICES)
    assert values["PREFOPT_BACKEND"] == {"auto", *BACKENDS}


def test_variables_of_other_tools_are_read_by_them_or_by_us():
    builder = Path(importlib.util.find_spec("torch.utils.cpp_extension").origin)
    texts = [*sources().values(), builder.read_text(encoding="utf-8")]
    for name in variables_documented():
        assert any(name in text for text in texts), name


@pytest.mark.parametrize(
    "text",
    [
        "see [here](docs/no_such_page.md)",
        "see `docs/no_such_page.md`",
        "see no_such_page.md",
        "in `prefopt_kernels/no_such_folder/`",
        "in `no_such_folder/loss`",
        "writes `no_such_output.jsonl`",
    ],
)
def test_a_planted_path_is_found(text):
    assert len(path_problems(text, ROOT / "README.md")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "`make no-such-word`",
        "`make test NO_SUCH=1`",
        "```sh\nmake no-such-word\n```",
        "```sh\nprefopt no-such-subcommand\n```",
        "```sh\nprefopt data no-such-subcommand\n```",
        "```sh\nprefopt data\n```",
        "```sh\nprefopt demo --no-such-flag 3\n```",
        "`prefopt train recipe.yaml --loss.bta 0.2`",
        "`python -m prefopt_kernels.no_such_module`",
        "`python -m prefopt_kernels.modules`",
        "```sh\npip install '.[no_such_extra]'\n```",
        "```sh\nno-such-program\n```",
    ],
)
def test_a_planted_command_is_found(text):
    assert len(command_problems(text)) == 1


def test_a_planted_variable_is_found():
    assert variable_problems("set PREFOPT_NO_SUCH=1") == ["variable PREFOPT_NO_SUCH"]
    assert variables_read("import os\nos.environ.get('A')\nos.environ['B']\nos.getenv('C')\nd['D']") == set("ABC")


@pytest.mark.parametrize(
    "code",
    [
        "from prefopt_kernels import no_such_name",
        "import prefopt_kernels\nprefopt_kernels.no_such_name()",
        "from prefopt_kernels import kto_loss\nkto_loss(1, 2, 3, beta=1, reference_point=0, no_such=1)",
        "from torch import nn\nlayer = nn.Linear\nfrom torch.nn import Linear\nx = Linear(1, 2)\nx.no_such()",
    ],
)
def test_a_planted_name_is_found(code, tmp_path, monkeypatch):
    assert len(code_problems(f"```python no-run\n{code}\n```", tmp_path, monkeypatch)) == 1
    assert reference_problems("`prefopt_kernels.no_such_name`") == ["name prefopt_kernels.no_such_name"]


def test_planted_code_that_fails_is_found(tmp_path, monkeypatch):
    with pytest.raises(AssertionError):
        code_problems("```python\nx = 1\n```\n```python\nassert x == 2\n```", tmp_path, monkeypatch)
    assert code_problems("```pycon\n>>> 1\n```", tmp_path, monkeypatch)
