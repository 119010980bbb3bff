"""Small labelled sets: every image is tested once, with an interval, chance, the classes and the confusion."""

import csv
import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from hf_mim.cli import main
from hf_mim.data.embedded import png
from hf_mim.data.labelled import LabelledImages
from hf_mim.evaluation.attentive import Attentive
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.folds import CrossValidation, Kept, fold_numbers
from hf_mim.evaluation.knn import KNN
from hf_mim.evaluation.linear import Linear
from hf_mim.evaluation.lowshot import LowShot
from hf_mim.evaluation.predictions import Predictions, interval


def small_set(count=36, classes=3, noise=90) -> LabelledImages:
    """Noisy pictures; the class is in their colour."""
    random, rows = np.random.default_rng(0), []
    for number in range(count):
        pixels = random.normal(128, noise, (16, 16, 3))
        pixels[..., number % classes] += 25
        rows.append({"bytes": png(Image.fromarray(pixels.clip(0, 255).astype(np.uint8))), "path": None})
    features = Features(image=ImageFeature(decode=False), label=ClassLabel(names=list("abcdef"[:classes])))
    labels = [number % classes for number in range(count)]
    return LabelledImages(Dataset.from_dict({"image": rows, "label": labels}, features=features), "small")


@pytest.mark.parametrize("folds", [5, "leave_one_out"])
def test_knn_in_folds_is_that_of_scikit_learn(folds, tiny_encoder):
    images, extract = small_set(), FeatureExtractor(tiny_encoder, progress=False)
    result = CrossValidation(KNN(k=1, ks=[1], temperatures=[0.07]), folds).run(extract, images)
    labels = images.read_labels()
    numbers = fold_numbers(labels, folds)
    (features,) = extract(images, ["last/mean/norm"])
    parts = [((numbers != k).nonzero()[:, 0].numpy(), (numbers == k).nonzero()[:, 0].numpy()) for k in numbers.unique()]
    nearest = KNeighborsClassifier(1, metric="cosine")
    expected = cross_val_predict(nearest, features.double().numpy(), labels.numpy(), cv=parts)
    assert result.predicted.tolist() == expected.tolist()
    assert result.value == pytest.approx((expected == labels.numpy()).mean()) and 1 / 3 < result.value < 1
    assert result.data == {"source": "small", "images": 36}
    assert len(result.table) == (5 if folds == 5 else 0)


@pytest.mark.parametrize(
    "protocol",
    [
        Linear(features=["last/mean/norm"], learning_rates=[0.1], weight_decays=[0.0], epochs=2),
        Attentive(learning_rates=[0.01], weight_decays=[0.0], epochs=1),
        LowShot(budgets=["2"], draws=2, c=[1.0]),
    ],
)
def test_every_protocol_tests_each_image_once(protocol, tiny_encoder):
    images = small_set(24)
    result = CrossValidation(protocol, 4).run(FeatureExtractor(tiny_encoder, progress=False), images)
    assert result.predicted.shape[-1] == 24 and (protocol.name != "lowshot" or len(result.predicted) == 2)
    predictions = Predictions.of(result.predicted, images, result.fold_numbers)
    assert result.value == pytest.approx(predictions.hits.mean().item())
    assert result.value == pytest.approx(sum(row["images"] * row["accuracy"] for row in result.table) / 24)


def test_folds_have_equally_many_of_each_class_and_whole_groups():
    labels = torch.arange(60) % 3
    numbers = fold_numbers(labels, 5)
    assert {tuple(labels[numbers == k].bincount().tolist()) for k in range(5)} == {(4, 4, 4)}
    groups = torch.arange(60) // 6
    grouped = fold_numbers(labels, 5, groups)
    assert all(len(grouped[groups == group].unique()) == 1 for group in range(10)) and len(grouped.unique()) == 5
    assert torch.equal(fold_numbers(labels, "leave_one_out", groups), groups)


def test_a_fold_never_learns_from_its_own_images(tiny_encoder):
    seen = []

    class Spy:
        name, features = "spy", "last/mean/norm"

        def run(self, extract, train, test):
            assert isinstance(extract, Kept) and not set(train.rows.tolist()) & set(test.rows.tolist())
            assert torch.equal(extract(test, [self.features])[0], whole[test.rows])
            seen.extend(test.rows.tolist())
            return KNN(k=1).run(extract, train, test)

    images, extract = small_set(12), FeatureExtractor(tiny_encoder, progress=False)
    (whole,) = extract(images, ["last/mean/norm"])
    spy = CrossValidation(Spy(), 3)
    with pytest.raises(TypeError):  # asdict of no dataclass, after all folds
        spy.run(extract, images)
    assert sorted(seen) == list(range(12))


