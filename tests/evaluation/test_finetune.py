"""Short runs on the embedded digits: learned, reproducible, resumed, kept, refused."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import (
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    Trainer,
    ViTConfig,
    ViTModel,
    pipeline,
)

from hf_mim import MAEForPreTraining
from hf_mim.data import CenterCrop
from hf_mim.data.crop import crop_rng, load_crop
from hf_mim.data.decode import open_image
from hf_mim.data.labelled import LabelledImages
from hf_mim.data.mix import MixAugment
from hf_mim.data.processor import image_processor
from hf_mim.evaluation import finetune
from hf_mim.evaluation.classifier import load_classifier, save_classifier
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.finetune import Finetune, FinetuningArguments, make_trainer, training_images
from hf_mim.evaluation.measure import measure
from hf_mim.evaluation.result import NotKept
from hf_mim.lock import locked

TINY = dict(image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
CLASSES = [f"class {number}" for number in range(10)]
# No augmentation and a rate that a tiny untrained model can do with.
QUICK = dict(epochs=4, batch_size=32, base_lr=16e-3, layer_decay=0.9, drop_path=0.0, mixup=0, cutmix=0, random_erase=0)
QUICK |= dict(randaugment_magnitude=0, flip=0, crop_scale=(0.7, 1.0), label_smoothing=0)


def extractor(checkpoint):
    encoder = FrozenEncoder.load(checkpoint, device="cpu", mean=[0.3] * 3, std=[0.3] * 3)
    return FeatureExtractor(encoder, progress=False)


def test_learning_rate_follows_the_batch_and_warm_up_is_five_epochs_of_a_long_run(tmp_path):
    args = FinetuningArguments(output_dir=str(tmp_path), per_device_train_batch_size=64, gradient_accumulation_steps=8)
    assert args.learning_rate == pytest.approx(5e-4 * 512 / 256)
    assert args.get_warmup_steps(1000) == 50 and args.n_gpu <= 1
    args = FinetuningArguments(output_dir=str(tmp_path), num_train_epochs=20, learning_rate=1.0)
    assert args.learning_rate == 1 and args.get_warmup_steps(1000) == 100


@pytest.mark.slow
def test_digits_are_learned(checkpoint, digits_splits):
    train, test = digits_splits[0].select(range(640)), digits_splits[1]
    result = Finetune(**QUICK).run(extractor(checkpoint), train, test)
    assert result.value > 0.35  # chance is .1
    assert result.table[-1]["training loss"] < result.table[0]["training loss"] - 0.2
    assert result.settings["learning_rate"] == pytest.approx(16e-3 * 32 / 256)
    assert result.settings["steps"] == 4 * (len(train) // 32)


def test_the_same_seed_gives_the_same_result_with_all_augmentation(checkpoint, digits_splits):
    few = digits_splits[0].select(range(96))
    first, again, other = (
        Finetune(epochs=2, batch_size=32, base_lr=0.02, seed=seed).run(extractor(checkpoint), few, few)
        for seed in (0, 0, 1)
    )
    assert (first.value, first.table) == (again.value, again.table)
    assert first.table != other.table


def test_a_budget_trains_on_as_many_images_of_each_class_and_each_seed_draws_others(
    checkpoint, digits_splits, monkeypatch
):
    train, test = digits_splits
    drawn = []

    def note(images, *_):
        drawn.append([image["bytes"] for image in images["image"]])
        raise InterruptedError

    monkeypatch.setattr(finetune, "training_images", note)
    for options in (dict(seed=0), dict(seed=0), dict(seed=1)):
        with pytest.raises(InterruptedError):
            Finetune(budget="3", batch_size=30, **options).run(extractor(checkpoint), train, test)
    label_of = dict(zip([image["bytes"] for image in train.images["image"]], train.read_labels().tolist(), strict=True))
    assert sorted(label_of[image] for image in drawn[0]) == sorted([*range(10)] * 3)
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_global_random_state_is_left_alone(checkpoint, digits_splits):
    few = digits_splits[0].select(range(40))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Finetune(**QUICK | dict(epochs=1, batch_size=20)).run(extractor(checkpoint), few, few)
    assert torch.equal(torch.rand(3), expected)


def train_by_pieces(checkpoint, images, folder, augmented=True, resume=False, **arguments):
    """Weights at the end of a run put together as in `training/finetune.py`."""
    encoder = extractor(checkpoint).encoder
    arguments = (
        dict(num_train_epochs=2, per_device_train_batch_size=20, base_lr=0.01, save_strategy="epoch") | arguments
    )
    args = FinetuningArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **arguments)
    data = training_images(images, encoder, magnitude=9.0 * augmented)
    torch.manual_seed(0)
    model = load_classifier(checkpoint, CLASSES, drop_path=0.2 * augmented)
    augment = MixAugment(encoder.mean, encoder.std) if augmented else MixAugment([0.3] * 3, [0.3] * 3, 0, 0, 0.1, 0, 0)
    trainer = make_trainer(model, args, augment, data)
    if not augmented:  # AdamW would not notice a loss that is too large
        trainer.optimizer_cls_and_kwargs = torch.optim.SGD, trainer.optimizer_cls_and_kwargs[1]
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_resumed_run_ends_in_the_same_weights(checkpoint, digits_splits, tmp_path):
    """All randomness included: crops, RandAugment, mixing, erasing, drop path."""
    images = digits_splits[0].select(range(60)).images
    whole = train_by_pieces(checkpoint, images, tmp_path)
    assert torch.equal(train_by_pieces(checkpoint, images, tmp_path, resume=True), whole)
    other = train_by_pieces(checkpoint, images, tmp_path, seed=1)
    assert not torch.equal(other, whole)


def test_accumulated_batches_take_the_steps_of_the_whole_batch(checkpoint, digits_splits, tmp_path):
    images = digits_splits[0].select(range(60)).images
    whole = train_by_pieces(checkpoint, images, tmp_path, augmented=False, base_lr=1.0)
    split = dict(per_device_train_batch_size=5, gradient_accumulation_steps=4, base_lr=1.0)
    start = train_by_pieces(checkpoint, images, tmp_path, augmented=False, learning_rate=1e-12)
    steps = train_by_pieces(checkpoint, images, tmp_path, augmented=False, **split) - start
    assert ((steps - (whole - start)).norm() / steps.norm()).item() < 1e-3


class Sealed(LabelledImages):
    """Test images whose labels may be read only once the model is trained and kept."""

    def __init__(self, images, trained: Path):
        super().__init__(images)
        self.trained, self.read = trained, 0

    def read_labels(self):
        assert (self.trained / "config.json").exists(), "labels of the test images were read before training ended"
        self.read += 1
        return super().read_labels()


def test_the_kept_classifier_predicts_what_was_measured_and_test_labels_are_read_last(
    checkpoint, digits_splits, tmp_path
):
    train, test = digits_splits[0].select(range(320)), digits_splits[1].select(range(60))
    kept = tmp_path / "classifier"
    sealed = Sealed(test.images, kept)
    result = Finetune(**QUICK | dict(output_dir=str(kept), epochs=3)).run(extractor(checkpoint), train, sealed)
    classifier = pipeline("image-classification", model=str(kept), device="cpu")
    answers = [classifier(open_image(value).convert("RGB"), top_k=1)[0]["label"] for value in test.images["image"]]
    right = sum(int(answer) == label for answer, label in zip(answers, test.read_labels().tolist(), strict=True))
    assert sealed.read == 1
    assert right / 60 == pytest.approx(result.value, abs=1e-9)


def test_a_broken_test_image_is_left_out_not_guessed(checkpoint, digits_splits):
    few = digits_splits[0].select(range(150))
    rows = few.images[:]
    rows["image"][7] = {"bytes": b"no image", "path": "seven.png"}
    test = LabelledImages(type(few.images).from_dict(rows, features=few.images.features))
    result = Finetune(**QUICK | dict(epochs=1)).run(extractor(checkpoint), few, test)
    assert result.data["test"]["images"] == 149 and (result.value * 149) == pytest.approx(round(result.value * 149))


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_transformers_models_at_another_size_by_the_full_recipe(family, digits_splits, tmp_path):
    torch.manual_seed(0)
    if family == "vit":
        ViTModel(ViTConfig(**TINY, intermediate_size=64)).save_pretrained(tmp_path)
    else:
        Dinov2Model(Dinov2Config(**TINY)).save_pretrained(tmp_path)
    few = digits_splits[0].select(range(100))
    encoder = FrozenEncoder.load(tmp_path, image_size=48, device="cpu", mean=[0.3] * 3, std=[0.3] * 3)
    finetune = Finetune(epochs=1, batch_size=32, blocks=1)
    result = finetune.run(FeatureExtractor(encoder, progress=False), few, few)
    assert result.settings["steps"] == 3 and 0 <= result.value <= 1
    assert bool(result.notes) == (family == "vit")  # it has no drop path, and says so


def test_predictions_are_the_classifiers_on_the_evaluation_crop(checkpoint, digits_splits, tmp_path):
    """Against the model loaded again and run by hand."""
    few = digits_splits[0].select(range(64))
    extract = extractor(checkpoint).replace(crop=CenterCrop(0.75))
    result = Finetune(**QUICK | dict(output_dir=str(tmp_path / "kept"), epochs=2)).run(extract, few, few)
    model = load_saved(tmp_path / "kept")
    pixels = [load_crop(x, CenterCrop(0.75), (32, 32), 3, crop_rng(0, 0, 0)) for x in few.images["image"]]
    with torch.no_grad():
        logits = model((torch.stack(pixels).float() / 255 - 0.3) / 0.3).logits
    assert (logits.argmax(1) == few.read_labels()).double().mean().item() == pytest.approx(result.value)


def load_saved(folder):
    return AutoModelForImageClassification.from_pretrained(folder).eval()


def test_training_has_the_rates_and_the_loss_that_were_asked_for(checkpoint, digits_splits, monkeypatch):
    """Looks at the Trainer before its first step: the groups of its optimizer, and its loss against torch's with
    smoothed labels."""
    trainers, few = [], digits_splits[0].select(range(32))
    monkeypatch.setattr(Trainer, "train", lambda trainer: trainers.append(trainer))
    options = dict(base_lr=0.8, layer_decay=0.5, weight_decay=0.2, label_smoothing=0.6, epochs=8, warmup_epochs=2)
    Finetune(**QUICK | options).run(extractor(checkpoint), few, few)
    (trainer,) = trainers
    groups = trainer.create_optimizer().param_groups
    assert sorted({group["lr"] for group in groups}) == pytest.approx([0.0125, 0.025, 0.05, 0.1])
    assert {group["weight_decay"] for group in groups} == {0.2, 0.0}
    assert trainer.args.get_warmup_steps(80) == 20 and trainer.args.num_train_epochs == 8
    batch = dict(pixel_values=torch.zeros(4, 3, 32, 32, dtype=torch.uint8), labels=torch.arange(4))
    torch.nn.init.normal_(trainer.model.classifier.linear.weight)  # at MAE's 2e-5 all losses are log 10
    loss, outputs = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    expected = F.cross_entropy(outputs["logits"], torch.arange(4), label_smoothing=0.6)
    torch.testing.assert_close(loss, expected)


def test_a_device_that_trainer_would_not_take_is_refused():
    extract = SimpleNamespace(encoder=SimpleNamespace(device=torch.device("cuda:1")))
    with pytest.raises(ValueError, match="device must be .* not cuda:1; .*CUDA_VISIBLE_DEVICES=1$"):
        Finetune().run(extract, None, None)


def test_a_run_on_a_gpu_says_that_another_may_differ(checkpoint):
    model = load_classifier(checkpoint, CLASSES)
    assert Finetune().notes(model, torch.device("cpu")) == []
    (note,) = Finetune().notes(model, torch.device("cuda:0"))
    assert "same seed" in note


def test_bad_options_are_named_in_one_line():
    for bad in (
        dict(layer_decay=0), dict(layer_decay=1.5), dict(base_lr=0), dict(epochs=0), dict(warmup_epochs=200),
        dict(batch_size=0), dict(blocks=-1), dict(mixup=-1), dict(label_smoothing=1), dict(random_erase=2),
        dict(randaugment_magnitude=11), dict(randaugment_std=-1), dict(crop_scale=(0.5, 0.2)), dict(flip=2),
        dict(weight_decay=-1), dict(drop_path=1), dict(budget="-1%"), dict(budget="all"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))) as error:
            Finetune(**bad)
        assert "\n" not in str(error.value)


def test_bad_input_is_refused_before_training(checkpoint, digits_splits, tmp_path):
    train, test = digits_splits
    of_one = [i for i, label in enumerate(train.read_labels().tolist()) if label == 3]
    unlabelled = train.select(range(8))
    unlabelled.images = unlabelled.images.map(lambda row: {"label": -1})
    for options, images, message in (
        (dict(blocks=3), train, "blocks must be between 0 (linear probe) and the 2 of the model, not 3"),
        (dict(budget="2000"), train, "budget 2000 asks for 2000 images of each class, and class"),
        (dict(budget="3"), train, "batch_size must be at most the 30 training images, not 32"),
        (dict(batch_size=99), train.select(range(98)), "batch_size must be at most the 98 training images, not 99"),
        (dict(), train.select(of_one), "at least two classes"),
        (dict(), unlabelled, "have no label"),
    ):
        with pytest.raises(ValueError) as error:
            Finetune(**QUICK | options).run(extractor(checkpoint), images, test)
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_the_script_trains_and_keeps_in_one_process_and_in_two(checkpoint, tmp_path):
    """Its own example, and under torchrun with two processes."""
    root = Path(__file__).parents[2]
    save_classifier(
        MAEForPreTraining.from_pretrained(checkpoint), tmp_path, image_processor((32, 32), [0.3] * 3, [0.3] * 3)
    )
    run = [str(root / "training/finetune.py"), str(tmp_path), "--dataset", "digits", "--epochs", "2", "--flip", "0"]
    run += ["--use_cpu", "true", "--output_dir", str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": str(Path(sys.executable).parent)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
    for launch, extra in (([sys.executable], []), (torchrun, ["--ddp_backend", "gloo", "--blocks", "1"])):
        done = subprocess.run([*launch, *run, *extra], env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert "eval_top1_accuracy" in done.stdout and "The classifier is in" in done.stdout
        assert load_saved(tmp_path / "out").config.id2label[7] == "7"
        again = subprocess.run([*launch, *run, *extra], env=environment, capture_output=True, text=True, timeout=200)
        assert again.returncode and "output_dir must be a new folder" in again.stderr
        resume = "--resume_from_checkpoint", str(next((tmp_path / "out").glob("checkpoint-*")))
        with locked(tmp_path / "out", "output_dir"):  # as a run that goes on does
            second = [*launch, *run, *extra, *resume]
            done = subprocess.run(second, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode and f"is in use by process {os.getpid()}" in done.stderr
        shutil.rmtree(tmp_path / "out")


def test_where_a_classifier_cannot_or_must_not_go_is_told_before_training(checkpoint, digits_splits, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, message in (
        (f"{checkpoint}/", "output_dir must be a new folder, and .* holds something already"),
        (tmp_path, "output_dir must be a new folder, and .* holds something already"),
        (tmp_path / "file", "output_dir must be a new folder, and .* is a file"),
        (tmp_path / "file" / "below", "output_dir must be a folder that can be written"),
        ("/proc/classifier", "output_dir must be a folder that can be written"),
    ):
        with mock.patch("hf_mim.evaluation.finetune.make_trainer", side_effect=AssertionError("it trains")):
            with pytest.raises(ValueError, match=message) as error:
                Finetune(**QUICK, output_dir=str(folder)).run(extractor(checkpoint), *digits_splits)
        assert "\n" not in str(error.value)


def test_a_disk_that_fills_at_the_end_does_not_lose_what_was_measured(checkpoint, digits_splits, tmp_path):
    few = digits_splits[0].select(range(40))
    quick = Finetune(**QUICK | dict(epochs=1, batch_size=20, output_dir=str(tmp_path / "classifier")))
    full = mock.patch("hf_mim.evaluation.finetune.save_classifier", side_effect=SafetensorError("No space left"))
    with (
        full,
        pytest.raises(NotKept, match="the classifier was not saved: .*classifier cannot be written: No space") as e,
    ):
        measure(quick, extractor(checkpoint), (few, few), checkpoint)
    result = e.value.result
    assert result.value == pytest.approx(round(result.value * 40) / 40) and result.checkpoint == checkpoint.name
    assert result.settings["untrained"] is False and "output_dir" not in result.settings
    assert not list(tmp_path.iterdir())


def test_pickled_arguments_hold_no_token_and_no_folder_of_this_machine(tmp_path):
    args = FinetuningArguments(output_dir=str(tmp_path / "out"), hub_token="hf_SECRET0123456789", use_cpu=True)
    data = pickle.dumps(args)
    assert b"SECRET" not in data and str(tmp_path).encode() not in data
    assert pickle.loads(data).output_dir == "out" and args.output_dir == str(tmp_path / "out")
