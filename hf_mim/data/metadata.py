"""A table beside images that says more about each: `metadata.csv`, `.jsonl` or `.parquet`, as in datasets' ImageFolder.

Its column `file_name` has the path of each image, from the folder of the table on. The other columns are columns of the
images.
"""

import os
from collections.abc import Iterable
from pathlib import Path, PurePath

import pyarrow
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from hf_mim.files import listed, one_line

FILE_NAME = "file_name"
UNREAD = "is not read"  # the end of a note about a table
_READERS = {
    ".csv": pyarrow.csv.read_csv,
    ".jsonl": pyarrow.json.read_json,
    ".parquet": pyarrow.parquet.read_table,
}
_NAMES = [f"metadata{extension}" for extension in _READERS]


def is_metadata(path: str) -> bool:
    """Whether a file is a table about images, by its name."""
    return os.path.basename(path) in _NAMES


def metadata_files(folder: Path, paths: Iterable[str]) -> list[str]:
    """The tables about these images: those in a folder that holds one of them, or in a folder above, up to `folder`."""
    holding = {os.path.dirname(path) for path in paths}
    places = {""} | holding | {str(above) for place in holding for above in PurePath(place).parents if above.parts}
    found = (os.path.join(place, name) for place in sorted(places) for name in _NAMES)
    return [path for path in found if os.path.isfile(folder / path)]


def read_metadata(folder: Path, files: list[str], paths: Iterable[str]) -> tuple[pyarrow.Table, dict[str, int], list]:
    """(the columns of all tables, the row of each image that has one, notes).

    Args:
        files: the tables, relative to the folder.
        paths: all images below the folder, relative to it.

    Raises:
        ValueError: in one line that names the table: it cannot be read, or has two rows for an image, or a row for a
            file that does not exist.
    """
    known, rows, tables, notes, others = set(paths), {}, [], [], 0
    for file in files:
        table = _read(folder / file)
        if FILE_NAME not in table.column_names:
            notes.append(f"{file} has no column {FILE_NAME} and {UNREAD}")
            continue
        start, missing = sum(map(len, tables)), []
        for number, name in enumerate(map(str, table[FILE_NAME].to_pylist()), start=start):
            path = os.path.relpath(os.path.normpath(folder / os.path.dirname(file) / name), folder)
            if path in rows:
                raise ValueError(f"{folder / file} has a second row for {name}; keep one row for each image")
            if path in known:
                rows[path] = number
            elif os.path.exists(folder / path):
                others += 1
            else:
                missing.append(name)
        if missing:
            raise ValueError(
                f"{folder / file} names {len(missing):,} files that do not exist: {listed(missing, 3)}; put them "
                "there, or remove their rows"
            )
        dropped = [name for name in (FILE_NAME, "image") if name in table.column_names]
        tables.append(table.drop_columns(dropped))
        notes += [f"the column image of {file} is not read"] if "image" in dropped else []
    if others:
        notes.append(f"{others:,} rows of metadata name files that are no images of the source")
    return _joined(tables, files), rows, notes


def _joined(tables: list[pyarrow.Table], files: list[str]) -> pyarrow.Table:
    try:
        return pyarrow.concat_tables(tables, promote_options="permissive") if tables else pyarrow.table({})
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ValueError(f"{' and '.join(files)} have columns of different types: {one_line(error)}") from None


def _read(path: Path) -> pyarrow.Table:
    try:
        return _READERS[path.suffix](path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
