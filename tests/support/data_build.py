"""`prefopt data build` on the fixtures: their names as its arguments, and what it says."""

from pathlib import Path

from prefopt.cli import main

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "data"


def words(*kinds):
    return [f"{kind}:{FIXTURES / kind}.jsonl" for kind in kinds]


def run(capsys, *given):
    """Exit code, output and error of `prefopt data build`; an error is one line, apart from bars of progress."""
    code = main(["data", "build", *map(str, given)])
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if "|" not in line and line.strip()]
    assert len(said) == (code != 0) and all(line.startswith("prefopt: ") for line in said), said
    return code, captured.out, "".join(said)
