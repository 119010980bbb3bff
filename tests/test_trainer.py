"""What MIMTrainer claims, on tiny models of the three methods."""

import copy
import io
import json
import math
from itertools import pairwise
from types import SimpleNamespace

import datasets
import PIL.Image
import PIL.ImageChops
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback, TrainingArguments

from hf_mim import (
    LatentMIMConfig,
    LatentMIMForPreTraining,
    MAEConfig,
    MAEForPreTraining,
    StopJepaConfig,
    StopJepaForPreTraining,
)
from hf_mim.callbacks import Throughput
from hf_mim.data import BrokenImagesError, DeviceAugment, ImageDataset, ImageStream
from hf_mim.trainer import MIMTrainer, MIMTrainingArguments, check_data

TINY = dict(image_size=24, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
METHODS = ["mae", "latent_mim", "stop_jepa"]


def make_model(method: str, seed: int = 0, **overrides):
    torch.manual_seed(seed)
    if method == "mae":
        return MAEForPreTraining(MAEConfig(**TINY, decoder_num_hidden_layers=1, **overrides))
    if method == "latent_mim":
        config = dict(decoder_num_hidden_layers=1, mask_ratio=0.75, patch_gap=1) | overrides
        return LatentMIMForPreTraining(LatentMIMConfig(**TINY, **config))
    return StopJepaForPreTraining(StopJepaConfig(**TINY, predictor_num_hidden_layers=1, **overrides))


class Images(torch.utils.data.Dataset):
    """Noise images, each a function of its index; float, or uint8 as the data room gives them."""

    def __init__(self, model, length: int = 48, uint8: bool = False, **extra):
        self.shape, self.length, self.uint8 = (3, *model.config.training_size), length, uint8
        self.extra, self.epochs = extra, []

    def __len__(self):
        return self.length

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        if self.uint8:
            image = torch.randint(0, 256, self.shape, dtype=torch.uint8, generator=generator)
        else:
            image = torch.randn(self.shape, generator=generator)
        return {"pixel_values": image} | {name: value(index) for name, value in self.extra.items()}


def image_column(length: int, broken=()):
    """What load_images gives: undecoded images, here gradients that get brighter, some of them no PNG at all."""
    rows = []
    for index in range(length):
        file = io.BytesIO(b"no image" if index in broken else b"")
        if index not in broken:
            image = PIL.Image.linear_gradient("L").resize((24, 24))
            PIL.ImageChops.add(image, PIL.Image.new("L", (24, 24), index)).save(file, "png")
        rows.append({"bytes": file.getvalue(), "path": f"{index}.png"})
    return datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image(decode=False))


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return (self.images[i] for i in range(len(self.images)))


def arguments(tmp_path, **overrides):
    defaults = dict(max_steps=8, per_device_train_batch_size=4, learning_rate=1e-3, save_strategy="no", use_cpu=True)
    return MIMTrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, **defaults | overrides)


def flip_at_random(pixels):
    """A stand-in for the augmentation on the device."""
    flip = torch.rand(len(pixels), 1, 1, 1) < 0.5
    return torch.where(flip, pixels.flip(-1), pixels).float() / 128 - 1


class AtEachStep(TrainerCallback):
    """Calls `function(state, optimizer)` right after each optimizer step, before everything that comes after it."""

    def __init__(self, function):
        self.function = function

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.function(state, optimizer)


def snapshot(module):
    return [parameter.detach().double().clone() for parameter in module.parameters()]


def assert_same_weights(model, other, tolerance=0.0):
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert (ours.double() - theirs.double()).abs().max() <= tolerance, name


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
    model = make_model(method, **({"similarity_weight": 0.0} if method == "latent_mim" else {}))
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


def fixed_ids(model):
    """What forward would draw, as functions of the image's index."""
    patches, config = math.prod(model.config.grid_size), model.config

    def permutation(index):
        return torch.randperm(patches, generator=torch.Generator().manual_seed(100 + index))

    if config.model_type != "stop_jepa":
        visible = config.num_visible(config.grid_size)
        ids = dict(context_ids=lambda i: permutation(i)[:visible], target_ids=lambda i: permutation(i)[visible:])
        if config.model_type == "latent_mim":
            offsets = (*config.grid_size, 2)
            ids["patch_offsets"] = lambda i: torch.randint(0, 2, offsets, generator=torch.Generator().manual_seed(i))
        return ids
    noise = (4, 6, config.hidden_size)
    return dict(
        context_ids=lambda i: permutation(i)[:12],
        target_ids=lambda i: permutation(i)[12:].reshape(4, 6),
        position_noise=lambda i: torch.randn(noise, generator=torch.Generator().manual_seed(i)) / 4,
    )


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


