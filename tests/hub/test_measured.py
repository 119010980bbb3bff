"""Rows of results: a number of the trained weights stands beside those that were measured in the same way."""

import json
from types import SimpleNamespace

import pytest

from hf_mim.evaluation.result import Result
from hf_mim.hub.measured import headline, measurements, table, verdict

DATA = {"train": {"source": "birds, split train", "images": 90}, "test": {"source": "birds, split test", "images": 10}}


def result(value, protocol="knn", data=DATA, scores=None, **settings) -> Result:
    return Result(protocol, "accuracy", value, {"k": 20} | settings, data, scores or {}, notes=[f"note {value}"])


def rows_of(notes=None, **results):
    return measurements(
        SimpleNamespace(
            results=results,
            notes=notes or {},
            own_results={name: x for name, x in results.items() if name not in (notes or {})},
        )
    )


def test_untrained_and_pixels_stand_beside_the_trained_from_scores_or_from_files_of_their_own():
    (row,) = rows_of(a=result(0.6, scores={"untrained": 0.4, "raw pixels": 0.7, "top5": 0.9}))
    assert table([row]) == [
        {
            "protocol": "k-NN: accuracy",
            "images": "birds",
            "trained": "60.0 %",
            "untrained": "40.0 %",
            "raw pixels": "70.0 %",
        }
    ]
    notes = {"b": "untrained encoder, to compare", "c": "raw pixels, to compare"}
    files = {"a": result(0.6, untrained=False), "b": result(0.4, untrained=True), "c": result(0.7, pixels=True)}
    (merged,) = rows_of(notes, **files)
    assert merged.cells == row.cells and [name for name, _ in merged.results.values()] == ["a", "b", "c"]
    assert merged.notes == ["trained: note 0.6", "untrained: note 0.4", "raw pixels: note 0.7"]
    assert row.numbers[1] == {"": "top5", "trained": 0.9, "untrained": None, "raw pixels": None}


@pytest.mark.parametrize(
    "other",
    [
        result(0.4, untrained=True, k=5),
        result(0.4, untrained=True, protocol="linear"),
        result(0.4, untrained=True, data=DATA | {"test": {"source": "birds, split test", "images": 9}}),
        result(0.4),  # of other weights
    ],
)
def test_what_was_measured_in_another_way_stands_apart(other):
    own, apart = rows_of({"b": "why"}, a=result(0.6), b=other)
    assert list(own.values) == ["trained"] and apart.note == "why" and "(why)" in apart.in_full
    assert headline([apart]) == verdict([apart]) == ""


def test_rows_of_one_protocol_are_told_apart_by_their_settings_or_images():
    rows = rows_of(a=result(0.6), b=result(0.5, k=1), c=result(0.9, protocol="linear"))
    assert [row.label for row in rows] == ["k-NN: accuracy, k 20", "k-NN: accuracy, k 1", "linear classifier: accuracy"]
    fewer = DATA | {"train": {"source": "birds, split train", "images": 9}}
    rows = rows_of(a=result(0.6), b=result(0.5, data=fewer))
    assert [row.label for row in rows] == ["k-NN: accuracy, 90 → 10 images", "k-NN: accuracy, 9 → 10 images"]
    same = rows_of(a=result(0.6, image_mean=[0.5024]), b=result(0.5, image_mean=[0.50239998], data=fewer))
    assert "mean" not in same[0].label


def test_the_number_that_tells_most_makes_a_sentence_and_all_make_a_verdict():
    scores = {"untrained": 0.4, "raw pixels": 0.7}
    rows = rows_of(a=result(0.6, scores=scores), b=result(0.8, protocol="linear", scores=scores))
    told = "Measured on birds: linear classifier, accuracy 80.0 % (untrained 40.0 %, raw pixels 70.0 %)."
    assert headline(rows) == headline([*rows, *rows_of(c=result(0.9, protocol="finetune"))]) == told
    assert verdict(rows) == (
        "The trained features are better than those of the untrained encoder in 2 of 2 measurements and better than "
        "raw pixels in 1 of 2 measurements."
    )
    assert headline(rows_of(a=result(None))) == "" and rows_of(a=result(None))[0].cells == {"trained": "not finite"}
    assert json.dumps(rows[0].settings) and rows_of(a=result(1.7))[0].cells == {"trained": "1.7000"}
