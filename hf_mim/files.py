"""What every room needs of files: hashes, whether a folder can be written, names in a line."""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def sha256(*paths: Path) -> str:
    """Of the bytes of files, one after the other, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def try_to_write(folder: Path):
    """Raise OSError if nothing can be written in a folder that exists."""
    os.rmdir(tempfile.mkdtemp(prefix=".", dir=folder))  # permissions alone do not tell, of /proc for one


def listed(names: Iterable[str], limit: int = 6) -> str:
    """The first of the names, on one line whatever they are, and how many more there are."""
    names = [name if name.isprintable() else ascii(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
