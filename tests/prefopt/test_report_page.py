"""The page in a browser: one file, whole or absent, with every text from data escaped."""

import json
import os
import re
from html.parser import HTMLParser

import pytest

from prefopt.report import write_report
from prefopt.report.page import page
from prefopt.report.read import read_run
from prefopt.report.summary import summarize

ARABIC = "كيف أزرع <b>الطماطم</b>؟"
ATTACK = '"><script>alert(1)</script>'
VOID = {"meta", "br", "path", "use", "rect", "img"}


class Page(HTMLParser):
    """Elements, ids, and each text with the open elements around it."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict]] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, list[tuple[str, dict]]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append((data, list(self.open)))


def make_run(folder):
    """A run with Arabic, an attack in every text, NaN, bad rows and a warning."""
    logs = [
        {
            "step": step,
            "loss": 0.5 - step / 100 if step != 4 else float("nan"),
            "learning_rate": 1e-3,
            "grad_norm": 1.0 / step,
            "kl": 0.1 * step,
            "rewards/chosen": 0.1 * step,
            "rewards/rejected": -0.1 * step,
            "rewards/margins": 0.2 * step,
        }
        for step in range(1, 9)
    ]
    logs.append({"step": 8, "epoch": 1.0, "eval_loss": 0.3, "eval_rewards/margins": 1.5})
    record = {
        "status": "finished",
        "method": "kto",
        "config": {"beta": 0.1, "run_name": ATTACK},
        "data": {"train": {"rows": 20, "fingerprint": "0123456789abcdef", "bad": 1}},
        "diagnostics": [{"name": "x", "step": 3, "reason": ATTACK, "remedy": "Train longer"}],
        "versions": {"torch": "2.13.0"},
    }
    samples = [
        {
            "prompt": ARABIC,
            "before": ATTACK,
            "after": "بالطبع!",
            "before_ok": False,
            "after_ok": True,
        }
        | {"before_reason": ATTACK, "after_reason": ""}
    ] * 12
    files = {
        "run.json": json.dumps(record),
        "metrics.jsonl": "".join(json.dumps(log) + "\n" for log in logs),
        "samples.json": json.dumps(samples),
        "summary.json": json.dumps({"title": ATTACK, "metric": ATTACK, "note": ATTACK, "how": ATTACK}),
        "bad_rows.jsonl": json.dumps({"file": ATTACK, "line": 3, "reason": ATTACK}) + "\n",
        "recipe.yaml": f"# {ATTACK}\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The same with its report, for tests that only read."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def text(reported):
    return (reported / "report.html").read_text(encoding="utf-8")


def test_no_text_becomes_markup(text):
    parsed = Page(text)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "iframe", "link", "object"}
    shown = [text for text, _ in parsed.texts]
    assert sum(ATTACK in text for text in shown) >= 12 + 6
    assert sum(ARABIC in text for text in shown) == 12


def test_every_text_from_data_has_automatic_direction(text):
    for one, around in Page(text).texts:
        if "الطماطم" in one or "بالطبع" in one or one == ATTACK:
            inside_mark = any("mark" in (at.get("class") or "") for _, at in around)
            titled = any(tag == "title" for tag, _ in around)
            assert inside_mark or titled or any(at.get("dir") == "auto" for _, at in around), one


def test_nothing_is_fetched(text):
    for tag, attributes in Page(text).tags:
        for name, value in attributes.items():
            if name in ("src", "srcset", "data", "action"):
                pytest.fail(f"<{tag} {name}={value!r}>")
            if name in ("href", "xlink:href"):
                assert value.startswith("#"), (tag, value)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique_and_every_reference_resolves(text):
    ids = [attributes["id"] for _, attributes in Page(text).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#([^)"]+)', text)
    assert used and set(used) <= set(ids)


def test_readable_on_a_phone_and_in_the_dark(text):
    assert text.startswith("<!doctype html>") and '<meta charset="utf-8">' in text
    assert 'name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text
    for tag, attributes in Page(text).tags:
        if tag == "svg":  # as wide as its column, in the page's colour
            assert "viewbox" in attributes and "width" not in attributes
    assert "#1b1f24" not in text.split("</style>")[1]


def test_tables_scroll_and_do_not_widen_the_page(text):
    assert text.count("<table>") == text.count('<div class="scroll"><table>') > 3


def test_all_plots_as_png_and_svg_without_nan(reported):
    names = ["grad_norm", "kl", "learning_rate", "loss", "margin", "rewards"]
    assert sorted(file.name for file in (reported / "plots").iterdir()) == [
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    ]
    assert (reported / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"\bnan\b", (reported / "plots" / "loss.svg").read_text(encoding="utf-8"))
    assert "not finite" in (reported / "report.html").read_text(encoding="utf-8")


def test_written_twice_the_same_bytes(run_dir, reported):
    def contents(folder):
        written = [folder / "report.html", folder / "README.md", folder / "eval_summary.csv"]
        return [file.read_bytes() for file in [*written, *sorted((folder / "plots").iterdir())]]

    write_report(run_dir)
    assert contents(run_dir) == contents(reported)


def test_evaluations_as_a_table(reported):
    assert (reported / "eval_summary.csv").read_text(encoding="utf-8") == (
        "step,epoch,eval_loss,eval_rewards/margins\n8,1.0,0.3,1.5\n"
    )


def test_a_failure_leaves_the_old_report_and_nothing_else(run_dir, monkeypatch):
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n', encoding="utf-8")  # a single plot
    report = write_report(run_dir)
    before, names = report.read_bytes(), sorted(file.name for file in run_dir.iterdir())

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(run_dir)
    assert report.read_bytes() == before
    assert sorted(file.name for file in run_dir.iterdir()) == names


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.json", "summary.json", "run.json"])
def test_a_missing_file_affects_only_its_section(run_dir, name):
    (run_dir / name).unlink()
    run = read_run(run_dir)
    shown = " ".join(text for text, _ in Page(page(run, summarize(run))).texts)
    assert "What happened" in shown
    assert ("There is no " + name in shown) == (name in ("metrics.jsonl", "run.json"))


def test_a_lone_surrogate_does_not_stop_the_report(run_dir):
    samples = '[{"prompt": "half an emoji \\ud83d", "before": "", "after": "b"}]'
    (run_dir / "samples.json").write_text(samples, encoding="utf-8")
    (run_dir / "metrics.jsonl").write_text("", encoding="utf-8")
    assert "half an emoji ?" in write_report(run_dir).read_text(encoding="utf-8")
