"""Any collection of images becomes one dataset: a column `image`, undecoded, and `label` where there are labels."""

import contextlib
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetsError

from .columns import prepare_columns
from .decode import BrokenImage, decoding, image_name, open_image
from .digits import digits
from .folders import IMAGE_EXTENSIONS, TABLE_EXTENSIONS, canonical_split, find_files, image_splits, table_splits

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_MAX_SHARDS = 64  # of a local source that is streamed
_NUM_PROBED = 16  # images that are opened, to see whether any can be read


class SplitNotFound(ValueError):
    """The source can be read, but it has no such split."""


def load_images(
    source: str | os.PathLike | Dataset | IterableDataset,
    split: str = "train",
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Dataset | IterableDataset:
    """Load the images of any source, not yet decoded.

    Args:
        source: one of: "digits" (embedded, works offline); a local folder of images, with or without class folders; a
            Parquet file, Arrow file or WebDataset tar, or a folder of them; a `save_to_disk` folder; the name of a
            dataset on the Hub ("owner/name", or "owner/name:config"); a dataset that is already loaded.
        split: "train", "validation" ("val"), "test", or the source's own name for it. In a local folder, words in the
            names of files or top folders tell the split; files without such a word are "train".
        streaming: read during training instead of preparing everything first; returns an `IterableDataset`.
        image_column: default: the only image column, or among several the one called "image".
        label_column: default: the class column, a column called "label", or the class folders.

    Returns:
        A dataset with the columns `image` ({"bytes", "path"}, or arrays) and, where there are labels, `label` (int
        class ids; -1 is unknown). `features["label"].names` has the names of the classes, if they are known.

    Raises:
        ValueError: in one line: nothing is there, no image can be read, or there is no such split or column (the line
            lists those that there are).
    """
    dataset = open_source(source, split, streaming)
    dataset = prepare_columns(dataset, image_column, label_column)
    if streaming and isinstance(dataset, Dataset):
        dataset = dataset.to_iterable_dataset(num_shards=min(len(dataset), _MAX_SHARDS))
    _check_readable(dataset, source)
    return dataset


def open_source(source, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
    """As `load_images`, but with all columns of the source, unchanged."""
    if isinstance(source, Dataset | IterableDataset):
        return source
    if str(source) == "digits":
        return pick_split(dict(zip(("train", "test"), digits(), strict=True)), split, source)
    if not str(source).strip():
        raise ValueError('source is empty; give a folder, a file, the name of a dataset on the Hub, or "digits"')
    if (path := Path(source).expanduser()).exists():
        return _load_local(path, split, streaming)
    return _load_hub(str(source), split, streaming)


def _load_local(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        with _naming_the_source(path):
            saved = datasets.load_from_disk(str(path))
        return pick_split(saved, split, path) if isinstance(saved, DatasetDict) else saved
    if path.is_file():
        if path.suffix.lower() not in TABLE_EXTENSIONS:
            known = ", ".join(TABLE_EXTENSIONS)
            raise ValueError(f"source {str(path)!r} must be a folder or a file of type {known}, not {path.suffix!r}")
        return _load_tables(path.parent, [path.name], split, streaming)
    files = find_files(path, IMAGE_EXTENSIONS | TABLE_EXTENSIONS.keys())
    tables = [name for name in files if Path(name).suffix.lower() in TABLE_EXTENSIONS]
    images = [name for name in files if Path(name).suffix.lower() in IMAGE_EXTENSIONS]
    if tables and len(tables) >= len(images):  # the few files of the other kind are not data
        return _load_tables(path, tables, split, streaming)
    if images:
        return _load_folder(path, images, split)
    raise ValueError(f"source {str(path)!r} holds no images, nor {', '.join(TABLE_EXTENSIONS)} files")


def _load_folder(folder: Path, paths: list[str], split: str) -> Dataset:
    """A folder of image files. Only their paths are read here."""
    splits = image_splits(paths)
    entries = pick_split(splits, split, folder)
    files = [str(folder / path) for path, _ in entries]
    # Names are collected from all splits, so that a class has the same id in each split.
    names = sorted({name for entries in splits.values() for _, name in entries if name is not None})
    features = Features(image=ImageFeature(decode=False))
    if entries[0][1] is None or len(names) < 2:
        return Dataset.from_dict({"image": files}, features=features)
    ids = {name: number for number, name in enumerate(names)}
    features["label"] = ClassLabel(names=names)
    return Dataset.from_dict({"image": files, "label": [ids[name] for _, name in entries]}, features=features)


def _load_tables(folder: Path, paths: list[str], split: str, streaming: bool) -> Dataset | IterableDataset:
    """Parquet files, Arrow files or tars. If kinds are mixed, the kind of most files is loaded."""
    kinds = [TABLE_EXTENSIONS[Path(path).suffix.lower()] for path in paths]
    kind = max(sorted(set(kinds)), key=kinds.count)
    splits = table_splits([path for path, found in zip(paths, kinds, strict=True) if found == kind])
    if len(paths) == 1 and split == "train":
        splits = {"train": paths}  # whatever a single file is called, the user wants to train on it
    files = [str(folder / path) for path in pick_split(splits, split, folder)]
    with _naming_the_source(folder / paths[0] if len(paths) == 1 else folder):
        return datasets.load_dataset(kind, data_files={"train": files}, split="train", streaming=streaming)


def _load_hub(name: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(f"source {name!r} does not exist, and is no name of a dataset on the Hub")
    name, _, config = name.partition(":")
    with _naming_the_source(name, "no local path, and from the Hub"):
        try:
            return datasets.load_dataset(name, config or None, split=split, streaming=streaming)
        except ValueError as error:
            if "unknown split" not in str(error).lower() and "bad split" not in str(error).lower():
                raise
            raise SplitNotFound(f"split {split!r} is not in source {name!r}: {error}") from error


def pick_split(splits: dict, split: str, source):
    """The value of a split by any of its names. Raises ValueError with those that there are."""
    for name in (split, canonical_split(split), *splits):
        if name in splits and canonical_split(name) == canonical_split(split):
            return splits[name]
    raise SplitNotFound(f"split {split!r} is not in source {str(source)!r}; it has {', '.join(sorted(splits))}")


def first_split(splits: Sequence[str], load: Callable[[str], Any]) -> tuple[Any, str]:
    """(what `load` returns, name of the split) for the first of these splits that is there.

    Raises:
        SplitNotFound: none of them is there; this is the error of the last.
    """
    for split in splits[:-1]:
        try:
            return load(split), split
        except SplitNotFound:
            continue
    return load(splits[-1]), splits[-1]


def fixed_sample(images, count: int, start: int = 0, random: torch.Generator | None = None, in_order: bool = False):
    """The same `count` images each time, or fewer if there are not as many. They are taken from place `start` on in a
    shuffled order.

    Args:
        images: a `datasets.Dataset`, or another object with a length and `select`; or an `IterableDataset`, which is
            not shuffled.
        random: the generator for the order; default: always the same order.
        in_order: sort the drawn images back into the order of `images`.
    """
    if isinstance(images, IterableDataset):
        return Dataset.from_list(list(images.skip(start).take(count)), features=images.features)
    order = torch.randperm(len(images), generator=random or torch.Generator().manual_seed(0))
    drawn = order[start : start + count].tolist()
    return images.select(sorted(drawn) if in_order else drawn)


@contextlib.contextmanager
def _naming_the_source(source, where: str = ""):
    """Turn what the datasets library raises into a ValueError of one line that names the source."""
    try:
        yield
    except SplitNotFound:
        raise
    except (DatasetsError, ValueError, OSError, RuntimeError, tarfile.TarError) as error:
        while error.__cause__ is not None:  # the first cause says what is wrong with the data
            error = error.__cause__
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ValueError(f"source {str(source)!r}: {where + ': ' if where else ''}{reason}") from error


def _check_readable(dataset: Dataset | IterableDataset, source):
    """Raise ValueError unless at least one of a few images, spread over the dataset, can be opened."""
    if isinstance(dataset, IterableDataset):
        rows = dataset.take(_NUM_PROBED)
    else:
        rows = (dataset[index] for index in range(0, len(dataset), max(1, len(dataset) // _NUM_PROBED)))
    error = None
    for row in rows:
        try:
            with decoding(image_name(row["image"], "its first image")):
                open_image(row["image"])
            return
        except BrokenImage as broken:
            error = error or broken
    reason = f": {error}" if error else "; it is empty"
    source = str(source) if isinstance(source, str | os.PathLike) else type(source).__name__
    raise ValueError(f"source {source!r} holds no image that can be read{reason}")


def local_folder(source) -> Path | None:
    """The path of a source that is a folder on this machine, None for others."""
    if isinstance(source, str | os.PathLike) and str(source).strip() and Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    return None


def source_name(source) -> str:
    """The name of a source in results. Results travel, so only the last part of a local path is in them."""
    if not isinstance(source, str | os.PathLike):
        return f"a {type(source).__name__} in memory"
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else str(source)
