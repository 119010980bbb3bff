"""Find the image and label columns of a dataset, whatever they are called."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Array2D, Array3D, ClassLabel, Dataset, Features, IterableDataset, LargeList, List, Value
from datasets import Image as ImageFeature
from datasets.utils import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

from .stacks import Incomplete, keys_of, parts_of

# A column of one of these names is preferred among several of its kind, or recognised if its type tells too little.
IMAGE_NAMES = tuple("image img pixel_values picture photo jpg jpeg png webp tif tiff npy npz bytes".split())
NO_LABELS = "none"  # as `labels`: the images have none, whatever columns and folders there are
FILE = "file"  # as `group`: the file that holds the frame of an image
FOLDER = "folder"  # as `labels`: the class folders; as `group`: the folder that holds an image
LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls")  # columns that say by their name that they hold classes
_PERHAPS_LABELS = ("target", "category", "species", "y")  # columns that may hold classes; the user has to say so
_ROWS = 64  # that are stacked at a time, because each may hold the bytes of a large image
_FEW_CLASSES, _PER_CLASS = 10, 2  # a column that only its name declares has few values, or so many images of each


@dataclass
class Chosen:
    """Which columns are the labels and the group, and what a user may want to know about this choice.

    labels: the name of the column, None for none. is_given: the user has named it.
    """

    labels: str | None = None
    group: str | None = None
    is_given: bool = False
    notes: list[str] = field(default_factory=list)


def prepare_columns(
    dataset,
    image_column: str | Incomplete | None,
    labels: str | None,
    group: str | None = None,
    notes: Sequence[str] = (),
):
    """(the dataset with only `image` (undecoded) and, if there are any, `label` (class ids) and `group` (text); what
    was chosen).

    Args:
        image_column: a column, or several of which each image is stacked (`stacks.py`).
        labels: a column; "none" leaves labels out; None takes a column that declares itself: its type is `ClassLabel`,
            or it is called label, labels, fine_label, class or cls and holds ids or names, several images of each.
        group: a column.
        notes: why columns may be missing.

    Raises:
        ValueError: a named column is not there, or no image column is found; the message lists the columns.
    """
    features, is_stream = dataset.features, isinstance(dataset, IterableDataset)
    if features is None:
        raise ValueError("the columns of this source cannot be known before it is read; load it with streaming=False")
    wanted = labels if labels != NO_LABELS or NO_LABELS in features else None
    parts = parts_of(image_column) if image_column not in features else {}
    for part in parts or [image_column]:
        check_columns(features, notes, image_column=part)
    check_columns(features, notes, labels=wanted, group=group)
    if parts:
        image_column, dataset = "image", _stacked(dataset, keys_of(image_column))
        features = dataset.features
    else:
        image_column = image_column or _find_image(features)
        check_holds_images(features, "image_column", image_column)
    chosen = Chosen(wanted, group, labels is not None)
    if group is not None:
        _check_group(dataset, chosen)
    if wanted is not None and is_stream and "string" in getattr(features[wanted], "dtype", ""):
        raise ValueError(f"labels={wanted!r} holds names; only streaming=False can turn them into ids")
    if labels is None:
        chosen.labels, chosen.notes = find_labels(dataset, image_column)
    columns = {image_column: "image"} | {old: new for old, new in ((chosen.labels, "label"), (group, "group")) if old}
    dataset = dataset.select_columns(list(columns))
    renamed = {old: new for old, new in columns.items() if old != new}
    dataset = dataset.rename_columns(renamed) if renamed else dataset
    if is_encoded(features[image_column]):
        dataset = dataset.cast_column("image", ImageFeature(decode=False))
    dataset = _with_class_ids(dataset, features[chosen.labels], chosen.labels) if chosen.labels else dataset
    if group is not None and features[group] != Value("string"):
        dataset = dataset.cast_column("group", Value("string"))
    return keep_types(dataset), chosen


def _stacked(dataset, keys: list[str]):
    """The dataset with a column `image` of stacks (`stacks.py`) of these keys in place of the columns of the parts."""
    parts = [key.partition(":")[0] for key in keys]
    for name in parts:
        if not is_encoded(dataset.features[name]):
            raise ValueError(f"image_column={name!r} must hold encoded images, not {dataset.features[name]}")
    if "image" in dataset.features and "image" not in parts:
        dataset = dataset.remove_columns(["image"])
    columns = {name: f"part {number} of the image" for number, name in enumerate(parts)}  # one may be called `image`
    dataset = dataset.rename_columns(columns)
    for column in columns.values():
        dataset = dataset.cast_column(column, ImageFeature(decode=False))

    def stack(rows: dict) -> dict:
        values = zip(*(rows[column] for column in columns.values()), strict=True)
        return {"image": [dict(zip(keys, row, strict=True)) for row in values]}

    others = {name: feature for name, feature in dataset.features.items() if name not in columns.values()}
    features = Features(others | {"image": {key: ImageFeature(decode=False) for key in keys}})
    about = {"remove_columns": [*columns.values()], "features": features}
    with _without_bars():
        return dataset.map(stack, batched=True, batch_size=_ROWS, **about)


@contextlib.contextmanager
def _without_bars():
    """Inside, datasets shows no progress bar: nobody waits for it, and an error may follow."""
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _check_group(dataset, chosen: Chosen):
    """Raise ValueError unless the column can be that of the groups."""
    if chosen.group == chosen.labels:
        raise ValueError(f"group must be another column than labels, not {chosen.group!r} for both")
    if not _is_id_or_name(feature := dataset.features[chosen.group]):
        raise ValueError(f"group={chosen.group!r} must hold ids or names, not {feature}")


def _find_image(features) -> str:
    found = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    if not found:  # files that datasets has not written show an image column by its structure only
        found = [name for name, feature in features.items() if is_encoded_struct(feature) or _is_fixed_array(feature)]
    if not found:
        found = [
            name for name in features if name in IMAGE_NAMES and (features[name] in _BINARY or is_array(features[name]))
        ]
    if len(found) > 1:
        found = [name for name in IMAGE_NAMES if name in found][:1]
    if not found:
        raise ValueError(f"no image column is found; set image_column to one of {', '.join(features)}")
    return found[0]


def find_labels(dataset, image_column: str | None = None) -> tuple[str | None, list[str]]:
    """(the column that declares itself as the labels, or None; notes about columns that may hold labels too)."""
    features = {name: feature for name, feature in dataset.features.items() if name != image_column}
    declared = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    named = [name for name in LABEL_NAMES if name in features and (name in declared or _is_id_or_name(features[name]))]
    if len(declared) > 1 and not set(declared) & set(named):
        return None, [f"columns {' and '.join(declared)} hold classes; choose one, such as --labels {declared[0]}"]
    found = next((name for name in named if name in declared), None) or next(iter(declared + named), None)
    if found is None:
        perhaps = [name for name in _PERHAPS_LABELS if name in features and _is_id_or_name(features[name])]
        return None, [f"column {perhaps[0]} may hold labels; if it does: --labels {perhaps[0]}"] if perhaps else []
    if found not in declared and isinstance(dataset, Dataset) and len(dataset):
        values = len(dataset.unique(found))
        if values > _FEW_CLASSES and len(dataset) < _PER_CLASS * values:
            return None, [
                f"column {found} holds {values:,} values for {len(dataset):,} images and is not taken for classes; if "
                f"it holds them: --labels {found}"
            ]
    if "string" in getattr(features[found], "dtype", "") and isinstance(dataset, IterableDataset):
        return None, [f"column {found} holds names, which only streaming=False can turn into ids"]
    others = [name for name in declared if name != found]
    return found, [f"column {others[0]} holds classes too; to take it: --labels {others[0]}"] if others else []


def _with_class_ids(dataset, feature, labels: str):
    """The dataset with class ids instead of names. Ids follow the sorted order of the names."""
    if isinstance(feature, ClassLabel) or (_is_id_or_name(feature) and "int" in feature.dtype):
        return dataset
    if feature == Value("bool"):
        return dataset.cast_column("label", Value("int64"))
    if not _is_id_or_name(feature):
        raise ValueError(f"labels={labels!r} must hold class ids or names, not {feature}")
    with _without_bars():
        return dataset.class_encode_column("label")


def keep_types(dataset):
    """The dataset, so that arrays in its column `image` come in the type of the column. Lists would lose it.

    A stream has no such format: its readers call `typed`.
    """
    if isinstance(dataset, Dataset) and (dtype := array_type(dataset.features["image"])):
        return dataset.with_format("numpy", columns=["image"], output_all_columns=True, dtype=dtype)
    return dataset


def typed(value, feature):
    """A value of an image column from a stream: lists of numbers become an array of the column's type."""
    dtype = array_type(feature)
    return value if dtype is None or value is None else np.asarray(value, dtype)


