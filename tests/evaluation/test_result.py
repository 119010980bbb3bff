"""Results as files and as text."""

import json
import shutil
import subprocess

import pytest

from hf_mim.evaluation import result as results
from hf_mim.evaluation.result import Result, format_table, git_state
from hf_mim.run_folder import result_path


def result(**changes) -> Result:
    data = {"train": {"source": "a", "images": 9}, "test": {"source": "digits, split test", "images": 1360}}
    return Result("knn", "accuracy", 0.87654321, {"k": 20}, data, **changes)


def test_a_saved_result_is_the_same_when_loaded(tmp_path):
    one = result(scores={"untrained": 0.5}, table=[{"k": 1, "accuracy": 0.1}], notes=["a note"], seconds=1.5)
    path = one.save(tmp_path / "results" / "knn.json")
    assert Result.load(path) == one
    assert [file.name for file in path.parent.iterdir()] == ["knn.json"]


def test_a_file_that_does_not_tell_the_commit_gets_none_by_being_loaded(tmp_path):
    path = result(git={"commit": "0" * 40, "changes": True}).save(tmp_path / "x.json")
    assert Result.load(path).git == {"commit": "0" * 40, "changes": True}
    values = json.loads(path.read_text())
    del values["git"]
    path.write_text(json.dumps(values))
    assert Result.load(path).git is None


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of our name somewhere else."""
    file = tmp_path / "hf_mim" / "evaluation" / "result.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr(results, "__file__", str(file))
    return tmp_path


def git(folder, *words) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_a_package_without_a_checkout_has_no_commit(package):
    assert git_state.__wrapped__() is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_checkout_tells_its_commit_and_whether_the_package_has_changes(package, tmp_path, monkeypatch):
    state = git_state.__wrapped__
    git(package, "init")
    (package / ".gitignore").write_text("ignored.py")
    git(package, "add", ".")
    git(package, "commit", "-m", "first")
    commit = git(package, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a hook of another repository
    for name in ("README.md", "hf_mim/ignored.py"):
        (package / name).write_text("x")
    assert state() == {"commit": commit, "changes": False}
    (package / "hf_mim" / "new.py").write_text("x")
    assert state() == {"commit": commit, "changes": True}
    (package / "hf_mim" / "new.py").unlink()
    (package / "hf_mim" / "evaluation" / "result.py").write_text("x")
    assert state() == {"commit": commit, "changes": True}
    monkeypatch.setenv("PATH", "")
    assert state() is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_package_in_an_environment_within_a_checkout_of_something_else_has_no_commit(package, monkeypatch):
    git(package, "init")
    inner = package / "env" / "hf_mim" / "evaluation" / "result.py"
    monkeypatch.setattr(results, "__file__", str(inner))
    assert git_state.__wrapped__() is None


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
