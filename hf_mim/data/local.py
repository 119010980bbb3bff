"""Files on this machine as a dataset: folders of images, tables, tars and `save_to_disk` folders, by split."""

import contextlib
import glob
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, concatenate_datasets
from datasets import Image as ImageFeature

from .account import Account
from .columns import FILE, FOLDER
from .damage import READING_ERRORS, check_saved, damaged, file_being_read, first_cause, is_saved_empty, saved_splits
from .folders import (
    IMAGE_EXTENSIONS,
    TABLE_EXTENSIONS,
    Layout,
    file_type,
    image_splits,
    readable,
    scan,
    table_splits,
)
from .frames import frames_of
from .metadata import is_metadata, metadata_files, read_metadata
from .names import canonical_split, group_folder
from .stacks import Incomplete, files_of_parts, keys_of, parts_of
from .tars import look_into, read_tars


class SplitNotFound(ValueError):
    """The source can be read, but it has no such split."""


class EmptySplit(SplitNotFound):
    """There is such a split, and it has no images."""

    def __init__(self, split: str, source: str | Path):
        super().__init__(f"split {split!r} of source {str(source)!r} is empty")


def pick_split(splits: dict, split: str, source):
    """The value of a split by any of its names. Raises ValueError with those that there are."""
    for name in (split, canonical_split(split), *splits):
        if name in splits and canonical_split(name) == canonical_split(split):
            return splits[name]
    raise SplitNotFound(f"split {split!r} is not in source {str(source)!r}; it has {', '.join(sorted(splits))}")


def picked(splits: dict, split: str, source) -> tuple[Dataset | IterableDataset, Account]:
    """One dataset of several, and an account of the others."""
    dataset = pick_split(splits, split, source)
    others = {
        name: f"{len(other):,}" for name, other in splits.items() if other is not dataset and hasattr(other, "__len__")
    }
    return dataset, Account(splits=others)


@contextlib.contextmanager
def naming_the_source(source, where: str = ""):
    """Turn what the datasets library raises into a ValueError of one line that names the source."""
    try:
        yield
    except SplitNotFound:
        raise
    except (*READING_ERRORS, tarfile.TarError) as error:
        cause = first_cause(error)
        if file := file_being_read(cause):
            cause = damaged(file, cause)
        reason = next(iter(str(cause).strip().splitlines()), "") or type(cause).__name__
        raise ValueError(f"source {str(source)!r}: {where + ': ' if where else ''}{reason}") from error


def load_local(
    path: Path, split: str, streaming: bool, labels: str | None, image_column: str | Incomplete | None = None
) -> tuple[Dataset | IterableDataset, Account]:
    """A split of a file or folder, with all its columns. `labels`, `image_column`: as in `load_images`."""
    if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        return _load_saved(path, split)
    if path.is_file():
        if path.suffix.lower() not in TABLE_EXTENSIONS:
            known = ", ".join(TABLE_EXTENSIONS)
            raise ValueError(f"source {str(path)!r} must be a folder or a file of type {known}, not {path.suffix!r}")
        return _load_tables(path.parent, [path.name], split, streaming, Counter(), labels)
    files, left_out = scan(path, IMAGE_EXTENSIONS | TABLE_EXTENSIONS.keys())
    tables = [name for name in files if _extension(name) in TABLE_EXTENSIONS]
    images = [name for name in files if file_type(name) in IMAGE_EXTENSIONS]
    if images:
        tables = [name for name in tables if not is_metadata(name)]
    if tables and len(tables) >= len(images):  # the few files of the other kind are not data
        return _load_tables(path, tables, split, streaming, left_out + Counter(map(file_type, images)), labels)
    if images:
        return _load_folder(path, images, split, left_out + Counter(map(_extension, tables)), labels, image_column)
    found = (
        f"; there are {', '.join(f'{count:,} {what}' for what, count in left_out.most_common(6))}" if left_out else ""
    )
    raise ValueError(f"source {str(path)!r} holds no images, nor {', '.join(TABLE_EXTENSIONS)} files{found}")


