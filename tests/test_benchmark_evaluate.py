"""`hf-mim benchmark evaluate` runs, and measures what it says."""

import json

import pytest

from hf_mim.cli import main


def run(path, *options) -> dict:
    assert main(["benchmark", "evaluate", *options, "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.slow
def test_evaluate_times_equal_answers_and_sees_the_memory_of_the_similarities(tmp_path):
    sizes = ["--train", "5000", "--test", "2000", "--width", "16", "--threads", "1", "--repeats", "1"]
    result = run(tmp_path / "evaluate.json", *sizes, "--heads", "5", "--epochs", "1")
    knn, linear = result["knn"], result["linear"]
    assert knn["seconds"].keys() == {"ours", "scikit-learn, cosine", "scikit-learn, unit vectors"}
    assert min(knn["equal_predictions"].values()) > 0.999
    table = 5000 * 2000 * 4 / 2**20  # of all similarities in float32, which fit at once
    assert table < knn["peak_mb"] < 5 * table and knn["process_peak_mb"] > knn["peak_mb"]
    assert linear["heads"] == 5 and 0 < linear["ratio"] < 1
    settings = result["settings"]
    assert (settings["train"], settings["classes"], settings["threads"]) == (5000, 10, 1)
    assert all(len(seconds) == 1 for seconds in knn["seconds_of_rounds"].values())
    assert sum(linear["seconds_of_each"]) == linear["seconds_alone"]


@pytest.mark.slow
def test_exact_search_is_no_slower_than_scikit_learn_and_heads_share_their_pass(tmp_path):
    result = run(tmp_path / "evaluate.json")
    seconds = result["knn"]["seconds"]
    assert seconds["ours"] <= seconds["scikit-learn, cosine"]
    assert result["knn"]["peak_mb"] < 2048
    assert result["linear"]["heads"] == 24 and result["linear"]["ratio"] <= 1 / 3
