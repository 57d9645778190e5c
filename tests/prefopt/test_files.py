"""A file is replaced by a whole one or stays as it was, and nothing else is left beside it."""

import pytest

from prefopt.files import write_whole


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
