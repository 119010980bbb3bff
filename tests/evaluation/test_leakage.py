"""No protocol looks at a test label before its last step.

Three ways to find one that does. The test images are sealed: once their labels are read, nothing may be extracted,
fitted or predicted any more. The same run with other test labels must choose and report the same, but for the scores.
And since accuracy counts hits, the accuracies under all cyclic shifts of the labels add up to 1 for predictions that do
not know them: a protocol that reports the best of several predictions gets more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.model_selection  # noqa: F401 (its estimators are to be sealed too)
import torch
from sealed import CLASSES, Seal, SealedExtractor, drawn_scenes, labelled, scenes_with_masks, video

from hf_mim import MAEConfig, MAEForPreTraining
from hf_mim.evaluation import PROTOCOLS, load_protocol
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.result import Result

WITHOUT_LABELS = {"health"}


@dataclass
class Case:
    """How a protocol is run quickly, and which of its numbers depend on the test labels.

    columns: of the table. accuracies: those of single predictions, which have to add up to 1.
    """

    options: dict[str, Any]
    splits: Callable = labelled
    columns: tuple[str, ...] = ()
    accuracies: Callable[[Result], list[float]] = lambda result: []
    shifts: int = CLASSES
    reads: int | None = 1


def top1(result: Result) -> list[float]:
    return [result.value, *(score for name, score in result.scores.items() if "deviation" not in name)]


FINETUNE = dict(epochs=1, batch_size=30, base_lr=0.1, mixup=0, cutmix=0, random_erase=0, randaugment_magnitude=0)
CASES = {
    "knn": Case(
        dict(k=3, ks=[1, 5], temperatures=[0.07]),
        columns=("T 0.07",),
        accuracies=lambda result: [result.value, *(row["T 0.07"] for row in result.table)],
    ),
    "leave_one_out": Case({}),  # test labels are what it predicts with, too: the shifts change nothing
    "linear": Case(dict(epochs=5, learning_rates=[0.01, 1]), columns=("test",), accuracies=top1),
    "attentive": Case(dict(epochs=3, attention_heads=2), columns=("test",), accuracies=top1),
    "lowshot": Case(dict(budgets=["2", "10%"], draws=2, c=[0.1, 10]), columns=("accuracy",), accuracies=top1),
    "finetune": Case(
        FINETUNE,
        columns=("test accuracy",),
        accuracies=lambda result: top1(result) + [row["test accuracy"] for row in result.table],
    ),
    "segment": Case(
        dict(epochs=3, learning_rates=[0.001, 0.1], k=3),
        scenes_with_masks,
        columns=("linear", "knn"),
        accuracies=lambda result: [score for name, score in result.scores.items() if "accuracy" in name],
        reads=4,
    ),
    "propagate": Case(dict(short_side=32), video, columns=("J&F", "J", "F"), shifts=2),
    "local": Case(
        dict(num_train=100, num_test=30), drawn_scenes, columns=("accuracy", "R2", "mean_absolute_error"), shifts=2
    ),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> FrozenEncoder:
    folder = tmp_path_factory.mktemp("mae")
    torch.manual_seed(0)
    tiny = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    MAEForPreTraining(MAEConfig(**tiny, decoder_hidden_size=16, decoder_num_hidden_layers=1)).save_pretrained(folder)
    return FrozenEncoder.load(folder, device="cpu", mean=[0.3] * 3, std=[0.3] * 3)


@pytest.fixture
def measure(encoder, digits_splits, monkeypatch):
    """measure(protocol, case) → its results under all shifts of the test labels."""

    def run(protocol, case: Case) -> list[Result]:
        results = []
        for shift in range(case.shifts):
            with Seal() as seal, monkeypatch.context() as patch:
                splits = case.splits(seal, shift, digits_splits, patch)
                results.append(protocol.run(SealedExtractor(encoder, progress=False, seal=seal), *splits))
            assert seal.reads == case.reads, "the test labels are to be read once"
        return results

    return run


def check_independent(results: list[Result], case: Case):
    """Nothing but scores differs between the results, and accuracies add up to 1."""
    for result in results:
        assert untouched(result, case) == untouched(results[0], case), "a choice depends on the test labels"
    totals = np.sum([case.accuracies(result) for result in results], axis=0)
    np.testing.assert_allclose(totals, 1, atol=1e-9, err_msg="predictions depend on the test labels")


def untouched(result: Result, case: Case) -> dict:
    """What the test labels must not change. Classes without a score have no row in some tables."""
    table = [{name: value for name, value in row.items() if name not in case.columns} for row in result.table]
    return {"settings": result.settings, "data": result.data, "notes": result.notes, "table": table} | {
        "names": [result.protocol, result.metric, *result.scores]
    }


def test_every_protocol_with_labels_is_tested():
    assert set(CASES) | WITHOUT_LABELS == set(PROTOCOLS)


@pytest.mark.parametrize("name", CASES)
def test_test_labels_are_read_last_and_change_the_scores_alone(name, measure):
    results = measure(load_protocol(name)(**CASES[name].options), CASES[name])
    check_independent(results, CASES[name])
    if name != "leave_one_out":
        assert len({str(result) for result in results}) > 1  # the labels did reach the scores


class Planted:
    """1-NN that reads the test labels at the end, as it should."""

    name, metric = "planted", "accuracy"

    def run(self, extract, train, test) -> Result:
        (known,), (asked,) = (extract(split, ["last/mean/norm"]) for split in (train, test))
        return self.result(torch.cdist(asked, known).argmin(dim=1), known, asked, train, test)

    def result(self, nearest, known, asked, train, test) -> Result:
        predicted = train.read_labels()[nearest]
        return self.scored((predicted == test.read_labels()).double().mean().item())

    def scored(self, value: float, **settings) -> Result:
        return Result(self.name, self.metric, value, settings, data={})


class ReadsBeforeExtraction(Planted):
    def run(self, extract, train, test):
        test.read_labels()
        return super().run(extract, train, test)


class ReadsTheColumn(Planted):
    def result(self, nearest, known, asked, train, test):
        return self.scored((train.read_labels()[nearest] == torch.tensor(test.images["label"])).double().mean().item())


class PredictsAfterwards(Planted):
    def result(self, nearest, known, asked, train, test):
        labels = test.read_labels()
        return self.scored((train.read_labels()[(asked @ known.T).argmax(dim=1)] == labels).double().mean().item())


class FitsAfterwards(Planted):
    def result(self, nearest, known, asked, train, test):
        labels = test.read_labels()
        model = sklearn.linear_model.LogisticRegression().fit(known.numpy(), train.read_labels().numpy())
        return self.scored(model.score(asked.numpy(), labels.numpy()))


class StepsAfterwards(Planted):
    def result(self, nearest, known, asked, train, test):
        optimizer, labels = torch.optim.AdamW([weight := torch.zeros(1, requires_grad=True)]), test.read_labels()
        weight.grad = torch.ones(1)
        optimizer.step()
        return self.scored(labels.double().mean().item())


class ReadsTwice(Planted):
    def result(self, nearest, known, asked, train, test):
        test.read_labels()
        return super().result(nearest, known, asked, train, test)


class ChoosesByTheTest(Planted):
    """Reports the best of two predictions, and says which."""

    says = True

    def result(self, nearest, known, asked, train, test):
        predictions = train.read_labels()[nearest], train.read_labels()[nearest].flip(0)
        labels = test.read_labels()
        accuracies = [(predicted == labels).double().mean().item() for predicted in predictions]
        best = int(np.argmax(accuracies))
        return self.scored(accuracies[best], **({"prediction": best} if self.says else {}))


class ChoosesByTheTestInSilence(ChoosesByTheTest):
    says = False


PLANTED = Case({}, accuracies=lambda result: [result.value])


def test_a_protocol_that_reads_last_passes(measure):
    check_independent(measure(Planted(), PLANTED), PLANTED)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (ReadsBeforeExtraction, "features are extracted after"),
        (ReadsTheColumn, "Column 'label' doesn't exist"),
        (PredictsAfterwards, "mm after the test labels were read"),
        (FitsAfterwards, "LogisticRegression.fit after"),
        (StepsAfterwards, "AdamW.step after"),
        (ReadsTwice, "to be read once"),
        (ChoosesByTheTest, "a choice depends on the test labels"),
        (ChoosesByTheTestInSilence, "predictions depend on the test labels"),
    ],
)
def test_planted_leaks_are_found(protocol, message, measure):
    with pytest.raises((AssertionError, ValueError), match=message):
        check_independent(measure(protocol(), PLANTED), PLANTED)
