"""`prefopt data build`: counts that were counted by hand, the same bytes again, the commits of the hub."""

import json
import re

import pyarrow.parquet
import pytest
from huggingface_hub import HfApi

from prefopt.cli import main
from prefopt.data import DataError, load_rows
from prefopt.data.build.convert import KINDS
from prefopt.data.build.plan import make_plan
from prefopt.data.build.run import build
from support.data_build import FIXTURES, run, words

SIX = ["ultrafeedback_binarized", "hh-rlhf", "shp", "oasst1", "kto-mix-14k", "mmlu-pro"]
PREFERENCES = SIX[:5]


def read(folder, split="train"):
    return load_rows(folder, split=split).rows.to_list()


def cells(table):
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines() if line.strip()]


# ---------------------------------------------------------------- the counts

# Counted by hand from tests/fixtures/data, line by line; the outcomes of the lines stand in test_data_convert.py.
# Dropped answers: "Eleven." of kto-mix is ultrafeedback's; "Twelve." is there twice; "عمّان." is good in one set and
# bad in the other; lines 1 and 11 of hh-rlhf exchange their labels; SHP's comment c2 wins once and loses once, c1 and
# c3 come twice.
COUNTED = """
                                                 ultrafeedback_binarized  hh-rlhf  shp  oasst1  kto-mix-14k  all
rows read                                                             10       12   11      26            8   67
  - a comment was deleted                                              0        0    1       0            0    1
  - a conversation does not end with an answer                         1        0    0       0            0    1
  - a message above it is deleted or missing                           0        0    0       4            0    4
  - a prompter's message                                               0        0    0       7            0    7
  - a transcript does not begin with a speaker                         0        1    0       0            0    1
  - a transcript ends with the user's turn                             0        1    0       0            0    1
  - a turn before the answer is empty                                  0        1    0       0            0    1
  - an answer is empty                                                 1        1    1       0            1    4
  - both answers are the same                                          1        0    0       0            0    1
  - both scores are equal                                              1        0    0       0            0    1
  - both transcripts are the same                                      0        1    0       0            0    1
  - its siblings have the same rank                                    0        0    0       2            0    2
  - neither among the best nor the worst                               0        0    0       1            0    1
  - no sibling to be compared with                                     0        0    0       2            0    2
  - the answer is empty                                                0        0    0       1            0    1
  - the better score is not positive                                   0        0    1       0            0    1
  - the conversations part before the last answer                      1        0    0       0            0    1
  - the label contradicts the scores                                   0        0    1       0            0    1
  - the message is not ranked                                          0        0    0       1            0    1
  - the message was deleted                                            0        0    0       1            0    1
  - the rejected answer has the higher score                           1        0    0       0            0    1
  - the review refused the message                                     0        0    0       1            0    1
  - the score ratio is below 2                                         0        0    1       0            0    1
  - the scores tie                                                     0        0    1       0            0    1
  - the speakers do not take turns                                     0        1    0       0            0    1
  - the transcripts part before the last answer                        0        1    0       0            0    1
rows used                                                              4        5    5       6            7   27
answers made of them                                                   8       10   10       6            7   41
  - the same answer has both labels                                    1        4    2       0            1    8
  - repeated within its source                                         1        0    2       0            1    4
  - already in another source                                          0        0    0       0            1    1
answers kept                                                           6        6    6       6            4   28
    desirable                                                          3        3    3       3            2   14
    undesirable                                                        3        3    3       3            2   14
    groups                                                             3        3    3       2            3   14
train                                                                  6        6    6       6            4   28
    desirable                                                          3        3    3       3            2   14
    undesirable                                                        3        3    3       3            2   14
    groups                                                             3        3    3       2            3   14
""".strip("\n")


