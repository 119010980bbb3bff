"""Which files of a folder are images or tables, and the split and class to which each belongs."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePath

IMAGE_EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .tga .jp2 .ico .avif .npy "
    ".npz".split()
)
TABLE_EXTENSIONS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # extension -> builder in datasets
TRAINER_STATE = "trainer_state.json"  # in every folder that transformers' Trainer has written
# Files that lie beside images and are none. No one misses them, so they are no reason for a warning.
SIDE_FILES = frozenset(
    ".txt .json .jsonl .csv .tsv .xml .yaml .yml .md .html .pdf .log .ini .db .py .ipynb .sh .toml .license".split()
)
NO_EXTENSION = "files without an extension"

# Beside masks, images lie in a folder of such a name: also those of VOC and DAVIS, and of Cityscapes.
_IMAGE_FOLDER = re.compile(r"images?|imgs?|jpegimages|leftimg8bit|rgb|frames")
_MASK_WORD = (
    r"(masks?|annot|annotations?|segmentations?|seg|labels?|ground[\W_]?truths?|gts?|gtfine|gtcoarse|trimaps?"
    r"|segmentation(class|object)(aug|raw)?)"
)
_MASK_FOLDER = re.compile(rf"(?P<of>.*?)[\W_]*{_MASK_WORD}[\W_\d]*(images?|png|train|val|test)?")
_MASK_FILE = re.compile(rf"(?P<of>.+)[\W_]{_MASK_WORD}[\W_\d]*", re.IGNORECASE)

_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORDS = "|".join(sorted(_SPLIT_OF_WORD, key=len, reverse=True))
_KINDS = r"(images?|imgs?|sets?|data|dataset|split|samples)"
_SPLIT_FOLDER = re.compile(rf"{_KINDS}?[\W_\d]*(?P<word>{_WORDS})[\W_\d]*{_KINDS}?[\W_\d]*")
_SPLIT_FILE = re.compile(rf"(?P<word>{_WORDS})([-_]\d+([-_]of[-_]\d+)?)?")  # as datasets names them
_UNLABELLED = re.compile(r"(un|non?)[\W_]?label+ed.*|unsup(ervised)?|extra")
_FEW = 10  # so many folders may be classes, however few images each has


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


def canonical_split(name: str) -> str:
    """ "val" -> "validation", "training" -> "train". Other names stay as they are."""
    return _SPLIT_OF_WORD.get(name.lower(), name)


def split_of_folder(name: str) -> str | None:
    """The split that a folder's name tells: "train" of "train2017" and of "training_set"; None for other names."""
    found = _SPLIT_FOLDER.fullmatch(name.lower())
    return found and _SPLIT_OF_WORD[found["word"]]


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
    twice. Pipes and devices are never opened.
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
            elif extension not in extensions:
                left_out[extension or NO_EXTENSION] += 1
            elif entry.is_file():
                found.append(path)
            else:
                left_out["no regular files (pipes, devices, broken links)"] += 1
        pending += reversed(folders)
    return found, left_out


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
        words = [word for word in re.split(r"[^a-z]+", pure.stem.lower()) if word in _SPLIT_OF_WORD]
        if named or (folders and not words):
            sure[path] = _SPLIT_OF_WORD[named["word"]] if named else folders[0]
        elif words:
            perhaps[path] = (_SPLIT_OF_WORD[words[0]], folders[0] if folders else "train")
    every = len(sure) + len(perhaps) == len(paths)
    splits: dict[str, list[str]] = {}
    for path in paths:
        split = sure.get(path) or (perhaps[path][not every] if path in perhaps else "train")
        splits.setdefault(split, []).append(path)
    named = sorted(path for path, (split, _) in perhaps.items() if split != "train" and not every)
    notes = [f"{named[0]} counts as training data, because other files name no split"] if named else []
    return splits, notes


