"""What MIMTrainer claims of a run: evaluation, checkpoint and resume, bad input."""

import json

import pytest
import torch
from tiny import METHODS, make_model
from tiny_runs import Images, Stream, arguments, assert_same_weights, flip_at_random, image_column
from torch import nn
from transformers import TrainingArguments

from hf_mim.data import BrokenImagesError, DeviceAugment, ImageDataset, ImageStream, NativeCrop, RandomCrop
from hf_mim.pretraining.trainer import MIMTrainer

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


NO_UP = dict(rotate90=True, vertical_flip_probability=0.5, color_jitter=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("crop", "more"), [(RandomCrop(), {}), (NativeCrop(20), NO_UP)])
def test_resume_is_exact_with_random_crops_in_workers(tmp_path, crop, more):
    def run(**kwargs):
        images = ImageDataset(image_column(20), size=24, crop=crop)  # 5 steps an epoch
        args = arguments(tmp_path, max_steps=9, save_strategy="steps", save_steps=7, dataloader_num_workers=2)
        trainer = MIMTrainer(make_model("mae"), args, images, augment=DeviceAugment(**more))
        trainer.train(**kwargs)
        return trainer.model

    assert_same_weights(run(), run(resume_from_checkpoint=str(tmp_path / "checkpoint-7")))


def test_an_image_is_augmented_alike_in_batches_of_any_size(tmp_path):
    def run(batch_size):
        seen, model = [], make_model("mae")
        model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.extend(kwargs["pixel_values"]), with_kwargs=True
        )
        sizes = dict(per_device_train_batch_size=batch_size, max_steps=16 // batch_size)
        args = arguments(tmp_path, train_sampling_strategy="sequential", **sizes)
        augment = DeviceAugment(grayscale_probability=0.5, blur_probability=0.5, **NO_UP)
        MIMTrainer(model, args, ImageDataset(image_column(16), size=24), augment=augment).train()
        return torch.stack(seen)

    torch.testing.assert_close(run(2), run(8), rtol=0, atol=1e-5)  # the blur sums in another order


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
    card = (tmp_path / "README.md").read_text()
    assert "fine-tuned" not in card and "| Optimizer steps | not recorded |" in card  # no state was saved
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
        ("lr_scheduler_type", "linear", "must be one of cosine, warmup_stable_decay, constant"),
        ("decay_steps", 3, "is for lr_scheduler_type warmup_stable_decay"),
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
