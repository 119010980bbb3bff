"""Find the image and label columns of a dataset, whatever they are called."""

from datasets import Array2D, Array3D, ClassLabel, Dataset, IterableDataset, Value
from datasets import Image as ImageFeature

# Names by which a column is preferred among several of its kind, or recognised where its type says too little.
IMAGE_NAMES = tuple("image img pixel_values picture photo jpg jpeg png webp tif tiff npy bytes".split())
LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "target", "category", "y")


def prepare_columns(dataset, image_column: str | None, label_column: str | None) -> Dataset | IterableDataset:
    """The dataset with only `image` (undecoded) and, where there are labels, `label` (class ids).

    Raises:
        ValueError: a named column is not there, or no image column can be told; lists the columns.
    """
    features = dataset.features
    if features is None:
        raise ValueError("the columns of this source cannot be known before it is read; load it with streaming=False")
    for argument, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in features:
            raise ValueError(f"{argument}={column!r} is not a column; there are {', '.join(features)}")
    image_column = image_column or _find_image(features)
    if not (is_encoded(features[image_column]) or is_array(features[image_column])):
        raise ValueError(f"image_column={image_column!r} must hold images, not {features[image_column]}")
    if (
        isinstance(dataset, IterableDataset)
        and label_column
        and "string" in getattr(features[label_column], "dtype", "")
    ):
        raise ValueError(
            f"label_column={label_column!r} holds names, whose ids are known only when all are read: streaming=False"
        )
    label_column = label_column or _find_label(features, image_column)
    columns = {image_column: "image"} | ({label_column: "label"} if label_column else {})
    dataset = dataset.select_columns(list(columns))
    renamed = {old: new for old, new in columns.items() if old != new}
    dataset = dataset.rename_columns(renamed) if renamed else dataset
    if is_encoded(features[image_column]):
        dataset = dataset.cast_column("image", ImageFeature(decode=False))
    return _with_class_ids(dataset, features[label_column], label_column) if label_column else dataset


def _find_image(features) -> str:
    found = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    if not found:  # files not written by datasets say only what an image column is made of
        found = [name for name, feature in features.items() if is_encoded_struct(feature) or is_array(feature)]
    if not found:
        found = [name for name in features if name in IMAGE_NAMES and features[name] in _BINARY]
    if len(found) > 1:
        found = [name for name in IMAGE_NAMES if name in found][:1]
    if not found:
        raise ValueError(f"no image column is to be found; set image_column to one of {', '.join(features)}")
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
    """Strings become ids, in the order of the sorted names."""
    if isinstance(feature, ClassLabel) or (_is_id_or_name(feature) and "int" in feature.dtype):
        return dataset
    if not _is_id_or_name(feature):
        raise ValueError(f"label_column={label_column!r} must hold class ids or names, not {feature}")
    if isinstance(dataset, IterableDataset):  # the names are not known before all are read
        return dataset.remove_columns("label")
    return dataset.class_encode_column("label")


_BINARY = (Value("binary"), Value("large_binary"))


def is_encoded(feature) -> bool:
    """Whether `Image(decode=False)` can hold the column: encoded bytes, or paths."""
    strings = (Value("string"), Value("large_string"))
    return isinstance(feature, ImageFeature) or is_encoded_struct(feature) or feature in _BINARY + strings


def is_encoded_struct(feature) -> bool:
    """`{"bytes", "path"}`, as an image column looks in files not written by datasets."""
    return isinstance(feature, dict) and feature.get("bytes") in _BINARY


def is_array(feature) -> bool:
    """Whether the column holds arrays of two or three dimensions."""
    return isinstance(feature, Array2D | Array3D)


def _is_id_or_name(feature) -> bool:
    return isinstance(feature, Value) and ("int" in feature.dtype or "string" in feature.dtype)