def test_the_combined_set_has_the_counts_that_were_counted_by_hand(tmp_path, capsys):
    code, out, _ = run(capsys, *words(*PREFERENCES), "--out", tmp_path / "set", "--validation", 0)
    assert code == 0 and cells(out.removesuffix(f"\n\n{tmp_path / 'set'}\n")) == cells(COUNTED)
    saved = (tmp_path / "set" / "counts.txt").read_text(encoding="utf-8")
    assert saved.strip("\n") == out.split("\n\n")[0].strip("\n")
    assert len({len(line) for line in saved.splitlines()}) == 1  # the columns are flush
    rows = read(tmp_path / "set")
    assert len(rows) == 28 and sum(row["label"] for row in rows) == 14
    kept = {(row["completion"][0]["content"], row["label"]) for row in rows}
    assert {("Twelve.", False), ("بغداد.", False), ("Until it walks.", False)} <= kept
    assert not {"عمّان.", "A week is fine.", "No idea."} & {text for text, _ in kept}
    assert [row["source"] for row in rows if row["completion"][0]["content"] == "Eleven."] == [
        "ultrafeedback_binarized"
    ]


@pytest.mark.parametrize(
    ("kind", "options", "read", "used", "answers", "dropped", "kept", "groups"),
    [
        ("ultrafeedback_binarized", [], 10, 4, 8, {"repeated within its source": 1}, 7, 3),
        ("hh-rlhf", [], 12, 5, 10, {"the same answer has both labels": 4}, 6, 3),
        ("shp", [], 11, 5, 10, {"the same answer has both labels": 2, "repeated within its source": 2}, 6, 3),
        ("oasst1", [], 26, 6, 6, {}, 6, 2),
        ("kto-mix-14k", [], 8, 7, 7, {"repeated within its source": 1}, 6, 5),
        ("mmlu-pro", ["--one-label"], 8, 6, 6, {}, 6, 6),
        ("oasst1", ["--language", "ar"], 26, 6, 6, {"in another language": 4}, 2, 1),
        ("kto-mix-14k", ["--max-rows", "2"], 8, 7, 7, None, None, None),
    ],
)
def test_each_set_alone(tmp_path, capsys, kind, options, read, used, answers, dropped, kept, groups):
    out = tmp_path / "set"
    assert run(capsys, *words(kind), "--out", out, "--validation", 0, *options)[0] == 0
    counts = json.loads((out / "counts.json").read_text(encoding="utf-8"))["sources"][kind]
    assert (counts["read"], counts["used"], counts["answers"]) == (read, used, answers)
    assert counts["read"] == counts["used"] + sum(counts["left_out"].values())
    assert counts["answers"] == counts["kept"] + sum(counts["dropped"].values())
    if dropped is not None:
        assert (counts["dropped"], counts["kept"], counts["groups"]) == (dropped, kept, groups)
    else:
        assert 0 < counts["kept"] <= 2


def test_arabic_rows_stay_as_they_were_written(tmp_path, capsys):
    source = FIXTURES / "arabic.jsonl"
    out = tmp_path / "set"
    given = [source, "--out", out, "--language", "ar", "--validation", 0, "--format", "jsonl"]
    assert run(capsys, *given)[0] == 0
    counts = json.loads((out / "counts.json").read_text(encoding="utf-8"))["total"]
    assert counts["dropped"] == {"in another language": 3, "repeated within its source": 1}
    assert (counts["kept"], counts["desirable"], counts["groups"]) == (3, 2, 2)
    text = (out / "train.jsonl").read_text(encoding="utf-8")
    assert "الدار البيضاء." in text and "مراكش 😀" in text and "\\u" not in text
    low = tmp_path / "low"
    assert run(capsys, source, "--out", low, "--language", "ar", "--language-share", "0.2", "--validation", 0)[0] == 0
    assert len(read(low)) == 4


