"""The features of a stream: its images are read in order, once, and neither indexed nor copied before.

What the features are of is not known before they are read, so each part keeps the names, the labels and a digest of its
images. An extraction that goes on reads past the images of the parts that are whole, and compares the digests.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from hf_mim.data import BrokenImagesError
from hf_mim.data.columns import typed
from hf_mim.data.contents import DIGEST, digest, short_hash
from hf_mim.data.damage import rows_of
from hf_mim.data.dataset import MAX_BROKEN, MIN_STREAMED
from hf_mim.data.decode import image_name
from hf_mim.embeddings.parts import Parts
from hf_mim.evaluation.cache import CHUNK
from hf_mim.evaluation.encoder import FeatureSpec
from hf_mim.evaluation.features import Decoder, FeatureExtractor
from hf_mim.files import free_space, replacing
from hf_mim.memory import freed_memory_kept
from hf_mim.progress import progress_bar


class StreamedParts:
    """What is known of the images of each part: names, labels, and a digest of what they hold."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __len__(self) -> int:
        """How many parts are whole. A part is written after its features."""
        return len(list(self.folder.glob("*.json")))

    def read(self, number: int) -> dict:
        """`names`, `labels` (None without any), `digest`."""
        return json.loads(self._path(number).read_text())

    def write(self, number: int, about: dict):
        with replacing(self._path(number)) as aside:
            aside.write_text(json.dumps(about))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.json"


class _Batches(TorchIterableDataset):
    """Batches of a stream, for DataLoader. None crosses the border of two parts.

    Gives `{"row", "pixels", "decoded", "names", "labels", "digests"}`; of the first `skip` images only the digests.
    """

    def __init__(self, images: IterableDataset, decoder: Decoder, batch_size: int, skip: int):
        self.images, self.decoder, self.batch_size, self.skip = images, decoder, batch_size, skip

    def __iter__(self) -> Iterator[dict]:
        feature, row = self.images.features["image"], 0
        stream = rows_of(self.images)
        while batch := list(islice(stream, min(self.batch_size, CHUNK - row % CHUNK))):
            values = [typed(sample["image"], feature) for sample in batch]
            about = {"row": row, "digests": [digest(value) for value in values]}
            if row >= self.skip:
                decoded = [self.decoder(row + place, value) for place, value in enumerate(values)]
                about["pixels"] = torch.stack([pixels for pixels, _ in decoded])
                about["decoded"] = [good for _, good in decoded]
                about["names"] = [image_name(value, f"image {row + place}") for place, value in enumerate(values)]
                about["labels"] = [sample.get("label") for sample in batch] if "label" in batch[0] else None
            yield about
            row += len(batch)


@freed_memory_kept()
def extract_stream(
    extract: FeatureExtractor,
    images: IterableDataset,
    specs: Sequence[FeatureSpec],
    stores: Sequence[Parts],
    parts: StreamedParts,
) -> int:
    """Extract the features of a stream, part by part, from the first part that is missing. Returns how many images
    were read, broken ones included.

    Raises:
        ValueError: the parts that are there are of other images, or the disk is full.
        BrokenImagesError: more than one image, and more than 1 % of them (of 1,000 at first), cannot be decoded.
    """
    done, row_bytes = len(parts), 4 * sum(torch.Size(extract.row_shape(spec)).numel() for spec in specs)
    skip = sum(len(parts.read(number)["names"]) for number in range(done))
    reader = _Batches(images, Decoder(extract.encoder, extract.crop), extract.batch_size, skip)
    seen, part = 0, _new_part()
    with progress_bar(bool(extract.progress), "features", None, " images") as bar:
        for batch in extract.loader(reader, batch_size=None):
            number, start = divmod(batch["row"], CHUNK)
            if start == 0 and seen:
                _finish(parts, stores, number - 1, part, done)
                _check_broken(parts, stores, max(seen, MIN_STREAMED))
                part = _new_part()
            if start == 0 and number >= done:
                _check_room(parts.folder, CHUNK * row_bytes)
            part["digests"] += batch["digests"]
            if "pixels" in batch:
                rows = range(batch["row"], batch["row"] + len(batch["names"]))
                extract.write(batch["pixels"], rows, specs, stores)
                part["broken"] += [row for row, good in zip(rows, batch["decoded"], strict=True) if not good]
                part["names"] += batch["names"]
                part["labels"] = None if batch["labels"] is None else (part["labels"] or []) + batch["labels"]
            seen = batch["row"] + len(batch["digests"])
            bar.update(len(batch["digests"]))
    if seen < skip:
        raise ValueError(f"the source ends after {seen:,} images, and {skip:,} were embedded before; {_AGAIN}")
    _finish(parts, stores, (seen - 1) // CHUNK, part, done)
    _check_broken(parts, stores, seen)
    return seen


def check_first(images: Dataset | IterableDataset, extract: FeatureExtractor):
    """Raise ValueError if the first image is not of the kind that the encoder takes."""
    sample = next(iter(images))
    Decoder(extract.encoder, extract.crop)(0, typed(sample["image"], images.features["image"]))


_AGAIN = "the folder _OUTPUT.partial beside output must be deleted to begin again"


def _new_part() -> dict:
    return {"names": [], "labels": None, "broken": [], "digests": []}


def _finish(parts: StreamedParts, stores: Sequence[Parts], number: int, part: dict, done: int):
    """Keep a part, or compare its images with those of the part that is there."""
    found = short_hash(np.array(part["digests"], dtype=f"S{DIGEST}"))
    if number >= done:
        for store in stores:
            store.commit(number, part["broken"])
        parts.write(number, {"names": part["names"], "labels": part["labels"], "digest": found})
    elif parts.read(number)["digest"] != found:
        raise ValueError(f"the images from {number * CHUNK:,} on are not those that were embedded before; {_AGAIN}")


def _check_broken(parts: StreamedParts, stores: Sequence[Parts], seen: int):
    broken = stores[0].broken()
    if len(broken) > 1 and len(broken) > MAX_BROKEN * seen:
        names = [parts.read(row // CHUNK)["names"][row % CHUNK] for row in broken[:20]]
        more = f" and {len(broken) - 20} more" if len(broken) > 20 else ""
        raise BrokenImagesError(
            f"{len(broken)} images cannot be decoded: {', '.join(names)}{more}; repair or remove them"
        )


def _check_room(folder: Path, needed: int):
    if needed > (free := free_space(folder)):
        raise ValueError(f"output has no room: {free / 2**20:.1f} MiB are free, and the next part needs more")
