"""Results as files and as text."""

import json

import pytest

from hf_mim.evaluation.result import Result, format_table
from hf_mim.run_folder import result_path


def result(**changes) -> Result:
    data = {"train": {"source": "a", "images": 9}, "test": {"source": "digits, split test", "images": 1360}}
    return Result("knn", "accuracy", 0.87654321, {"k": 20}, data, **changes)


def test_a_saved_result_is_the_same_when_loaded(tmp_path):
    one = result(scores={"untrained": 0.5}, table=[{"k": 1, "accuracy": 0.1}], notes=["a note"], seconds=1.5)
    path = one.save(tmp_path / "results" / "knn.json")
    assert Result.load(path) == one
    assert [file.name for file in path.parent.iterdir()] == ["knn.json"]


def test_another_file_is_no_result(tmp_path):
    for text in ("{", "[]", '{"value": 1}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match="x.json holds no result"):
            Result.load(tmp_path / "x.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"data": None},
        {"data": ["digits"]},
        {"data": {"test": "digits"}},
        {"settings": ["k"]},
        {"scores": None},
        {"metric": None},
        {"protocol": 3},
        {"value": "high"},
        {"value": True},
        {"table": [1]},
        {"notes": "a note"},
        {"checkpoint_sha256": 5},
    ],
)
def test_a_field_of_another_type_is_no_result(tmp_path, changes):
    path = result().save(tmp_path / "x.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=f"x.json holds no result: {next(iter(changes))} is "):
        Result.load(path)


def test_the_headline_says_value_and_data():
    assert result().headline() == "knn: accuracy 0.8765 on 1,360 images of digits, split test"


def test_a_table_is_aligned_numbers_to_the_right():
    rows = [{"head": "a", "lr": 0.1, "accuracy": 0.5}, {"head": "long", "lr": 1e-5, "accuracy": None}]
    assert format_table(rows).splitlines() == [
        "  head      lr  accuracy",
        "  a     0.1000    0.5000",
        "  long   1e-05",
    ]


def test_a_long_table_is_left_to_the_file():
    rows = [{"head": number} for number in range(16)]
    assert "head" in str(result(table=rows)) and "in the file" not in str(result(table=rows))
    assert "The table of 17 rows is in the file." in str(result(table=[*rows, {"head": 16}]))


def test_a_result_is_named_after_what_it_measures(tmp_path):
    assert result_path("run", "knn", "my photos!", "").as_posix() == "run/results/knn_my_photos.json"
    one, two = (result_path("run", "linear", *(f"option_{i}" for i in range(20)), x) for x in "ab")
    assert one != two and len(one.name) < 130


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    path = result(scores={"R2": float("nan"), "best": float("-inf")}, table=[{"x": float("inf")}]).save(
        tmp_path / "r.json"
    )
    loaded = Result.load(path)
    assert loaded.scores == {"R2": None, "best": None} and loaded.table == [{"x": None}]
    assert "NaN" not in path.read_text()
