"""The features of every image of a source, in a file that other programs read.

    from hf_mim.embeddings.embed import embed

    embed("runs/textures_mae", "textures.parquet", dataset="textures", split="test", features=["last/mean/norm"])

The images go through the encoder once, in parts that are written as they come, so that memory does not grow with their
number. What was written is kept in a folder beside the output until the end: the same call goes on from there.
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import ClassLabel, Dataset, Features, List, Value

from hf_mim.data.contents import digests, short_hash, stamps
from hf_mim.data.decode import image_name
from hf_mim.data.images import Images
from hf_mim.data.sources import load_described, local_folder, source_name
from hf_mim.docstrings import argument_texts
from hf_mim.embeddings import formats
from hf_mim.embeddings.parts import Parts
from hf_mim.embeddings.streamed import StreamedParts, check_first, extract_stream
from hf_mim.evaluation import cache
from hf_mim.evaluation.data_arguments import ImageArguments
from hf_mim.evaluation.encoder import FeatureSpec
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.measure import EncoderArguments, field_types, how_seen
from hf_mim.evaluation.result import installed_versions
from hf_mim.files import free_space, replacing
from hf_mim.lock import locked

# The options of the encoder that make sense for embeddings.
OF_THE_ENCODER = ("image_size", "image_mean", "image_std", "modalities", "trust_remote_code", "dtype", "device")
OF_THE_ENCODER += ("extract_batch_size", "num_workers")


@dataclass
class EmbedArguments(ImageArguments):
    """Images to embed, and the file for their features.

    Args:
        labels: the column of the classes; folder: class folders; none: no labels; default: what declares itself
        streaming: read the images while embedding, in order; nothing is indexed or copied first
        features: one or more of layer/pooling/norm; the pooling may be mean, cls or tokens
        output: a new .parquet file, .npy file, or folder of datasets
    """

    labels: str | None = None
    streaming: bool = False
    features: list[str] = dataclasses.field(default_factory=lambda: ["last/mean/norm"])
    output: str = "embeddings.parquet"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset is None:
            raise ValueError(f"dataset must be given: {argument_texts(ImageArguments)['dataset']}")
        if not self.features:
            raise ValueError("features must name at least one kind, such as last/mean/norm")
        self.features = list(dict.fromkeys(str(FeatureSpec.parse(text)) for text in self.features))


@dataclass
class _Extracted:
    """Features of `count` images in parts, the rows of those that are broken, and what the images are called.

    about: number of a part → (names, labels or None) of its images, with the broken ones.
    """

    count: int
    stores: list[Parts]
    broken: list[int]
    about: Callable[[int], tuple[list[str], list | None]]


@dataclass
class Embedded:
    """What `embed` has written, of how many images, and how many were left out because they cannot be decoded."""

    output: Path
    features: list[str]
    images: int
    broken: int
    seconds: float


def option_types(own: type = EmbedArguments) -> dict[str, Any]:
    """Name → type of every option of `embed`, or of a command with other arguments of its `own`."""
    encoder = {name: hint for name, hint in field_types(EncoderArguments).items() if name in OF_THE_ENCODER}
    return field_types(own) | encoder


def divided(own: type, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Options of `option_types` → the arguments `own` that are made of some, and the others, for `EncoderArguments`."""
    names = field_types(own)
    rest = {name: value for name, value in options.items() if name not in names}
    return own(**{name: value for name, value in options.items() if name in names}), rest