def test_log_has_images_per_second_and_no_pixel_flops(tmp_path):
    model = make_model("mae")
    trainer = MIMTrainer(model, arguments(tmp_path, max_steps=2, logging_steps=1), Images(model))
    trainer.train()
    *steps, summary = trainer.state.log_history
    assert all(entry["images_per_second"] > 0 for entry in steps)
    assert "total_flos" not in summary and trainer.state.total_flos == 0


def test_throughput_counts_neither_evaluation_nor_saving(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hf_mim.callbacks.time.perf_counter", lambda: now[0])
    clock = Throughput()
    clock.on_train_begin(None, None, None)
    for seconds, event in ((2, "on_step_end"), (30, "on_evaluate"), (50, "on_save"), (1, "on_step_end")):
        now[0] += seconds
        getattr(clock, event)(None, None, None)
    clock.images += 12
    now[0] += 1
    assert clock.read() == 12 / 4


def test_progress_bar_shows_loss_and_speed(tmp_path, capsys):
    model = make_model("mae")
    args = arguments(tmp_path, max_steps=2, logging_steps=1)
    args.disable_tqdm = False
    MIMTrainer(model, args, Images(model)).train()
    shown = capsys.readouterr().err
    assert "loss " in shown and "images/s" in shown


# ---- evaluation


def test_evaluation_has_the_same_masks_each_time(tmp_path):
    model = make_model("mae")
    trainer = MIMTrainer(model, arguments(tmp_path), eval_dataset=Images(model, 10))
    first = trainer.evaluate()["eval_loss"]
    torch.rand(7)
    assert trainer.evaluate()["eval_loss"] == first
    trainer.args.seed += 1
    assert trainer.evaluate()["eval_loss"] != first


def test_evaluating_leaves_training_as_it_was(tmp_path):
    weights = []
    for strategy in ("no", "steps"):
        model = make_model("mae")
        args = arguments(tmp_path, eval_strategy=strategy, eval_steps=2)
        MIMTrainer(model, args, Images(model), eval_dataset=Images(model, 10)).train()
        weights.append(model)
    assert_same_weights(*weights)


def test_evaluation_reads_the_last_smaller_batch(tmp_path):
    model, sizes = make_model("mae"), []
    model.register_forward_hook(lambda module, args, output: sizes.append(len(output.context_ids)))
    args = arguments(tmp_path, per_device_eval_batch_size=8)
    MIMTrainer(model, args, eval_dataset=Images(model, 11)).evaluate()
    assert sizes == [8, 3] and args.dataloader_drop_last


def test_augmentation_follows_train_and_eval_mode(tmp_path):
    class Augment(nn.Module):
        modes = []

        def forward(self, pixels):
            assert pixels.dtype == torch.uint8
            self.modes.append(self.training)
            return pixels.float()

    model = make_model("mae")
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    images = Images(model, 8, uint8=True)
    MIMTrainer(model, args, images, augment=Augment(), eval_dataset=images).train()
    assert Augment.modes == [True, False, True, False]


# ---- checkpoint and resume


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("images", [28, 20], ids=["mid-epoch", "epoch boundary"])
def test_resumed_training_equals_uninterrupted_training_to_the_bit(tmp_path, method, images):
    def run(**kwargs):
        model = make_model(method, seed=len(kwargs))  # a resumed model starts from whatever it is
        args = arguments(tmp_path, max_steps=10, save_strategy="steps", save_steps=5, logging_steps=5)
        trainer = MIMTrainer(model, args, Images(model, images, uint8=True), augment=flip_at_random)
        trainer.train(**kwargs)
        return trainer

    straight = run()
    resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_same_weights(straight.model, resumed.model)
    losses = [[e["loss"] for e in t.state.log_history if e["step"] == 10 and "loss" in e] for t in (straight, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 1


def test_resume_is_exact_with_random_crops_in_workers(tmp_path):
    def run(**kwargs):
        images = ImageDataset(image_column(20), size=24)  # 5 steps an epoch
        args = arguments(tmp_path, max_steps=9, save_strategy="steps", save_steps=7, dataloader_num_workers=2)
        trainer = MIMTrainer(make_model("mae"), args, images, augment=DeviceAugment())
        trainer.train(**kwargs)
        return trainer.model

    assert_same_weights(run(), run(resume_from_checkpoint=str(tmp_path / "checkpoint-7")))


def test_data_is_told_each_epoch_also_after_a_resume(tmp_path):
    def run(**kwargs):
        model = make_model("mae")
        images = Images(model, 16)  # 4 steps an epoch
        args = arguments(tmp_path, max_steps=10, save_strategy="steps", save_steps=6)
        MIMTrainer(model, args, images).train(**kwargs)
        return sorted(set(images.epochs))

    assert run() == [0, 1, 2]
    assert run(resume_from_checkpoint=str(tmp_path / "checkpoint-6")) == [1, 2]


def test_checkpoint_says_nothing_that_is_not_so(tmp_path):
    model = make_model("mae")
    trainer = MIMTrainer(model, arguments(tmp_path, max_steps=1), Images(model))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="x")
    assert not (tmp_path / "README.md").exists()
    assert "use_cache" not in json.loads((tmp_path / "config.json").read_text())


# ---- bad input


@pytest.mark.parametrize(
    "name, value, right",
    [
        ("base_lr", 0, "above 0"),
        ("base_lr", "fast", "must be a number"),
        ("learning_rate", -1e-3, "above 0"),
        ("learning_rate", float("nan"), "above 0"),
        ("start_lr_ratio", -0.1, "at least 0"),
        ("final_lr_ratio", -0.1, "at least 0"),
        ("weight_decay", -0.05, "at least 0"),
        ("weight_decay_end", -0.05, "at least 0"),
        ("warmup_steps", -1, "at least 0"),
        ("lr_scheduler_type", "linear", "must be 'cosine'"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(tmp_path, name, value, right):
    with pytest.raises(ValueError, match=rf"^{name} .*{right}") as error:
        arguments(tmp_path, **{name: value})
    assert "\n" not in str(error.value)


def test_warmup_longer_than_the_run_is_refused(tmp_path):
    model = make_model("mae")
    with pytest.raises(ValueError, match="^warmup_steps must be at most the 8 steps of the run"):
        MIMTrainer(model, arguments(tmp_path, warmup_steps=9), Images(model)).train()


def test_plain_training_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^args must be MIMTrainingArguments"):
        MIMTrainer(make_model("mae"), TrainingArguments(str(tmp_path), use_cpu=True))


def test_stream_needs_max_steps(tmp_path):
    model = make_model("mae")
    with pytest.raises(ValueError, match="^max_steps must be given"):
        MIMTrainer(model, arguments(tmp_path, max_steps=-1, num_train_epochs=2), Stream(Images(model)))


def test_accumulation_over_a_stream_on_several_ranks_is_refused():
    stream = ImageStream(image_column(4).to_iterable_dataset(), size=24)
    args = SimpleNamespace(max_steps=5, world_size=2, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match="^gradient_accumulation_steps must be 1 .* got 3$"):
        check_data(args, stream)


def test_stream_trains_past_its_end(tmp_path):
    model = make_model("mae")
    trainer = MIMTrainer(model, arguments(tmp_path, max_steps=5), Stream(Images(model, 12)))
    assert trainer.train().global_step == 5


def test_less_than_one_batch_of_data_is_refused(tmp_path):
    model = make_model("mae")
    with pytest.raises(ValueError, match="^per_device_train_batch_size .* at most the 3 images"):
        MIMTrainer(model, arguments(tmp_path), Images(model, 3))


def test_data_without_pixels_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^train_dataset must give 'pixel_values', got \['image'\]"):
        MIMTrainer(make_model("mae"), arguments(tmp_path), image_column(8))


def test_one_percent_of_broken_images_is_survived_and_more_is_not(tmp_path):
    def run(length):
        images = ImageDataset(image_column(length, broken=[2]), size=24)
        args = arguments(tmp_path, train_sampling_strategy="sequential", max_steps=2)
        trainer = MIMTrainer(make_model("mae"), args, images, augment=DeviceAugment())
        trainer.train()
        return trainer.state.log_history[0]["broken_images"]

    assert run(100) == 1
    with pytest.raises(BrokenImagesError, match=r"^1 of 99 images cannot be decoded; .*: 2\.png$"):
        run(99)


def test_images_stream_into_training(tmp_path):
    stream = ImageStream(image_column(10).to_iterable_dataset(num_shards=2), size=24)
    trainer = MIMTrainer(make_model("mae"), arguments(tmp_path), stream, augment=DeviceAugment())
    assert trainer.train().global_step == 8
