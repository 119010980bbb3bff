"""A short text that tells whether the files of a source are still the same, and what has changed."""

import hashlib
import os
import re
from pathlib import Path

from .embedded import EMBEDDED
from .folders import IMAGE_EXTENSIONS, TABLE_EXTENSIONS, scan

_NUM_READ = 64  # files, spread over all, whose bytes are part of the fingerprint
_BYTES_READ = 1 << 16  # of each of them
_COMMIT = "commit "
_PATTERN = (
    r"(?P<files>\d+) files, (?P<bytes>\d+) bytes, names (?P<names>\w+), sizes (?P<sizes>\w+), "
    r"beginnings (?P<beginnings>\w+)"
)


def absolute_source(source: str | None) -> str | None:
    """The absolute path of a source that lies on this machine, so that it means the same in every folder."""
    if source is None or source in EMBEDDED or not os.path.exists(os.path.expanduser(source)):
        return source
    return os.path.abspath(os.path.expanduser(source))


def fingerprint(source: str) -> str | None:
    """The fingerprint of a local file or folder; None for other sources.

    It holds for another place and time of the same files: it has their number, bytes, names and sizes, and the
    beginnings of a few.
    """
    root = Path(source).expanduser()
    if source in EMBEDDED or not root.exists():
        return None
    names = scan(root, IMAGE_EXTENSIONS | TABLE_EXTENSIONS.keys())[0] if root.is_dir() else [""]
    paths = [os.path.join(root, name) if name else str(root) for name in names]
    sizes = [os.stat(path).st_size for path in paths]
    beginnings = hashlib.sha256()
    for path in paths[:: max(1, len(paths) // _NUM_READ)]:
        with open(path, "rb") as file:
            beginnings.update(file.read(_BYTES_READ))
    named = hashlib.sha256(b"\0".join(map(os.fsencode, names))).hexdigest()[:12]
    sized = hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]
    return (
        f"{len(names)} files, {sum(sizes)} bytes, names {named}, sizes {sized}, "
        f"beginnings {beginnings.hexdigest()[:12]}"
    )


def is_copy(one: str, other: str) -> bool:
    """Whether two local sources hold files of the same names, sizes and beginnings."""
    held = fingerprint(one)
    return held is not None and held == fingerprint(other)


def changes(before: str, now: str) -> str:
    """What differs between two fingerprints, in words; "" if nothing does. "commit 1a2b..." is one of the Hub."""
    if before == now:
        return ""
    if all(text.startswith(_COMMIT) for text in (before, now)):
        return f"it has {now}, and had {before}"
    old, new = (re.fullmatch(_PATTERN, text) for text in (before, now))
    if old is None or new is None:
        return "its fingerprint is unreadable"
    if old["files"] != new["files"]:
        return f"it had {int(old['files']):,} files and has {int(new['files']):,}"
    for part in ("names", "sizes", "beginnings"):
        if old[part] != new[part]:
            return f"its files have other {'contents' if part == 'beginnings' else part}"
    return ""
