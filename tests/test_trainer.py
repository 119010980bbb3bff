"""What MIMTrainer claims of a training step, on tiny models of the three methods."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from tiny import METHODS, make_mean_model, make_model
from tiny_runs import AtEachStep, Images, arguments, assert_same_weights, fixed_ids, flip_at_random, snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from hf_mim.pretraining.callbacks import Throughput
from hf_mim.pretraining.trainer import MIMTrainer

# ---- the target


@pytest.mark.parametrize("method, schedule", [("stop_jepa", "linear"), ("latent_mim", "cosine")])
def test_target_follows_the_momentum_schedule_under_accumulation(tmp_path, method, schedule):
    model = make_model(method, momentum_start=0.5, momentum_end=0.9, momentum_schedule=schedule)
    expected, online = snapshot(model.target_encoder), []
    trainer = MIMTrainer(
        model,
        arguments(tmp_path, max_steps=6, gradient_accumulation_steps=3),
        Images(model),
        callbacks=[AtEachStep(lambda state, optimizer: online.append(snapshot(model.encoder)))],
    )
    trainer.train()
    assert len(online) == 6
    for step, weights in enumerate(online):
        if schedule == "linear":
            momentum = 0.5 + 0.4 * step / 6
        else:
            momentum = 0.9 - 0.4 * (1 + math.cos(math.pi * step / 6)) / 2
        expected = [momentum * t + (1 - momentum) * o for t, o in zip(expected, weights, strict=True)]
    for got, wanted in zip(snapshot(model.target_encoder), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_target_stays_where_the_optimizer_step_was_skipped(tmp_path):
    model = make_model("stop_jepa", momentum_start=0.5)
    targets = [snapshot(model.target_encoder)]

    class SkipThird(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            optimizer._is_overflow = state.global_step == 2  # what the fp16 loss scaler leaves there

        def on_step_end(self, *args, **kwargs):
            targets.append(snapshot(model.target_encoder))

    MIMTrainer(model, arguments(tmp_path, max_steps=4), Images(model), callbacks=[SkipThird()]).train()
    moved = [any((a != b).any() for a, b in zip(*pair, strict=True)) for pair in pairwise(targets)]
    assert moved == [True, True, False, True]


def test_model_is_told_its_progress_once_before_each_step(tmp_path):
    model, told = make_model("mae"), []
    model.set_progress = told.append
    MIMTrainer(model, arguments(tmp_path, max_steps=5, gradient_accumulation_steps=2), Images(model)).train()
    assert told == [0, 1 / 5, 2 / 5, 3 / 5, 4 / 5]


# ---- schedules and parameter groups


def test_rates_and_decays_equal_their_formulas_at_every_step(tmp_path):
    model, seen = make_model("mae"), []

    def record(state, optimizer):
        seen.append([(group["decays"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups])

    args = arguments(
        tmp_path,
        max_steps=20,
        warmup_steps=5,
        learning_rate=1e-3,
        start_lr_ratio=0.2,
        final_lr_ratio=0.001,
        weight_decay=0.04,
        weight_decay_end=0.4,
    )
    MIMTrainer(model, args, Images(model), callbacks=[AtEachStep(record)]).train()
    assert len(seen) == 20
    for step, groups in enumerate(seen):
        if step < 5:
            rate = 2e-4 + 8e-4 * step / 5
        else:
            rate = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * (step - 5) / 15)) / 2
        decay = 0.4 - 0.36 * (1 + math.cos(math.pi * step / 20)) / 2
        assert groups == [(True, pytest.approx(rate), pytest.approx(decay)), (False, pytest.approx(rate), 0)]


def test_decay_that_starts_at_zero_reaches_the_right_groups(tmp_path):
    model, seen = make_model("mae"), []
    args = arguments(tmp_path, max_steps=4, weight_decay=0.0, weight_decay_end=0.2)
    record = AtEachStep(lambda state, optimizer: seen.append([g["weight_decay"] for g in optimizer.param_groups]))
    MIMTrainer(model, args, Images(model), callbacks=[record]).train()
    assert seen[2] == [pytest.approx(0.1), 0]


@pytest.mark.parametrize(
    "method, overrides",
    [("mae", {}), ("latent_mim", {}), ("stop_jepa", {}), ("stop_jepa", {"position_embedding": "learned"})],
)
def test_exactly_the_linear_weights_decay(tmp_path, method, overrides):
    model = make_model(method, **overrides)
    trainer = MIMTrainer(model, arguments(tmp_path), Images(model))
    trainer.create_optimizer()
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {g["decays"]: {by_id[id(p)] for p in g["params"]} for g in trainer.optimizer.param_groups}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert groups[True] == linear & trainable
    assert groups[False] == trainable - linear
    assert not any(name.startswith("target_") for name in groups[True] | groups[False])


def test_base_lr_is_for_256_images_per_optimizer_step(tmp_path):
    args = arguments(tmp_path, learning_rate=None, base_lr=1e-3, gradient_accumulation_steps=8)
    assert args.learning_rate == pytest.approx(1e-3 * 4 * 8 / 256)


def test_explicit_learning_rate_wins(tmp_path):
    assert arguments(tmp_path, learning_rate=7e-4, base_lr=1e-3).learning_rate == 7e-4


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    args = arguments(tmp_path, learning_rate=None, base_lr="1e-3", weight_decay="5e-2", per_device_train_batch_size=256)
    assert (args.learning_rate, args.weight_decay) == (1e-3, 0.05)


def test_many_gpus_without_a_launcher_use_one(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 4
    assert (args.n_gpu, args.train_batch_size) == (1, 4)


# ---- loss, metrics, log


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_small_batches_equal_one_large_batch(tmp_path, method):
    model = make_mean_model(method)
    ids = fixed_ids(model)
    start = copy.deepcopy(model)
    common = dict(train_sampling_strategy="sequential", max_steps=3, adam_epsilon=1e-3, learning_rate=0.01)
    small = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, **common)
    # Labels in the data make Trainer count them, and take the loss for one that is summed over the whole step.
    MIMTrainer(model, small, Images(model, labels=lambda i: 1, **ids)).train()
    other = copy.deepcopy(start)
    MIMTrainer(other, arguments(tmp_path, per_device_train_batch_size=6, **common), Images(other, **ids)).train()
    assert any((a != b).any() for a, b in zip(snapshot(model), snapshot(start), strict=True))
    assert_same_weights(model, other, tolerance=1e-6)


def test_logged_metrics_are_means_over_all_passes_since_the_last_log(tmp_path):
    model, passes = make_model("stop_jepa"), []
    model.register_forward_hook(lambda module, args, output: passes.append(output.metrics))
    args = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=2, logging_steps=3, logging_first_step=False)
    trainer = MIMTrainer(model, args, Images(model))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [3, 6] and len(passes) == 12
    for entry, window in zip(logs, (passes[:6], passes[6:]), strict=True):
        for name in passes[0]:
            assert entry[name] == pytest.approx(sum(m[name].item() for m in window) / 6, rel=1e-5), name


class Syncs(TorchDispatchMode):
    """Counts the operations for which a host waits for its device: reading a number, and shapes that hang on data."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_between_two_logs_never_waits_for_the_device(tmp_path, method):
    counts = []
    for steps in (2, 7):
        model = make_model(method)
        args = arguments(tmp_path, max_steps=steps, logging_steps=100, logging_first_step=False)
        # Multi-block masks are drawn on the CPU wherever the model is, so that their sizes wait for nothing.
        ids = fixed_ids(model) if method == "stop_jepa" else {}
        trainer = MIMTrainer(model, args, Images(model, uint8=True, **ids), augment=flip_at_random)
        with Syncs() as syncs:
            trainer.train()
        counts.append(syncs.count)
    assert counts[0] == counts[1]


def test_log_has_images_per_second(tmp_path):
    model = make_model("mae")
    trainer = MIMTrainer(model, arguments(tmp_path, max_steps=2, logging_steps=1), Images(model))
    trainer.train()
    *steps, _ = trainer.state.log_history
    assert all(entry["images_per_second"] > 0 for entry in steps)


def test_throughput_counts_neither_evaluation_nor_saving(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hf_mim.pretraining.callbacks.time.perf_counter", lambda: now[0])
    clock = Throughput()
    clock.on_train_begin(None, None, None)
    for seconds, event in ((2, "on_step_end"), (30, "on_evaluate"), (50, "on_save"), (1, "on_step_end")):
        now[0] += seconds
        getattr(clock, event)(None, None, None)
    clock.images += 12
    now[0] += 1
    assert clock.read(torch.device("cpu"))["images_per_second"] == 12 / 4
