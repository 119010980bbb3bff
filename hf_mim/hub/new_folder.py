"""Folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_mim.files import check_writable


def check_destination(dest: str | Path) -> Path:
    """The path of a new folder. Raises ValueError for a file, a link, a folder that is not empty, or no permission."""
    dest = Path(dest)
    if dest.is_symlink():
        raise ValueError(f"DEST must be a new folder, and {dest} is a link")
    if dest.exists() and not dest.is_dir():
        raise ValueError(f"DEST must be a new folder, and {dest} is a file")
    if dest.is_dir() and any(dest.iterdir()):
        raise ValueError(f"DEST must be a new folder, and {dest} holds something already")
    check_writable(dest, "DEST", "new folder")
    return dest


@contextmanager
def new_folder(dest: str | Path) -> Iterator[Path]:
    """A folder to write into. It is renamed to `dest` when the block ends well, and removed when the block fails."""
    dest = check_destination(dest).absolute()
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = dest.with_name(f".{dest.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        if dest.is_dir():
            dest.rmdir()
        partial.rename(dest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