def embed(checkpoint: str | Path, **options: Any) -> Embedded:
    """Write the features of every image of a source to a file, with names and labels.

    Args:
        checkpoint: a folder, or a name on the Hub.
        options: the fields of `EmbedArguments`, and those of `EncoderArguments` in `OF_THE_ENCODER`.

    Raises:
        ValueError: in one line, before any work: the options, the checkpoint, the source or the output do not fit, or
            an extraction with other settings was begun for this output.
        BrokenImagesError: more than one image, and more than 1 % of them, cannot be decoded.
    """
    start = time.perf_counter()
    source, options = divided(EmbedArguments, options)
    formats.remove_leftovers(Path(source.output))
    output = formats.check_output(source.output, source.features)
    extract = EncoderArguments(**options, cache="none").extractor(str(checkpoint), source.crop())
    specs = [FeatureSpec.parse(text) for text in source.features]
    for spec in specs:
        extract.encoder.check(spec)
    if source.streaming and extract.num_workers > 1:
        raise ValueError(
            f"num_workers must be 0 or 1 with streaming, so that images keep their order, not {extract.num_workers}"
        )
    images, account = load_described(source.dataset, source.split, source.streaming, source.parts(), source.labels)
    about = describe(checkpoint, extract, source) | {"labels": account.labels}
    partial = formats.partial_of(output)
    begun = about | {"device": extract.encoder.device.type}
    if not source.streaming:
        images = Images(images, f"{source_name(source.dataset)}, split {source.split}").images
        _check_room(output, extract, specs, 2 * len(images))
        begun |= {"contents": _contents(images)}
    check_first(images, extract)
    partial.mkdir(exist_ok=True)
    with locked(partial, "output"):
        _begin(partial, begun, output)
        extracted = (_read_through if source.streaming else _fill)(images, extract, specs, partial, source)
        count = extracted.count - len(extracted.broken)
        about |= {"images": count, "broken_images_left_out": len(extracted.broken)}
        features = _columns(images.features, source.features, about["shapes"])
        about |= {"classes": getattr(features.get("label"), "names", None)}
        formats.write(output, _tables(extracted, features), features, about, partial)
    shutil.rmtree(partial)
    return Embedded(output, source.features, count, len(extracted.broken), time.perf_counter() - start)


def _stores(specs: Sequence[FeatureSpec], partial: Path, count: int) -> list[Parts]:
    return [Parts(partial / str(spec).replace("/", "-"), count) for spec in specs]


def _fill(
    images: Dataset, extract: FeatureExtractor, specs: list[FeatureSpec], partial: Path, source: EmbedArguments
) -> _Extracted:
    """Extract the parts that are missing."""
    stores, split = _stores(specs, partial, len(images)), Images(images, source_name(source.dataset))
    if missing := sorted({number for store in stores for number in store.missing()}):
        extract.fill(split, specs, cast(Any, stores), missing)  # `Parts` has what it calls
    if broken := stores[0].broken():
        extract.leave_out(split, broken)
    root, table = local_folder(source.dataset), images.with_format("arrow")

    def about(number: int) -> tuple[list[str], list | None]:
        rows = range(number * cache.CHUNK, min((number + 1) * cache.CHUNK, len(images)))
        part = table[rows.start : rows.stop]
        return names_of(part["image"], rows, root), part["label"].to_pylist() if "label" in images.features else None

    return _Extracted(len(images), stores, broken, about)


def _read_through(
    images: Any, extract: FeatureExtractor, specs: list[FeatureSpec], partial: Path, source: EmbedArguments
) -> _Extracted:
    """Read the stream, from its first image, and extract the parts that are missing."""
    parts = StreamedParts(partial / "rows")
    count = extract_stream(extract, images, specs, _stores(specs, partial, 0), parts)
    _check_room(partial, extract, specs, count)
    stores, root = _stores(specs, partial, count), local_folder(source.dataset)

    def about(number: int) -> tuple[list[str], list | None]:
        part = parts.read(number)
        return [below(root, name) for name in part["names"]], part["labels"]

    return _Extracted(count, stores, stores[0].broken(), about)


def describe(checkpoint: str | Path, extract: FeatureExtractor, source: EmbedArguments) -> dict[str, Any]:
    """What the features are of: the encoder, what it sees of an image, and the source. It travels with the features, so
    of a local source it has only what the user has typed."""
    encoder: Any = extract.encoder
    known = encoder.describe()
    return {
        "checkpoint": source_name(checkpoint),
        "encoder": encoder.sha256,
        "features": source.features,
        "shapes": {text: list(extract.row_shape(FeatureSpec.parse(text))) for text in source.features},
        **how_seen(extract),
        "value_range": known["value_range"],
        "nodata": known.get("nodata"),
        "dataset": source.dataset,
        "split": source.split,
        "image_column": source.image_column,
        "missing_modality": source.missing_modality,
        **({"streaming": True} if source.streaming else {}),
        "versions": installed_versions(),
    }