def check_columns(features, notes: Sequence[str] = (), **arguments: str | None):
    """Raise ValueError, which lists the columns, if an argument names one that is not there; `notes` may say why."""
    for argument, column in arguments.items():
        if column is not None and column not in features:
            if (argument, column) == ("group", FILE):
                notes = [*notes, "a folder has file where some files hold several frames; without them leave group out"]
            known = "; ".join([f"columns: {', '.join(features)}", *notes])
            raise ValueError(f"{argument}={column!r} is not a column; {known}")


def check_holds_images(features, argument: str, column: str):
    """Raise ValueError, which names the argument, if the column holds something else than images."""
    if not holds_images(features[column]):
        raise ValueError(f"{argument}={column!r} must hold images, not {features[column]}")


def holds_images(feature) -> bool:
    """Whether the column holds images: encoded, or as arrays."""
    return is_encoded(feature) or is_array(feature)


_BINARY = (Value("binary"), Value("large_binary"))


def is_encoded(feature) -> bool:
    """Whether the column can be cast to `Image(decode=False)`: it holds encoded bytes, or paths."""
    strings = (Value("string"), Value("large_string"))
    return isinstance(feature, ImageFeature) or is_encoded_struct(feature) or feature in _BINARY + strings


def is_encoded_struct(feature) -> bool:
    """Whether the column holds `{"bytes", "path"}`, as image columns in files that datasets has not written."""
    return isinstance(feature, dict) and feature.get("bytes") in _BINARY


def is_array(feature) -> bool:
    """Whether the column holds arrays: of two or three dimensions, or of one, the bytes of a file as numbers."""
    return array_type(feature) is not None


def array_type(feature) -> str | None:
    """The type of the numbers in a column of arrays ("uint16"): `Array2D`, `Array3D`, lists of lists, lists of bytes.

    None for other columns.
    """
    if _is_fixed_array(feature):
        return feature.dtype
    depth = 0
    while isinstance(feature, List | LargeList):
        feature, depth = feature.feature, depth + 1
    dtype = feature.dtype if isinstance(feature, Value) else ""
    if depth in (2, 3) and dtype.startswith(("int", "uint", "float", "bool")) or depth == 1 and dtype == "uint8":
        return dtype
    return None


def _is_fixed_array(feature) -> bool:
    return isinstance(feature, Array2D | Array3D)


def _is_id_or_name(feature) -> bool:
    return isinstance(feature, Value) and any(kind in feature.dtype for kind in ("int", "string", "bool"))
