"""The folder of an export: whole or not there, and never over something that is not an export."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefopt.data.write import whole_folder
from prefopt.errors import UserError

RECORD = "export.json"


@contextmanager
def export_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``out`` when the block has ended well.

    Until then an earlier export stays where it is.

    Raises:
        UserError: ``out`` is in use, and ``force`` is not given or what is there is no export.
    """
    out = out.absolute()
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        with whole_folder(out) as folder:
            yield folder
        return
    if not (out / RECORD).is_file():
        raise UserError(f"--out {out} has files that are not part of an export; choose another folder")
    if not force:
        raise UserError(f"--out {out} has an export in it; choose another folder, or replace it by --force")
    with whole_folder(out, replace=True) as folder:
        yield folder