def image_splits(paths: list[str]) -> Layout:
    """Tell images from masks, and find the split and the class of each image.

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
    for split, entries in splits.items():
        layout.splits[split] = _with_classes(entries, layout.notes if split == "train" else [])
    return layout


def without_masks(paths: Iterable[str]) -> tuple[list[tuple[tuple[str, ...], str]], Counter]:
    """([(folders and name, path)], what is left out → how many) of the images that are no masks.

    Masks are known by their place: a folder "masks", "annotations", "labels", "gtFine" beside "images", beside folders
    of splits, beside "train" ("train_masks"), or beside pictures; or files "1_mask.png" beside most of "1.png". Where
    a folder of masks lies beside "images", only "images" is taken, and its name is no class.
    """
    entries = [(PurePath(path).parts, path) for path in paths]
    children: dict[tuple, set[str]] = {}  # folder → the folders in it
    for parts, _ in entries:
        for depth in range(len(parts) - 1):
            children.setdefault(parts[:depth], set()).add(parts[depth])
    holding = {parts[:-1] for parts, _ in entries}
    dropped, passed = set(), set()
    for place, names in children.items():
        masks = {name for name in names if _MASK_FOLDER.fullmatch(name.lower())}
        if not masks:
            continue
        images = {name for name in names - masks if _IMAGE_FOLDER.fullmatch(name.lower())}
        splits = {name for name in names - masks if split_of_folder(name)}
        if images:
            passed |= {(*place, name) for name in images - splits}
            dropped |= {(*place, name) for name in names - images - splits}
        elif splits:
            dropped |= {(*place, name) for name in masks}
        else:
            owners = {name.lower() for name in names - masks}
            owners |= {""} if place in holding or len(names) == 2 and _same_names(entries, place, *names) else set()
            dropped |= {(*place, name) for name in masks if _MASK_FOLDER.fullmatch(name.lower())["of"] in owners}
    files = _mask_files(entries)
    kept, left_out = [], Counter()
    for parts, path in entries:
        places = [parts[:depth] for depth in range(1, len(parts))]
        if drop := next((place for place in places if place in dropped), None):
            left_out[f"in {drop[-1]}/"] += 1
        elif path in files:
            left_out["masks by their names"] += 1
        else:
            shown = (part for part, place in zip(parts, [*places, parts], strict=True) if place not in passed)
            kept.append((tuple(shown), path))
    return kept, left_out


def _same_names(entries: list, place: tuple, one: str, other: str) -> bool:
    """Whether at least half of the images in one of two folders have the same name, without extension, in the other."""
    names: dict[str, set] = {one: set(), other: set()}
    for parts, _ in entries:
        if parts[: len(place)] == place and parts[len(place)] in names:
            names[parts[len(place)]].add((*parts[len(place) + 1 : -1], os.path.splitext(parts[-1])[0]))
    return 2 * len(names[one] & names[other]) >= min(map(len, names.values()))


def _mask_files(entries: list[tuple[tuple[str, ...], str]]) -> set[str]:
    """The files "1_mask.png" of each folder in which at least half of the other images have such a file."""
    folders: dict[tuple, dict[str, str]] = {}
    for parts, path in entries:
        folders.setdefault(parts[:-1], {})[os.path.splitext(parts[-1])[0]] = path
    masks = set()
    for files in folders.values():
        owners = {stem: found["of"] for stem in files if (found := _MASK_FILE.fullmatch(stem)) and found["of"] in files}
        if 2 * len(set(owners.values())) >= len(files) - len(owners):
            masks |= {files[stem] for stem in owners}
    return masks


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


def _with_classes(entries: list[tuple[tuple[str, ...], str]], notes: list[str]) -> list[tuple[str, str | None]]:
    """(path, class or None). Folders are classes if nearly all images are in one, and there are not too many."""
    folders = Counter(parts[0] for parts, _ in entries if len(parts) > 1)
    inside = folders.total()
    few_outside = len(entries) - inside <= 0.1 * len(entries)
    several_each = len(folders) <= _FEW or inside >= 2 * len(folders)
    if folders and len(folders) > 1 and not few_outside:
        notes.append(f"folders are no classes, because {len(entries) - inside} images lie outside of them")
    elif len(folders) > 1 and not several_each:
        notes.append(f"the {len(folders)} folders are no classes, because they hold less than 2 images each")
    has_classes = few_outside and several_each
    return [(path, parts[0] if has_classes and len(parts) > 1 else None) for parts, path in entries]
