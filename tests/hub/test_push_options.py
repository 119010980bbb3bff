"""The options of the Hub reach the calls that make the repository and upload, in this process."""

import json
import types
from concurrent import futures
from pathlib import Path

import pytest
from tiny import make_model
from tiny_runs import Images, arguments

from hf_mim.pretraining.trainer import MIMTrainer

ABOUT = dict(hub_model_id="me/bees", hub_token="hf_secret", hub_private_repo=True, hub_revision="a-branch")


@pytest.fixture
def hub(monkeypatch):
    """The calls of one run: (what was uploaded, the settings). `done`: whether uploads in the background get done."""
    found = types.SimpleNamespace(made=[], uploaded=[], done=True)

    def create_repo(name, **settings):
        found.made.append((name, settings))
        return types.SimpleNamespace(repo_id=name)

    def upload_folder(folder_path, **settings):
        found.uploaded.append((settings.get("path_in_repo", Path(folder_path).name), settings))
        job = futures.Future()
        if found.done:
            job.set_result(None)
        return job

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: types.SimpleNamespace(create_repo=create_repo))
    monkeypatch.setattr("hf_mim.hub.push.upload_folder", upload_folder)
    monkeypatch.setattr("hf_mim.hub.push.LONGEST_WAIT", 0.01)
    return found


def train(folder, **settings):
    model = make_model("mae")
    args = arguments(
        folder / "run", max_steps=3, save_strategy="steps", save_steps=1, **dict(push_to_hub=True) | settings
    )
    MIMTrainer(model, args, Images(model)).train()


def test_name_token_privacy_and_revision_reach_the_hub(hub, tmp_path):
    train(tmp_path, **ABOUT)
    assert hub.made == [("me/bees", {"token": "hf_secret", "private": True, "exist_ok": True})]
    about = [(name, each["repo_id"], each["token"], each["revision"]) for name, each in hub.uploaded]
    assert about == [("run", "me/bees", "hf_secret", "a-branch")] * 3


@pytest.mark.parametrize(
    ("strategy", "uploaded"),
    [
        ("end", []),
        ("every_save", ["run"] * 3),
        ("checkpoint", ["run", "last-checkpoint"] * 3),
        ("all_checkpoints", ["run", "checkpoint-1", "run", "checkpoint-2", "run", "checkpoint-3"]),
    ],
)
def test_what_goes_up_is_what_the_strategy_says(hub, tmp_path, strategy, uploaded):
    train(tmp_path, hub_strategy=strategy)
    assert [name for name, _ in hub.uploaded] == uploaded


@pytest.mark.parametrize(("always", "uploads"), [(False, 1), (True, 3)])
def test_a_push_waits_for_no_other_if_all_are_asked_for(hub, tmp_path, always, uploads):
    hub.done = False
    train(tmp_path, hub_always_push=always)
    assert len(hub.uploaded) == uploads


def test_the_history_of_the_repository_says_what_each_commit_holds(hub, tmp_path):
    train(tmp_path, hub_strategy="checkpoint")
    messages = [settings["commit_message"] for _, settings in hub.uploaded]
    assert messages[0] == "MAE, step 1 of 3: weights, card and logs, during the training"
    assert messages[-1] == "MAE, step 3 of 3: the checkpoint to resume from, as last-checkpoint"


def test_the_code_lies_beside_the_weights_before_they_go_up(hub, tmp_path):
    train(tmp_path, hub_strategy="every_save")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_mae.MAEModel"
    assert (tmp_path / "run" / "modeling_mae.py").is_file() and (tmp_path / "run" / "vit.py").is_file()


def test_nothing_goes_up_unless_that_is_asked_for(hub, tmp_path):
    train(tmp_path, push_to_hub=False)
    assert not hub.made and not hub.uploaded
