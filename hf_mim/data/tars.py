"""WebDataset tars as people write them: images of any type, in one tar or over several; labels beside them or folders.

Files of one sample follow each other and have the same name up to the first dot: "7.jpg", "7.cls" or "7.json",
"7.seg.png". A label is a number or a name in "7.cls", or in "7.json" a value called label, class or the like.
"""

import contextlib
import gzip
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature

from .columns import FOLDER, IMAGE_NAMES, LABEL_NAMES, NO_LABELS
from .damage import damaged
from .folders import IMAGE_EXTENSIONS, Layout, image_splits
from .names import group_folder

_MOST_PEEKED = 20_000  # files in all tars whose names are read before a stream begins
_ORDER = {name: place for place, name in enumerate(IMAGE_NAMES)}  # of "7.jpg" and "7.png", the first is the image


@dataclass
class TarImages:
    """The images of some tars.

    Attributes:
        layout: their splits and classes by the folders in the tars, and what was left out, as in a folder.
        column: the name of the column of labels.
        extensions: of the images → how many.
        labels: the labels that they have themselves, as text → how many.
        extra: further images of the samples, by what follows the first dot: "seg.png" → how many.
    """

    layout: Layout = field(default_factory=Layout)
    column: str = "cls"
    extensions: Counter = field(default_factory=Counter)
    labels: Counter = field(default_factory=Counter)
    extra: Counter = field(default_factory=Counter)


