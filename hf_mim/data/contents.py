"""What images hold, whatever they are called: a digest of the bytes of each."""

import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from datasets import Dataset

from .dicom import split_frame
from .stacks import is_stack, present

DIGEST = 16  # bytes
_ROWS = 1000  # that are looked at at once
_THREADS = 8  # they wait for the disk; hashing runs without Python's lock


def digests(images: Dataset) -> np.ndarray:
    """The digest of each image `[n]`, of the type S16. Equal bytes have equal digests, in files and in tables.

    The digest of a frame (`scan.dcm/0003`) is of its file's bytes and its number.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [one for values in _parts(images) for one in pool.map(digest, values)]
    return np.array(found, dtype=f"S{DIGEST}")


def stamps(images: Dataset) -> tuple[str, float] | None:
    """(a hash of where the files of the images lie and when they were changed, the time of the last change).

    None if images are not files of their own. A change of a file's bytes also changes the time at which its entry was
    changed, which nobody can set back.
    """
    hashed, newest = hashlib.sha256(), 0.0
    for values in _parts(images):
        for held in (part for value in values for part in (present(value).values() if is_stack(value) else [value])):
            if not isinstance(held, dict) or held.get("bytes") is not None:
                return None
            path = os.path.abspath(held.get("path") or "")
            try:
                about = os.stat(split_frame(path)[0])
            except OSError:  # the extraction will find that the file is not there
                return None
            newest = max(newest, about.st_ctime)
            hashed.update(f"{path} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino}\n".encode())
    return hashed.hexdigest(), newest


def count_copies(train: np.ndarray, test: np.ndarray) -> int:
    """How many test images are training images too, byte for byte."""
    return int(np.isin(test, train).sum())


def short_hash(found: np.ndarray) -> str:
    """12 hexadecimal digits for images in their order, by what they hold."""
    return hashlib.sha256(found.tobytes()).hexdigest()[:12]


def _parts(images: Dataset):
    for start in range(0, len(images), _ROWS):
        yield images[start : start + _ROWS]["image"]


def digest(value) -> bytes:
    """The digest of one value of an image column."""
    data = value
    if is_stack(value):
        data = b"".join(map(digest, value.values()))
    elif isinstance(value, dict):
        data = value.get("bytes")
        if data is None:
            path, frame = split_frame(value.get("path") or "")
            try:
                if frame is not None:
                    about = os.stat(path)
                    data = _file_digest(path, about.st_mtime_ns, about.st_size) + frame.to_bytes(8, "big")
                else:
                    with open(path, "rb") as file:
                        data = file.read()
            except OSError:  # as above
                data = b"missing " + os.fsencode(path)
    elif not isinstance(value, bytes):
        array = np.asarray(value)
        data = f"{array.dtype}{array.shape}".encode() + array.tobytes()
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


@functools.lru_cache(maxsize=1024)
def _file_digest(path: str, changed: int, size: int) -> bytes:
    """The digest of a file of several frames, which is read once for all of them."""
    with open(path, "rb") as file:
        return hashlib.blake2b(file.read(), digest_size=DIGEST).digest()
