"""Any collection of images becomes one dataset: a column `image`, undecoded, and `label` where there are labels."""

import contextlib
import functools
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetsError

from .account import Account
from .columns import prepare_columns
from .decode import BrokenImage, decoding, image_name, open_image
from .digits import digits
from .fingerprint import is_copy
from .folders import (
    IMAGE_EXTENSIONS,
    TABLE_EXTENSIONS,
    canonical_split,
    image_splits,
    readable,
    scan,
    table_splits,
)
from .tars import look_into, read_tars

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_MAX_SHARDS = 64  # of a local source that is streamed
_NUM_PROBED = 16  # images that are opened, to see whether any can be read

_warn_once = functools.cache(logging.getLogger(__name__).warning)  # a run reads its sources several times


class SplitNotFound(ValueError):
    """The source can be read, but it has no such split."""


def load_images(
    source: str | os.PathLike | Dataset | IterableDataset | dict,
    split: str = "train",
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    tell: Callable[[str], Any] | None = None,
) -> Dataset | IterableDataset:
    """Load the images of any source, not yet decoded.

    Args:
        source: one of: "digits" (embedded, works offline); a local folder of images, with or without class folders; a
            Parquet file, Arrow file or WebDataset tar, or a folder of them; a `save_to_disk` folder; the name of a
            dataset on the Hub ("owner/name", or "owner/name:config"); a dataset that is already loaded, or a
            `DatasetDict`.
        split: "train", "validation" ("val"), "test", or the source's own name for it. In a local folder, the names of
            folders or tables tell the split (`folders.py`); files without such a name are "train". Masks are left out.
        streaming: read during training instead of preparing everything first; returns an `IterableDataset`.
        image_column: default: the only image column, or among several the one called "image".
        label_column: default: the class column, a column called "label", or the class folders; "none" leaves them out.
        tell: is called with one line: what was taken, the splits, the classes, and what was left out. By default,
            there is a warning if something was left out.

    Returns:
        A dataset with the columns `image` ({"bytes", "path"}, or arrays) and, where there are labels, `label` (int
        class ids; -1 is unknown). `features["label"].names` has the names of the classes, if they are known.

    Raises:
        ValueError: in one line: nothing is there, no image can be read, or there is no such split or column (the line
            lists those that there are).
    """
    dataset, account = _open(source, split, streaming)
    dataset = prepare_columns(dataset, image_column, label_column)
    if streaming and isinstance(dataset, Dataset):
        dataset = dataset.to_iterable_dataset(num_shards=min(len(dataset), _MAX_SHARDS))
    _check_readable(dataset, source)
    if tell is not None:
        tell(f"source {source_name(source)!r}, split {split}: {account.line(dataset)}")
    elif missed := account.missed():
        _warn_once("source %r, split %s: %s is taken; %s", str(source), split, account.taken, missed)
    return dataset


def open_source(source, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
    """As `load_images`, but with all columns of the source, unchanged."""
    return _open(source, split, streaming)[0]


def _open(source, split: str, streaming: bool) -> tuple[Dataset | IterableDataset, Account]:
    """The dataset of `open_source`, without a format of its own, because a format may hide columns."""
    dataset, account = _read(source, split, streaming)
    account.taken = account.taken or (f"{len(dataset):,} images" if isinstance(dataset, Dataset) else "a stream")
    return dataset.with_format(None), account


def _read(source, split: str, streaming: bool) -> tuple[Dataset | IterableDataset, Account]:
    if isinstance(source, Dataset | IterableDataset):
        return source, Account()
    if isinstance(source, dict):  # DatasetDict is one
        return _picked(source, split, type(source).__name__)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"source must be a path, the name of a dataset, a Dataset or a DatasetDict, not a {type(source).__name__}"
        )
    if str(source) == "digits":
        return _picked(dict(zip(("train", "test"), digits(), strict=True)), split, source)
    if not str(source).strip():
        raise ValueError('source is empty; give a folder, a file, the name of a dataset on the Hub, or "digits"')
    if (path := Path(source).expanduser()).exists():
        return _load_local(path, split, streaming)
    return _load_hub(str(source), split, streaming), Account()


