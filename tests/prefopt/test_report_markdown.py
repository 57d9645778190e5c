"""Names from outside in Markdown, HTML and CSV: nothing in them is interpreted, and numbers stay numbers."""

import csv
import io
import json

import pytest

from prefopt.compare.report import markdown
from prefopt.export.card import write_card
from prefopt.report.markdown import code, csv_text, plain, table
from prefopt.runs import Source

EVIL = "a|b [x](javascript:y) <img src=x> *b* `c` ~~d~~ $e$ #\n# f"
PLAIN = r"a\|b \[x\](javascript:y) &lt;img src=x&gt; \*b\* \`c\` \~\~d\~\~ \$e\$ \# \# f"


def test_text_is_escaped():
    assert plain(EVIL) == PLAIN
    assert table(["h", EVIL], [[1, "x|y"]]) == f"| h | {PLAIN} |\n| --- | --- |\n| 1 | x\\|y |"


def test_a_fence_cannot_be_closed_from_inside():
    assert code("a", "sh") == "```sh\na\n```"
    assert code("a\n````\nb", "sh") == "`````sh\na\n````\nb\n`````"


@pytest.mark.parametrize("value", ["=1+1", "+cmd", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "-"])
def test_a_cell_that_a_spreadsheet_would_run_is_text(value):
    text = csv_text([value], [[value], {value: value}])
    assert [row[0] for row in csv.reader(io.StringIO(text, newline=""))] == ["'" + value.replace("\r", "\n")] * 3


@pytest.mark.parametrize("value", ["-0.5", "+1.5e-3", "-0.0000", -0.5, 3, "a=b", "", "-inf"])
def test_numbers_and_other_texts_stay(value):
    assert csv_text(["x"], [[value, "b"]]) == f"x\n{value},b\n"


def test_a_missing_cell_is_empty():
    assert csv_text(["a", "b"], [{"b": 1}, {"a": None, "b": True}]) == "a,b\n,1\n,True\n"


def test_a_comparison_escapes_the_recipes_name():
    text = markdown({"recipe": f"runs/{EVIL.replace('/', '')}.yaml"}, [], [EVIL])
    assert text.startswith(f"## {PLAIN}: methods compared\n") and text.endswith(f"- {PLAIN}\n")


def test_an_exports_card_escapes_the_runs_name(tmp_path):
    record = {"run": EVIL, "notes": [EVIL]}
    (tmp_path / "export.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "a $(b)`.gguf").touch()
    write_card(tmp_path, Source(tmp_path), "gguf")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"\n# {PLAIN}, gguf\n" in card and f"\n- {PLAIN}\n" in card
    assert "\nllama-cli -m 'a $(b)`.gguf' -cnv\n" in card