def look_into(tars: list[Path], peek: bool = False, labels: str | None = None) -> TarImages:
    """Read the names and labels in all tars; with `peek`, only of the first files of each.

    labels: the name of the value in "7.json" that is the label, or of the file ("cls"); "folder": only the folders;
        "none": nothing. By default, `LABEL_NAMES`, or else folders that look like classes.

    Raises:
        DamagedFile: in one line that names the file.
    """
    most = max(20, _MOST_PEEKED // len(tars)) if peek else None
    is_column = labels not in (None, FOLDER, NO_LABELS)
    found, names = TarImages(column=labels if is_column else "cls"), {}
    fields = (labels,) if is_column else LABEL_NAMES if labels is None else ()
    for tar in tars:
        for sample in _samples(tar, fields, most):
            names[sample.name] = None
            found.extensions[_extension(sample.name)] += 1
            found.extra.update(sample.extra.keys())
            found.labels.update([sample.label] if sample.label is not None else [])
    has_folders = {None: None if not found.labels else False, FOLDER: True}.get(labels, False)
    found.layout = image_splits(list(names), has_folders)
    return found


def read_tars(tars: list[Path], found: TarImages, split: str, streaming: bool) -> Dataset | IterableDataset:
    """The images of a split of the layout of some tars.

    Its columns are the extension of the images, or `image` if they have several; `cls` (or as the user named it), or
    `label` by the folders in the tars; `folder`, the folder of an image; and one for each kind of further images. A
    stream has only images, and labels that are numbers, because the rest of the tars is not known yet.
    """
    if streaming and len(found.layout.splits) > 1:
        raise ValueError(f"folders in it are splits ({', '.join(found.layout.splits)}); load it with streaming=False")
    if streaming and found.layout.left_out:
        raise ValueError(f"images in it are masks ({', '.join(found.layout.left_out)}); load it with streaming=False")
    classes = sorted({name for part in found.layout.splits.values() for _, name in part if name is not None})
    numbers, by_folder = all(map(_is_number, found.labels)), not found.labels and len(classes) > 1
    ids = {text: number for number, text in enumerate(classes if by_folder else sorted(found.labels))}
    if found.labels and numbers:
        ids = {text: int(text) for text in found.labels}
    extra = () if streaming else tuple(sorted(found.extra))
    labelled = bool(found.labels and numbers) if streaming else bool(found.labels or by_folder)
    image = "image" if len(found.extensions) > 1 else next(iter(found.extensions)).removeprefix(".")
    label = (found.column if found.labels else "label") if labelled else None
    features = Features({name: ImageFeature(decode=False) for name in (image, *extra)})
    if label is not None:
        features[label] = Value("int64") if numbers and not by_folder else ClassLabel(names=list(ids))
    fields = LABEL_NAMES if found.column == "cls" else (found.column,)
    arguments = {"tars": [str(tar) for tar in tars], "columns": (image, label, extra), "fields": fields}
    if streaming:
        return IterableDataset.from_generator(_rows, features, gen_kwargs=arguments)
    # Size and time are arguments, so that a tar that was changed is not taken from the cache of datasets.
    arguments["stamps"] = tuple((stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, tars))
    arguments |= {"ids": ids, "classes": dict(found.layout.splits[split]), "by_folder": by_folder}
    if any(group_folder(name) for name in arguments["classes"]):
        features[FOLDER] = Value("string")
    return Dataset.from_generator(_rows, features, gen_kwargs=arguments)


def _rows(
    tars: list[str], columns: tuple, fields: tuple, ids=None, classes=None, by_folder=False, stamps=None
) -> Iterator[dict]:
    """The rows of a dataset. Without `classes`, all images are taken, with labels that are numbers.

    Args:
        fields: names of values that are labels.
        ids: label as text → label.
        classes: name of an image in the tar → its class by the folder. Other images are left out.
    """
    image, label, extra = columns
    for tar in tars:
        for sample in _samples(tar, fields, None, read=True):
            if classes is not None and sample.name not in classes:
                continue
            row = {image: _value(tar, sample.name, sample.data)}
            row |= {name: _value(tar, *sample.extra[name]) if name in sample.extra else None for name in extra}
            if classes is not None:
                row[FOLDER] = group_folder(sample.name)
            if label is not None:
                text = classes[sample.name] if by_folder else sample.label
                row[label] = ids.get(text, -1) if ids is not None else int(text) if _is_number(text) else -1
            yield row


def _value(tar: str, name: str, data: bytes) -> dict:
    return {"bytes": data, "path": f"{os.path.basename(tar)}/{name}"}


@dataclass
class _Sample:
    """One image: its name and bytes; its label as text; further images, by field → (name, bytes)."""

    name: str
    data: bytes
    label: str | None
    extra: dict[str, tuple[str, bytes]]


def _samples(tar: str | Path, fields: tuple, most: int | None, read: bool = False) -> Iterator[_Sample]:
    """The images of one tar. Their bytes are empty unless they are asked for."""
    key, group = None, []
    for name, content in _members(tar, most, read):
        if _key(name) != key:
            yield from _divide(group, fields)
            key, group = _key(name), []
        group.append((name, content))
    yield from _divide(group, fields)


def _divide(group: list[tuple[str, bytes]], fields: tuple) -> Iterator[_Sample]:
    """The sample of these files, or one for each image if dots belong to their names ("7.1.jpg", "7.2.jpg")."""
    pictures = [(name, data) for name, data in group if _extension(name) in IMAGE_EXTENSIONS]
    exact = [picture for picture in pictures if f".{_field(picture[0])}" in IMAGE_EXTENSIONS]
    if exact:
        exact.sort(key=lambda picture: _ORDER.get(_field(picture[0]), len(_ORDER)))
        name, data = exact[0]
        labels = [text for other, content in group if (text := _label(_field(other), content, fields)) is not None]
        extra = {_field(other): (other, content) for other, content in pictures if other != name}
        yield _Sample(name, data, labels[0] if labels else None, extra)
        return
    labels = {os.path.splitext(name)[0]: _label(_extension(name)[1:], content, fields) for name, content in group}
    for name, data in pictures:
        yield _Sample(name, data, labels.get(os.path.splitext(name)[0]), {})


def _label(kind: str, content: bytes, fields: tuple) -> str | None:
    """The label in a file of this kind, as text; None if there is none. `fields`: the names that it may have."""
    if kind == "cls" and "cls" in fields:
        return content.decode(errors="replace").strip() or None
    if kind != "json":
        return None
    try:
        values = json.loads(content)
    except ValueError:
        return None
    label = next((values[name] for name in fields if name in values), None) if isinstance(values, dict) else None
    return (
        None
        if label is None or isinstance(label, dict | list)
        else str(int(label) if isinstance(label, bool) else label)
    )


def _is_number(text: str | None) -> bool:
    return text is not None and text.removeprefix("-").isdecimal()


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _field(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _members(tar: str | Path, most: int | None, read: bool) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files. The content of an image is read only if `read` is true; else it is empty.

    What macOS adds ("._7.jpg", "__MACOSX/") and hidden files are left out.
    """
    with _damage(tar), tarfile.open(tar, encoding="utf-8", errors="backslashreplace") as archive:
        for count, member in enumerate(archive):
            if most is not None and count >= most:
                return
            archive.members = []  # type: ignore[attr-defined]  # not in typeshed; it would keep them all
            name = str(PurePosixPath(member.name))
            hidden = any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
            if not member.isfile() or hidden:
                continue
            wanted = read or _extension(name) in (".cls", ".json")
            content = archive.extractfile(member).read() if wanted else b""
            if wanted and len(content) < member.size:
                raise tarfile.ReadError("unexpected end of data")
            yield name, content
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("no tar from here on")


@contextlib.contextmanager
def _damage(tar: str | Path):
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(tar, error) from error
