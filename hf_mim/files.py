"""What every room needs of files, and of what goes wrong with them: hashes, writing aside, errors in one line."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path


def sha256(*paths: Path) -> str:
    """The hash, in hex, of the bytes of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to write beside `path`. It takes the name `path` when the block ends well, and vanishes otherwise."""
    path = Path(path)
    aside = path.with_name(f"_{path.name}.{os.getpid()}.part")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def check_writable(path: str | Path, argument: str, kind: str = "folder"):
    """Find out, before any work, whether a path can be written, though it may not exist yet.

    Args:
        kind: "folder", to write into; "file" or "new folder", to put there in one move.

    Raises:
        ValueError: it cannot; one line that names the argument.
    """
    path = Path(path)
    places = path.absolute(), *path.absolute().parents
    above = next(place for place in places[kind != "folder" :] if os.path.lexists(place))
    try:
        if kind == "file" and path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=above))  # permissions alone do not tell: in /proc nothing can be made
    except OSError as error:
        kind, made = kind.removeprefix("new "), "" if path.exists() else f" be made in {above}"
        found = f"{path} cannot{made}: {error.strerror}"
        raise ValueError(f"{argument} must be a {kind} that can be written, and {found}") from error


def one_line(error: BaseException, limit: int | None = None) -> str:
    """What is wrong, in one line of at most `limit` characters, without what strict dataclasses and DataLoader workers
    wrap around it."""
    from huggingface_hub.errors import StrictDataclassError  # slow to import, and most commands end without an error

    while isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return (" ".join(text.split()) or type(error).__name__)[:limit]


@contextlib.contextmanager
def quiet():
    """Without the warnings of transformers inside, such as those about a load whose outcome is checked anyway."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def listed(names: Iterable[str], limit: int = 6) -> str:
    """The first of the names, on one line whatever they are, and how many more there are."""
    names = [name if name.isprintable() else ascii(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
