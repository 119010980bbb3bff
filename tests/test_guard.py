"""Steps that go wrong change nothing; a signal ends a run at a whole checkpoint."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from tiny import METHODS, fields, make_model
from tiny_runs import AtEachStep, Images, arguments, image_column, snapshot

from hf_mim.data import DeviceAugment, ImageDataset
from hf_mim.pretraining.arguments import MIMTrainingArguments
from hf_mim.pretraining.checkpoints import is_whole
from hf_mim.pretraining.guard import NonFiniteError
from hf_mim.pretraining.trainer import MIMTrainer, ScalarMeans
from hf_mim.run_folder import checkpoints
from hf_mim.trainer_utils import gpu_has_bfloat16

SHARED = dict(max_steps=4, logging_steps=1, train_sampling_strategy="sequential")


class WithNaN(Images):
    """One pixel of some images is not a number."""

    def __init__(self, model, broken, length=16):
        super().__init__(model, length)
        self.broken = broken

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index in self.broken:
            sample["pixel_values"][0, 0, 0] = torch.nan
        return sample | {"name": f"{index}.npy"}


def names_kept(samples):
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    return {"pixel_values": pixels, "name": [sample["name"] for sample in samples]}


def train(folder, method="mae", broken=(5,), changes=None, **settings):
    """The trainer, and after each step the weights with the target, and the optimizer's state."""
    model, after = make_model(method, **changes or {}), []

    def record(state, optimizer):
        states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
        after.append((snapshot(model), [value.clone() for value in states]))

    args = arguments(folder, **SHARED | settings)
    images, callbacks = WithNaN(model, broken), [AtEachStep(record)]
    trainer = MIMTrainer(model, args, images, callbacks=callbacks, data_collator=names_kept)
    trainer.train()
    return trainer, after


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"], ids=["on the device", "by the host"])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_optimizer_nor_target(tmp_path, method, optim, caplog):
    trainer, after = train(tmp_path, method, broken=[5], optim=optim)  # the second step's
    weights, states = zip(*after, strict=True)
    model_after = snapshot(trainer.model)
    assert all(torch.isfinite(value).all() for value in model_after)
    assert equal(states[1], states[0]) and not equal(states[2], states[1])
    encoder = [i for i, (name, _) in enumerate(trainer.model.named_parameters()) if not name.startswith("target")]
    assert equal([weights[1][i] for i in encoder], [weights[0][i] for i in encoder])
    assert not equal([weights[2][i] for i in encoder], [weights[1][i] for i in encoder])
    target = [i for i, (name, _) in enumerate(trainer.model.named_parameters()) if name.startswith("target")]
    # The target moves after the record of its step: what step 2 did to it is in the record of step 3.
    assert equal([weights[2][i] for i in target], [weights[1][i] for i in target])
    assert trainer.guard.skipped == 1
    assert [line for line in caplog.messages if line.startswith("Step 2 is skipped")] == [
        "Step 2 is skipped, because its loss or its gradient is not finite; the predictions of 5.npy are not finite"
    ]


@pytest.mark.parametrize("method", [method for method in METHODS if "masks_per_image" in fields(method)])
def test_with_several_masks_per_image_a_run_names_the_broken_image(tmp_path, method, caplog):
    trainer, _ = train(tmp_path, method, broken=[6], changes={"masks_per_image": 2})
    assert trainer.guard.skipped == 1
    assert [line for line in caplog.messages if line.startswith("Step 2 is skipped")] == [
        "Step 2 is skipped, because its loss or its gradient is not finite; the predictions of 6.npy are not finite"
    ]


def test_a_finite_run_is_the_same_with_and_without_the_guards_vote(tmp_path):
    def run(votes):
        model = make_model("stop_jepa")
        trainer = MIMTrainer(model, arguments(tmp_path, **SHARED), Images(model))
        if not votes:
            trainer.guard.on_pre_optimizer_step = lambda *args, **kwargs: None
        trainer.train()
        return snapshot(model)

    assert equal(run(True), run(False))


