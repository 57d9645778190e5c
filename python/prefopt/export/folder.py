"""The folder of an export: complete or absent, and never in place of other files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefopt.data.write import whole_folder
from prefopt.errors import UserError

RECORD = "export.json"


@contextmanager
def export_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder to write into, which replaces ``out`` if the block succeeds.

    Until then an earlier export is kept.

    Raises:
        UserError: ``out`` has files that are not an export, or an export and ``force`` is not set.
    """
    out = out.absolute()
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        with whole_folder(out) as folder:
            yield folder
        return
    if not (out / RECORD).is_file():
        raise UserError(f"--out {out} has files that are not part of an export; choose another folder")
    if not force:
        raise UserError(f"--out {out} has an export; choose another folder, or replace it by --force")
    with whole_folder(out, replace=True) as folder:
        yield folder
