"""The effect of options of transformers' TrainingArguments on what a run gives: evaluations, checkpoints, logs and
reports. `test_trainer_options.py` lists all options."""

import logging as python_logging
import os
import sys
import types

import pytest
import torch
from option_runs import LOGGED, make_trainer, steps_of, train
from safetensors.torch import load_file
from tiny import METHODS, make_model
from tiny_runs import Images, arguments
from transformers import EarlyStoppingCallback, modelcard
from transformers.integrations import integration_utils
from transformers.utils import logging

from hf_mim.pretraining.arguments import MIMTrainingArguments
from hf_mim.pretraining.trainer import MIMTrainer


@pytest.fixture(autouse=True)
def the_level_of_logs_stays():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


# ---- evaluation


def test_evaluations_come_when_they_are_asked_for(tmp_path):
    def steps(**settings):
        return steps_of(train(tmp_path, max_steps=6, **settings), "eval_loss")

    by_steps = dict(eval_strategy="steps", eval_steps=2)
    assert steps(**by_steps) == [2, 4, 6]
    assert steps(**by_steps, eval_delay=3) == [4, 6]
    assert steps(**by_steps, eval_on_start=True) == [0, 2, 4, 6]
    assert steps(eval_strategy="epoch") == [4, 6] and steps() == []


def evaluate(folder, method="mae", **settings):
    """What `compute_metrics` is called with, and the result."""
    seen, model = [], make_model(method)

    def compute_metrics(found, compute_result=None):
        seen.append(found)
        return {"count": len(seen), "last": compute_result}

    args = arguments(folder, prediction_loss_only=False, per_device_eval_batch_size=3, **settings)
    trainer = MIMTrainer(model, args, eval_dataset=Images(model, 7), compute_metrics=compute_metrics)
    return seen, trainer.evaluate()


@pytest.mark.parametrize("method", METHODS)
def test_compute_metrics_gets_predictions_and_targets_of_all_images(tmp_path, method):
    (found,), result = evaluate(tmp_path, method, include_for_metrics=["loss", "inputs"])
    predictions, targets, *_ = found.predictions
    assert predictions.shape == targets.shape and len(predictions) == 7
    assert found.losses.mean() == pytest.approx(result["eval_loss"]) and found.inputs.shape == found.label_ids.shape
    assert found.losses.shape == (7,) and result["eval_count"] == 1
    (without,), _ = evaluate(tmp_path, method)
    assert without.losses is without.inputs is None


def test_only_the_loss_is_kept_unless_predictions_are_asked_for(tmp_path):
    seen, result = evaluate(tmp_path, label_names=[])
    assert not seen and "eval_loss" not in result  # no label is named, so there is nothing to compare with
    trainer = make_trainer(tmp_path)
    trainer.compute_metrics = seen.append
    assert trainer.evaluate()["eval_loss"] > 0 and not seen


def test_metrics_can_be_computed_by_batches_and_predictions_kept_apart(tmp_path):
    seen, result = evaluate(tmp_path, batch_eval_metrics=True)
    assert [len(found.label_ids) for found in seen] == [3, 3, 1] and result["eval_last"] is True
    ((apart,), _), ((joined,), _) = evaluate(tmp_path, eval_do_concat_batches=False), evaluate(tmp_path)
    assert [len(labels) for labels in apart.label_ids] == [3, 3, 1] and len(joined.label_ids) == 7


def test_predictions_leave_the_device_every_so_many_batches(tmp_path, monkeypatch):
    moved, name = [], "transformers.trainer_pt_utils.EvalLoopContainer.to_cpu_and_numpy"
    monkeypatch.setattr(name, lambda self: moved.append(1))
    evaluate(tmp_path, eval_accumulation_steps=2)
    often = len(moved)
    evaluate(tmp_path)
    assert often == 2 * (len(moved) - often)  # after the second batch, and at the end


# ---- checkpoints


class Judged(MIMTrainer):
    """Its evaluations give 3, 1, 2 as the loss and 0, 1, 5 as another measure."""

    def evaluate(self, *args, **kwargs):
        step = self.state.global_step
        return {"eval_loss": {1: 3, 2: 1, 3: 2}[step], "eval_mine": {1: 0, 2: 1, 3: 5}[step]}


@pytest.mark.parametrize(
    ("options", "best"),
    [
        ({}, 2),
        (dict(greater_is_better=True), 1),
        (dict(metric_for_best_model="mine"), 3),
        (dict(metric_for_best_model="mine", greater_is_better=False), 1),
    ],
)
def test_the_best_checkpoint_by_the_measure_that_is_named_is_loaded_at_the_end(tmp_path, options, best):
    each = dict(max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    trainer = train(tmp_path, kind=Judged, load_best_model_at_end=True, **each | options)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    saved = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    weights = trainer.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in saved.items())


