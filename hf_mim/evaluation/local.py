"""Counting and distance: do frozen features keep small objects and their places?

I-JEPA and StoP report VTAB's two low-level tasks on CLEVR (arXiv 1910.04867): the number of objects (3 to 10, one class
each) and a distance in six classes. CLEVR itself is 18 GB; here the scenes are drawn (`hf_mim.data.scenes`), so the
numbers compare encoders with each other, not with the papers. VTAB's distance is that of the object nearest to the
camera. The scenes here have no depth, so the distance is that between the two objects nearest to each other.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from torch import Tensor

from hf_mim.checks import least
from hf_mim.data import WholeImage
from hf_mim.data.images import Images
from hf_mim.data.scenes import check_size, scenes
from hf_mim.data.splits import stratified_split
from hf_mim.evaluation.lowshot import fit_logistic
from hf_mim.evaluation.probe_training import parse_features, standardiser
from hf_mim.evaluation.raw_pixels import RawPixels
from hf_mim.evaluation.result import Result

NUM_BINS = 6  # of the distance, as VTAB's
HELD_OUT = 0.2  # of the training scenes, to choose C
CS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
RIDGES = tuple(10.0**exponent for exponent in range(-3, 4))
PIXELS = (16, 16)  # raw pixels are averaged to this size; their features are about as wide as a ViT-B's
SIZES = (64, 128)  # within which scenes are drawn, in pixels
TASKS = ("count", "distance")
NOTHING = "none (largest class, mean)"


class Scenes(Images):
    """Drawn scenes. Only `read_labels` gives the answers."""

    def __init__(self, count: int, size: int, seed: int, split: str):
        drawn = scenes(count, size, seed, split)
        self.size = size
        super().__init__(drawn.select_columns("image"), f"scenes of {size} px, seed {seed}, split {split}")
        self._answers = drawn.select_columns(["num_objects", "distance"])

    def read_labels(self) -> dict[str, Tensor]:
        """ "count" and "distance" (of the nearest pair, as a share of the side), float64 `[n]`."""
        return self._answers.rename_column("num_objects", "count").with_format("torch", dtype=torch.float64)[:]


@dataclass
class Local:
    """Accuracy of counting objects, and of telling the distance of the nearest pair, by linear probes.

    Scenes are drawn square, at the encoder's size but within 64..128 px, and resized to the encoder's size. On
    standardised features, L2-regularised logistic regression classifies the number (8 classes) and the distance (6 bins
    with equally many training scenes each). A fifth of the training scenes chooses its C; then it is fitted again on
    all. Ridge regression on the same features gives R² and the mean absolute error, in objects and in shares of the
    side; leave-one-out on the training scenes chooses its strength. Features should be better than the same probes on
    raw pixels, and than always saying the largest class. Test answers are read after all predictions are made.

    Sources: VTAB (arXiv 1910.04867); I-JEPA (arXiv 2301.08243, section 6), linear probes on averaged patch tokens.

    Args:
        features: layer/pooling/norm; mean or cls
        num_train: training scenes
        num_test: test scenes
        size: side of the scenes as drawn, in pixels; default: the encoder's, but within 64..128
        seed: for the scenes, and for those that are held out to choose C
    """

    name: ClassVar[str] = "local"
    needs: ClassVar[str] = "nothing"
    unused: ClassVar[tuple[str, ...]] = ("pixels",)  # it measures them anyway

    features: str = "last/mean/norm"
    num_train: int = 4000
    num_test: int = 1000
    size: int | None = None
    seed: int = 0

    def __post_init__(self):
        parse_features(self.features, self.name)
        least(100, num_train=self.num_train)
        least(10, num_test=self.num_test)
        least(0, seed=self.seed)
        check_size(self.size)

    def run(self, extract) -> Result:
        """Raises ValueError if the encoder's images are not square or have more than 4 channels, or if it has no such
        features."""
        encoder = extract.encoder
        height, width = encoder.image_size
        if height != width:
            raise ValueError(f"image_size must be square for scenes, not {height},{width}; give image_size={height}")
        if encoder.num_channels > 4:
            raise ValueError(f"scenes are pictures in colour, and {encoder.name} takes {encoder.num_channels} channels")
        encoder.check(parse_features(self.features, self.name))  # before the scenes are drawn
        size = self.size or min(max(height, SIZES[0]), SIZES[1])
        train = Scenes(self.num_train, size, self.seed, "train")
        test = Scenes(self.num_test, size, self.seed, "test")
        pixels = RawPixels(encoder.mean, encoder.std, PIXELS, encoder.device)
        answers = train.read_labels()
        edges = torch.quantile(answers["distance"], torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)[1:-1])
        rows, predictions = [], []
        for source, spec, used in (("encoder", self.features, encoder), ("raw pixels", "last/mean/norm", pixels)):
            # The encoder sees the whole scene, because it cannot count what a crop cuts off.
            features = [extract.replace(encoder=used, crop=WholeImage())(split, [spec])[0] for split in (train, test)]
            fit, query = map(standardiser(features[0], source), features)
            for task in TASKS:
                probe = fit_probe(fit, as_classes(task, answers, edges), self.seed)
                ridge = RidgeCV(RIDGES).fit(fit, answers[task])
                rows.append({"task": task, "features": source, "C": probe.C})
                predictions.append((torch.from_numpy(probe.predict(query)), torch.from_numpy(ridge.predict(query))))
        for task in TASKS:
            largest = as_classes(task, answers, edges).mode().values
            rows.append({"task": task, "features": NOTHING, "C": None})
            predictions.append((largest.expand(self.num_test), answers[task].mean().expand(self.num_test)))
        return self._result(rows, predictions, edges, train, test)

    def _result(self, rows: list[dict], predictions: list, edges: Tensor, train: Scenes, test: Scenes) -> Result:
        answers = test.read_labels()
        for row, (classes, values) in zip(rows, predictions, strict=True):
            truth = answers[row["task"]]
            row["accuracy"] = (classes == as_classes(row["task"], answers, edges)).double().mean().item()
            row["R2"] = (1 - (values - truth).square().sum() / (truth - truth.mean()).square().sum()).item()
            row["mean_absolute_error"] = (values - truth).abs().mean().item()
        names = {"encoder": "", "raw pixels": " from raw pixels", NOTHING: " by chance"}
        return Result(
            self.name,
            "accuracy of counting",
            rows[0]["accuracy"],
            settings=asdict(self)
            | {"size": test.size, "bin_edges": edges.tolist(), "held_out": HELD_OUT, "C": CS, "ridge": RIDGES}
            | {"raw_pixels": PIXELS},
            data={"train": train.describe(), "test": test.describe()},
            scores={f"{row['task']}{names[row['features']]}": row["accuracy"] for row in rows},
            table=rows,
            notes=[
                "Scenes drawn by hf_mim, not CLEVR: they compare encoders with each other, not with published numbers. "
                "The distance is that of the nearest pair, in shares of the side."
            ],
        )


def as_classes(task: str, answers: dict[str, Tensor], edges: Tensor) -> Tensor:
    """Class ids `[n]`: the number of objects, or the bin of the distance between `edges`."""
    return answers["count"].long() if task == "count" else torch.bucketize(answers["distance"], edges)


def fit_probe(features: Tensor, labels: Tensor, seed: int = 0) -> LogisticRegression:
    """Logistic regression on all of `[n, D]` and `[n]`. Its C is the best on a fifth that a first fit leaves out.

    If several C are equally good, the smallest is taken.
    """
    kept, held = stratified_split(labels, HELD_OUT, seed)
    accuracy = {c: fit_logistic(features[kept], labels[kept], [c]).score(features[held], labels[held]) for c in CS}
    return fit_logistic(features, labels, [max(accuracy, key=accuracy.get)])
