"""A folder that is written whole or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_free(dest: str | Path) -> Path:
    """The path, if nothing is there yet but perhaps an empty folder. Raises ValueError otherwise."""
    dest = Path(dest)
    if dest.is_symlink() or (dest.exists() and not (dest.is_dir() and not any(dest.iterdir()))):
        raise ValueError(f"dest must not exist yet, and {dest} does")
    return dest


@contextlib.contextmanager
def whole_folder(dest: str | Path) -> Iterator[Path]:
    """A temporary folder beside `dest`, which becomes it at the end; after an error there is neither."""
    dest = check_free(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=dest.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's is for the owner alone
        temporary.rename(dest)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
