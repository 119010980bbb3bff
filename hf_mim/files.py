"""Files, for all parts of the package: hashes, writing aside and renaming, errors in one line."""

import contextlib
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

PARTIAL = ".partial"  # the end of the name of a folder that is not whole yet


def sha256(*paths: Path) -> str:
    """The SHA-256, in hex, of the bytes of all files in their order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def beside(path: Path, before: str, after: str) -> Path:
    """A new name beside a path. No process has it, on other machines with the same file system neither."""
    return path.with_name(f"{before}{path.name}.{secrets.token_hex(6)}{after}")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to write, beside `path`. It is renamed to `path` if the block raises nothing, and deleted otherwise."""
    path = Path(path)
    aside = beside(path, "_", ".part")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def check_writable(path: str | Path, argument: str, kind: str = "folder"):
    """Find out, before any work, whether a path can be written. It may not exist yet.

    Args:
        kind: "folder" to write files into; "file" or "new folder" to rename something to this path.

    Raises:
        ValueError: it cannot be written; one line that names the argument.
    """
    path = Path(path)
    places = path.absolute(), *path.absolute().parents
    above = next(place for place in places[kind != "folder" :] if os.path.lexists(place))
    try:
        if kind == "file" and path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=above))  # try it: in /proc, permissions allow it and it fails
    except OSError as error:
        kind, made = kind.removeprefix("new "), "" if path.exists() else f" be made in {above}"
        found = f"{path} cannot{made}: {error.strerror}"
        raise ValueError(f"{argument} must be a {kind} that can be written, and {found}") from error


def check_destination(dest: str | Path, argument: str = "DEST") -> Path:
    """The path of a new folder. Raises ValueError for a file, a link, a folder that is not empty, or no permission."""
    dest = Path(dest)
    if dest.is_symlink():
        raise ValueError(f"{argument} must be a new folder, and {dest} is a link")
    if dest.exists() and not dest.is_dir():
        raise ValueError(f"{argument} must be a new folder, and {dest} is a file")
    if dest.is_dir() and any(dest.iterdir()):
        raise ValueError(f"{argument} must be a new folder, and {dest} holds something already")
    check_writable(dest, argument, "new folder")
    return dest


def check_parent(path: Path, argument: str):
    """Raise ValueError unless the folder that is to hold a path exists: a slip of the pen should make none."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{argument} must be in a folder that exists, and there is no folder {path.parent}")


def check_file(path: Path, argument: str):
    """Raise ValueError for the path of a file, old or new, that is a folder, or whose folder does not exist."""
    if path.is_dir():
        raise ValueError(f"{argument} must be a file, and {path} is a folder")
    check_parent(path, argument)


def check_new_file(path: str | Path, argument: str, ends: tuple[str, ...]) -> Path:
    """The path of a new file with one of these ends, in a folder that exists. Raises ValueError otherwise."""
    path = Path(path)
    if path.suffix not in ends:
        raise ValueError(f"{argument} must end with {' or '.join(ends)}, not {path}")
    if os.path.lexists(path):
        raise ValueError(f"{argument} must be a new file, and {path} exists")
    check_parent(path, argument)
    check_writable(path, argument, "file")
    return path


def free_space(folder: Path | None) -> int:
    """Bytes that are free on the disk of a folder, which may not exist yet; without one, in memory."""
    if folder is None:
        import psutil  # the command line imports this file, and has to be quick

        return psutil.virtual_memory().available
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


@contextlib.contextmanager
def new_folder(dest: str | Path, argument: str = "DEST") -> Iterator[Path]:
    """A folder to write into. It is renamed to `dest` when the block ends well, and removed when the block fails.

    Raises:
        ValueError: as `check_destination`.
        OSError: in one line, if the disk is full or fails, whatever wrote the files.
    """
    dest = check_destination(dest, argument).absolute()
    partial = beside(dest, ".", PARTIAL)
    try:
        with disk_errors(f"{dest} cannot be written: "):
            partial.mkdir(parents=True)
            yield partial
            follow_umask(partial)
            if dest.is_dir():
                dest.rmdir()
            partial.rename(dest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(before: str = ""):
    """Turn what safetensors, torch.save and Python raise on a full or broken disk into an OSError of one line, which
    begins with the text `before`."""
    from safetensors import SafetensorError  # the command line imports this file, and has to be quick

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        raise OSError(f"{before}{one_line(error, 200)}") from error


def one_line(error: BaseException, limit: int | None = None) -> str:
    """The message of an error in one line of at most `limit` characters.

    It leaves out what strict dataclasses and DataLoader workers wrap around the message.
    """
    from huggingface_hub.errors import StrictDataclassError  # slow to import, and few commands end with an error

    while isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return (" ".join(text.split()) or type(error).__name__)[:limit]


def follow_umask(folder: Path):
    """Give the files below a folder the modes that the umask says: safetensors makes its files readable by the owner
    alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


@contextlib.contextmanager
def quiet():
    """Inside, transformers warns of nothing, for example about a load whose outcome we check ourselves."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def listed(names: Iterable[str], limit: int = 6) -> str:
    """The first `limit` names on one line, whatever characters they have, and how many more there are."""
    names = [name if name.isprintable() else ascii(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
