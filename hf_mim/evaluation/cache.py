"""Features on disk: written once, memory-mapped, checked before they are read.

Each combination of weights, data and preprocessing has a folder, with a file for each layer and pooling. Each written
chunk is recorded with its checksum. So an interrupted extraction continues where it stopped, and a chunk that is
damaged or missing is computed again. A cache that cannot be written costs a warning and nothing else.
"""

import hashlib
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_mim.data.contents import DIGEST, digests, stamps
from hf_mim.files import free_space, one_line, replacing

logger = logging.getLogger(__name__)

CHUNK = 512  # images
FORMAT = 3  # part of every key; it is raised when older files in caches may be wrong
SETTLED = 2.0  # seconds after which another change of a file has another time, on every file system


def default_cache() -> Path | None:
    """The folder in `HF_MIM_CACHE`, or hf_mim/features in the user's cache folder; None, with a warning, if the user
    has no home folder."""
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    try:
        return Path(os.environ.get("HF_MIM_CACHE", f"{home}/hf_mim/features")).expanduser()
    except RuntimeError:
        warn_of_no_cache("there is no home folder")
        return None


def warn_of_no_cache(reason: str):
    """Say that features are not kept, and what would keep them."""
    logger.warning("features are not kept: %s; --cache FOLDER or the variable HF_MIM_CACHE names a place", reason)


def fingerprint(about: dict) -> str:
    """A short name for a description. Equal descriptions have equal names."""
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


def image_digests(images: Dataset, cache: Path | None) -> np.ndarray:
    """`data.contents.digests`. The cache keeps those of files, so that files which nobody has changed are not read."""
    found = stamps(images) if cache is not None else None
    if found is None:
        return digests(images)
    stamp, newest = found
    path = cache / "contents" / f"{stamp}.npy"
    try:
        kept = np.load(path)
        if kept.shape == (len(images),) and kept.dtype == f"S{DIGEST}":
            return kept
    except (OSError, ValueError, EOFError):  # not kept, or damaged
        pass
    made = digests(images)
    if time.time() - newest > SETTLED:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as aside, aside.open("wb") as file:
                np.save(file, made)
        except OSError:  # the features will not find a place either, and then there is a warning
            pass
    return made


class NoRoom(ValueError):
    """The features do not fit where they are to be kept."""


def check_room(shapes: list[tuple[int, ...]], folder: Path | None):
    """Raise NoRoom, before hours of work, if the disk or memory has no room for features of these shapes."""
    needed = 4 * sum(math.prod(shape) for shape in shapes)
    where = folder or "memory, which has to hold them without a cache; give --cache FOLDER or fewer images"
    if needed > (free := free_space(folder)):
        needed, free = (f"{size / 2**30:.1f} GiB" for size in (needed, free))
        raise NoRoom(f"the features take {needed}, and {free} are free in {where}")


class FeatureStore:
    """Features `[n, ...]` of one layer and pooling, filled by chunks of images; on disk, or in memory without a path.

    `missing` tells which chunks must be written, `write` and `commit` write them, `tensor` reads all.
    """

    def __init__(self, shape: tuple[int, ...], path: Path | None = None):
        self.shape, self.path, self.chunks = tuple(shape), path, {}
        if path is None:
            self.array: Any = np.empty(self.shape, np.float32)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.record = path.with_suffix(".json")
        size = 4 * int(np.prod(self.shape))
        if not path.exists() or path.stat().st_size != size:
            self.record.unlink(missing_ok=True)
            try:
                with path.open("ab") as file:  # keeps the file itself, because another process may have it mapped
                    file.truncate(size)
                    if size and hasattr(os, "posix_fallocate"):  # a full disk raises here, not as a bus error later
                        os.posix_fallocate(file.fileno(), 0, size)
            except OSError:
                path.unlink(missing_ok=True)
                raise
        # This array reads and writes the file; `tensor` gives its readers a private view of the same pages.
        self.array = np.memmap(path, np.float32, "r+", shape=self.shape)
        self.chunks = {number: entry for number, entry in self._recorded().items() if self._is_whole(number, entry)}

    @property
    def num_chunks(self) -> int:
        return -(-self.shape[0] // CHUNK)

    def missing(self) -> list[int]:
        """Chunks that are not there, or have changed since they were written."""
        return [number for number in range(self.num_chunks) if number not in self.chunks]

    def broken(self) -> list[int]:
        """Images that could not be decoded. Their rows hold no features."""
        return sorted(index for entry in self.chunks.values() for index in entry["broken"])

    def write(self, rows: Sequence[int], features: Tensor):
        """Write features `[b, ...]` of these images, which must be consecutive."""
        assert len(features) == len(rows) == rows[-1] + 1 - rows[0]
        self.array[rows[0] : rows[-1] + 1] = features.cpu().numpy()

    def commit(self, number: int, broken: list[int]):
        """Record that a chunk is complete, after its features are on the disk."""
        self.chunks[number] = {"crc32": self._checksum(number) if self.path else None, "broken": broken}
        if self.path:
            self.array.flush()
            try:
                with replacing(self.record) as aside:
                    aside.write_text(json.dumps(self.chunks))
            except OSError as error:  # the features are there; only another run will not know that they are whole
                warn_of_no_cache(one_line(error))

    def copy_to(self, other: "FeatureStore", kept: Tensor) -> "FeatureStore":
        """Fill the missing chunks of `other` with the rows that are `kept`, in order; returns `other`."""
        rows = kept.nonzero()[:, 0]
        for number in other.missing():
            part = range(number * CHUNK, min((number + 1) * CHUNK, len(rows)))
            other.write(part, torch.from_numpy(self.array[rows[part.start : part.stop].numpy()]))
            other.commit(number, broken=[])
        return other

    def tensor(self) -> Tensor:
        """float32 `[n, ...]`. A file is memory-mapped; changes to the tensor stay in memory."""
        if self.path is None:
            return torch.from_numpy(self.array)
        return torch.from_numpy(np.memmap(self.path, np.float32, "c", shape=self.shape))

    def _checksum(self, number: int) -> int:
        return zlib.crc32(np.ascontiguousarray(self.array[number * CHUNK : (number + 1) * CHUNK]))

    def _recorded(self) -> dict[int, dict]:
        try:
            entries = json.loads(self.record.read_text())
            return {int(number): {"crc32": e["crc32"], "broken": list(e["broken"])} for number, e in entries.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # nothing recorded, or a damaged record
            return {}

    def _is_whole(self, number: int, entry: dict) -> bool:
        return 0 <= number < self.num_chunks and entry["crc32"] == self._checksum(number)
