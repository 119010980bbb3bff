"""Names of folders that tell what they hold: a split, images, or masks."""

import re
from pathlib import PurePath

# Beside masks, images lie in a folder of such a name: also those of VOC and DAVIS, and of Cityscapes.
IMAGE_FOLDER = re.compile(r"images?|imgs?|jpegimages|leftimg8bit|rgb|frames")
_MASK_WORD = (
    r"(masks?|annot|annotations?|segmentations?|seg|labels?|ground[\W_]?truths?|gts?|gtfine|gtcoarse|trimaps?"
    r"|segmentation(class|object)(aug|raw)?)"
)
MASK_FOLDER = re.compile(rf"(?P<of>.*?)[\W_]*{_MASK_WORD}[\W_\d]*(images?|png|train|val|test)?")
MASK_FILE = re.compile(rf"(?P<of>.+)[\W_]{_MASK_WORD}[\W_\d]*", re.IGNORECASE)

SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
WORDS = "|".join(sorted(SPLIT_OF_WORD, key=len, reverse=True))
_KINDS = r"(images?|imgs?|sets?|data|dataset|split|samples)"
_SPLIT_FOLDER = re.compile(rf"{_KINDS}?[\W_\d]*(?P<word>{WORDS})[\W_\d]*{_KINDS}?[\W_\d]*")


def canonical_split(name: str) -> str:
    """ "val" -> "validation", "training" -> "train". Other names stay as they are."""
    return SPLIT_OF_WORD.get(name.lower(), name)


def split_of_folder(name: str) -> str | None:
    """The split that a folder's name tells: "train" of "train2017" and of "training_set"; None for other names."""
    found = _SPLIT_FOLDER.fullmatch(name.lower())
    return found and SPLIT_OF_WORD[found["word"]]


def group_folder(path: str) -> str | None:
    """The name of the folder that holds an image. Folders named images or after splits are passed over."""
    for name in reversed(PurePath(path).parts[:-1]):
        if not IMAGE_FOLDER.fullmatch(name.lower()) and not split_of_folder(name):
            return name
    return None
