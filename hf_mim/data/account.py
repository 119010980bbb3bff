"""What was taken from a source and what was left out, in words."""

from collections import Counter
from dataclasses import dataclass, field

from datasets import ClassLabel, Dataset, IterableDataset

from hf_mim.files import listed

from .folders import SIDE_FILES


@dataclass
class Account:
    """What was taken from a source, and what was not.

    Attributes:
        taken: in words: "6 images (4 .jpg, 2 .png)".
        splits: name → what it holds, for those that were not asked for.
        left_out: what was not taken → the number of files.
        notes: more that a user may want to know, each in a few words.
    """

    taken: str = ""
    splits: dict[str, str] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def missed(self) -> str:
        """What was left out, in words. Empty if there are only such files as lie beside images and are none."""
        if self.left_out.keys() <= SIDE_FILES:
            return ""
        return "left out: " + ", ".join(f"{count:,} {what}" for what, count in sorted(self.left_out.items()))

    def line(self, dataset: Dataset | IterableDataset) -> str:
        """One line about the images that were loaded."""
        label = dataset.features.get("label") if dataset.features else None
        classes = "no labels" if label is None else "labels are numbers"
        if isinstance(label, ClassLabel):
            classes = f"{len(label.names)} classes: {listed(label.names)}"
        others = f"other splits: {listed([f'{name} ({what})' for name, what in self.splits.items()])}"
        notes = [*self.notes, *([others] if self.splits else []), *filter(None, [self.missed()])]
        return "; ".join([self.taken, classes, *notes])
