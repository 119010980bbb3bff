"""Videos with object masks, from DAVIS's folders or from tables. A mask is read only when it is needed."""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np
from datasets import ClassLabel, Dataset

from .folders import IMAGE_EXTENSIONS, find_files
from .local import image_files
from .masks import IMAGE_FOLDERS, MASK_FOLDERS, MaskedImages, load_masks
from .sources import first_split, local_folder, open_source, source_name

VOID = 255  # the id of pixels that are not scored, in DAVIS
SEQUENCE_COLUMNS = ("sequence", "video", "clip", "label")
FRAME_COLUMNS = ("frame", "frame_id", "frame_index")
_FRAME_FOLDERS = ("jpegimages", "frames", *IMAGE_FOLDERS)
_LISTS = ("2017", "2016", "480p", "1080p")  # folders of DAVIS's lists; papers report the first
_USUAL_RESOLUTION = "480p"


class Videos:
    """Sequences of frames. Each frame has a mask of object ids: 0 background, 255 void.

    If the first mask of a sequence has only the ids 0 and 255, as in DAVIS 2016, then the sequence has one object, and
    255 is read as 1.

    A protocol reads only first masks until all its predictions are made.

    Args:
        frames: all frames with their masks; those of a sequence in the order of time.
        sequences: the name of each frame's sequence.

    Attributes: `names` of the sequences, sorted; `name` of the source.

    Raises:
        ValueError: in one line that names the sequence: it has a single frame, frames of several sizes, or an empty
            first mask.
    """

    def __init__(self, frames: MaskedImages, sequences: Sequence[str]):
        self._frames, self.name = frames, frames.name
        self._rows: dict[str, list[int]] = {}
        for row, sequence in enumerate(sequences):
            self._rows.setdefault(sequence, []).append(row)
        self.names = sorted(self._rows)
        for sequence, rows in self._rows.items():
            if len(rows) < 2:
                raise ValueError(f"sequence {sequence} of {self.name} has one frame, and a video needs two at least")
            if len(sizes := {frames.sizes[row] for row in rows}) > 1:
                found = ", ".join(f"{height}×{width}" for height, width in sorted(sizes))
                raise ValueError(f"frames of sequence {sequence} of {self.name} must be of one size, not {found}")
            if not len(self.object_ids(sequence)):
                raise ValueError(f"the first mask of sequence {sequence} of {self.name} must hold an object, not none")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def images(self) -> Dataset:
        """All frames, with the column `image`."""
        return self._frames.images

    def frames(self, sequence: str) -> Dataset:
        """The frames in order: a column `image`, undecoded."""
        return self._frames.images.select(self._rows[sequence])

    def size(self, sequence: str) -> tuple[int, int]:
        """(height, width) of its frames and masks."""
        return self._frames.sizes[self._rows[sequence][0]]

    def object_ids(self, sequence: str) -> np.ndarray:
        """The ids in the first mask, without background and void, in increasing order."""
        ids = np.unique(self.read_first_mask(sequence))
        return ids[(ids != 0) & (ids != VOID)]

    def read_first_mask(self, sequence: str) -> np.ndarray:
        """Object ids `[h, w]` of the first frame. The task gives them to the protocol."""
        return self._read(sequence, self._rows[sequence][:1])[0]

    def read_masks(self, sequence: str) -> np.ndarray:
        """Object ids `[frames, h, w]`: the answers."""
        return self._read(sequence, self._rows[sequence])

    def _read(self, sequence: str, rows: list[int]) -> np.ndarray:
        masks = np.stack([self._frames.read_mask(row) for row in rows])
        is_binary = set(np.unique(masks[0])) | {0} == {0, VOID}
        return (masks == VOID).astype(np.uint8) if is_binary else masks

    def pick(self, wanted: int | str | Sequence[str] | None) -> list[str]:
        """Names of sequences: all (None), so many of the first, or those named. Raises ValueError for unknown ones."""
        if wanted is None:
            return self.names
        if isinstance(wanted, int):
            if not 1 <= wanted <= len(self):
                raise ValueError(f"sequences must be between 1 and the {len(self)} of {self.name}, not {wanted}")
            return self.names[:wanted]
        wanted = [wanted] if isinstance(wanted, str) else wanted
        unknown = sorted(set(wanted) - set(self.names))
        if unknown or not wanted:
            known = ", ".join(self.names)
            raise ValueError(f"sequences must be a number or among {known}, not {', '.join(unknown) or 'none'}")
        return list(dict.fromkeys(wanted))

    def describe(self, sequences: Sequence[str]) -> dict:
        """For a result on these sequences."""
        return {
            "source": self.name,
            "sequences": list(sequences),
            "frames": sum(len(self._rows[sequence]) for sequence in sequences),
        }


