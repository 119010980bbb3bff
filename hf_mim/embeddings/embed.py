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
from collections.abc import Iterator, Sequence
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
        features: one or more of layer/pooling/norm; the pooling may be mean, cls or tokens
        output: a new .parquet file, .npy file, or folder of datasets
    """

    labels: str | None = None
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
    columns = source.parts(), source.labels
    images, account = load_described(source.dataset, source.split, False, *columns)
    about = describe(checkpoint, extract, source) | {"labels": account.labels}
    split = Images(images, f"{source_name(source.dataset)}, split {source.split}")
    partial = formats.partial_of(output)
    _check_room(output, extract, specs, len(split))
    partial.mkdir(exist_ok=True)
    with locked(partial, "output"):
        _begin(partial, about | {"device": extract.encoder.device.type, "contents": _contents(split.images)}, output)
        stores = [Parts(partial / str(spec).replace("/", "-"), len(split)) for spec in specs]
        if missing := sorted({number for store in stores for number in store.missing()}):
            extract.fill(split, specs, cast(Any, stores), missing)  # `Parts` has what it calls
        rows = np.ones(len(split), dtype=bool)
        rows[broken := stores[0].broken()] = False
        if broken:
            extract.leave_out(split, broken)
        about |= {"images": len(split), "broken_images_left_out": len(broken)}
        features = _columns(split, source.features, about["shapes"])
        about |= {"classes": getattr(features.get("label"), "names", None)}
        formats.write(output, _tables(split, stores, rows, features, source), features, about, partial)
    shutil.rmtree(partial)
    return Embedded(output, source.features, len(split), len(broken), time.perf_counter() - start)


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
    """Raise ValueError if the disk has no room for the parts and the file that is made of them."""
    needed = 2 * 4 * count * sum(int(np.prod(extract.row_shape(spec))) for spec in specs)
    if needed > (free := free_space(output.absolute().parent)):
        needed, free = (f"{size / 2**30:.1f} GiB" for size in (needed, free))
        raise ValueError(f"output {output} needs {needed} while it is written, and {free} are free there")


def _columns(split: Images, kinds: Sequence[str], shapes: dict[str, list[int]]) -> Features:
    columns = {"name": Value("string"), "row": Value("int64")}
    if "label" in split.images.column_names:
        label = split.images.features["label"]
        columns["label"] = label if isinstance(label, ClassLabel) else Value("int64")
    for kind in kinds:
        feature = Value("float32")
        for length in reversed(shapes[kind]):
            feature = List(feature, length=length)
        columns[kind] = feature
    return Features(columns)


def _tables(
    split: Images, stores: Sequence[Parts], kept: np.ndarray, features: Features, source: EmbedArguments
) -> Iterator[pa.Table]:
    """The rows of the file, part by part. kept: which images of the source are in `split` still."""
    root, start = local_folder(source.dataset), 0
    images = split.images.with_format("arrow")
    for number in range(stores[0].num_parts):
        chosen = kept[number * cache.CHUNK : (number + 1) * cache.CHUNK]
        rows = np.flatnonzero(chosen) + number * cache.CHUNK
        part = slice(start, start := start + len(rows))
        columns = [names_of(images.select_columns("image")[part]["image"], cast(Any, rows), root), rows]
        if "label" in features:
            labels = images.select_columns("label")[part]["label"].to_pylist()
            columns.append([None if label is None or label < 0 else label for label in labels])
        arrays = [pa.array(column, field.type) for column, field in zip(columns, features.arrow_schema, strict=False)]
        arrays += [_lists(store.read(number)[chosen]) for store in stores]
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
    start = "" if root is None else f"{root}{os.sep}"
    return [name.removeprefix(start) for name in names]
