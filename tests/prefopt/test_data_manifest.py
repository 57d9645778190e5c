"""manifest.json of a built folder: its files lie inside the folder and are the ones that were built."""

import json
import shutil

import pytest

from prefopt.cli import main
from prefopt.data import DataError, load_rows
from prefopt.data.build.manifest import read_manifest, split_file
from prefopt.data.build.plan import make_plan
from prefopt.data.build.run import build


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    rows = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(5)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    return build(make_plan([str(folder / "rows.jsonl")], validation=0.0, format="jsonl"), folder / "set").folder


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "set")


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def put(*keys, value):
    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "name",
    ["../secret.jsonl", "{outside}/secret.jsonl", "sub/../../secret.jsonl", "..", "", "a\0b"],
)
def test_a_file_outside_of_the_folder_is_not_read(folder, capsys, name):
    (folder.parent / "secret.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    edit(folder, put("splits", "train", "file", value=name.format(outside=folder.parent)))
    for command in ("check", "inspect"):
        assert main(["data", command, str(folder)]) == 2
        error = capsys.readouterr().err
        assert "splits.train.file is " in error and "expected the name of a file in the same folder" in error
        assert error.count("\n") == 1


def test_a_link_out_of_the_folder_is_not_read(folder):
    shutil.move(folder / "train.jsonl", folder.parent / "elsewhere.jsonl")
    (folder / "train.jsonl").symlink_to(folder.parent / "elsewhere.jsonl")
    with pytest.raises(DataError, match="splits.train.file is 'train.jsonl'; expected .* not a link out of it"):
        load_rows(folder)


def test_the_folder_itself_may_be_a_link(folder):
    link = folder.parent / "link"
    link.symlink_to(folder, target_is_directory=True)
    assert load_rows(link).counts["rows"] == 10


def test_a_snapshot_in_the_cache_of_the_hub_is_read(folder):
    """There every file is a link into the folder blobs of the same repository."""
    home = folder.parent / "datasets--me--thumbs"
    (home / "snapshots").mkdir(parents=True)
    snapshot = home / "snapshots" / "0123abc"
    shutil.move(folder, snapshot)
    (home / "blobs").mkdir()
    for file in snapshot.iterdir():
        shutil.move(file, home / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    assert load_rows(snapshot).counts["rows"] == 10


def test_a_file_that_was_changed_or_is_gone(folder):
    path = folder / "train.jsonl"
    assert split_file(folder, "train") == path
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"c"', 1))
    with pytest.raises(DataError, match="train.jsonl was changed after it was built: its SHA-256"):
        load_rows(folder)
    path.unlink()
    with pytest.raises(DataError, match="there is no file .*train.jsonl, which .*manifest.json names"):
        load_rows(folder)


@pytest.mark.parametrize(
    ("keys", "value", "problem"),
    [
        (["splits"], [], r"splits is \[\]; expected an object"),
        (["splits"], None, "splits is missing; expected an object"),
        (["splits", "train"], "train.jsonl", "splits.train is 'train.jsonl'; expected an object"),
        (["splits", "train", "file"], 3, "splits.train.file is 3; expected text"),
        (["splits", "train", "sha256"], None, "splits.train.sha256 is missing; expected text"),
        (["splits", "train", "rows"], True, "splits.train.rows is True; expected a whole number"),
        (["sources"], {}, "sources is {}; expected a list"),
        (["sources", 0], 1, r"sources\[0\] is 1; expected an object"),
        (["sources", 0, "revision"], 1, r"sources\[0\].revision is 1; expected text or null"),
        (["arguments"], 1, "arguments is 1; expected an object"),
        (["fingerprint"], 1, "fingerprint is 1; expected text"),
    ],
)
def test_a_field_that_is_missing_or_of_another_type(folder, keys, value, problem):
    edit(folder, put(*keys, value=value))
    with pytest.raises(DataError, match=rf"manifest.json: {problem}"):
        read_manifest(folder)


def test_a_manifest_that_is_nested_too_deeply(folder):
    (folder / "manifest.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(DataError, match="manifest.json cannot be read: maximum recursion"):
        load_rows(folder)