def test_the_interval_is_that_of_wilson_and_groups_make_it_wider():
    hits = torch.tensor([1.0] * 8 + [0.0] * 2, dtype=torch.float64)
    # Wilson's interval of 8 of 10, for example in Brown, Cai and DasGupta (2001)
    assert interval(hits) == pytest.approx((0.4902, 0.9433), abs=2e-3)
    low, high = interval(torch.ones(12, dtype=torch.float64))
    assert low == pytest.approx(0.7575, abs=1e-3) and high == 1.0
    hits = torch.tensor([1.0] * 10 + [0.0] * 10, dtype=torch.float64)
    alone, grouped = interval(hits), interval(hits, torch.arange(20) // 5)
    assert grouped[0] < alone[0] - 0.05 and grouped[1] > alone[1] + 0.05


def test_the_interval_holds_the_truth_in_19_of_20_samples():
    random = torch.Generator().manual_seed(0)
    for truth, count in ((0.9, 36), (0.5, 20)):
        samples = (torch.rand(2000, count, generator=random, dtype=torch.float64) < truth).double()
        inside = [low <= truth <= high for low, high in map(interval, samples)]
        assert 0.93 < np.mean(inside) < 0.985


def test_classes_and_confusion_are_counted():
    images = small_set(9)
    predictions = Predictions.of(torch.tensor([[0, 1, 2] * 3, [0, 0, 2, 0, 1, 0, 0, 1, 2]]), images)
    assert predictions.confusion.tolist() == [[3, 0, 0], [0.5, 2.5, 0], [0.5, 0, 2.5]]
    assert predictions.by_class() == [
        {"class": "a", "images": 3, "accuracy": 1.0, "taken for": ""},
        {"class": "b", "images": 3, "accuracy": 2.5 / 3, "taken for": "a"},
        {"class": "c", "images": 3, "accuracy": 2.5 / 3, "taken for": "a"},
    ]
    assert predictions.scores()["chance: the commonest class"] == pytest.approx(1 / 3)


def test_budgets_that_come_to_the_same_images_are_one_row(tiny_encoder):
    images = small_set(30)
    protocol = LowShot(budgets=["1%", "10%", "1", "5"], draws=2, c=[1.0])
    result = protocol.run(FeatureExtractor(tiny_encoder, progress=False), images, images)
    assert [(row["budget"], row["images"]) for row in result.table] == [("1% = 10% = 1", 3)] * 2 + [("5", 15)] * 2
    assert result.value == result.scores["top1 1% = 10% = 1"]


@pytest.mark.parametrize(
    ("labels", "folds", "groups", "message"),
    [
        ([0, 0, 1], 2, None, "folds 2 leave no other images of class 1 to learn from"),
        ([0, 0, 1, 1], 5, None, "folds must be between 2 and the 4 images, or leave_one_out, not 5"),
        ([0, 1] * 101, "leave_one_out", None, "folds leave_one_out is for 200 images at most, not 202; give folds 5"),
        ([0, 0, 1, 1], "leave_one_out", [0, 1, 2, 2], "leave no other groups of class 1 to learn from"),
    ],
)
def test_folds_that_cannot_be_made_are_refused(labels, folds, groups, message):
    with pytest.raises(ValueError, match=message):
        fold_numbers(torch.tensor(labels), folds, None if groups is None else torch.tensor(groups))


@pytest.mark.parametrize("option", ["--test photos", "--test_images 3", "--test_split test"])
def test_folds_need_no_test_images(option, checkpoint, tmp_path, capsys):
    assert main(["evaluate", "knn", str(checkpoint), "--dataset", "digits", "--folds", "5", *option.split()]) == 2
    assert "cannot be given together with folds" in capsys.readouterr().err


def test_the_command_leaves_predictions_and_the_confusion_beside_the_result(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_MIM_CACHE", str(tmp_path / "cache"))
    for number in range(24):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 200, (16, 16, 3), dtype=np.uint8)
        pixels[..., number % 2] += 55
        Image.fromarray(pixels).save(path)
    output = tmp_path / "knn.json"
    words = ["--dataset", tmp_path / "photos", "--folds", "leave_one_out", "--k", 5, "--output", output]
    assert main(["evaluate", "knn", *map(str, [checkpoint, *words])]) == 0
    result, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert set(result["scores"]) >= {"untrained", "raw pixels", "95 % interval, low", "chance: the commonest class"}
    assert result["scores"]["chance: the commonest class"] == 0.5 and "untrained" in printed
    assert result["settings"]["cross_validation"] == "leave_one_out" and len(result["classes"]) == 2
    rows = list(csv.DictReader(open(tmp_path / "knn.predictions.csv")))
    assert [row["image"] for row in rows][:2] == ["a/00.png", "a/02.png"] and len({row["fold"] for row in rows}) == 24
    right = [row["class"] == row["predicted"] for row in rows]
    assert np.mean(right) == pytest.approx(result["value"])
    table = list(csv.reader(open(tmp_path / "knn.confusion.csv")))
    assert table[0] == ["class", "a", "b"] and sum(float(x) for line in table[1:] for x in line[1:]) == 24
    assert Image.open(tmp_path / "knn.confusion.png").size[0] > 300
    assert main(["evaluate", "knn", *map(str, [checkpoint, *words, "--beside", "false"])]) == 0
    assert "untrained" not in json.loads(output.read_text())["scores"]
