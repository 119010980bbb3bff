"""What lies near what in a collection: the images nearest to a query, and the near-duplicates.

Cosines are those of whitened features, see `collection.Whitening`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from torch import Tensor

from hf_mim.checks import least, share
from hf_mim.data import CenterCrop, CenterWindow
from hf_mim.data.crop import crop_rng, load_crop
from hf_mim.data.decode import BrokenImage, decoding, image_name
from hf_mim.data.images import Images
from hf_mim.data.local import stack_beside
from hf_mim.data.sources import load_images, source_name
from hf_mim.data.stacks import is_stack, parts_of
from hf_mim.embeddings.collection import EmbeddedCollection, Found, ImageCollection, Whitening, found
from hf_mim.embeddings.embed import divided
from hf_mim.embeddings.formats import Embeddings, read_about
from hf_mim.evaluation.data_arguments import CropArguments
from hf_mim.evaluation.features import LARGEST_TABLE
from hf_mim.evaluation.knn import ROUNDING, nearest_neighbours, unit_vectors
from hf_mim.evaluation.measure import EncoderArguments
from hf_mim.evaluation.probe_training import parse_features
from hf_mim.models.pixel_types import ImageFormatError
from hf_mim.models.pixels import scale_pixels

THUMBNAIL = 128  # pixels
MOST_PAIRS = 1_000_000  # of near-duplicates
FEWEST = 10  # images, of which whitening and duplicates make sense


@dataclass
class SearchArguments(CropArguments):
    """Where to search, and for what.

    Args:
        duplicates: list the near-duplicates in the collection; no query is needed
        map: draw the collection as a map, like images beside each other; no query is needed
        k: nearest images of each query
        threshold: two images are near-duplicates from this cosine of whitened features on
        features: layer/pooling/norm; default: the first pooled ones in the embeddings, or last/mean/norm
        dataset: where the images of the embeddings are, for their pictures; default: where they were embedded
        split: the split of the images; default: that of the embeddings, or train
        image_column: the images, or their parts such as rgb,ir; default: found by its type
        missing_modality: what an image is that lacks a part: error, or zero, the part is masked as a whole there
        cache: folder in which features of a source of images are kept (default: ~/.cache/hf_mim/features), or none
        output: file of the picture; a picture that is there is replaced
    """

    duplicates: bool = False
    map: bool = False
    k: int = 10
    threshold: float = 0.9
    features: str | None = None
    dataset: str | None = None
    split: str | None = None
    image_column: str | None = None
    missing_modality: Literal["error", "zero"] = "error"
    cache: str = "default"
    output: str = "search.png"

    def __post_init__(self):
        super().__post_init__()
        least(1, k=self.k)
        if self.map and self.duplicates:
            raise ValueError("map cannot be given together with duplicates; give one of them")
        share("(0, 1]", threshold=self.threshold)
        if self.features is not None:
            parse_features(self.features, "search")


class Search:
    """A collection, and the encoder that its features are from.

    Args:
        checkpoint: a folder, or a name on the Hub.
        where: what `embed` has written, or a source of images.
        options: the fields of `SearchArguments`, and those of `EncoderArguments` in `OF_THE_ENCODER`.

    Raises:
        ValueError: in one line, before any work, if they do not fit; for example, if the embeddings are of another
            encoder.
    """

    def __init__(self, checkpoint: str | Path, where: str | Path, **options):
        self.source, options = divided(SearchArguments, options)
        embedded = Embeddings(where) if read_about(where) is not None else None
        crop = self.source.crop()
        if embedded is not None:
            options, crop = as_embedded(embedded, options, self.source)
        self.extract = EncoderArguments(**options, cache=self.source.cache).extractor(str(checkpoint), crop)
        if embedded is not None and self.extract.encoder.sha256 != embedded.about["encoder"]:
            raise ValueError(
                f"in must be embeddings of {source_name(checkpoint)}, and {where} has those of other weights "
                f"({embedded.about['checkpoint']}); give that checkpoint, or run hf-mim embed again"
            )
        self.features = self.source.features or default_features(embedded, self.extract.encoder)
        self.extract.encoder.check(parse_features(self.features, "search"))
        place = self.source.split, self.source.parts()
        if embedded is not None:
            embedded.check(self.features)
            self.collection = EmbeddedCollection(embedded, self.features, self.source.dataset, *place)
            self.image_column = self.collection.image_column
        else:
            if self.source.dataset is not None:
                raise ValueError(f"dataset tells where the images of embeddings are, and {where} holds none")
            images, self.image_column = load_images(where, place[0] or "train", image_column=place[1]), place[1]
            split = Images(images, f"{source_name(where)}, split {place[0] or 'train'}")
            self.collection = ImageCollection(split, where, self.extract, self.features)
        least(2, images=len(self.collection))

    def nearest(self, images: Sequence[str | Path | dict]) -> list[list[Found]]:
        """For each image, a file or a value of an image column, the k nearest images of the collection, the nearest
        first.

        Raises:
            ValueError: one is no image, or lacks channels, or k is more than the images of the collection.
        """
        k = self.source.k
        if k > len(self.collection):
            raise ValueError(f"k must be at most the {len(self.collection)} images of the collection, not {k}")
        rows = [image if isinstance(image, dict) else self.query(str(image)) for image in images]
        for row in rows:
            self.check(row)
        stacked = is_stack(rows[0])
        if any(is_stack(row) != stacked for row in rows):
            raise ValueError("queries must all be in folders of the parts of an image, or none of them")
        feature = ImageFeature(decode=False)
        features = Features(image={key: feature for key in rows[0]} if stacked else feature)
        queries = Dataset.from_dict({"image": rows}, features=features)
        extract = self.extract.replace(cache=None, progress=False)
        whiten = Whitening.of(self.collection)
        features = whiten(extract(Images(queries), [self.features])[0])
        best, start = (torch.empty(len(rows), 0, dtype=torch.float64), torch.empty(len(rows), 0, dtype=torch.int64)), 0
        for part in self.collection.parts():
            near = list(nearest_neighbours(whiten(part), features, min(k, len(part))))
            cosines, places = (torch.cat(column) for column in zip(*near, strict=True))
            cosines, places = torch.cat([best[0], cosines], dim=1), torch.cat([best[1], places + start], dim=1)
            cosines, order = cosines.sort(dim=1, descending=True, stable=True)
            best, start = (cosines[:, :k], places.gather(1, order)[:, :k]), start + len(part)
        return [found(self.collection, *pair) for pair in zip(best[1].tolist(), best[0].tolist(), strict=True)]

    def query(self, file: str) -> dict:
        """A file as a value of the image column. If it is in a folder of a part of the image, such as ir/, the files of
        the other parts belong to it."""
        stack = stack_beside(file, self.image_column) if parts_of(self.image_column) else None
        return stack or {"bytes": None, "path": file}

    def check(self, query: dict):
        """Raise ValueError for a query that the encoder cannot take."""
        try:
            self.picture(query)
        except ImageFormatError as error:
            modalities = getattr(self.extract.encoder.model.config, "modality_channels", {})
            if len(modalities) < 2 or is_stack(query):
                raise
            parts = ",".join(modalities)
            raise ValueError(
                f"{error}. An image of {parts} is one array of all channels; or, with --image_column {parts}, a file "
                "in a folder with the name of its part (docs/modalities.md)"
            ) from error

    def duplicates(self) -> list[list[Found]]:
        """Groups of near-duplicates, those with the highest cosine first.

        Two images whose cosine is at least `threshold` are in one group. The cosine of an image is that with the
        nearest of its group. All features are in memory, and fewer than 10 images tell too little.

        Raises:
            ValueError: there are too few images, or too many pairs, because the threshold is too low.
        """
        if len(self.collection) < FEWEST:
            raise ValueError(f"duplicates need a collection of {FEWEST} images at least, not {len(self.collection)}")
        whiten = Whitening.of(self.collection)
        units = torch.cat([unit_vectors(whiten(part)) for part in self.collection.parts()])
        pairs = near_pairs(units, self.source.threshold)
        return [found(self.collection, *group) for group in groups_of(*pairs)]

    def picture(self, value) -> np.ndarray:
        """The centre of an image, uint8 `[h, w, 3]` or grey `[h, w]`, from a file or a value of an image column.

        Raises:
            ValueError: it cannot be decoded.
        """
        encoder, size = self.extract.encoder, (THUMBNAIL, THUMBNAIL)
        name = value if isinstance(value, str) else image_name(value, "an image of the collection")
        try:
            with decoding(name):
                about = encoder.num_channels, crop_rng(0, 0, 0), encoder.value_range
                pixels = scale_pixels(load_crop(value, CenterCrop(), size, *about), encoder.value_range)
        except BrokenImage as error:
            raise ValueError(f"{error}") from error
        pixels = pixels.float().nan_to_num(nan=0.0).clamp(0, 255).byte().numpy()
        return pixels[:3].transpose(1, 2, 0) if len(pixels) >= 3 else pixels[0]


def as_embedded(embedded: Embeddings, options: dict[str, Any], source: SearchArguments) -> tuple[dict[str, Any], Any]:
    """The options and the crop by which queries are seen as the images of the embeddings were."""
    about = embedded.about
    fixed = {name: about.get(name) for name in ("image_size", "image_mean", "image_std", "dtype", "modalities")}
    given = [name for name in fixed if name in options]
    given += [name for name in ("crop_fraction", "crop_pixels") if getattr(source, name) is not None]
    if given:
        raise ValueError(f"{given[0]} cannot be given together with embeddings: it is that of {embedded.path}")
    window = about.get("crop_pixels")
    return options | fixed, CenterCrop(about["crop_fraction"]) if window is None else CenterWindow(tuple(window))


def default_features(embedded: Embeddings | None, encoder) -> str:
    """The first pooled features of the embeddings; without embeddings, the mean of the last layer."""
    if embedded is None:
        return f"last/mean/{'raw' if encoder.norm is None else 'norm'}"
    kinds = embedded.about["features"]
    pooled = next((kind for kind in kinds if "/tokens/" not in kind), None)
    if pooled is None:
        raise ValueError(f"in must have pooled features, and {embedded.path} has only {', '.join(kinds)}")
    return pooled


def near_pairs(units: Tensor, threshold: float) -> tuple[list[tuple[int, int]], list[float]]:
    """The pairs of unit vectors `[n, D]` whose cosine is at least `threshold`, and their cosines."""
    pairs, cosines = [], []
    step = max(1, LARGEST_TABLE // len(units))
    for start in range(0, len(units), step):
        table = units[start : start + step] @ units[start:].T
        table = table.triu(diagonal=1)  # row i is image start + i, column j is image start + j
        near = (table >= threshold - ROUNDING).nonzero()
        pairs += (near + start).tolist()
        cosines += table[near[:, 0], near[:, 1]].tolist()
        if len(pairs) > MOST_PAIRS:
            raise ValueError(f"threshold must be higher: {threshold} makes more than {MOST_PAIRS:,} pairs")
    return [tuple(pair) for pair in pairs], cosines


def groups_of(pairs: Sequence[tuple[int, int]], cosines: Sequence[float]) -> list[tuple[list[int], list[float]]]:
    """(places, cosines) of images that pairs connect: within a group by place, the group of the closest pair first."""
    group: dict[int, list[int]] = {}
    closest: dict[int, float] = {}
    for pair, cosine in zip(pairs, cosines, strict=True):
        one, other = (group.setdefault(place, [place]) for place in pair)
        if one is not other:
            one.extend(other)
            group.update(dict.fromkeys(other, one))
        for place in pair:
            closest[place] = max(cosine, closest.get(place, -1.0))
    groups = [sorted(places) for places in {id(places): places for places in group.values()}.values()]
    groups.sort(key=lambda places: (-max(closest[place] for place in places), places))
    return [(places, [closest[place] for place in places]) for places in groups]
