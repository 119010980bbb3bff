"""Features of a frozen encoder: each image is read once, and gives all layers and poolings. A cache may keep them."""

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_mim.data import BrokenImagesError
from hf_mim.data.crop import crop_rng, load_crop
from hf_mim.data.dataset import MAX_BROKEN
from hf_mim.data.decode import BrokenImage, decoding, image_name
from hf_mim.data.workers import leave_signals_to_the_main_process
from hf_mim.evaluation.cache import (
    CHUNK,
    FORMAT,
    FeatureStore,
    NoRoom,
    check_room,
    fingerprint,
    image_digests,
    warn_of_no_cache,
)
from hf_mim.evaluation.encoder import FeatureSpec, FrozenEncoder
from hf_mim.evaluation.raw_pixels import RawPixels
from hf_mim.evaluation.result import installed_versions
from hf_mim.files import one_line
from hf_mim.memory import freed_memory_kept
from hf_mim.models.pixels import scale_pixels
from hf_mim.progress import progress_bar

logger = logging.getLogger(__name__)

LARGEST_TABLE = 2**26  # similarities or scores that a protocol holds at once: 256 MB


@dataclass
class FeatureExtractor:
    """`extract(split, specs)`: features of every image of a split, one tensor for each spec.

    Args:
        encoder: makes the features.
        batch_size, num_workers: of the extraction; they do not change the features.
        cache: folder in which features are kept; None, or a folder that cannot be written: they stay in memory.
        crop: what is resized to the encoder's size: `CenterCrop`, `CenterWindow`, `WholeImage`; default: its own crop.
        progress: show a bar, or one with this text.
        kept: a `KeptCrops`, so that other extractions decode these images no more; without `num_workers`.
    """

    encoder: FrozenEncoder | RawPixels
    batch_size: int = 64
    num_workers: int = 0
    cache: Path | None = None
    crop: Any = None
    progress: bool | str = True
    kept: object | None = None

    def __post_init__(self):
        self.crop = self.encoder.crop if self.crop is None else self.crop

    def replace(self, **changes) -> "FeatureExtractor":
        """The same with other arguments."""
        return dataclasses.replace(self, **changes)

    def __call__(self, split, specs: Sequence[FeatureSpec | str]) -> list[Tensor]:
        """float32 on the CPU, memory-mapped if there is a cache: `[n, D]`, or `[n, N, D]` for tokens.

        Images that cannot be decoded are left out, up to 1 % of them, if the split has `leave_out`.

        Raises:
            ValueError: the encoder has no such features, or the disk or memory has no room for them.
            BrokenImagesError: more images cannot be decoded, or the split cannot leave them out.
        """
        specs = [FeatureSpec.parse(spec) for spec in specs]
        for spec in specs:
            self.encoder.check(spec)
        stores = self._stores(split, specs)
        missing = sorted({number for store in stores for number in store.missing()})
        if missing:
            self.fill(split, specs, stores, missing)
        if broken := sorted({row for store in stores for row in store.broken()}):
            self.leave_out(split, broken)
            kept = torch.ones(stores[0].shape[0], dtype=torch.bool)
            kept[broken] = False
            stores = [store.copy_to(new, kept) for store, new in zip(stores, self._stores(split, specs), strict=True)]
        return [store.tensor() for store in stores]

    def _stores(self, split, specs: list[FeatureSpec]) -> list[FeatureStore]:
        shapes = [(len(split), *self.row_shape(spec)) for spec in specs]
        if self.cache is not None:
            try:
                return self._kept_stores(split, specs, shapes)
            except (OSError, NoRoom) as error:  # a full disk, no permission
                warn_of_no_cache(one_line(error))
        check_room(shapes, None)
        return [FeatureStore(shape) for shape in shapes]

    def _kept_stores(self, split, specs: list[FeatureSpec], shapes: list[tuple[int, ...]]) -> list[FeatureStore]:
        folder = self._folder(split)
        paths = [folder / f"{str(spec).replace('/', '-')}.f32" for spec in specs]
        check_room([shape for shape, path in zip(shapes, paths, strict=True) if not path.exists()], self.cache)
        return [FeatureStore(shape, path) for shape, path in zip(shapes, paths, strict=True)]

    @freed_memory_kept()
    def fill(self, split, specs: Sequence[FeatureSpec], stores: Sequence[FeatureStore], missing: list[int]):
        """Extract the chunks of these numbers, and write them to the stores, one for each spec."""
        chunks = [range(number * CHUNK, min((number + 1) * CHUNK, len(split))) for number in missing]
        batches = [rows[i : i + self.batch_size] for rows in chunks for i in range(0, len(rows), self.batch_size)]
        images = _Decoded(split.images, Decoder(self.encoder, self.crop, self.kept))
        images.decode_first(batches[0][0])  # raises before the bar if they have other channels than the encoder
        loader = self.loader(images, batch_sampler=batches)
        broken: list[int] = []
        text = self.progress if isinstance(self.progress, str) else "features"
        with progress_bar(bool(self.progress), text, sum(map(len, chunks)), " images") as bar:
            for rows, (pixels, decoded) in zip(batches, loader, strict=True):
                self.write(pixels, rows, specs, stores)
                broken += [row for row, good in zip(rows, decoded.tolist(), strict=True) if not good]
                if (rows[-1] + 1) % CHUNK == 0 or rows[-1] + 1 == len(split):
                    for store in stores:
                        store.commit(rows[-1] // CHUNK, broken)
                    broken = []
                bar.update(len(rows))

    def loader(self, images: Dataset, **batches: Any) -> DataLoader:
        """A `DataLoader` of decoded images. `batches` are the arguments that say how they are divided."""
        return DataLoader(
            images,
            num_workers=self.num_workers,
            pin_memory=self.encoder.device.type != "cpu",
            worker_init_fn=leave_signals_to_the_main_process,
            generator=torch.Generator(),  # without it, DataLoader draws from torch's generator, which a training uses
            **batches,
        )

    def write(self, pixels: Tensor, rows: Sequence[int], specs: Sequence[FeatureSpec], stores: Sequence[FeatureStore]):
        """Write the features of decoded images `[B, C, h, w]` to the stores, one for each spec."""
        features = self.encoder.extract(self.encoder.preprocess(pixels), specs)
        for spec, store, tensor in zip(specs, stores, features, strict=True):
            if not tensor.isfinite().all():
                raise ValueError(
                    f"features {spec} of {self.encoder.name} hold numbers that are not finite: the checkpoint is "
                    f"broken, or they overflow in {self.encoder.dtype}"
                )
            store.write(rows, tensor)

    def leave_out(self, split, broken: list[int]):
        """Drop images that could not be decoded from the split, with a warning. Raises as `__call__`."""
        names = [image_name(split.images[row]["image"], f"image {row}") for row in broken[:20]]
        more = f" and {len(broken) - 20} more" if len(broken) > 20 else ""
        message = f"{len(broken)} of {len(split)} images cannot be decoded: {', '.join(names)}{more}"
        if len(broken) > MAX_BROKEN * len(split) and len(broken) > 1 or not hasattr(split, "leave_out"):
            raise BrokenImagesError(f"{message}; repair or remove them")
        logger.warning("%s; left out", message)
        split.leave_out(broken)

    def row_shape(self, spec: FeatureSpec) -> tuple[int, ...]:
        """The shape of an image's features."""
        width = self.encoder.feature_width(spec)
        rows, columns = self.encoder.grid
        return (rows * columns, width) if spec.pooling == "tokens" else (width,)

    def _folder(self, split) -> Path:
        """The cache's folder for these features. Its name depends on all that decides a feature, except layer and
        pooling, which name the file."""
        about = self.encoder.describe() | {
            "images": hashlib.sha256(image_digests(split.images, self.cache).tobytes()).hexdigest(),
            "crop": repr(self.crop),
            "versions": installed_versions(),
            "format": FORMAT,
        }
        return Path(self.cache) / fingerprint(about)


class Decoder:
    """`decoder(row, value)`: a value of an image column, of this row of the source → (uint8 or float32 in 0..255
    [C, h, w] as the encoder takes it, whether it could be decoded)."""

    def __init__(self, encoder: FrozenEncoder, crop, kept=None):
        self.crop, self.kept = crop, kept
        self.size, self.num_channels, self.value_range = encoder.image_size, encoder.num_channels, encoder.value_range

    def __call__(self, row: int, value) -> tuple[Tensor, bool]:
        try:
            with decoding(image_name(value, f"image {row}")):
                return scale_pixels(self._load(row, value), self.value_range), True
        except BrokenImage:
            return torch.zeros(self.num_channels, *self.size, dtype=torch.uint8), False

    def _load(self, row: int, value) -> Tensor:
        if self.kept is not None:
            return self.kept.load(value, self.crop, self.size, self.num_channels, row, self.value_range)
        return load_crop(value, self.crop, self.size, self.num_channels, crop_rng(0, 0, row), self.value_range)


class _Decoded(Dataset):
    """The decoded images of a dataset, for DataLoader."""

    def __init__(self, images, decoder: Decoder):
        self.images, self.decoder, self.first = images.select_columns("image"), decoder, {}

    def decode_first(self, row: int):
        self.first = {row: self.__getitems__([row])[0]}

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, bool]]:
        values = zip(rows, self.images[rows]["image"], strict=True)
        return [self.first[row] if row in self.first else self.decoder(row, value) for row, value in values]