def _picked(splits: dict, split: str, source) -> tuple[Dataset | IterableDataset, Account]:
    """One dataset of several, and an account of the others."""
    dataset = pick_split(splits, split, source)
    others = {
        name: f"{len(other):,}" for name, other in splits.items() if other is not dataset and hasattr(other, "__len__")
    }
    return dataset, Account(splits=others)


def _load_local(path: Path, split: str, streaming: bool) -> tuple[Dataset | IterableDataset, Account]:
    if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        with _naming_the_source(path):
            saved = datasets.load_from_disk(str(path))
        return _picked(saved, split, path) if isinstance(saved, dict) else (saved, Account())
    if path.is_file():
        if path.suffix.lower() not in TABLE_EXTENSIONS:
            known = ", ".join(TABLE_EXTENSIONS)
            raise ValueError(f"source {str(path)!r} must be a folder or a file of type {known}, not {path.suffix!r}")
        return _load_tables(path.parent, [path.name], split, streaming, Counter())
    files, left_out = scan(path, IMAGE_EXTENSIONS | TABLE_EXTENSIONS.keys())
    tables = [name for name in files if _extension(name) in TABLE_EXTENSIONS]
    images = [name for name in files if _extension(name) in IMAGE_EXTENSIONS]
    if tables and len(tables) >= len(images):  # the few files of the other kind are not data
        return _load_tables(path, tables, split, streaming, left_out + Counter(map(_extension, images)))
    if images:
        return _load_folder(path, images, split, left_out + Counter(map(_extension, tables)))
    found = (
        f"; there are {', '.join(f'{count:,} {what}' for what, count in left_out.most_common(6))}" if left_out else ""
    )
    raise ValueError(f"source {str(path)!r} holds no images, nor {', '.join(TABLE_EXTENSIONS)} files{found}")


def _load_folder(folder: Path, paths: list[str], split: str, left_out: Counter) -> tuple[Dataset, Account]:
    """A folder of image files. Only their paths are read here."""
    layout = image_splits(paths)
    if not layout.splits:
        raise ValueError(f"source {str(folder)!r} holds no images beside its masks")
    entries = pick_split(layout.splits, split, folder)
    others = {name: f"{len(other):,}" for name, other in layout.splits.items() if other is not entries}
    kinds = Counter(_extension(path) for path, _ in entries)
    types = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    taken = f"{len(entries):,} images ({types})"
    account = Account(taken, others, left_out + layout.left_out, layout.notes)
    dataset = image_files([str(folder / path) for path, _ in entries])
    # Names are collected from all splits, so that a class has the same id in each split. A folder "unlabeled" has none.
    known = [entries for name, entries in layout.splits.items() if name in ("train", "validation", "test")]
    names = sorted({readable(name) for entries in known for _, name in entries if name is not None})
    if len(names) > 1 and any(name is not None for _, name in entries):
        ids = {name: number for number, name in enumerate(names)}
        labels = [-1 if name is None else ids.get(readable(name), -1) for _, name in entries]
        dataset = dataset.add_column("label", labels, feature=ClassLabel(names=names))
    return dataset, account


def image_files(files: list[str | None], column: str = "image") -> Dataset:
    """A dataset with one column: these image files, undecoded. Only their paths are kept.

    Arrow cannot hold a path that is not UTF-8. If there is such a path, the bytes of its file are read into a cache on
    disk.
    """
    features = Features({column: ImageFeature(decode=False)})
    if all(file is None or file.isprintable() or readable(file) == file for file in files):
        return Dataset.from_dict({column: files}, features)
    stamps = [0 if file is None or readable(file) == file else os.stat(file).st_mtime_ns for file in files]
    rows = {"files": tuple(file and os.fsencode(file) for file in files), "stamps": tuple(stamps), "column": column}
    return Dataset.from_generator(_file_rows, features, gen_kwargs=rows)


