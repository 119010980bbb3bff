"""The best checkpoint by a measurement is kept whole, marked, and on request becomes the model of the run folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_online_probe import TINY

from hf_mim.hub.card import model_card
from hf_mim.pretraining import checkpoints
from hf_mim.pretraining.probe import OnlineProbe
from hf_mim.pretraining.recipe import Recipe
from hf_mim.pretraining.run import Pretraining

OPTIONS = {"probe_every": 1, "keep_best": "probe_rank_me", "save_steps": 100, "save_total_limit": 1, "max_steps": 5}


@pytest.fixture
def measured(monkeypatch):
    """Sets what the probe finds after each step."""

    def set_values(values, name="rank_me"):
        monkeypatch.setattr(OnlineProbe, "values", lambda self, model: {name: values[self.trainer.state.global_step]})

    set_values([9, 2, 5, 3, 1, 4])  # that before the first step does not count: it is no checkpoint
    return set_values


def train(folder, **settings):
    run = Pretraining(Recipe.read(None, TINY | OPTIONS | settings | {"output_dir": str(folder)}))
    run()
    return run


def state(folder):
    held = json.loads((folder / "trainer_state.json").read_text())
    return held["best_global_step"], held["best_metric"]


def same(one, other):
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return all(torch.equal(x, other[name]) for name, x in one.items())


def test_the_best_checkpoint_outlives_the_rotation_and_is_marked(tmp_path, measured):
    train(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]
    assert checkpoints.is_whole(tmp_path / "checkpoint-2") and state(tmp_path) == (2, 5)
    assert same(tmp_path, tmp_path / "checkpoint-5") and not same(tmp_path, tmp_path / "checkpoint-2")
    row = "| Best checkpoint | step 2 of 5, by probe_rank_me (5): in `checkpoint-2`, these weights are the last |"
    assert row in str(model_card(tmp_path))


def test_the_best_checkpoint_becomes_the_model_of_the_run_folder(tmp_path, measured):
    train(tmp_path, export_best=True)
    assert same(tmp_path, tmp_path / "checkpoint-2") and state(tmp_path) == (2, 5)
    assert "step 2 of 5, by probe_rank_me (5): these weights |" in str(model_card(tmp_path))


def test_of_a_measure_that_should_be_small_the_smallest_is_best(tmp_path, measured):
    measured([0, 0.9, 0.5, 0.7, 0.6, 0.8], "mean_cosine")
    train(tmp_path, keep_best="probe_mean_cosine")
    assert state(tmp_path) == (2, 0.5)


def test_a_resumed_run_knows_the_best_of_before(tmp_path, measured):
    train(tmp_path, save_steps=3, save_total_limit=5)
    shutil.rmtree(tmp_path / "checkpoint-5")
    measured([0, 0, 0, 0, 4, 6])
    train(tmp_path, resume=True, export_best=True, save_total_limit=5)
    assert state(tmp_path) == (5, 6)
    shutil.rmtree(tmp_path / "checkpoint-5")
    measured([0, 0, 0, 0, 4, 4])
    train(tmp_path, resume=True, export_best=True, save_total_limit=5)
    assert state(tmp_path) == (2, 5) and same(tmp_path, tmp_path / "checkpoint-2")


def test_a_best_checkpoint_that_could_not_be_saved_is_not_the_best(tmp_path, measured, monkeypatch):
    commit = checkpoints.commit

    def fails_once(staged, final):
        if final.name == "checkpoint-2":
            raise OSError(28, "No space left on device")
        commit(staged, final)

    monkeypatch.setattr(checkpoints, "commit", fails_once)
    train(tmp_path)
    assert state(tmp_path) == (5, 4) and checkpoints.is_whole(tmp_path / "checkpoint-5")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (dict(keep_best="probe_loss"), "keep_best must be one of probe_knn, probe_rank_me, .*, not 'probe_loss'"),
        (dict(probe_every=0), "keep_best probe_rank_me needs probe_every"),
        (dict(keep_best=None, export_best=True), "export_best needs keep_best"),
        (dict(keep_best="probe_knn_accuracy", labels="none"), "keep_best probe_knn needs labels, and there are none"),
        (dict(save_strategy="no"), "keep_best needs checkpoints"),
        (dict(metric_for_best_model="loss"), "keep_best and metric_for_best_model loss exclude each other"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_the_run(settings, line, tmp_path):
    with pytest.raises(ValueError, match=f"^{line}"):
        Pretraining(Recipe.read(None, TINY | OPTIONS | settings | {"output_dir": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()
