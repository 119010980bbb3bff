"""The parts of an extraction that is under way: files of a few hundred images, each whole or not there."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from hf_mim.evaluation.cache import CHUNK
from hf_mim.files import replacing


class Parts:
    """Features of one kind of `count` images, in files of `CHUNK` images; only one part is in memory.

    It has the methods of `evaluation.cache.FeatureStore` that `FeatureExtractor.fill` calls. A part that is there is
    whole, because it gets its name when it is written.
    """

    def __init__(self, folder: Path, count: int):
        self.folder, self.num_parts = folder, -(-count // CHUNK)
        self._now: list[np.ndarray] = []
        folder.mkdir(exist_ok=True)

    def missing(self) -> list[int]:
        return [number for number in range(self.num_parts) if not self._path(number).exists()]

    def broken(self) -> list[int]:
        """Images that could not be decoded. Their rows hold no features."""
        return sorted(row for path in self.folder.glob("*.json") for row in json.loads(path.read_text()))

    def write(self, rows: Sequence[int], features: Tensor):
        self._now.append(features.cpu().numpy())

    def commit(self, number: int, broken: list[int]):
        if broken:  # first, because the part counts as whole when its features are there
            with replacing(self._path(number).with_suffix(".json")) as aside:
                aside.write_text(json.dumps(broken))
        with replacing(self._path(number)) as aside, aside.open("wb") as file:
            np.save(file, np.concatenate(self._now))
        self._now.clear()

    def read(self, number: int) -> np.ndarray:
        """The features of a part, with the rows of broken images."""
        return np.load(self._path(number))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.npy"