def _file_rows(files: tuple[bytes | None, ...], stamps: tuple[int, ...], column: str):
    """Rows of `image_files`. A change of `stamps`, the times of the files, makes datasets read them again."""
    for file in files:
        path = None if file is None else readable(os.fsdecode(file))
        data = Path(os.fsdecode(file)).read_bytes() if file is not None and os.fsencode(path) != file else None
        yield {column: None if file is None else {"bytes": data, "path": path}}


def _load_tables(
    folder: Path, paths: list[str], split: str, streaming: bool, left_out: Counter
) -> tuple[Dataset | IterableDataset, Account]:
    """Parquet files, Arrow files or tars. If kinds are mixed, the kind of most files is loaded."""
    kinds = [TABLE_EXTENSIONS[_extension(path)] for path in paths]
    kind = max(sorted(set(kinds)), key=kinds.count)
    left_out = left_out + Counter(_extension(path) for path, found in zip(paths, kinds, strict=True) if found != kind)
    splits, notes = table_splits([path for path, found in zip(paths, kinds, strict=True) if found == kind])
    if len(paths) == 1 and split == "train":
        splits = {"train": paths}  # whatever a single file is called, the user wants to train on it
    within = kind == "webdataset" and list(splits) == ["train"]  # folders in the tars may tell splits
    chosen = splits["train"] if within else pick_split(splits, split, folder)
    others = {name: f"{len(other):,} files" for name, other in splits.items() if other is not chosen}
    account = Account("", others, left_out, notes)
    files = [folder / path for path in chosen]
    with _naming_the_source(folder / paths[0] if len(paths) == 1 else folder):
        if kind == "webdataset":
            dataset = _read_tars(files, split if within else None, streaming, account)
        else:
            data_files = {"train": [str(file) for file in files]}
            dataset = datasets.load_dataset(kind, data_files=data_files, split="train", streaming=streaming)
    account.taken = f"{len(chosen):,} {_extension(chosen[0])} file{'s' * (len(chosen) > 1)}"
    account.taken += f", {len(dataset):,} images" if isinstance(dataset, Dataset) else ""
    return dataset, account


def _read_tars(tars: list[Path], split: str | None, streaming: bool, account: Account) -> Dataset | IterableDataset:
    """The images of these tars. If folders in them are named after splits, those of `split`; None takes the first."""
    found = look_into(tars, peek=streaming)
    splits = found.layout.splits
    if not splits:
        raise ValueError("it holds no images")
    name = next(iter(splits))
    if split is not None and not (len(tars) == len(splits) == 1 and split == "train"):
        pick_split(splits, split, tars[0] if len(tars) == 1 else tars[0].parent)
        name = next(other for other in splits if canonical_split(other) == canonical_split(split))
    account.splits |= {f"{other} within": f"{len(splits[other]):,}" for other in splits if other != name}
    account.left_out += found.layout.left_out
    account.left_out += Counter({f".{kind} beside other images": count for kind, count in found.extra.items()})
    account.notes += found.layout.notes
    return read_tars(tars, found, name, streaming)


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()


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


def same_source(one, other) -> bool:
    """Whether two sources are one: the same object, the same path or name in other words, or a copy of the files."""
    paths = isinstance(one, str | os.PathLike), isinstance(other, str | os.PathLike)
    return (_real(one) == _real(other) or is_copy(_real(one), _real(other))) if all(paths) else one is other


def _real(source: str | os.PathLike) -> str:
    return str(path.resolve()) if (path := Path(source).expanduser()).exists() else str(source)


def source_name(source) -> str:
    """The name of a source in results. Results travel, so only the last part of a local path is in them."""
    if not isinstance(source, str | os.PathLike):
        return f"a {type(source).__name__} in memory"
    path = Path(source).expanduser()
    return readable(path.resolve().name) if path.exists() else str(source)
