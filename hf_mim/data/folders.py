"""Which files of a folder are images or tables, and the split and class to which each belongs."""

import os
import re
from itertools import takewhile
from pathlib import Path, PurePath

IMAGE_EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .tga .jp2 .ico .avif .npy".split()
)
TABLE_EXTENSIONS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # extension -> builder in datasets
TRAINER_STATE = "trainer_state.json"  # in every folder that transformers' Trainer has written

_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def canonical_split(name: str) -> str:
    """ "val" -> "validation", "training" -> "train". Other names stay as they are."""
    return _SPLIT_OF_WORD.get(name.lower(), name)


def find_files(folder: Path, extensions) -> list[str]:
    """Sorted paths, relative to the folder, of all files below it with one of the extensions, in upper or lower case.

    Hidden files and folders are left out. So are folders that a training has written, because their pictures are no
    data. Links are followed, but no folder is read twice.
    """
    found, visited = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited or TRAINER_STATE in names:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(parent, folder)
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions:
                found.append(name if below == "." else os.path.join(below, name))
    return found


def table_splits(paths: list[str]) -> dict[str, list[str]]:
    """Split -> files. Words in names of files or folders tell the split: "train-00000-of-2.parquet", "val/0.tar".

    A file's own name comes before its folders'. A file without such a word is training data.
    """
    splits: dict[str, list[str]] = {}
    for path in paths:
        pure = PurePath(path)
        parts = [pure.stem, *reversed(pure.parts[:-1])]
        words = (word for part in parts for word in re.split(r"[^a-z]+", part.lower()))
        split = next((_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD), "train")
        splits.setdefault(split, []).append(path)
    return splits


def image_splits(paths: list[str]) -> dict[str, list[tuple[str, str | None]]]:
    """Split -> (path, class or None) of the images in a folder.

    If all top folders are named after splits ("train", "val"), they are splits; otherwise all images are "train". The
    class is the next folder below, as in torchvision's ImageFolder: "cat/2023/1.jpg" is a cat. A folder that holds all
    images (from an unpacked archive) is ignored. If one image of a split has no class folder, the split has no classes.
    """
    entries = [(PurePath(path).parts, path) for path in paths]
    splits: dict[str, list] = {}
    shared = _shared_depth([parts for parts, _ in entries])
    entries = [(parts[shared:], path) for parts, path in entries]
    if all(len(parts) > 1 and parts[0].lower() in _SPLIT_OF_WORD for parts, _ in entries):
        for parts, path in entries:
            splits.setdefault(canonical_split(parts[0]), []).append((parts[1:], path))
    else:
        splits["train"] = entries
    return {split: _with_classes(entries) for split, entries in splits.items()}


def _shared_depth(parts: list[tuple[str, ...]]) -> int:
    """How many leading folders all paths share, not counting those from a folder named after a split on."""
    folders = zip(*(other[:-1] for other in parts), strict=False)  # of all paths at each depth
    shared = takewhile(lambda names: len(set(names)) == 1 and names[0].lower() not in _SPLIT_OF_WORD, folders)
    return len(list(shared))


def _with_classes(entries: list[tuple[tuple[str, ...], str]]) -> list[tuple[str, str | None]]:
    has_classes = all(len(parts) > 1 for parts, _ in entries)
    return [(path, parts[0] if has_classes else None) for parts, path in entries]
