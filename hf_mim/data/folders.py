"""Which files of a folder are images or tables, and the split and class to which each belongs."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePath

from hf_mim.files import listed

from .classes import why_no_classes
from .dicom import is_dicom
from .mask_folders import without_masks
from .names import SPLIT_OF_WORD, WORDS, split_of_folder

IMAGE_EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .tga .jp2 .ico .avif .heic .heif "
    ".jxl .dcm .dicom .ima .npy .npz".split()
)
DICOM_EXTENSIONS = (".dcm", ".dicom", ".ima")
TABLE_EXTENSIONS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # extension -> builder in datasets
TRAINER_STATE = "trainer_state.json"  # in every folder that transformers' Trainer has written
# Files that lie beside images and are none. No one misses them, so they are no reason for a warning.
SIDE_FILES = frozenset(
    ".txt .json .jsonl .csv .tsv .xml .yaml .yml .md .html .pdf .log .ini .db .py .ipynb .sh .toml .license".split()
)
NO_EXTENSION = "files without an extension"
_DICOM_INDEX = "DICOMDIR"  # lists files, and holds no image

_SPLIT_FILE = re.compile(rf"(?P<word>{WORDS})([-_]\d+([-_]of[-_]\d+)?)?")  # as datasets names them
_UNLABELLED = re.compile(r"(un|non?)[\W_]?label+ed.*|unsup(ervised)?|extra")


@dataclass
class Layout:
    """How the images of a folder are understood.

    Attributes:
        splits: split → (path, class or None) of its images.
        left_out: what was not taken → the number of files.
        notes: what a user may want to know, each in a few words.
    """

    splits: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def readable(name: str) -> str:
    """The name itself if it is UTF-8; otherwise its other bytes are written as `\\xe9`."""
    return os.fsencode(name).decode(errors="backslashreplace")


def find_files(folder: Path, extensions) -> list[str]:
    """The files of `scan`, without what it leaves out."""
    return scan(folder, extensions)[0]


def scan(folder: Path, extensions) -> tuple[list[str], Counter]:
    """(paths, what is left out → how many): the regular files below a folder with one of the extensions.

    Paths are relative to the folder. They are sorted within each folder, and a folder's own files come before those of
    its folders. Extensions may be in upper or lower case. Hidden files and folders are not counted. Folders that a
    training has written are left out, because their pictures are no data. Links are followed, but no folder is read
    twice. Pipes and devices are never opened. Where `.dcm` is wanted, a file without an extension, or with digits for
    one (`1.2.840.1`), is opened to see whether it is a DICOM file, because archives name them so.
    """
    found, left_out, visited, pending = [], Counter(), set(), [""]
    while pending:
        below = pending.pop()
        place = os.path.join(folder, below)
        if (real := os.path.realpath(place)) in visited:
            continue
        visited.add(real)
        try:
            with os.scandir(place) as entries:
                entries = sorted((entry for entry in entries if _is_shown(entry.name)), key=lambda entry: entry.name)
        except OSError:
            left_out["folders that cannot be read"] += 1
            continue
        if any(entry.name == TRAINER_STATE for entry in entries):
            left_out["folders that a training has written"] += 1
            continue
        folders = []
        for entry in entries:
            path, extension = os.path.join(below, entry.name), os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                folders.append(path)
            elif extension not in extensions and not (".dcm" in extensions and _is_bare_dicom(entry)):
                left_out[extension or NO_EXTENSION] += 1
            elif entry.is_file():
                found.append(path)
            else:
                left_out["no regular files (pipes, devices, broken links)"] += 1
        pending += reversed(folders)
    return found, left_out


def file_type(path: str) -> str:
    """The extension in lower case; `.dcm` for a DICOM file that `scan` has found by its bytes."""
    extension = os.path.splitext(path)[1].lower()
    return ".dcm" if _is_bare(path) else extension


def _is_bare(path: str) -> bool:
    return not (extension := os.path.splitext(path)[1].removeprefix(".")) or extension.isdecimal()


def _is_bare_dicom(entry: os.DirEntry) -> bool:
    if not _is_bare(entry.name) or entry.name.upper() == _DICOM_INDEX or not entry.is_file():
        return False
    try:
        with open(entry.path, "rb") as file:
            return is_dicom(file.read(132))
    except OSError:
        return False


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def table_splits(paths: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """(split -> files, notes). Words in names tell the split: "train-00000-of-2.parquet", "val/0.tar".

    A file's own name comes before its folders'. A name such as "test" or "test-00000-of-00002", and a folder "test",
    always tell a split. A word within a longer name ("crash_test_3") tells one only if every file has such a word;
    otherwise the file is training data, as one without such a word.
    """
    sure, perhaps = {}, {}
    for path in paths:
        pure = PurePath(path)
        named = _SPLIT_FILE.fullmatch(pure.stem.lower())
        folders = [split for part in reversed(pure.parts[:-1]) if (split := split_of_folder(part))]
        words = [word for word in re.split(r"[^a-z]+", pure.stem.lower()) if word in SPLIT_OF_WORD]
        if named or (folders and not words):
            sure[path] = SPLIT_OF_WORD[named["word"]] if named else folders[0]
        elif words:
            perhaps[path] = (SPLIT_OF_WORD[words[0]], folders[0] if folders else "train")
    every = len(sure) + len(perhaps) == len(paths)
    splits: dict[str, list[str]] = {}
    for path in paths:
        split = sure.get(path) or (perhaps[path][not every] if path in perhaps else "train")
        splits.setdefault(split, []).append(path)
    named = sorted(path for path, (split, _) in perhaps.items() if split != "train" and not every)
    notes = [f"{named[0]} counts as training data, because other files name no split"] if named else []
    return splits, notes


def image_splits(paths: list[str], classes: bool | None = None) -> Layout:
    """Tell images from masks, and find the split and the class of each image.

    classes: whether folders are classes; None: `why_no_classes` decides, by the training images if there are any.

    Masks that lie beside their images are left out (`without_masks`). A folder that holds all images (from an unpacked
    archive) is ignored. Folders named after splits ("train", "val2017", "test_set") are splits: the top folders, or
    below each class ("cat/train/1.jpg"). Another top folder beside `train` is a split of its own name ("unlabeled"),
    and pictures beside it are left out. Without a folder `train`, what lies beside `test` or `val` is training data.
    A single folder `train` beside folders of other names is a class. The class of an image is the next folder below,
    as in torchvision's ImageFolder: "cat/2023/1.jpg" is a cat.
    """
    layout = Layout()
    entries, layout.left_out = without_masks(paths)
    shared = _shared_depth([parts for parts, _ in entries])
    entries = [(parts[shared:], path) for parts, path in entries]
    splits = _top_splits(entries, layout) or _lower_splits(entries, layout) or {"train": entries}
    decisive = splits.get("train") or next(iter(splits.values()), [])
    if classes is None:
        folders = Counter(parts[0] for parts, _ in decisive if len(parts) > 1)
        reason = why_no_classes(folders, len(decisive) - folders.total())
        classes = reason is None
        layout.notes += [reason] if reason else []
    names = {parts[0] for parts, _ in decisive if len(parts) > 1}
    for split, entries in splits.items():
        found = {parts[0] for parts, _ in entries if len(parts) > 1}
        has_classes = classes and not names.isdisjoint(found)
        if classes and found and not has_classes and split in SPLIT_OF_WORD.values():
            layout.notes.append(f"the folders of split {split} ({listed(sorted(found), 3)}) are none of the classes")
        layout.splits[split] = [(path, parts[0] if has_classes and len(parts) > 1 else None) for parts, path in entries]
    return layout


def _top_splits(entries: list, layout: Layout) -> dict[str, list]:
    """Split → entries below the top folders that are named after splits; {} if there are no such folders."""
    tops = {parts[0] for parts, _ in entries if len(parts) > 1}
    of_top = {top: split for top in tops if (split := split_of_folder(top))}
    found, others = set(of_top.values()), tops - of_top.keys()
    alone = found == {"train"} and not all(_UNLABELLED.fullmatch(name.lower()) for name in others)
    if not found or alone:
        return {}
    splits: dict[str, list] = {}
    for parts, path in entries:
        if len(parts) > 1 and parts[0] in of_top:
            splits.setdefault(of_top[parts[0]], []).append((parts[1:], path))
        elif "train" not in found:
            splits.setdefault("train", []).append((parts, path))
        elif len(parts) > 1:
            splits.setdefault(parts[0], []).append((parts[1:], path))
        else:
            layout.left_out["beside the folders of splits"] += 1
    layout.notes.append(f"splits by the folders {', '.join(sorted(of_top))}")
    return splits


def _lower_splits(entries: list, layout: Layout) -> dict[str, list]:
    """As `_top_splits`, for folders of splits below others ("cat/train/1.jpg"). All images must be in such folders."""
    for depth in range(1, max((len(parts) for parts, _ in entries), default=1) - 1):
        found = [split_of_folder(parts[depth]) if len(parts) > depth + 1 else None for parts, _ in entries]
        if len(set(found) - {None}) < 2:
            continue
        names = sorted({parts[depth] for (parts, _), split in zip(entries, found, strict=True) if split})
        if None in found:
            layout.notes.append(f"folders {', '.join(names)} are no splits, because other images lie outside of them")
            return {}
        splits: dict[str, list] = {}
        for (parts, path), split in zip(entries, found, strict=True):
            splits.setdefault(split, []).append((parts[:depth] + parts[depth + 1 :], path))
        layout.notes.append(f"splits by the folders {', '.join(names)} within others")
        return splits
    return {}


def _shared_depth(parts: list[tuple[str, ...]]) -> int:
    """How many leading folders all paths share, not counting those from a folder named after a split on."""
    folders = zip(*(other[:-1] for other in parts), strict=False)  # of all paths at each depth
    shared = takewhile(lambda names: len(set(names)) == 1 and not split_of_folder(names[0]), folders)
    return len(list(shared))
