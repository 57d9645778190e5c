"""Every YAML goes through one loader: safe, with unique keys, and bounded in size, depth and aliases."""

import logging

import pytest

from prefopt.cli import main
from prefopt.data import DataError
from prefopt.data.build.plan import make_plan
from prefopt.errors import UserError
from prefopt.read_yaml import MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES, parse_yaml, read_yaml
from prefopt.recipe import load_recipe
from prefopt.report.read import sections
from prefopt.runs import find_run

# Nine lists of nine: 9 ** 10 values with the aliases expanded.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 11))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 5,000 keys and values with aliases expanded"),
        ("".join(f"k{n}: 1\n" for n in range(5_000)), "more than 5,000 keys and values"),
        ("x" * (MAX_CHARACTERS + 1), "more than 262,144 characters"),
        ("a: " + "[" * 1_000, "nested more than 40 deep at line 1"),
        ("a:\n- " + "{b: " * 50, "nested more than 40 deep at line 2"),
        ("&k {a: *k}", "an alias contains itself"),
        ("&k [1, [*k]]", "an alias contains itself"),
        ("!!map [1]", "expected a mapping node, but found sequence at line 1, column 1"),
        ("a: {b: 1, b: 2}", "the key 'b' appears twice at line 1, column 11"),
        ("? [1]\n: 2", "while constructing a mapping, found unhashable key at line 1, column 3"),
        ("a: 2026-13-01", "a value does not fit its type (month must be in 1..12)"),
        ('!!float ""', "a value does not fit its type (string index out of range)"),
        ("!!bool x", "a value does not fit its type ('x')"),
        ("!!timestamp x", "a value does not fit its type ('NoneType' object has no attribute"),
        ("!!python/name:os.system", "could not determine a constructor for the tag"),
        ("a\0b", "unacceptable character #x0000"),
        ("a: b: c", "mapping values are not allowed here at line 1, column 5"),
    ],
)
def test_what_is_refused_is_one_sentence(text, message):
    with pytest.raises(UserError) as error:
        parse_yaml(text)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_what_is_within_the_bounds_is_read():
    assert parse_yaml("") is None
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    items = MAX_VALUES - 1  # the list itself is one
    assert len(parse_yaml("\n".join(["- 1"] * items))) == items
    text = "base: &b {r: 8, alpha: 16}\nlora: {<<: *b, r: 4}\nagain: *b\n"
    assert parse_yaml(text)["lora"] == {"r": 4, "alpha": 16}
    assert parse_yaml(text)["again"] == {"r": 8, "alpha": 16}


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "r.yaml"
    for content, message in (
        (b"\xff\xfea", "cannot be read: 'utf-8' codec can't decode byte 0xff in position 0"),
        (b"a: [", "is not valid YAML: while parsing a flow node, expected"),
        (b"x" * (MAX_CHARACTERS + 1), "is not valid YAML: more than 262,144 characters"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_yaml(path)
        assert str(error.value).startswith(f"{path} {message}")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)
    with pytest.raises(UserError, match="cannot be read: embedded null byte"):
        read_yaml(tmp_path / "a\0b")
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "missing.yaml")


def test_every_reader_has_the_bounds(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("&k [*k]", encoding="utf-8")
    message = "an alias contains itself"
    with pytest.raises(UserError, match=f"recipe.yaml is not valid YAML: {message}$"):
        load_recipe(path)
    with pytest.raises(DataError, match=f"recipe.yaml is not valid YAML: {message}$"):
        make_plan([str(path)])
    with pytest.raises(UserError, match=f"recipe.yaml is not valid YAML: {message}$"):
        find_run(tmp_path)  # recipe.yaml of a run folder
    assert sections("&k [*k]") == {}  # the report of a run shows what it can read
    for words in (
        ["train", "kto-lora", "--loss.beta", "&k [*k]"],
        ["data", "check", "x.jsonl", "--template", "&k [*k]"],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "is '&k [*k]'; expected" in error and error.count("\n") == 1


def test_no_is_the_strategy_and_not_false(tmp_path, caplog):
    """YAML 1.1 reads no and off as false."""
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {path: m}\ndata: {path: d}\nloss: {method: bco, shift: off}\n"
        "training: {output_dir: o, save_strategy: no, eval_strategy: no, bf16: no}\n",
        encoding="utf-8",
    )
    with caplog.at_level(logging.WARNING):
        recipe = load_recipe(path, {"training.save_strategy": False})
    assert recipe.training.save_strategy == recipe.training.eval_strategy == "no"
    assert recipe.loss.shift == "off" and recipe.training.bf16 is False
    with pytest.raises(UserError, match="save_strategy is True; expected one of no, steps, epoch"):
        load_recipe(path, {"training.save_strategy": True})
