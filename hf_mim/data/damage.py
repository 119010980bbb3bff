"""Files of many images that cannot be read to their end, such as tars, Parquet and Arrow files: one line names them."""

import contextlib
import json
import os
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
from datasets import Features
from datasets.exceptions import DatasetsError
from datasets.table import CastError

from hf_mim.files import one_line

# What the readers of such files raise.
READING_ERRORS = (pyarrow.ArrowException, DatasetsError, ValueError, OSError, RuntimeError)


class DamagedFile(ValueError):
    """A file of many images that cannot be read to its end."""


def damaged(file: str | Path, error: BaseException) -> DamagedFile:
    """One line that names the file, and says what is wrong and what helps."""
    if isinstance(error, CastError):
        return DamagedFile(f"{file} has other columns or types than the files before it; make them alike")
    return DamagedFile(f"{file} is damaged ({one_line(error, 120)}); copy or make it again, or leave it out")


def first_cause(error: BaseException) -> BaseException:
    """The error that says what is wrong with the data."""
    while error.__cause__ is not None and not isinstance(error, DamagedFile):
        error = error.__cause__
    return error


def file_being_read(error: BaseException) -> str | None:
    """The local file that the datasets library was reading when this was raised, by the frames of its readers."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = frame.f_locals.get("file")
        if "packaged_modules" in frame.f_code.co_filename and isinstance(file, str) and os.path.exists(file):
            return file
    return None


def rows_of(stream: Iterable[dict]) -> Iterator[dict]:
    """The rows of a stream. Raises DamagedFile for a local file that cannot be read."""
    try:
        yield from stream
    except READING_ERRORS as error:
        if file := file_being_read(cause := first_cause(error)):
            raise damaged(file, cause) from error
        raise


def check_saved(folder: Path):
    """Raise DamagedFile if one of the files that `save_to_disk` has written here is damaged.

    Damaged images are found when they are decoded. What is looked at is where they begin and end: Arrow believes it,
    and the process would die of it. The images themselves are not read.
    """
    for state in filter(Path.exists, [folder / "state.json", *folder.glob("*/state.json")]):
        with _naming(state):
            names = [file["filename"] for file in json.loads(state.read_bytes())["_data_files"]]
        with _naming(info := state.with_name("dataset_info.json")):
            json.loads(info.read_bytes())
        for file in map(state.with_name, names):
            with _naming(file), pyarrow.memory_map(str(file)) as opened:
                table = pyarrow.ipc.open_stream(opened).read_all()
                table.validate(full=True)
                Features.from_arrow_schema(table.schema)


def saved_splits(folder: Path) -> list[str] | None:
    """The names of the splits that `save_to_disk` has written here; None if it has written one dataset."""
    if (folder / "state.json").exists():
        return None
    with _naming(file := folder / "dataset_dict.json"):
        names = json.loads(file.read_bytes())["splits"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("splits must be a list of names")
    return names


def is_saved_empty(folder: Path) -> bool:
    """Whether `save_to_disk` has written a dataset without images here. It writes no data then."""
    state = folder / "state.json"
    return state.exists() and not json.loads(state.read_bytes())["_data_files"]


@contextlib.contextmanager
def _naming(file: Path):
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(file, error) from error
