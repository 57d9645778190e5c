"""`prefopt data build`: from published sets and local files to one checked data set with splits.

Start here. ``intake`` and ``convert`` read every source and spool its texts to disk, ``choose`` filters and splits by
attributes only, and the result is written to a folder that appears when it is complete.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from tqdm.auto import tqdm

import prefopt
from prefopt.data.build.choose import Answers, choose
from prefopt.data.build.counts import count, table
from prefopt.data.build.intake import Intake
from prefopt.data.build.manifest import FORMAT, MANIFEST
from prefopt.data.build.plan import Plan
from prefopt.data.write import Spool, whole_folder, write_json, write_rows


@dataclass(frozen=True)
class Built:
    """The folder that ``build`` wrote, and its counts, also as a table."""

    folder: Path
    counts: dict[str, Any]
    table: str


def build(plan: Plan, out: str | Path) -> Built:
    """Build a data set of rows {prompt, completion, label, source, group}.

    The folder gets one file for each split, manifest.json (arguments, sources with commits and hashes, files with
    hashes), counts.json, counts.txt, and bad_rows.jsonl if there are any. The same plan on the same data gives the same
    bytes. A build that fails or is interrupted leaves nothing.

    Args:
        plan: from ``make_plan``.
        out: a new or empty folder.

    Raises:
        DataError: a source that cannot be read, bad rows, an empty split, one label only.
        OSError: the folder cannot be written.

    Example:
        >>> import json, tempfile
        >>> from prefopt.data.build.plan import make_plan
        >>> folder = Path(tempfile.mkdtemp())
        >>> pair = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
        >>> _ = (folder / "pairs.jsonl").write_text(json.dumps(pair), encoding="utf-8")
        >>> plan = make_plan([str(folder / "pairs.jsonl")], validation=0.0)
        >>> build(plan, folder / "set").counts["total"]["splits"]
        {'train': {'rows': 2, 'desirable': 1, 'undesirable': 1, 'groups': 1}}
    """
    out = Path(out)
    with whole_folder(out) as folder:
        spool = Spool(folder / "rows.spool")
        intake = Intake(plan, spool)
        taken = [intake.take(number) for number in range(len(plan.sources))]
        answers = intake.answers
        splits = choose(answers, plan)
        counts = count([reading for reading, _ in taken], answers, splits, plan)
        files = {
            split: write_rows(
                folder / f"{split}.{plan.format}",
                _rows(numbers, split, answers, spool, plan),
                chat=intake.chat,
            )
            for split, numbers in splits.items()
        }
        spool.remove()
        text = table(counts)
        (folder / "counts.txt").write_text(text + "\n", encoding="utf-8")
        write_json(folder / "counts.json", counts)
        if intake.bad:
            lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in intake.bad]
            (folder / "bad_rows.jsonl").write_text("".join(lines), encoding="utf-8")
        # last: a folder without it is refused
        write_json(folder / MANIFEST, _manifest(plan, [record for _, record in taken], files))
    return Built(out, counts, text)


def _rows(numbers: list[int], split: str, answers: Answers, spool: Spool, plan: Plan) -> Iterator[dict[str, Any]]:
    for number in tqdm(numbers, desc=f"writing {split}", unit="row", delay=1):
        prompt, completion = spool.read(number)
        yield {
            "prompt": prompt,
            "completion": completion,
            "label": answers.label[number],
            "source": plan.sources[answers.source[number]].name,
            "group": answers.group_name(number),
        }


def _manifest(plan: Plan, sources: list[dict], files: dict[str, dict]) -> dict[str, Any]:
    """The manifest; it does not depend on the time, the machine or the user."""
    return {
        "format": FORMAT,
        "fingerprint": hashlib.sha256(
            "".join(f"{split} {entry['sha256']}\n" for split, entry in files.items()).encode()
        ).hexdigest(),
        "splits": files,
        "sources": sources,
        "arguments": plan.described(),
        "versions": {
            "prefopt": prefopt.__version__,
            "datasets": datasets.__version__,
            "pyarrow": pyarrow.__version__,
        },
    }