def test_the_log_counts_skipped_steps_and_its_means_leave_them_out(tmp_path):
    trainer, _ = train(tmp_path, broken=[5], logging_steps=4, logging_first_step=False)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["skipped_steps"] == 1
    assert 0 < entry["loss"] < 5 and 0 < entry["feature_std"] < 5
    assert 0 < trainer.state.log_history[-1]["train_loss"] < 5


def test_a_bad_image_in_an_accumulated_step_skips_all_of_it(tmp_path, caplog):
    trainer, after = train(tmp_path, broken=[9], gradient_accumulation_steps=2, max_steps=2)
    assert trainer.guard.skipped == 1 and "the predictions of 9.npy" in caplog.text
    assert equal(after[0][1], after[1][1])


def test_gradients_that_the_device_reports_as_infinite_name_the_images_of_the_step(tmp_path, caplog):
    model = make_model("mae")
    args = arguments(tmp_path, **SHARED)
    trainer = MIMTrainer(model, args, ImageDataset(image_column(16), size=24), augment=DeviceAugment())
    calls = []

    def report_infinity(gradient):
        calls.append(1)
        return torch.full_like(gradient, torch.inf) if len(calls) == 3 else gradient

    model.encoder.layers[0].mlp.fc1.weight.register_hook(report_infinity)
    trainer.train()
    assert trainer.guard.skipped == 1
    line = next(line for line in caplog.messages if line.startswith("Step 3 is skipped"))
    assert line.endswith("all of its images have finite predictions: 8.png, 9.png, 10.png, 11.png")
    assert all(torch.isfinite(value).all() for value in snapshot(model))


def names_of_checkpoints(folder):
    return [path.name for path in checkpoints(folder)]


def test_too_many_in_a_row_stop_the_run_and_name_the_last_checkpoint_that_gave_a_finite_loss(tmp_path):
    settings = dict(save_strategy="steps", save_steps=1, max_skipped_steps=2, save_total_limit=1)
    with pytest.raises(NonFiniteError) as error:
        train(tmp_path, broken=range(8, 16), **settings)  # step 2 is good, but whether its weights are is not known
    text = str(error.value)
    assert text.startswith("2 steps in a row, up to step 4, had a loss or a gradient that is not finite")
    assert f"the last good checkpoint is {tmp_path / 'checkpoint-1'}. " in text
    assert "lower base_lr" in text and "\n" not in text
    assert names_of_checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-1"]
    assert is_whole(tmp_path / "checkpoint-1")


def test_a_run_that_never_gave_a_second_finite_loss_has_no_good_checkpoint(tmp_path):
    with pytest.raises(NonFiniteError, match=r"checkpoint is none \(checkpoint-1 has given no finite loss yet\)"):
        train(tmp_path, broken=range(4, 16), save_strategy="steps", save_steps=1, max_skipped_steps=2)


def test_no_checkpoint_is_saved_at_a_skipped_step_but_at_the_next_good_one(tmp_path, caplog):
    train(tmp_path, broken=[5], save_strategy="steps", save_steps=2, max_steps=4)
    assert names_of_checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-3"]
    assert "No checkpoint is saved at step 2, because it was skipped" in caplog.text


def test_a_checkpoint_replaces_the_one_before_it_once_its_weights_have_given_a_finite_loss(tmp_path):
    held, model = [], make_model("mae")
    args = arguments(tmp_path, **SHARED | dict(save_strategy="steps", save_steps=2, save_total_limit=1, max_steps=6))
    look = AtEachStep(lambda *_: held.append(names_of_checkpoints(tmp_path)))
    MIMTrainer(model, args, Images(model), callbacks=[look]).train()
    assert held[4] == ["checkpoint-4", "checkpoint-2"] and held[5] == ["checkpoint-4"]
    assert names_of_checkpoints(tmp_path) == ["checkpoint-6"]


def test_a_run_that_ends_in_skipped_steps_says_so(tmp_path, caplog):
    train(tmp_path, broken=range(12, 16))
    assert "The last 1 steps of the run were skipped: its weights are those after step 3" in caplog.text


