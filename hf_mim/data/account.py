"""What was taken from a source and what was left out, in words."""

from collections import Counter
from dataclasses import dataclass, field

from datasets import ClassLabel, Dataset, IterableDataset

from hf_mim.files import listed

from .columns import Chosen
from .folders import SIDE_FILES


@dataclass
class Account:
    """What was taken from a source, and what was not.

    Attributes:
        taken: in words: "6 images (4 .jpg, 2 .png)".
        splits: name → what it holds, for those that were not asked for.
        left_out: what was not taken → the number of files.
        notes: more that a user may want to know, each in a few words.
        class_folders: whether the column `label` has the classes by the folders.
        absent: parts that no image has, where images may lack parts.
        revision: of a dataset on the Hub, if it is known.
        labels, group: where they come from, in words: "column label", "class folders". None: there are none.
    """

    taken: str = ""
    splits: dict[str, str] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    class_folders: bool = False
    absent: list[str] = field(default_factory=list)
    revision: str | None = None
    labels: str | None = None
    group: str | None = None
    _decided: bool = False  # the user did not name the labels

    def choose(self, chosen: Chosen):
        """Note which columns are the labels and the group."""
        if chosen.labels is not None:
            by_folder = self.class_folders and chosen.labels == "label"
            self.labels = "class folders" if by_folder else f"column {chosen.labels}"
        self.group = chosen.group and f"column {chosen.group}"
        self._decided = not chosen.is_given
        self.notes = chosen.notes + self.notes

    def missed(self) -> str:
        """What was left out, in words. Empty if there are only such files as lie beside images and are none."""
        if self.left_out.keys() <= SIDE_FILES:
            return ""
        return "left out: " + ", ".join(f"{count:,} {what}" for what, count in sorted(self.left_out.items()))

    def line(self, dataset: Dataset | IterableDataset) -> str:
        """One line about the images that were loaded."""
        groups = []
        if self.group is not None:
            names = sorted({name for name in dataset.unique("group") if name is not None})
            groups = [f"{len(names):,} groups by {self.group}: {listed(names)}"]
        others = f"other splits: {listed([f'{name} ({what})' for name, what in self.splits.items()])}"
        notes = [*groups, *self.notes, *([others] if self.splits else []), *filter(None, [self.missed()])]
        return "; ".join([self.taken, self._labels(dataset), *notes])

    def _labels(self, dataset: Dataset | IterableDataset) -> str:
        """Where the labels come from and what the classes are; how to say that they are none."""
        if self.labels is None:
            return "no labels"
        label = dataset.features["label"]
        classes = f"{len(label.names)} classes: {listed(label.names)}" if isinstance(label, ClassLabel) else "numbers"
        return f"labels by {self.labels}, {classes}{' (to leave them out: --labels none)' * self._decided}"
