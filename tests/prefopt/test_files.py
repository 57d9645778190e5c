"""A file is replaced by a whole one or stays as it was, and nothing else is left beside it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt.data.write import whole_folder
from prefopt.export.folder import export_folder
from prefopt.files import remove_stale, temporary, write_whole
from prefopt.report.figures import placed


def test_a_text_that_cannot_be_encoded_leaves_the_old_one(tmp_path):
    path = tmp_path / "new" / "page.html"
    write_whole(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half of a pair: \ud83d")
    assert path.read_text(encoding="utf-8") == "first"
    write_whole(path, "half of a pair: \ud83d", "replace")
    assert path.read_text(encoding="utf-8") == "half of a pair: ?"
    assert [one.name for one in path.parent.iterdir()] == ["page.html"]


def test_a_folder_in_its_place_is_named(tmp_path):
    path = tmp_path / "page.html"
    path.mkdir()
    with pytest.raises(OSError, match="page.html is a folder; expected a file there, or nothing$"):
        write_whole(path, "text")
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- what a killed process leaves


@pytest.fixture(scope="module")
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_by(pid: int, path: Path, kind: str, host: str | None = None) -> Path:
    """What process ``pid`` was writing when it was killed: a folder with a file in it."""
    left = path.with_name(f".{path.name}.{kind}-{pid}-{host or socket.gethostname()}")
    left.mkdir(parents=True)
    (left / "half").write_text(kind, encoding="utf-8")
    return left


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def test_the_temporary_name_is_that_of_this_process(tmp_path):
    with temporary(tmp_path / "page.html") as scratch:
        assert scratch.name == f".page.html.partial-{os.getpid()}-{socket.gethostname()}"
        remove_stale(tmp_path)
        scratch.touch()
        remove_stale(tmp_path)
        assert scratch.exists()
    assert names(tmp_path) == []


def test_what_a_killed_process_left_goes_and_what_others_write_stays(tmp_path, dead):
    kept = [
        left_by(os.getppid(), tmp_path / "set", "partial"),
        left_by(dead, tmp_path / "set", "partial", host="elsewhere"),
        tmp_path / f".mine.partial-{dead}",
    ]
    kept[-1].touch()
    for name in ("set", "other.json", "plots"):
        left_by(dead, tmp_path / name, "partial")
    write_whole(tmp_path / "page.html", "text")
    assert names(tmp_path) == sorted([*(one.name for one in kept), "page.html"])


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: whole_folder(folder / "out"),
        lambda folder: placed(folder / "out"),
        lambda folder: export_folder(folder / "out", force=False),
    ],
    ids=["whole_folder", "placed", "export_folder"],
)
def test_every_writer_removes_what_was_left_and_leaves_nothing(tmp_path, dead, write):
    left_by(dead, tmp_path / "earlier", "partial")
    with write(tmp_path) as folder:
        (folder / "file").touch()
        assert len(names(tmp_path)) == 1 + (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]
    with pytest.raises(KeyboardInterrupt), write(tmp_path / "new") as folder:
        (folder / "file").touch()
        raise KeyboardInterrupt
    assert names(tmp_path / "new") == []


def test_a_folder_whose_replacement_was_killed_is_put_back(tmp_path, dead):
    left_by(dead, tmp_path / "export", "old")  # moved away, and nothing had taken its place
    left_by(dead, tmp_path / "export", "partial")
    left_by(dead, tmp_path / "second", "old")
    (tmp_path / "second").mkdir()  # the replacement
    remove_stale(tmp_path)
    assert names(tmp_path) == ["export", "second"]
    assert (tmp_path / "export" / "half").read_text(encoding="utf-8") == "old"
    assert names(tmp_path / "second") == []


def test_a_folder_is_replaced_when_the_new_one_is_complete(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(KeyError), whole_folder(tmp_path / "out", replace=True):
        raise KeyError
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]
    with whole_folder(tmp_path / "out", replace=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]