def test_skipped_steps_that_are_not_in_a_row_stop_nothing(tmp_path):
    trainer, _ = train(tmp_path, broken=[1, 9], max_skipped_steps=2)
    assert trainer.guard.skipped == 2 and trainer.state.global_step == 4


def test_means_are_of_the_finite_values():
    class Alone:
        def reduce(self, tensor, reduction):
            return tensor

    means = ScalarMeans()
    for value in (1.0, torch.nan, 3.0, torch.inf):
        means.add({"a": torch.tensor(value), "b": torch.tensor(torch.nan)})
    found = means.pop(Alone())
    assert found["a"] == 2 and found["b"] != found["b"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_whole_checkpoint_of_the_step_and_ends_the_run(tmp_path, number):
    model = make_model("mae")

    def send(state, optimizer):
        if state.global_step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    trainer = MIMTrainer(model, arguments(tmp_path, max_steps=8), Images(model), callbacks=[AtEachStep(send)])
    trainer.train()
    assert trainer.guard.signal == number and signal.getsignal(number) == before
    step = trainer.state.global_step
    assert step in (3, 4) and is_whole(tmp_path / f"checkpoint-{step}")
    resumed = MIMTrainer(make_model("mae", seed=1), arguments(tmp_path, max_steps=8), Images(model))
    assert resumed.train(resume_from_checkpoint=True).global_step == 8 and resumed.guard.signal is None


def test_a_second_interrupt_ends_the_run_at_once(tmp_path):
    model = make_model("mae")

    def send(state, optimizer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer = MIMTrainer(model, arguments(tmp_path), Images(model), callbacks=[AtEachStep(send)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_bfloat16_is_on_a_cpu_only_if_asked_for(tmp_path):
    assert arguments(tmp_path).bf16 is False  # 20 times slower on a CPU without instructions for it
    assert arguments(tmp_path, bf16=True).bf16 is True


@pytest.mark.parametrize(
    ("instructions", "told"),
    [
        ({"avx512_bf16": False, "amx_bf16": False}, True),
        ({"avx512_bf16": True, "amx_bf16": False}, False),
        ({"avx512_bf16": False, "amx_bf16": True}, False),
        ({"bf16": False}, True),  # ARM
        ({"bf16": True}, False),
        ({}, False),
    ],
)
def test_a_warning_tells_that_a_cpu_only_emulates_bfloat16(tmp_path, monkeypatch, caplog, instructions, told):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    arguments(tmp_path, bf16=True)
    assert ("only emulates bfloat16" in caplog.text) is told
    arguments(tmp_path)
    assert caplog.text.count("emulates") == told


def test_bfloat16_on_a_machine_without_an_accelerator_needs_no_other_option(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert MIMTrainingArguments(str(tmp_path), bf16=True).use_cpu


@pytest.mark.parametrize("generation, has_it", [(7, False), (8, True)])
def test_bfloat16_is_not_the_default_of_a_gpu_that_only_emulates_it(monkeypatch, generation, has_it):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=generation))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)  # what a T4 says
    assert gpu_has_bfloat16() is has_it


@pytest.mark.parametrize(
    "name, value, right", [("max_skipped_steps", 0, "at least 1"), ("enable_jit_checkpoint", True, "must stay False")]
)
def test_wrong_arguments_are_named_in_one_line(tmp_path, name, value, right):
    with pytest.raises(ValueError, match=rf"^{name} .*{right}"):
        arguments(tmp_path, **{name: value})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_a_step_that_is_not_finite_is_skipped_there_and_told_later(tmp_path, method, caplog):
    trainer, after = train(tmp_path, method, broken=[5], use_cpu=False, max_steps=6, optim="adamw_torch_fused")
    assert trainer.guard.skipped == 1 and trainer.args.bf16
    assert equal(after[1][1], after[0][1]) and not equal(after[2][1], after[1][1])
    assert "Step 2 is skipped" in caplog.text and "5.npy" in caplog.text
    assert trainer.state.log_history[0]["device_memory_gib"] > 0