def _load_saved(folder: Path, split: str) -> tuple[Dataset, Account]:
    """A split of what `save_to_disk` has written. The datasets library cannot load an empty one."""
    with naming_the_source(folder):
        check_saved(folder)
        names = saved_splits(folder)
        folders = {split: folder} if names is None else {name: folder / name for name in names}
        saved = {
            name: Dataset.from_dict({}) if is_saved_empty(path) else datasets.load_from_disk(str(path))
            for name, path in folders.items()
        }
        dataset, account = picked(saved, split, folder)
        if not len(dataset):
            raise EmptySplit(split, folder)
    return dataset, account


def _load_folder(
    folder: Path,
    paths: list[str],
    split: str,
    left_out: Counter,
    labels: str | None,
    image_column: str | Incomplete | None,
) -> tuple[Dataset, Account]:
    """A folder of image files. Only their paths, and tables about them, are read here."""
    stacks = {}
    if parts_of(image_column):
        with naming_the_source(folder):
            stacks, outside = files_of_parts(paths, image_column)
        left_out = left_out + outside if stacks else left_out
    layout = image_splits([*stacks] or paths, classes={None: None, FOLDER: True}.get(labels, False))
    if not layout.splits:
        raise ValueError(f"source {str(folder)!r} holds no images beside its masks")
    entries = pick_split(layout.splits, split, folder)
    others = {name: f"{len(other):,}" for name, other in layout.splits.items() if other is not entries}
    kinds = Counter(file_type(path) for path, _ in entries)
    types = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    entries, files = (entries, [stacks[path] for path, _ in entries]) if stacks else _frames(folder, entries)
    taken = f"{len(entries):,} images ({types}{', some of several frames' if len(entries) > kinds.total() else ''})"
    account = Account(taken, others, left_out + layout.left_out, layout.notes + _without(files))
    account.absent = [name for name in files[0] if all(held[name] is None for held in files)]
    columns = {}
    by_part = (image_files([held[name] and str(folder / held[name]) for held in files], name) for name in files[0])
    dataset = concatenate_datasets([*by_part], axis=1)
    if tables := metadata_files(folder, paths):
        named = [next(filter(None, stacks[path].values())) if stacks else path for path, _ in entries]
        about = _metadata(folder, tables, paths, named, account)
        if about is not None:
            columns, dataset = set(about.column_names), concatenate_datasets([dataset, about], axis=1)
    if len(entries) > kinds.total() and FILE not in columns:
        dataset = dataset.add_column(FILE, [readable(path) for path, _ in entries], feature=Value("string"))
        account.notes.append(f"the frames of a file are alike; to keep them on one side of a split: --group {FILE}")
    if FOLDER not in columns and any(names := [group_folder(readable(path)) for path, _ in entries]):
        dataset = dataset.add_column(FOLDER, names, feature=Value("string"))
    if labels not in (None, FOLDER) or FOLDER in columns and labels == FOLDER:
        return dataset, account
    classes = _class_column(layout, entries)
    if classes and (labels == FOLDER or "label" not in columns):
        dataset = dataset.remove_columns([name for name in ("label",) if name in columns])
        dataset, account.class_folders = dataset.add_column("label", classes[0], feature=classes[1]), True
    elif classes:
        account.notes.append(f"the {len(classes[1].names):,} folders may be classes too; to take them: --labels folder")
    elif labels == FOLDER:
        raise ValueError(f"labels={FOLDER!r} needs a folder for each of two classes at least, in {str(folder)!r}")
    return dataset, account


