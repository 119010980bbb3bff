"""A collection to search: its features in parts, what its images are called, and the images themselves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from datasets import Dataset
from torch import Tensor

from hf_mim.data import load_images
from hf_mim.data.columns import typed
from hf_mim.data.damage import rows_of
from hf_mim.data.images import Images
from hf_mim.data.sources import local_folder
from hf_mim.data.stacks import ERROR, image_parts
from hf_mim.embeddings.embed import names_of
from hf_mim.embeddings.formats import Embeddings
from hf_mim.evaluation.features import FeatureExtractor

PART = 4096  # images
SHRINKAGE = 0.1  # of the mean variance, see `Whitening`


@dataclass(frozen=True)
class Found:
    """An image of a collection. place: among the features; row: in the source. label: the name of its class."""

    name: str
    place: int
    row: int
    cosine: float
    label: str | None = None


class EmbeddedCollection:
    """The images of embeddings that `embed` has written.

    dataset, split, image_column: where the images are now, if they have moved.
    """

    def __init__(self, embeddings: Embeddings, features: str, dataset=None, split=None, image_column=None):
        self.embeddings, self.features, about = embeddings, features, embeddings.about
        self.source = dataset or about["dataset"], split or about["split"]
        recorded = about["image_column"], about.get("missing_modality", ERROR)
        self.image_column = image_column or image_parts(*recorded)

    def __len__(self) -> int:
        return len(self.embeddings)

    def parts(self) -> Iterator[Tensor]:
        """The features `[b, D]`, in parts."""
        return self.embeddings.parts(self.features)

    @property
    def rows(self) -> dict[str, list]:
        """`name`, `row` and maybe `label` of every image."""
        return self.embeddings.rows

    def images(self, rows: Sequence[int]) -> Dataset | dict[int, dict]:
        """These images of the source, by `row`. A stream is read up to the last of them, and they are kept in memory.

        Raises ValueError if they are not where they were."""
        streaming = self.embeddings.about.get("streaming", False)
        images = load_images(*self.source, streaming, image_column=self.image_column)
        if not streaming:
            return images
        wanted, feature = set(rows), images.features["image"]
        stream = enumerate(rows_of(images.take(max(wanted) + 1)))
        return {row: {"image": typed(sample["image"], feature)} for row, sample in stream if row in wanted}


class ImageCollection:
    """The images of a source. Their features are extracted when they are first needed."""

    def __init__(self, split: Images, source, extract: FeatureExtractor, features: str):
        self.split, self.root, self.extract, self.features = split, local_folder(source), extract, features

    def __len__(self) -> int:
        return len(self.split)

    @cached_property
    def _features(self) -> Tensor:
        return self.extract(self.split, [self.features])[0]

    def parts(self) -> Iterator[Tensor]:
        """The features `[b, D]`, in parts."""
        yield from self._features.split(PART)

    @cached_property
    def rows(self) -> dict[str, list]:
        """`name`, `row` and maybe `label` of every image."""
        images, places = self.split.images, range(len(self.split))
        names = names_of(images.with_format("arrow").select_columns("image")[:]["image"], places, self.root)
        rows = {"name": names, "row": list(places)}
        if "label" in images.column_names:
            texts, labels = getattr(images.features["label"], "names", None), images["label"][:]
            rows["label"] = [None if x is None or x < 0 else texts[x] if texts else str(x) for x in labels]
        return rows

    def images(self, rows: Sequence[int]) -> Dataset:
        """The images of the source, by `row`."""
        return self.split.images


@dataclass(frozen=True)
class Whitening:
    """Takes the common part out of features, and gives each direction in which they vary a similar weight.

    Features of one encoder have a large common part: any two images may have a cosine of .99. Whitened, unrelated
    images have cosines around 0. Directions that hardly vary are noise, so a tenth of the mean variance is added to
    each.
    """

    mean: Tensor  # float64 [D]
    matrix: Tensor  # float64 [D, D]

    @classmethod
    def of(cls, collection: EmbeddedCollection | ImageCollection) -> "Whitening":
        total, products, first = torch.zeros(()), torch.zeros(()), None
        for part in collection.parts():
            part = part.double()
            first = part[0] if first is None else first
            part = part - first  # squares of large numbers would lose digits
            total, products = total + part.sum(dim=0), products + part.T @ part
        mean, count = total / len(collection), len(collection)
        variances, directions = torch.linalg.eigh(products / count - mean[:, None] * mean)
        variances = variances.clamp(min=0)
        scale = (variances + SHRINKAGE * variances.mean()).clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
        return cls(mean + first, directions * scale)

    def __call__(self, features: Tensor) -> Tensor:
        """Features `[b, D]`, whitened, float32."""
        return ((features.double() - self.mean) @ self.matrix).float()


def found(collection: EmbeddedCollection | ImageCollection, places: list[int], cosines: list[float]) -> list[Found]:
    """What these places of a collection hold."""
    rows = collection.rows
    labels = rows.get("label")
    return [
        Found(rows["name"][place], place, rows["row"][place], cosine, None if not labels else labels[place] or None)
        for place, cosine in zip(places, cosines, strict=True)
    ]