@pytest.mark.parametrize(("strategy", "steps"), [("no", []), ("steps", [2, 4, 5]), ("epoch", [4, 5]), ("best", [1, 3])])
def test_checkpoints_are_saved_when_they_are_asked_for(tmp_path, strategy, steps):
    class Improving(MIMTrainer):
        def evaluate(self, *args, **kwargs):
            return {"eval_loss": {1: 3, 2: 4, 3: 2, 4: 2, 5: 2}[self.state.global_step]}

    each = dict(eval_strategy="steps", eval_steps=1, metric_for_best_model="loss")
    train(tmp_path, kind=Improving, max_steps=5, save_strategy=strategy, save_steps=2, **each)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in steps]


@pytest.mark.parametrize("restored", [True, False])
def test_the_state_of_a_callback_is_restored_if_that_is_asked_for(tmp_path, restored):
    each = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    each |= dict(load_best_model_at_end=True, restore_callback_states_from_checkpoint=restored)
    train(tmp_path, callbacks=[EarlyStoppingCallback(7)], **each)
    resumed = train(tmp_path, callbacks=[EarlyStoppingCallback(3)], resume=str(tmp_path / "checkpoint-1"), **each)
    (stopping,) = (c for c in resumed.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
    assert stopping.early_stopping_patience == (7 if restored else 3) and resumed.state.global_step == 2


# ---- logs and reports


def test_logs_come_when_they_are_asked_for(tmp_path):
    def steps(**settings):
        return steps_of(train(tmp_path, max_steps=8, **settings))

    assert steps(logging_strategy="epoch", logging_first_step=False) == [4, 8]  # 18 images in batches of 4
    assert steps(logging_steps=4) == [1, 4, 8] and steps(logging_steps=4, logging_first_step=False) == [4, 8]
    assert steps(logging_strategy="no", logging_first_step=False) == []


@pytest.mark.parametrize(
    ("ranks", "on_each_node", "level"),
    [((0, 0), True, "ERROR"), ((8, 0), True, "ERROR"), ((8, 0), False, "CRITICAL"), ((1, 1), True, "CRITICAL")],
)
def test_the_level_of_logs_hangs_on_the_process(tmp_path, monkeypatch, ranks, on_each_node, level):
    args = arguments(tmp_path, log_level="error", log_level_replica="critical", log_on_each_node=on_each_node)
    for name, rank in zip(("process_index", "local_process_index"), ranks, strict=True):
        monkeypatch.setattr(MIMTrainingArguments, name, rank)
    MIMTrainer(make_model("mae"), args)
    assert logging.get_verbosity() == getattr(python_logging, level)


@pytest.mark.parametrize("silent", [True, False])
def test_there_is_a_bar_unless_it_is_switched_off(tmp_path, capsys, monkeypatch, silent):
    monkeypatch.setattr("hf_mim.pretraining.progress.watched", lambda: True)  # as in a terminal
    model = make_model("mae")
    args = MIMTrainingArguments(
        output_dir=str(tmp_path), disable_tqdm=silent, use_cpu=True, save_strategy="no", **LOGGED
    )
    MIMTrainer(model, args, Images(model)).train()
    assert ("step 2 of 2" in capsys.readouterr().err) is not silent


@pytest.fixture
def trackio(monkeypatch):
    """A stand-in for the package. `calls` are (name of the function, what it was given)."""
    module = types.ModuleType("trackio")
    module.calls, module.__version__ = [], "1.0"

    def known(value):
        return types.SimpleNamespace(get=lambda: value)

    def function(called):
        return lambda *args, **settings: module.calls.append((called, settings))

    for name in ("init", "log", "finish", "freeze"):
        setattr(module, name, function(name))
    module.config = type("Config", (dict,), {"update": lambda self, values, **options: None})()
    module.context_vars = types.SimpleNamespace(current_space_id=known("me/space"), current_project=known("bees"))
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: True)
    monkeypatch.setattr(modelcard, "AUTOGENERATED_TRAINER_COMMENT", "")
    return module


def test_reports_have_the_names_that_are_given(tmp_path, trackio):
    names = dict(project="bees", run_name="first", trackio_space_id="space", trackio_bucket_id="bucket")
    train(tmp_path, report_to=["trackio"], hub_private_repo=True, trackio_static_space_id="me/curves", **names)
    calls = dict(call for call in trackio.calls if call[0] in ("init", "freeze"))
    about = dict(project="bees", name="first", space_id="space", bucket_id="bucket")
    assert calls["init"] == about | {"resume": "allow", "private": True}
    assert calls["freeze"] == dict(space_id="me/space", project="bees", new_space_id="me/curves", private=True)


def test_reports_go_to_each_of_the_places_that_are_named(tmp_path, trackio, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(tmp_path, report_to="tensorboard,trackio", trackio_static_space_id=False)
    assert os.listdir(tmp_path / "board") and "log" in dict(trackio.calls) and "freeze" not in dict(trackio.calls)