def _begin(partial: Path, settings: dict[str, Any], output: Path) -> None:
    """Note what the parts in this folder are of. Raises ValueError if they are of something else."""
    path = partial / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.exists():
        before = json.loads(path.read_text())
        names = settings.keys() | before.keys()
        if other := sorted(name for name in names if settings.get(name) != before.get(name)):
            raise ValueError(
                f"output {output} was begun with another {' and '.join(other)}: give the same again, or delete "
                f"{partial}"
            )
    with replacing(path) as aside:
        aside.write_text(json.dumps(settings))


def _contents(images: Dataset) -> str:
    """What tells whether the images are still the same: of files, where they are and when they were changed."""
    found = stamps(images)
    return found[0] if found is not None else short_hash(digests(images))


def _check_room(output: Path, extract: FeatureExtractor, specs: Sequence[FeatureSpec], count: int) -> None:
    """Raise ValueError if the disk has no room for the features of so many images."""
    needed = 4 * count * sum(int(np.prod(extract.row_shape(spec))) for spec in specs)
    if needed > (free := free_space(output.absolute().parent)):
        needed, free = (f"{size / 2**30:.1f} GiB" for size in (needed, free))
        raise ValueError(f"output {output} needs {needed} while it is written, and {free} are free there")


def _columns(known: Features, kinds: Sequence[str], shapes: dict[str, list[int]]) -> Features:
    """The columns of the file. known: those of the source."""
    columns = {"name": Value("string"), "row": Value("int64")}
    if (label := known.get("label")) is not None:
        columns["label"] = label if isinstance(label, ClassLabel) else Value("int64")
    for kind in kinds:
        feature = Value("float32")
        for length in reversed(shapes[kind]):
            feature = List(feature, length=length)
        columns[kind] = feature
    return Features(columns)


def _tables(extracted: _Extracted, features: Features) -> Iterator[pa.Table]:
    """The rows of the file, part by part, without broken images."""
    kept = np.ones(extracted.count, dtype=bool)
    kept[extracted.broken] = False
    for number in range(extracted.stores[0].num_parts):
        chosen = kept[number * cache.CHUNK : (number + 1) * cache.CHUNK]
        places = np.flatnonzero(chosen)
        names, labels = extracted.about(number)
        columns = [[names[place] for place in places], places + number * cache.CHUNK]
        if labels is not None:
            labels = [labels[place] for place in places]
            columns.append([None if label is None or label < 0 else label for label in labels])
        arrays = [pa.array(column, field.type) for column, field in zip(columns, features.arrow_schema, strict=False)]
        arrays += [_lists(store.read(number)[chosen]) for store in extracted.stores]
        yield pa.Table.from_arrays(arrays, schema=features.arrow_schema)


def _lists(array: np.ndarray) -> pa.Array:
    """An array `[b, ...]` as a column of lists of one length."""
    values = pa.array(array.reshape(-1))
    for length in reversed(array.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, length)
    return values


def names_of(column: pa.ChunkedArray, rows: Sequence[int], root: Path | None) -> list[str]:
    """The names of images: paths below the folder of the source, the names in a table, or "image 12" by the row."""
    values = [None] * len(rows)
    if pa.types.is_struct(column.type):
        if column.type.get_field_index("path") < 0:  # a stack: its first part
            column = pa.compute.struct_field(column, [0])
        values = pa.compute.struct_field(column, "path").to_pylist()
    names = (image_name({"path": path}, f"image {row}") for path, row in zip(values, rows, strict=True))
    return [below(root, name) for name in names]


def below(root: Path | None, name: str) -> str:
    """The name of an image without the folder of the source."""
    return name if root is None else name.removeprefix(f"{root}{os.sep}")
