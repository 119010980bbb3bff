"""Which pictures of a folder are masks of others: by their folders, or by their names."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath

from .names import IMAGE_FOLDER, MASK_FILE, MASK_FOLDER, split_of_folder

Entry = tuple[tuple[str, ...], str]  # (folders and name, path)


def without_masks(paths: Iterable[str]) -> tuple[list[Entry], Counter]:
    """([(folders and name, path)], what is left out → how many) of the images that are no masks; see `divide`."""
    kept, _, left_out = divide(paths)
    return kept, left_out


def divide(paths: Iterable[str]) -> tuple[list[Entry], dict[str, list[Entry]], Counter]:
    """(images, masks by the name of their folder, what is left out → how many).

    The folders and names of an image and of its mask are the same, except for the extension: what says that they are
    images or masks is left out of them.

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
        masks = {name for name in names if MASK_FOLDER.fullmatch(name.lower())}
        if not masks:
            continue
        images = {name for name in names - masks if IMAGE_FOLDER.fullmatch(name.lower())}
        splits = {name for name in names - masks if split_of_folder(name)}
        if images:
            passed |= {(*place, name) for name in images - splits}
            dropped |= {(*place, name) for name in names - images - splits}
        elif splits:
            dropped |= {(*place, name) for name in masks}
        else:
            owners = {name.lower() for name in names - masks}
            owners |= {""} if place in holding or len(names) == 2 and _same_names(entries, place, *names) else set()
            dropped |= {(*place, name) for name in masks if MASK_FOLDER.fullmatch(name.lower())["of"] in owners}
    files = _mask_files(entries)
    kept, found, left_out = [], {}, Counter()
    for parts, path in entries:
        places = [parts[:depth] for depth in range(1, len(parts))]
        if drop := next((place for place in places if place in dropped), None):
            left_out[f"in {drop[-1]}/"] += 1
            if match := MASK_FOLDER.fullmatch(drop[-1].lower()):
                owner = (drop[-1][: len(match["of"])],) if match["of"] else ()
                found.setdefault(drop[-1], []).append(((*drop[:-1], *owner, *parts[len(drop) :]), path))
        elif path in files:
            left_out["masks by their names"] += 1
            stem, extension = os.path.splitext(parts[-1])
            name = MASK_FILE.fullmatch(stem)["of"] + extension
            found.setdefault(files[path], []).append(((*parts[:-1], name), path))
        else:
            shown = (part for part, place in zip(parts, [*places, parts], strict=True) if place not in passed)
            kept.append((tuple(shown), path))
    return kept, found, left_out


def _same_names(entries: list, place: tuple, one: str, other: str) -> bool:
    """Whether at least half of the images in one of two folders have the same name, without extension, in the other."""
    names: dict[str, set] = {one: set(), other: set()}
    for parts, _ in entries:
        if parts[: len(place)] == place and parts[len(place)] in names:
            names[parts[len(place)]].add((*parts[len(place) + 1 : -1], os.path.splitext(parts[-1])[0]))
    return 2 * len(names[one] & names[other]) >= min(map(len, names.values()))


def _mask_files(entries: list[Entry]) -> dict[str, str]:
    """The files "1_mask.png" of each folder in which at least half of the other images have such a file → "_mask"."""
    folders: dict[tuple, dict[str, str]] = {}
    for parts, path in entries:
        folders.setdefault(parts[:-1], {})[os.path.splitext(parts[-1])[0]] = path
    masks = {}
    for files in folders.values():
        owners = {stem: found["of"] for stem in files if (found := MASK_FILE.fullmatch(stem)) and found["of"] in files}
        if 2 * len(set(owners.values())) >= len(files) - len(owners):
            masks |= {files[stem]: stem[len(owner) :] for stem, owner in owners.items()}
    return masks
