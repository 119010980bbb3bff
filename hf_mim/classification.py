"""What a classifier says of every image of a source, in a file: `hf-mim predict`.

from hf_mim.classification import predict

predict("runs/classifier", dataset="my_photos", output="predictions.csv")
"""

import csv
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel
from torch import Tensor

from hf_mim.data.images import Images, group_ids
from hf_mim.data.sources import load_described, local_folder, source_name
from hf_mim.docstrings import argument_texts
from hf_mim.embeddings.embed import divided, names_of
from hf_mim.evaluation.data_arguments import ImageArguments
from hf_mim.evaluation.encoder import FeatureSpec
from hf_mim.evaluation.measure import EncoderArguments
from hf_mim.evaluation.predictions import interval
from hf_mim.evaluation.trained_classifier import TrainedClassifier
from hf_mim.files import check_new_file, listed, replacing

AT_ONCE = 1024  # rows that are read or written at a time


@dataclass
class PredictArguments(ImageArguments):
    """Images to classify, and the file for the answers.

    Args:
        labels: the column of the classes; folder: class folders; none: no labels; default: what declares itself
        group: the column of patients, scenes or the like, or folder: images of one group widen the accuracy's interval
        output: a new .csv or .parquet file, in a folder that exists
    """

    labels: str | None = None
    group: str | None = None
    output: str = "predictions.csv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset is None:
            raise ValueError(f"dataset must be given: {argument_texts(ImageArguments)['dataset']}")


@dataclass
class Predicted:
    """What `predict` has written, and how much of it is right, as far as there are labels.

    images: in the file. broken: left out, because they cannot be decoded.
    labelled: images whose label is a class of the classifier. accuracy: of these, with its 95 % interval.
    unknown: images with another label. others: such labels.
    """

    output: Path
    source: str
    images: int
    broken: int
    seconds: float = 0.0
    labelled: int = 0
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    unknown: int = 0
    others: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        broken = f" ({self.broken:,} more cannot be decoded)" if self.broken else ""
        text = f"{self.output} holds the classes of {self.images:,} images of {self.source}{broken}; "
        lines = [f"{text}{self.seconds:.1f} s."]
        if self.accuracy is not None:
            low, high = self.interval
            told = f"Accuracy {self.accuracy:.4f} (95 % interval {low:.4f} to {high:.4f})"
            lines.append(f"{told} on the {self.labelled:,} images whose label it knows.")
        if self.unknown:
            what = f"{self.unknown:,} images have labels that are no classes of the classifier"
            lines.append(f"{what}, and do not count: {listed(self.others, 5)}.")
        return "\n".join(lines)


def predict(classifier: str | Path, **options: Any) -> Predicted:
    """Write, for every image of a source, the predicted class and the probability of each class.

    Args:
        classifier: a folder, or a name on the Hub.
        options: the fields of `PredictArguments`, and those of `EncoderArguments` in `OF_THE_ENCODER`.

    Raises:
        ValueError: in one line, before any work: the options, the classifier, the source or the output do not fit.
        BrokenImagesError: more than one image, and more than 1 % of them, cannot be decoded.
    """
    start = time.perf_counter()
    source, options = divided(PredictArguments, options)
    output = check_new_file(source.output, "output", (".csv", ".parquet"))
    arguments = EncoderArguments(**options, cache="none")
    extract = arguments.extractor(str(classifier), source.crop(), TrainedClassifier)
    about = source.parts(), source.labels
    images, _ = load_described(source.dataset, source.split, False, *about, group=source.group)
    name = f"{source_name(source.dataset)}, split {source.split}"
    split = Images(images.add_column("row", list(range(len(images)))), name)
    (logits,) = extract(split, [FeatureSpec()])
    classes = cast(TrainedClassifier, extract.encoder).classes
    table = answers(split, source, logits, classes)
    _write(output, table)
    done = Predicted(output, split.name, len(split), split.num_broken)
    if "label" in table.column_names:
        right, groups = table["right"].to_pylist(), group_ids(split.images)
        others = Counter(label for label, hit in zip(table["label"].to_pylist(), right, strict=True) if hit is None)
        others.pop(None, None)  # images without a label
        done.unknown, done.others = others.total(), list(others)
        if known := [row for row, hit in enumerate(right) if hit is not None]:
            hits = torch.tensor([right[row] for row in known], dtype=torch.float64)
            done.labelled, done.accuracy = len(known), hits.mean().item()
            done.interval = interval(hits, None if groups is None else groups[known])
    done.seconds = time.perf_counter() - start
    return done


def label_names(split: Images, classes: Sequence[str]) -> list[str | None]:
    """The name of each image's class, None without a label. Numbers without names are the classifier's ids."""
    if "label" not in split.images.column_names:
        return [None] * len(split)
    feature = split.images.features["label"]
    names = list(feature.names) if isinstance(feature, ClassLabel) else classes

    def name_of(label: int | None) -> str | None:
        if label is None or label < 0:
            return None
        return names[label] if label < len(names) else str(label)

    return [name_of(label) for label in split.images["label"][:]]


def answers(split: Images, source: PredictArguments, logits: Tensor, classes: Sequence[str]) -> pa.Table:
    """The file as a table, a row for each image: name, row in the source, predicted class, probabilities, and where
    there are labels the label and whether it was predicted (null: the classifier has no such class)."""
    rows, labels = split.images["row"][:], label_names(split, classes)
    pictures, root = split.images.with_format("arrow").select_columns("image"), local_folder(source.dataset)
    names = []
    for start in range(0, len(rows), AT_ONCE):  # a table of images may hold their bytes
        part = slice(start, start + AT_ONCE)
        names += names_of(pictures[part]["image"], rows[part], root)
    predicted = [classes[number] for number in logits.argmax(dim=1).tolist()]
    table = {"name": names, "row": rows, "predicted": predicted}
    counts = Counter(classes)  # ImageNet has two cranes
    named = [name if counts[name] == 1 else f"{name} {number}" for number, name in enumerate(classes)]
    if len(set(named)) < len(named):  # and somebody has "a", "a" and "a 0"
        named = [f"{name} {number}" for number, name in enumerate(classes)]
    for name, probabilities in zip(named, logits.softmax(dim=1).T, strict=True):
        table[f"probability_{name}"] = probabilities.numpy()
    if any(label is not None for label in labels):
        table["label"] = pa.array(labels, pa.string())
        known = set(classes)
        hits = [label == x if label in known else None for label, x in zip(labels, predicted, strict=True)]
        table["right"] = pa.array(hits, pa.bool_())
    return pa.table(table)


def _write(output: Path, table: pa.Table) -> None:
    with replacing(output) as aside:
        if output.suffix == ".parquet":
            pq.write_table(table, aside)
            return
        with aside.open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(table.column_names)
            for batch in table.to_batches(AT_ONCE):
                for row in batch.to_pylist():
                    lines.writerow(f"{x:.6g}" if isinstance(x, float) else x for x in row.values())
