"""Whether the folders of images are classes, or groups such as patients, scenes and videos.

Folders tell it only by their names and sizes, so the rule is cautious, and the line that a run prints says what it
found. `--labels folder` and `--labels none` overrule it.
"""

import re
from collections import Counter

from hf_mim.files import listed

FEW = 10  # so many folders may be classes, however few images each has
SEVERAL = 10  # images that each of more folders must have, on average
_OUTSIDE = 0.1  # share of the images that may lie outside of the folders
_SAME_PATTERN = 0.9  # share of the folders whose names differ only in their numbers
# What people call groups and classes that they number: "P001", "patient_2", "class 3".
_GROUP_WORDS = frozenset(
    "p pt pat patient sub subj subject case id site scene sc seq sequence video vid clip slide scan study series"
    " session ses visit frame tile roi sample specimen plate well cam camera loc location area region field user person"
    " animal day date run batch".split()
)
_CLASS_WORDS = frozenset("class cls label category cat digit grade stage level type kind char character letter".split())
_WORDNET = re.compile(r"n\d{8}")
_HEX = re.compile(r"(?=.*\d)[0-9a-f-]{8,}")


def why_no_classes(folders: Counter, outside: int) -> str | None:
    """Why these folders are not taken for classes, in words; "" if there is nothing to say, None if they are classes.

    Two or more folders are classes if all of this holds:
    - At most a tenth of the images lie outside of them.
    - Their names are not those of groups. Names of one pattern ("P001", "2021-03-04", "0a1b2c3d") are, if they begin
      with a word such as patient or scene, or if there are more than 10 folders; except for WordNet's "n01440764" and
      for words such as class or grade.
    - There are at most 10 folders, or 10 images in each on average.

    Args:
        folders: name → number of images.
        outside: the number of images outside of them.
    """
    if len(folders) < 2:
        return ""
    inside = folders.total()
    if outside > _OUTSIDE * (inside + outside):
        return f"folders are no classes, because {outside:,} images lie outside of them"
    reason = None
    word = _numbered(list(folders))
    if word is not None and word not in _CLASS_WORDS and (word in _GROUP_WORDS or len(folders) > FEW):
        reason = "their names are numbered"
    elif len(folders) > FEW and inside < SEVERAL * len(folders):
        reason = f"they hold {inside / len(folders):.1f} images on average, fewer than {SEVERAL}"
    return reason and (
        f"the {len(folders):,} folders ({listed(sorted(folders), 3)}) are taken for groups such as patients or scenes, "
        f"not for classes, because {reason}; if they are classes: --labels folder; to keep each group on one side of a "
        "split: --group folder"
    )


def _numbered(names: list[str]) -> str | None:
    """The word before the number, in lower case and maybe empty, if the names differ only in numbers; None if not."""
    names = [name.lower() for name in names]
    if all(map(_WORDNET.fullmatch, names)):
        return None
    if all(map(_HEX.fullmatch, names)):
        return "id"
    patterns = Counter(re.sub(r"\d+", "0", name) for name in names)
    pattern, count = patterns.most_common(1)[0]
    if "0" not in pattern or count < _SAME_PATTERN * len(names):
        return None
    return re.match(r"[a-z]*", pattern)[0]
