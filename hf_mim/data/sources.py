"""Any collection of images becomes one dataset: a column `image`, undecoded, and `label` where there are labels."""

import functools
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, IterableDataset

from .account import Account
from .columns import FOLDER, keep_types, prepare_columns, typed
from .damage import rows_of
from .decode import BrokenImage, decoding, image_name, open_image
from .embedded import EMBEDDED
from .fingerprint import is_copy
from .folders import readable
from .local import SplitNotFound, load_local, naming_the_source, picked
from .metadata import UNREAD
from .stacks import Incomplete

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_MAX_SHARDS = 64  # of a local source that is streamed
_NUM_PROBED = 16  # images that are opened, to see whether any can be read

_warn_once = functools.cache(logging.getLogger(__name__).warning)  # a run reads its sources several times


def load_images(
    source: str | os.PathLike | Dataset | IterableDataset | dict,
    split: str = "train",
    streaming: bool = False,
    image_column: str | Incomplete | None = None,
    labels: str | None = None,
    tell: Callable[[str], Any] | None = None,
    group: str | None = None,
) -> Dataset | IterableDataset:
    """Load the images of any source, not yet decoded.

    Args:
        source: one of: "textures" or "digits" (embedded, work offline); a local folder of images, with or without
            class folders; a Parquet file, Arrow file or WebDataset tar, or a folder of them; a `save_to_disk` folder;
            the name of a dataset on the Hub ("owner/name", or "owner/name:config"); a dataset that is already loaded,
            or a `DatasetDict`.
        split: "train", "validation" ("val"), "test", or the source's own name for it. In a local folder, the names of
            folders or tables tell the split (`folders.py`); files without such a name are "train". Masks are left out.
            A `metadata.csv`, `.jsonl` or `.parquet` beside images gives them more columns (`metadata.py`).
        streaming: read during training instead of preparing everything first; returns an `IterableDataset`.
        image_column: default: the only image column, or among several the one called "image". "rgb,ir" stacks the
            channels of two columns, or of the files with equal names in two folders (`stacks.py`);
            `stacks.image_parts` takes images that lack one.
        labels: a column; "folder": the class folders; "none": no labels. By default, a column that declares itself as
            the class (`columns.find_labels`), or folders that look like classes (`classes.py`).
        tell: is called with one line: what was taken, the splits, the classes, and what was left out. By default,
            there is a warning if something was left out.
        group: a column whose values must stay together, such as the patient; "folder": the folder of an image; "file":
            the file of a frame.

    Returns:
        A dataset with the columns `image` ({"bytes", "path"}, or arrays); where there are labels, `label` (int class
        ids; -1 is unknown); with `group`, `group` (text). `features["label"].names` has the names of the classes, if
        they are known.

    Raises:
        ValueError: in one line: nothing is there, no image can be read, or there is no such split or column (the line
            lists those that there are).
    """
    return load_described(source, split, streaming, image_column, labels, tell, group)[0]


def load_described(
    source, split="train", streaming=False, image_column=None, labels=None, tell=None, group=None
) -> tuple[Dataset | IterableDataset, Account]:
    """As `load_images`, but also the account, which says where labels and groups come from."""
    dataset, account = _open(source, split, streaming, labels, image_column)
    if group is not None and (streaming or isinstance(dataset, IterableDataset)):
        raise ValueError(f"group={group!r} needs the images as a whole, not a stream; leave out streaming or group")
    labels = "label" if labels == FOLDER and account.class_folders else labels
    unread = [note for note in account.notes if note.endswith(UNREAD)]
    dataset, chosen = prepare_columns(dataset, image_column, labels, group, unread)
    account.choose(chosen)
    if streaming and isinstance(dataset, Dataset):
        dataset = dataset.with_format(None).to_iterable_dataset(num_shards=min(len(dataset), _MAX_SHARDS))
    _check_readable(dataset, source)
    if tell is not None:
        tell(f"source {source_name(source)!r}, split {split}: {account.line(dataset)}")
    elif missed := account.missed():
        _warn_once("source %r, split %s: %s is taken; %s", str(source), split, account.taken, missed)
    return dataset, account


def open_source(source, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
    """As `load_images`, but with all columns of the source, unchanged."""
    return _open(source, split, streaming)[0]


def _open(
    source, split: str, streaming: bool, labels: str | None = None, image_column: str | Incomplete | None = None
) -> tuple[Dataset | IterableDataset, Account]:
    """The dataset of `open_source`, without a format of its own, because a format may hide columns."""
    dataset, account = _read(source, split, streaming, labels, image_column)
    account.taken = account.taken or (f"{len(dataset):,} images" if isinstance(dataset, Dataset) else "a stream")
    return dataset.with_format(None), account


def _read(
    source, split: str, streaming: bool, labels: str | None, image_column: str | Incomplete | None
) -> tuple[Dataset | IterableDataset, Account]:
    if isinstance(source, Dataset | IterableDataset):
        return source, Account()
    if isinstance(source, dict):  # DatasetDict is one
        return picked(source, split, type(source).__name__)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"source must be a path, the name of a dataset, a Dataset or a DatasetDict, not a {type(source).__name__}"
        )
    if str(source) in EMBEDDED:
        return picked(dict(zip(("train", "test"), EMBEDDED[str(source)](), strict=True)), split, source)
    if not str(source).strip():
        raise ValueError('source is empty; give a folder, a file, the name of a dataset on the Hub, or "textures"')
    if (path := Path(source).expanduser()).exists():
        return load_local(path, split, streaming, labels, image_column)
    dataset = _load_hub(str(source), split, streaming)
    return dataset, Account(revision=hub_revision(dataset))


def _load_hub(name: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(f"source {name!r} does not exist, and is no name of a dataset on the Hub")
    name, _, config = name.partition(":")
    with naming_the_source(name, "no local path, and from the Hub"):
        try:
            return datasets.load_dataset(name, config or None, split=split, streaming=streaming)
        except ValueError as error:
            if "unknown split" not in str(error).lower() and "bad split" not in str(error).lower():
                raise
            raise SplitNotFound(f"split {split!r} is not in source {name!r}: {error}") from error


def hub_revision(dataset: Dataset | IterableDataset) -> str | None:
    """The commit of a dataset from the Hub, by the addresses of its files; None if they do not tell it."""
    addresses = dataset.info.download_checksums or {}
    found = (re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", address) for address in addresses)
    commits = {match[1] for match in found if match}
    return commits.pop() if len(commits) == 1 else None


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
        return keep_types(Dataset.from_list(list(rows_of(images.skip(start).take(count))), features=images.features))
    order = torch.randperm(len(images), generator=random or torch.Generator().manual_seed(0))
    drawn = order[start : start + count].tolist()
    return images.select(sorted(drawn) if in_order else drawn)


def _check_readable(dataset: Dataset | IterableDataset, source):
    """Raise ValueError unless at least one of a few images, spread over the dataset, can be opened."""
    if isinstance(dataset, IterableDataset):
        rows = rows_of(dataset.take(_NUM_PROBED))
    else:
        rows = (dataset[index] for index in range(0, len(dataset), max(1, len(dataset) // _NUM_PROBED)))
    error = None
    for row in rows:
        try:
            with decoding(image_name(row["image"], "its first image")):
                open_image(typed(row["image"], dataset.features["image"]))
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
