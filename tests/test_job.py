"""`training/job.py`, without a Hub."""

import importlib
import sys
from types import SimpleNamespace

import pytest
from tiny_comparison import TRAINING


@pytest.fixture
def job(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINING))
    yield importlib.import_module("job")
    sys.modules.pop("job")


def test_the_probe_gets_the_images_of_the_run_and_the_repository_its_privacy(job, monkeypatch):
    calls = []

    def noted(name, result=None):
        return lambda *words, **given: calls.append((name, words, given)) or result

    monkeypatch.setattr(job, "HfApi", lambda: SimpleNamespace(create_repo=noted("repo"), upload_folder=noted("upload")))
    monkeypatch.setattr(job.hf_mim, "pretrain", noted("pretrain", SimpleNamespace(folder="runs/x")), raising=False)
    result = SimpleNamespace(headline=lambda: "measured")
    monkeypatch.setattr(job.hf_mim, "evaluate", noted("evaluate", result), raising=False)
    monkeypatch.setattr(job, "write_card", noted("card"))
    words = "--dataset me/a --repo me/b --group patient --test_dataset me/c --hub_private_repo true --size tiny"
    job.main(words.split())
    assert [name for name, *_ in calls] == ["repo", "pretrain", "evaluate", "card", "upload"]
    assert calls[0][1:] == (("me/b",), {"private": True, "exist_ok": True})
    assert "repo" not in calls[1][2] and calls[1][2]["size"] == "tiny"
    assert calls[2][2] == {"dataset": "me/a", "group": "patient", "test": "me/c"}


@pytest.mark.parametrize("words", ["--dataset", "--dataset a", "dataset a --repo b"])
def test_a_call_that_lacks_something_ends_before_any_work(job, words):
    with pytest.raises(SystemExit, match="error: "):
        job.main(words.split())
