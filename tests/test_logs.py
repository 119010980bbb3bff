"""What a run logs, where, and what is left of it after a resume."""

import json
import math
import time

import pytest
import torch
from tiny import make_model
from tiny_runs import AtEachStep, Images, arguments

from hf_mim.pretraining.callbacks import MetricsFile
from hf_mim.pretraining.trainer import MIMTrainer


def train(folder, steps=4, images=None, method="stop_jepa", resume=None, callbacks=(), **settings):
    model = make_model(method)
    settings = dict(save_strategy="steps", save_steps=2, logging_steps=1) | settings
    args = arguments(folder, max_steps=steps, **settings)
    trainer = MIMTrainer(model, args, images or Images(model), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_jsonl_has_each_entry_of_the_log_with_its_step_and_time(tmp_path):
    before = time.time()
    trainer = train(tmp_path)
    found = lines(tmp_path)
    assert [entry["step"] for entry in found] == [1, 2, 3, 4, 4]  # the last is the summary
    assert all(before - 1 < entry.pop("time") < time.time() + 1 for entry in found)
    assert found == [{"step": entry["step"]} | entry for entry in trainer.state.log_history]
    names = {"loss", "grad_norm", "learning_rate", "target_std", "collapsed", "images_per_second", "seconds"}
    assert names | {"data_wait_seconds", "memory_gib"} <= found[0].keys()


def test_a_resume_takes_back_the_lines_after_its_checkpoint_and_half_a_line(tmp_path):
    train(tmp_path, save_total_limit=None)
    straight = [{k: v for k, v in entry.items() if k in ("step", "loss")} for entry in lines(tmp_path)][:4]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    train(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    resumed = [{k: v for k, v in entry.items() if k in ("step", "loss")} for entry in lines(tmp_path)]
    assert [entry for entry in resumed if "loss" in entry] == straight


def test_what_is_not_finite_is_null_in_the_file(tmp_path):
    class State:
        is_world_process_zero, global_step = True, 3

    args = arguments(tmp_path)
    MetricsFile().on_log(args, State, None, logs={"loss": math.nan, "a": math.inf, "b": 1.5, "c": 2})
    (entry,) = lines(tmp_path)
    assert (entry["loss"], entry["a"], entry["b"], entry["c"]) == (None, None, 1.5, 2)


def test_waiting_for_data_is_told_from_computing(tmp_path):
    class SlowImages(Images):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    slow = train(tmp_path / "slow", images=SlowImages(make_model("mae")), method="mae")
    fast = train(tmp_path / "fast", method="mae", callbacks=[AtEachStep(lambda state, optimizer: time.sleep(0.08))])
    for entry in slow.state.log_history[1:-1]:
        assert 0.08 <= entry["data_wait_seconds"] <= entry["seconds"]
    for entry in fast.state.log_history[1:-1]:
        assert entry["data_wait_seconds"] < 0.04 and entry["seconds"] >= 0.08


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = train(tmp_path, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for name in ("loss", "target_std", "collapsed", "images_per_second", "data_wait_seconds"):
        shown = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        logged = [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged], name


def test_random_numbers_follow_from_seed_step_and_nothing_drawn_before(tmp_path):
    def masks(seed, waste=0):
        found, model = [], make_model("mae")
        model.register_forward_hook(lambda module, inputs, output: found.append(output.context_ids.tolist()))
        args = arguments(tmp_path, max_steps=3, seed=seed, data_seed=0)
        wasteful = AtEachStep(lambda state, optimizer: torch.rand(1 + waste))
        MIMTrainer(model, args, Images(model), callbacks=[wasteful]).train()
        return found

    assert masks(0) == masks(0, waste=99) != masks(1)
    assert len({str(mask) for mask in masks(0)}) == 3
