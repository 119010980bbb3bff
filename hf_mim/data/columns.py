"""Find the image and label columns of a dataset, whatever they are called."""

from datasets import Array2D, Array3D, ClassLabel, Dataset, IterableDataset, Value
from datasets import Image as ImageFeature

# A column of one of these names is preferred among several of its kind, or recognised if its type tells too little.
IMAGE_NAMES = tuple("image img pixel_values picture photo jpg jpeg png webp tif tiff npy npz bytes".split())
NO_LABELS = "none"  # as label_column: the images have none, whatever columns and folders there are
LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "target", "category", "y")


def prepare_columns(dataset, image_column: str | None, label_column: str | None) -> Dataset | IterableDataset:
    """The dataset with only `image` (undecoded) and, where there are labels, `label` (class ids).

    Args:
        label_column: "none" leaves labels out.

    Raises:
        ValueError: a named column is not there, or no image column is found; the message lists the columns.
    """
    features = dataset.features
    if features is None:
        raise ValueError("the columns of this source cannot be known before it is read; load it with streaming=False")
    labelled = label_column != NO_LABELS or NO_LABELS in features
    label_column = label_column if labelled else None
    check_columns(features, image_column=image_column, label_column=label_column)
    image_column = image_column or _find_image(features)
    check_holds_images(features, "image_column", image_column)
    label_type = getattr(features[label_column], "dtype", "") if label_column else ""
    if "string" in label_type and isinstance(dataset, IterableDataset):
        raise ValueError(f"label_column={label_column!r} holds names; only streaming=False can turn them into ids")
    label_column = label_column or (_find_label(features, image_column) if labelled else None)
    columns = {image_column: "image"} | ({label_column: "label"} if label_column else {})
    dataset = dataset.select_columns(list(columns))
    renamed = {old: new for old, new in columns.items() if old != new}
    dataset = dataset.rename_columns(renamed) if renamed else dataset
    if is_encoded(features[image_column]):
        dataset = dataset.cast_column("image", ImageFeature(decode=False))
    dataset = _with_class_ids(dataset, features[label_column], label_column) if label_column else dataset
    if is_array(features[image_column]) and isinstance(dataset, Dataset):  # as lists they would lose their type
        kept = dict(columns=["image"], output_all_columns=True, dtype=features[image_column].dtype)
        dataset = dataset.with_format("numpy", **kept)
    return dataset


def _find_image(features) -> str:
    found = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    if not found:  # files that datasets has not written show an image column by its structure only
        found = [name for name, feature in features.items() if is_encoded_struct(feature) or is_array(feature)]
    if not found:
        found = [name for name in features if name in IMAGE_NAMES and features[name] in _BINARY]
    if len(found) > 1:
        found = [name for name in IMAGE_NAMES if name in found][:1]
    if not found:
        raise ValueError(f"no image column is found; set image_column to one of {', '.join(features)}")
    return found[0]


def _find_label(features, image_column: str) -> str | None:
    found = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(found) == 1:
        return found[0]
    for name in LABEL_NAMES:
        if name in features and name != image_column and (name in found or _is_id_or_name(features[name])):
            return name
    return None


def _with_class_ids(dataset, feature, label_column: str):
    """The dataset with class ids instead of names. Ids follow the sorted order of the names."""
    if isinstance(feature, ClassLabel) or (_is_id_or_name(feature) and "int" in feature.dtype):
        return dataset
    if feature == Value("bool"):
        return dataset.cast_column("label", Value("int64"))
    if not _is_id_or_name(feature):
        raise ValueError(f"label_column={label_column!r} must hold class ids or names, not {feature}")
    if isinstance(dataset, IterableDataset):  # the names are known only when all rows are read
        return dataset.remove_columns("label")
    return dataset.class_encode_column("label")


def check_columns(features, **arguments: str | None):
    """Raise ValueError, which lists the columns, if an argument names one that is not there."""
    for argument, column in arguments.items():
        if column is not None and column not in features:
            raise ValueError(f"{argument}={column!r} is not a column; there are {', '.join(features)}")


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
    """Whether the column holds arrays of two or three dimensions."""
    return isinstance(feature, Array2D | Array3D)


def _is_id_or_name(feature) -> bool:
    return isinstance(feature, Value) and any(kind in feature.dtype for kind in ("int", "string", "bool"))
