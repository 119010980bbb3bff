"""Checkpoints that are whole or absent.

A checkpoint is written into `_saving/` beside the others. It then gets a manifest with the size and the SHA-256 of each
file, and only then its name, `checkpoint-STEP`. So a run that is killed, or a disk that fills up, leaves no half of a
checkpoint under that name. The manifest shows what happens to its files later (one is deleted, a block goes bad), and a
resume passes over a damaged checkpoint.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from hf_mim.files import follow_umask, sha256
from hf_mim.run_folder import MANIFEST, RESULTS, STAGING, checkpoints, kept_results, step_of


def write_manifest(folder: Path, **about):
    """Write `manifest.json` (`about`, and size and hash of each file below `folder`), and flush all to the disk."""
    files = {}
    follow_umask(folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _flush(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(about | {"files": files}, indent=1))
    _flush(manifest)
    for directory in {folder, *(path.parent for path in folder.rglob("*"))}:
        _flush_folder(directory)


def check(folder: str | Path, hashes: bool = True) -> dict:
    """The manifest of a checkpoint, after the sizes of its files and their hashes were compared with it.

    Raises:
        ValueError: the checkpoint is damaged; the text goes on after its name ("lacks optimizer.pt").
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = [(name, about["bytes"], about["sha256"]) for name, about in manifest["files"].items()]
    except FileNotFoundError:
        raise ValueError(f"has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"has a damaged {MANIFEST}") from None
    for name, size, _ in files:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"lacks {name}")
        if path.stat().st_size != size:
            raise ValueError(f"has {path.stat().st_size} of {size} bytes of {name}")
    for name, _, expected in files if hashes else ():
        if sha256(folder / name) != expected:
            raise ValueError(f"has other bytes in {name} than were saved")
    return manifest


def lacking(folder: Path) -> list[str]:
    """What a resume needs and a checkpoint does not have: the state of the optimizer and of the schedule."""
    names = {path.name for path in folder.iterdir()}
    found = {"optimizer": any(name.startswith("optimizer") for name in names), "scheduler": "scheduler.pt" in names}
    return [part for part, there in found.items() if not there]


def is_whole(folder: str | Path, hashes: bool = True) -> bool:
    """Whether `check` finds nothing."""
    try:
        check(folder, hashes)
    except (ValueError, OSError):
        return False
    return True


def newest_whole(
    run_folder: str | Path, tell: Callable[[str], None] = lambda line: None, up_to: int | None = None
) -> Path | None:
    """The latest whole checkpoint, None if there is none.

    tell: called for each damaged one, with the reason.
    up_to: only those of this step and of earlier ones.
    """
    for folder in checkpoints(run_folder):
        if up_to is not None and step_of(folder) > up_to:
            continue
        try:
            check(folder)
        except (ValueError, OSError) as error:
            tell(f"{folder.name} is passed over: it {error}")
        else:
            return folder
    return None


def commit(staged: Path, final: Path):
    """Move a checkpoint with its manifest to its name. A whole one that is there already is the same, and stays."""
    if final.exists():
        if is_whole(final):
            shutil.rmtree(staged)
            return
        _remove(final)
    os.rename(staged, final)
    _flush_folder(final.parent)


def rotate(run_folder: str | Path, limit: int | None, keep: Collection[str] = (), proved: int | None = None):
    """Delete all checkpoints but the `limit` latest whole ones, those whose names are in `keep`, and the latest whole
    one up to step `proved`.

    If none is whole, delete nothing.
    """
    if not limit or limit < 0:
        return
    found = checkpoints(run_folder)
    whole = [folder for folder in found if is_whole(folder, hashes=False)]
    kept = {folder.name for folder in whole[:limit]} | set(keep)
    if proved is not None:
        kept |= {folder.name for folder in [folder for folder in whole if step_of(folder) <= proved][:1]}
    for folder in found if whole else ():
        if folder.name not in kept:
            _remove(folder)


def clear_staging(run_folder: str | Path):
    """Delete what an interrupted save has left."""
    shutil.rmtree(Path(run_folder) / STAGING, ignore_errors=True)


@contextlib.contextmanager
def written_aside(run_folder: str | Path) -> Iterator[Path]:
    """A folder to write files into. When all are written, each of them is moved to `run_folder`."""
    run_folder = Path(run_folder)
    aside = run_folder / STAGING / "files"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        follow_umask(aside)
        for path in aside.iterdir():
            _flush(path)
            os.replace(path, run_folder / path.name)
    finally:
        clear_staging(run_folder)


def _remove(folder: Path):
    """Delete a checkpoint, but keep its results. It is renamed first, so that a half-deleted one does not look like a
    checkpoint."""
    trash = folder.parent / STAGING / f"removed-{folder.name}"
    trash.parent.mkdir(exist_ok=True)
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    for result in (trash / RESULTS).glob("*.json"):
        kept_results(folder).mkdir(parents=True, exist_ok=True)
        os.replace(result, kept_results(folder) / result.name)
    shutil.rmtree(trash, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is not empty: a save may be under way
        trash.parent.rmdir()


def _flush(path: Path):
    """Write a file to the disk: what is only in the page cache is lost when the machine stops."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path):
    """Write a folder's entries to the disk. Some file systems cannot, which is no error here."""
    with contextlib.suppress(OSError):
        _flush(path)