def test_pairs_rated_rows_text_and_messages(tmp_path, capsys):
    pairs, rated = FIXTURES / "paired.jsonl", FIXTURES / "unpaired.jsonl"
    assert run(capsys, pairs, rated, "--out", tmp_path / "text", "--validation", 0)[0] == 0
    counts = json.loads((tmp_path / "text" / "counts.json").read_text(encoding="utf-8"))
    assert counts["sources"]["paired"]["blank_lines"] == 1
    assert counts["sources"]["paired"]["answers"] == 6 and counts["total"]["kept"] == 9
    assert counts["sources"]["unpaired"]["groups"] == 2
    assert counts["sources"]["unpaired"]["without_use"] == {"rater": 3}
    assert (tmp_path / "text" / "counts.txt").read_text().endswith("unused fields: rater (3)\n")
    rows = read(tmp_path / "text")
    assert all(isinstance(row["prompt"], str) for row in rows)
    table = pyarrow.parquet.read_table(tmp_path / "text" / "train.parquet").to_pylist()
    assert {row["group"] for row in table if row["source"] == "unpaired"} >= {"unpaired/house"}
    code, _, error = run(capsys, pairs, *words("shp"), "--out", tmp_path / "mixed")
    assert code == 2 and "source paired holds text and shp chat messages; --messages" in error
    given = [pairs, *words("shp"), "--out", tmp_path / "mixed", "--messages", "--validation", 0]
    assert run(capsys, *given)[0] == 0
    rows = read(tmp_path / "mixed")
    assert {"role": "user", "content": "ما لون الموز الناضج؟"} in [row["prompt"][0] for row in rows]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_parquet_and_jsonl_sources_give_the_same_rows(tmp_path, capsys, suffix):
    lines = (FIXTURES / "shp.jsonl").read_text(encoding="utf-8").splitlines()
    table = pyarrow.Table.from_pylist([json.loads(line) for line in lines])
    pyarrow.parquet.write_table(table, tmp_path / "shp.parquet")
    given = ["--validation", 0, "--format", suffix]
    run(capsys, *words("shp"), "--out", tmp_path / "a", *given)
    run(capsys, f"shp:{tmp_path / 'shp.parquet'}", "--out", tmp_path / "b", *given)
    files = [(tmp_path / name / f"train.{suffix}").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab"]
    assert manifests[0]["sources"][0]["sha256_of_rows"] == manifests[1]["sources"][0]["sha256_of_rows"]


# ---------------------------------------------------------------- splits, and again


def test_no_group_and_no_prompt_is_in_two_splits(tmp_path):
    plan = make_plan(words(*PREFERENCES), validation=0.3, test=0.2, seed=1, format="jsonl")
    build(plan, tmp_path / "set")
    groups, prompts, rows = {}, {}, 0
    for split in ("train", "validation", "test"):
        for row in read(tmp_path / "set", split):
            rows += 1
            assert groups.setdefault(row["group"], split) == split
            assert prompts.setdefault(json.dumps(row["prompt"]).lower(), split) == split
    assert rows == 28 and set(groups.values()) == {"train", "validation", "test"}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_the_same_plan_gives_the_same_bytes_and_another_seed_another_order(tmp_path, suffix):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        plan = make_plan(words(*PREFERENCES), validation=0.3, seed=seed, format=suffix)
        build(plan, tmp_path / name)
    files = {name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"}
    assert files["a"] == files["b"]
    assert sorted(files["a"]) == [
        "counts.json",
        "counts.txt",
        "manifest.json",
        f"train.{suffix}",
        f"validation.{suffix}",
    ]
    assert files["a"][f"train.{suffix}"] != files["c"][f"train.{suffix}"]


def test_the_labels_are_not_in_the_order_of_the_pairs(tmp_path):
    lines = [json.dumps({"prompt": f"q{i}", "chosen": f"y{i}", "rejected": f"n{i}"}) for i in range(200)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    build(make_plan([str(tmp_path / "p.jsonl")], validation=0.0), tmp_path / "set")
    labels = [row["label"] for row in read(tmp_path / "set")]
    # 100 draws out of 200 good and 200 bad ones: standard deviation 4.3; five of them
    assert abs(sum(labels[:100]) - 50) < 22 and labels != [True, False] * 200


def test_the_manifest_says_what_was_read_and_written(tmp_path):
    plan = make_plan(words("shp"), validation=0.0, seed=7)
    build(plan, tmp_path / "set")
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["arguments"]["seed"] == 7 and manifest["splits"]["train"]["rows"] == 6
    source = manifest["sources"][0]
    assert (source["kind"], source["rows"], source["revision"]) == ("shp", 11, None)
    assert re.fullmatch("[0-9a-f]{64}", source["sha256_of_rows"])
    assert str(tmp_path) not in (tmp_path / "set" / "manifest.json").read_text(encoding="utf-8")


def test_a_folder_is_read_as_data_by_its_splits(tmp_path):
    build(make_plan(words(*PREFERENCES), validation=0.3, seed=1), tmp_path / "set")
    assert load_rows(tmp_path / "set").counts["rows"] == len(read(tmp_path / "set", "train"))
    with pytest.raises(DataError, match="has no split 'dev'; it has train, validation"):
        load_rows(tmp_path / "set", split="dev")
    (tmp_path / "set" / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest\.json cannot be read: Expecting"):
        load_rows(tmp_path / "set")
    (tmp_path / "set" / "manifest.json").write_text('{"splits": {}}', encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest\.json is not what `prefopt data build` writes"):
        load_rows(tmp_path / "set")


# ---------------------------------------------------------------- the hub


def test_a_hub_dataset_is_loaded_at_the_commit_that_is_recorded(tmp_path, monkeypatch):
    import datasets

    asked, rows = {}, [json.loads(line) for line in open(FIXTURES / "kto-mix-14k.jsonl", encoding="utf-8")]

    def load_dataset(name, **kwargs):
        asked.update(name=name, **kwargs)
        return datasets.Dataset.from_list(rows)

    class Info:
        sha = "c" * 40

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: Info)
    build(make_plan(["kto-mix-14k:someone/copy@v2"], validation=0.0), tmp_path / "set")
    assert asked == {"name": "someone/copy", "split": "train", "revision": "c" * 40}
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["sources"][0]["revision"] == "c" * 40
    assert manifest["arguments"]["sources"][0]["revision"] == "v2"
    build(make_plan(["trl-lib/kto-mix-14k"], validation=0.0), tmp_path / "pinned")
    assert asked["revision"] == KINDS["kto-mix-14k"].revision


def test_every_published_set_is_pinned_to_a_commit():
    assert {name for name, kind in KINDS.items() if kind.path} == set(SIX)
    for name in SIX:
        (source,) = make_plan([name]).sources
        assert re.fullmatch("[0-9a-f]{40}", source.revision) and source.path == KINDS[name].path
    (moved,) = make_plan(["hh-rlhf:someone/copy"]).sources
    assert moved.revision is None


# ---------------------------------------------------------------- inspect


def test_inspect_shows_counts_lengths_and_rows(tmp_path, capsys):
    build(make_plan(words(*PREFERENCES), validation=0.3, seed=1), tmp_path / "set")
    assert main(["data", "inspect", str(tmp_path / "set"), "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"  oasst1: 26 rows of \S+oasst1\.jsonl\n", text)
    train = json.loads((tmp_path / "set" / "counts.json").read_text())["total"]["splits"]["train"]
    assert f"train: {train['rows']} rows (chat messages)" in text
    shown = re.search(r"  all +(\d+) +(\d+) +(\d+)\n", text).groups()
    assert [int(one) for one in shown] == [train[name] for name in ("desirable", "undesirable", "groups")]
    assert "groups in more than one split: 0" in text and text.count("asked: ") == 2
    assert main(["data", "inspect", str(FIXTURES / "arabic.jsonl"), "--rows", "7"]) == 0
    text = capsys.readouterr().out
    assert "  arabic" not in text and "الـدار البيضـاء." in text and "line 7, desirable" in text


def test_inspect_notices_a_changed_file(tmp_path, capsys):
    build(make_plan(words("shp"), validation=0.0, format="jsonl"), tmp_path / "set")
    path = tmp_path / "set" / "train.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert main(["data", "inspect", str(tmp_path / "set")]) == 2
    assert "train.jsonl was changed after it was built" in capsys.readouterr().err
    assert main(["data", "inspect", str(tmp_path)]) == 2
    assert "is a folder; expected a .jsonl or .parquet file" in capsys.readouterr().err