def load_videos(
    source: str | os.PathLike | Dataset,
    split: str | None = None,
    image_column: str | None = None,
    mask_column: str | None = None,
    sequence_column: str | None = None,
) -> Videos:
    """Load videos whose frames have masks, not yet decoded.

    Args:
        source: a folder laid out as DAVIS (`JPEGImages/480p/SEQUENCE/00000.jpg` and the same in `Annotations`, `.png`);
            or a folder with `frames` (or `images`) and `masks`, each with one folder for each sequence; or a source of
            `load_images`, as a table with a row for each frame. The numbers in the names of files order the frames.
        split: for DAVIS, the name of a list in `ImageSets/2017` (or `2016`, `480p`), by default "val". For a folder
            without lists it must be left out. For tables as in `load_images`, by default the first that is there of
            test, validation and train.
        image_column, mask_column: default: found as in `load_masks`.
        sequence_column: holds names or ids of sequences; default: "sequence", "video", "clip" or "label". The column
            "frame" orders the rows; without it they keep their order.

    Raises:
        ValueError: in one line: there are no masks, a frame has no mask, a mask has another size than its frame (only
            headers are read), or `Videos` raises.
    """
    path = local_folder(source)
    folder = None if path is None else _child(path, _FRAME_FOLDERS)
    if folder is not None:
        return _load_folders(path, folder, split)
    splits = ["test", "validation", "train"] if split is None else [split]
    data, split = first_split(splits, lambda name: open_source(source, name))
    name = f"{source_name(source)}, split {split}"
    sequence_column = sequence_column or next((c for c in SEQUENCE_COLUMNS if c in data.features), None)
    if sequence_column not in data.features:
        known = ", ".join(data.features)
        raise ValueError(f"{name} tells no sequences: sequence_column must be one of {known}, not {sequence_column}")
    feature, values = data.features[sequence_column], data[sequence_column][:]
    sequences = feature.int2str(values) if isinstance(feature, ClassLabel) else [str(value) for value in values]
    frame_column = next((column for column in FRAME_COLUMNS if column in data.features), None)
    frames = load_masks(data, image_column=image_column, mask_column=mask_column)
    frames.name = name
    order = range(len(frames))
    if frame_column is not None:
        order = sorted(order, key=data[frame_column][:].__getitem__)
    return Videos(frames.select(order), [sequences[row] for row in order])


def _load_folders(source: Path, frame_folder: Path, split: str | None) -> Videos:
    mask_folder = _child(source, MASK_FOLDERS)
    if mask_folder is None:
        raise ValueError(f"source {str(source)!r} has {frame_folder.name}, but no folder Annotations or masks")
    frames = {_without_extension(path): path for path in find_files(frame_folder, IMAGE_EXTENSIONS)}
    masks = {_without_extension(path): path for path in find_files(mask_folder, IMAGE_EXTENSIONS)}
    frames = _one_resolution(frames, source)
    if (listed := _listed(source, split)) is not None:
        if missing := sorted(listed - {key.parent.name for key in frames}):
            raise ValueError(f"source {str(source)!r} has no frames of {missing[0]}, which its list names")
        frames = {key: path for key, path in frames.items() if key.parent.name in listed}
    if not frames:
        raise ValueError(f"source {str(source)!r} holds no frames in {frame_folder.name}")
    order = sorted(frames, key=lambda key: _natural(str(key)))
    names = [key.parent.name or source.name for key in order]
    features = [str(frame_folder / frames[key]) for key in order]
    answers = [str(mask_folder / masks[key]) if key in masks else None for key in order]
    name = source_name(source) + ("" if listed is None else f", split {split or 'val'}")
    return Videos(MaskedImages(image_files(features), image_files(answers, "mask"), name), names)


def _child(folder: Path, names: Sequence[str]) -> Path | None:
    """The child of `folder` with the first of these names that is there, in upper or lower case."""
    found = {child.name.lower(): child for child in folder.iterdir() if child.is_dir()}
    return next((found[name] for name in names if name in found), None)


def _one_resolution(frames: dict[PurePath, str], source: Path) -> dict[PurePath, str]:
    """The frames of one resolution, because DAVIS has a folder for each resolution above the sequences."""
    if not all(len(key.parts) > 2 for key in frames):
        return frames
    resolutions = sorted({key.parts[0] for key in frames})
    if len(resolutions) > 1 and _USUAL_RESOLUTION not in resolutions:
        raise ValueError(f"source {str(source)!r} has frames in {', '.join(resolutions)}: leave one of them")
    chosen = _USUAL_RESOLUTION if _USUAL_RESOLUTION in resolutions else resolutions[0]
    return {key: path for key, path in frames.items() if key.parts[0] == chosen}


def _listed(source: Path, split: str | None) -> set[str] | None:
    """The sequences of a split, or None for a source without lists like DAVIS's."""
    lists = source / "ImageSets"
    if not lists.is_dir():
        if split is not None:
            raise ValueError(f"split {split!r} is not in source {str(source)!r}, which has no ImageSets: leave it out")
        return None
    files = [path for name in _LISTS if (path := lists / name / f"{split or 'val'}.txt").is_file()]
    if not files:
        known = sorted({path.stem for name in _LISTS for path in (lists / name).glob("*.txt")})
        raise ValueError(f"split {split or 'val'!r} is not in {str(lists)!r}; it has {', '.join(known) or 'none'}")
    words = map(PurePath, files[0].read_text().split())  # names; or, in a resolution's lists, paths of files
    return {word.parent.name or word.name for word in words}


def _without_extension(path: str) -> PurePath:
    return PurePath(path).with_suffix("")


def _natural(text: str) -> list:
    """A key that sorts frame10 after frame9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
