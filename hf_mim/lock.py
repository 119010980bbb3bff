"""One writer at a time in a folder: a lock that a dead owner does not hold.

The lock is a file that names its owner. It is made by a hard link, which is atomic on network file systems too. The
owner touches it every `BEAT` seconds. Whoever finds the lock of a process on this machine asks the kernel whether
it lives. The lock of another machine, or of another container, is held as long as its file changes: after `PATIENCE`
seconds without a change, its owner is dead. No clock of another machine is compared.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from hf_mim.files import beside

logger = logging.getLogger(__name__)

LOCK = "_lock"  # the file; like all names with a _ it is never uploaded
BEAT, PATIENCE = 10.0, 45.0  # seconds
_SAME = "host", "boot", "pids"  # a process with the same three can be looked up here


class LockedError(ValueError):
    """Another process writes into the folder."""


@contextlib.contextmanager
def locked(folder: str | Path, argument: str, tell: Callable[[str], None] = logger.warning) -> Iterator[None]:
    """Inside, this process alone writes into an existing folder. Such a block may stand in another one.

    Args:
        argument: the name of the argument that gave the folder, for the error.
        tell: called with a line before this waits to see whether the owner on another machine lives.

    Raises:
        LockedError: another process holds the lock; one line.
        OSError: the lock cannot be written.
    """
    path = Path(folder).absolute() / LOCK
    mine = _about_this_process()
    if _same(_read(path) or {}, mine):
        yield
        return
    aside = beside(path, "", "")
    try:
        aside.write_text(json.dumps(mine))
        while not _take(path, aside):
            dead = _read(path)
            check_unlocked(folder, argument, tell)
            _remove(path, dead)
    finally:
        aside.unlink(missing_ok=True)
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, mine, over), daemon=True)
    beat.start()
    try:
        yield
    finally:
        over.set()
        beat.join()
        if _same(_read(path) or {}, mine):
            path.unlink(missing_ok=True)


def _take(path: Path, aside: Path) -> bool:
    """Make the lock with the content of `aside`. False if there is one already."""
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "x") as file:
                file.write(aside.read_text())
        except FileExistsError:
            return False
    return True


def _remove(path: Path, dead: dict | None):
    """Remove the lock of this owner. If another process has taken it over meanwhile, that one keeps it."""
    gone = beside(path, "", ".dead")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, gone)
        if _read(gone) != dead:
            _take(path, gone)
        gone.unlink()


def check_unlocked(folder: str | Path, argument: str, tell: Callable[[str], None] = logger.warning):
    """Raise LockedError, in one line, if a living process other than this one holds the lock of the folder."""
    path = Path(folder).absolute() / LOCK
    owner = _read(path)
    mine = _about_this_process()
    if owner is None or _same(owner, mine) or not _lives(path, owner, mine, tell):
        return
    raise LockedError(
        f"{argument} {folder} is in use by process {owner.get('process')} on {owner.get('host')} since "
        f"{owner.get('since')}; wait until it has ended, or stop it (its lock is {path})"
    )


def _about_this_process() -> dict:
    """Who the owner of a lock is. `started` tells two processes with one number apart."""
    process = psutil.Process()
    return {
        "process": process.pid,
        "started": process.create_time(),
        "host": socket.gethostname(),
        "boot": _first_line("/proc/sys/kernel/random/boot_id") or round(psutil.boot_time()),
        "pids": os.readlink("/proc/self/ns/pid") if os.path.islink("/proc/self/ns/pid") else None,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _first_line(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()


def _lives(path: Path, owner: dict, mine: dict, tell: Callable[[str], None]) -> bool:
    if all(owner.get(name) == mine[name] for name in _SAME):
        try:
            process = psutil.Process(owner["process"])
            return abs(process.create_time() - owner["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
            return False
    tell(f"Looking for up to {PATIENCE:.0f} s whether process {owner.get('process')} on {owner.get('host')} still runs")
    first, end = _state(path), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        if (now := _state(path)) != first:
            return now is not None
    return False


def _state(path: Path) -> tuple[int, int] | None:
    """What changes with each beat. The file is opened, which makes a network file system ask its server."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        about = os.fstat(file.fileno())
        return about.st_ino, about.st_mtime_ns


def _read(path: Path) -> dict | None:
    """Who holds the lock; None if nobody, {} if the file does not say who."""
    try:
        owner = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _same(owner: dict, mine: dict) -> bool:
    return all(owner.get(name) == mine[name] for name in (*_SAME, "process", "started"))


def _beat(path: Path, mine: dict, over: threading.Event):
    while not over.wait(BEAT):
        if not _same(_read(path) or {}, mine):
            logger.warning("The lock %s was deleted or taken by another process: two may write into its folder", path)
            return
        with contextlib.suppress(OSError):  # it was deleted just now; the next beat tells
            os.utime(path)