def stack_beside(file: str, image_column: str | Incomplete) -> dict | None:
    """The image that a file is a part of, as a value of the image column: with the files of the same name in the
    folders of the other parts, or None where there is none. None for a file that is in no folder of a part.

    Raises ValueError for a part that is there twice.
    """
    path, names = Path(file), list(parts_of(image_column))
    places = [place for place, part in enumerate(path.parts[:-1]) if part in names]
    if len(places) != 1 or not path.is_file():
        return None
    stack, pattern = {}, f"{glob.escape(path.stem)}.*"
    for key, name in zip(keys_of(image_column), names, strict=True):
        folder = Path(*path.parts[: places[0]], name, *path.parts[places[0] + 1 : -1])
        found = [str(one) for one in sorted(folder.glob(pattern)) if file_type(str(one)) in IMAGE_EXTENSIONS]
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]} are two files of one image; keep one of them")
        stack[key] = {"bytes": None, "path": found[0]} if found else None
    return stack


def _without(files: list[dict[str, str | None]]) -> list[str]:
    """Notes about the parts that images lack."""
    counts = Counter(name for held in files for name, file in held.items() if file is None)
    return [f"{count:,} images lack {name}, which is masked there" for name, count in counts.items()]


def _frames(folder: Path, entries: list[tuple[str, str | None]]) -> tuple[list, list[dict[str, str]]]:
    """(these entries, that of a file of several frames once for each; the path of each image)."""
    images, files = [], []
    for entry in entries:
        whole = str(folder / entry[0])
        for place in frames_of(whole):
            images.append(entry)
            files.append({"image": entry[0] + place.removeprefix(whole)})
    return images, files


def _class_column(layout: Layout, entries: list[tuple[str, str | None]]) -> tuple[list[int], ClassLabel] | None:
    """(class ids of these images, the classes) by their folders; None if there are no two classes.

    Names are collected from all splits, so that a class has the same id in each split. A folder "unlabeled" has none.
    """
    known = [entries for name, entries in layout.splits.items() if name in ("train", "validation", "test")]
    names = sorted({readable(name) for entries in known for _, name in entries if name is not None})
    if len(names) < 2 or all(name is None for _, name in entries):
        return None
    ids = {name: number for number, name in enumerate(names)}
    return [-1 if name is None else ids.get(readable(name), -1) for _, name in entries], ClassLabel(names=names)


def _metadata(folder: Path, tables: list[str], paths: list[str], chosen: list[str], account: Account) -> Dataset | None:
    """The columns of metadata of the chosen images, null where an image has no row; None if there are no columns."""
    table, rows, notes = read_metadata(folder, tables, paths)
    account.notes += notes
    if table.num_columns == 0:
        return None
    account.left_out -= Counter(map(_extension, tables))
    if without := sum(path not in rows for path in chosen):
        account.notes.append(f"{without:,} images have no row in {' or '.join(tables[:3])}")
    return Dataset(table.take(pyarrow.array([rows.get(path) for path in chosen], pyarrow.int64())))


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
    folder: Path, paths: list[str], split: str, streaming: bool, left_out: Counter, labels: str | None
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
    with naming_the_source(folder / paths[0] if len(paths) == 1 else folder):
        if kind == "webdataset":
            dataset = _read_tars(files, split if within else None, streaming, account, labels)
        else:
            given: dict[str, Any] = {"data_files": {"train": [str(file) for file in files]}, "split": "train"}
            if kind == "parquet":
                given["batch_size"] = 1000  # by default that of the first row group, and 0 rows are an error
            try:
                dataset = datasets.load_dataset(kind, streaming=streaming, **given)
            except ValueError as error:
                if "corresponds to no data" not in str(error):
                    raise
                raise EmptySplit(split, folder / paths[0] if len(paths) == 1 else folder) from None
    account.taken = f"{len(chosen):,} {_extension(chosen[0])} file{'s' * (len(chosen) > 1)}"
    account.taken += f", {len(dataset):,} images" if isinstance(dataset, Dataset) else ""
    return dataset, account


def _read_tars(
    tars: list[Path], split: str | None, streaming: bool, account: Account, labels: str | None
) -> Dataset | IterableDataset:
    """The images of these tars. If folders in them are named after splits, those of `split`; None takes the first."""
    found = look_into(tars, streaming, labels)
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
    dataset = read_tars(tars, found, name, streaming)
    account.class_folders = "label" in dataset.column_names
    return dataset


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()
