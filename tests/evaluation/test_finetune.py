"""Rates by depth worked out by hand, what is frozen stays, and short runs on the embedded digits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ResNetConfig,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    pipeline,
)

from hf_mim import MAEConfig, MAEForPreTraining, StopJepaConfig, StopJepaForPreTraining
from hf_mim.callbacks import DatasetEpoch, RankSeeds
from hf_mim.data import CenterCrop
from hf_mim.data.crop import crop_rng, load_crop
from hf_mim.data.decode import open_image
from hf_mim.data.mix import MixAugment
from hf_mim.evaluation.classifier import (
    find_layers,
    load_classifier,
    parameter_groups,
    save_classifier,
)
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.finetune import Finetune, FinetuningArguments, training_images
from hf_mim.evaluation.images import LabelledImages

TINY = dict(image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
CLASSES = [f"class {number}" for number in range(10)]
# No augmentation and a rate that a tiny untrained model can do with.
QUICK = dict(epochs=4, batch_size=32, base_lr=16e-3, layer_decay=0.9, drop_path=0.0, mixup=0, cutmix=0, random_erase=0)
QUICK |= dict(randaugment_magnitude=0, flip=0, crop_scale=(0.7, 1.0), label_smoothing=0)


def save_mae(folder, **overrides) -> Path:
    torch.manual_seed(0)
    config = MAEConfig(**TINY | overrides, decoder_hidden_size=32, decoder_num_hidden_layers=1)
    MAEForPreTraining(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_mae(tmp_path_factory.mktemp("mae"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return save_mae(tmp_path_factory.mktemp("deep"), num_hidden_layers=4)


def extractor(checkpoint):
    encoder = FrozenEncoder.load(checkpoint, device="cpu", mean=[0.3] * 3, std=[0.3] * 3)
    return FeatureExtractor(encoder, progress=False)


def rates(model, layer_decay, weight_decay=0.05):
    """Name → (learning rate, weight decay) for a peak of 1."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1.0, weight_decay, layer_decay)
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_rates_by_depth_and_decay_of_matrices_alone(deep):
    """Four blocks: the head is at depth 5 with the peak, each step down costs one factor."""
    found = rates(load_classifier(deep, CLASSES), layer_decay=0.5)
    assert found["classifier.linear.weight"] == (1, 0.05)
    assert found["classifier.linear.bias"] == (1, 0)
    assert found["encoder.norm.weight"] == (1, 0)
    assert found["encoder.layers.3.mlp.fc1.weight"] == (0.5, 0.05)
    assert found["encoder.layers.3.norm1.bias"] == (0.5, 0)
    assert found["encoder.layers.2.attention.qkv.weight"] == (0.25, 0.05)
    assert found["encoder.layers.1.attention.qkv.bias"] == (0.125, 0)
    assert found["encoder.layers.0.mlp.fc2.weight"] == (0.0625, 0.05)
    assert found["encoder.embeddings.projection.weight"] == (0.03125, 0.05)
    assert found["encoder.embeddings.projection.bias"] == (0.03125, 0)
    assert found["encoder.embeddings.cls_token"] == (0.03125, 0)
    assert len(found) == len(list(load_classifier(deep, CLASSES).parameters()))


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_rates_of_transformers_models(family):
    if family == "vit":
        model = ViTForImageClassification(ViTConfig(**TINY, intermediate_size=64, num_labels=10))
        block, norm = "vit.layers.{}.mlp.fc1.weight", "vit.layernorm.weight"
    else:
        model = Dinov2ForImageClassification(Dinov2Config(**TINY, num_labels=10))
        block, norm = "dinov2.encoder.layer.{}.mlp.fc1.weight", "dinov2.layernorm.weight"
    found = rates(model, layer_decay=0.1)
    assert found["classifier.weight"] == (1, 0.05) and found[norm] == (1, 0)
    assert [found[block.format(i)][0] for i in (0, 1)] == pytest.approx([0.01, 0.1])
    for name in ("cls_token", "position_embeddings", "patch_embeddings.projection.weight"):
        assert found[f"{family}.embeddings.{name}"][0] == pytest.approx(0.001)
    assert found[f"{family}.embeddings.position_embeddings"][1] == 0


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(ValueError, match="Linear has no list of layers"):
        find_layers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layer_decay"):
        parameter_groups(torch.nn.Linear(2, 2), 1.0, 0.05, layer_decay=0)


def one_step(model, seed=0):
    """Names of the parameters that a step of SGD changed."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(seed)
    augment = MixAugment([0.5] * 3, [0.5] * 3, cutmix=0)
    augment.attach(model.train())
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    torch.nn.init.normal_(model.classifier.linear.weight)  # at MAE's 2e-5 hardly any gradient passes
    before["classifier.linear.weight"] = model.classifier.linear.weight.detach().clone()
    augment.loss(model(pixel_values=images), torch.arange(8)).backward()
    torch.optim.SGD(parameter_groups(model, 1.0, 0.05, 0.9)).step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_only_the_last_blocks_and_what_follows_them_change(deep, blocks):
    model = load_classifier(deep, CLASSES, drop_path=0.2, blocks=blocks)
    trained = {"classifier.linear.weight", "classifier.linear.bias"}
    if blocks:
        trained |= {"encoder.norm.weight", "encoder.norm.bias"}
    for name in dict(model.named_parameters()):
        trained |= {name for i in range(4 - blocks, 4) if name.startswith(f"encoder.layers.{i}.")}
    assert one_step(model) == trained
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


@pytest.mark.parametrize("blocks", [None, 4])
def test_all_blocks_are_full_fine_tuning(deep, blocks):
    model = load_classifier(deep, CLASSES, blocks=blocks)
    assert one_step(model) == set(dict(model.named_parameters()))


def test_frozen_blocks_drop_no_path_in_train_mode(deep):
    """Two of four blocks frozen: what leaves them is what leaves them in eval mode; of the others it is not."""
    model, outputs = load_classifier(deep, CLASSES, drop_path=0.9, blocks=2), {}
    for i, layer in enumerate(model.encoder.layers):
        layer.register_forward_hook(lambda module, args, output, i=i: outputs.setdefault(i, []).append(output))
    images = torch.randn(16, 3, 32, 32)
    model.train()(images), model.eval()(images)
    for i in range(4):
        assert torch.equal(*outputs[i]) == (i < 2)


def test_a_linear_probe_pools_after_the_norm_through_batch_norm(deep):
    assert load_classifier(deep, CLASSES).config.pool_before_norm
    config = load_classifier(deep, CLASSES, blocks=0).config
    assert config.head_batch_norm and not config.pool_before_norm


def test_the_encoder_is_the_checkpoints_and_the_classifier_new(checkpoint, tmp_path):
    model, source = load_classifier(checkpoint, CLASSES), MAEForPreTraining.from_pretrained(checkpoint).encoder
    for name, parameter in source.named_parameters():
        assert torch.equal(parameter, dict(model.encoder.named_parameters())[name])
    torch.nn.init.ones_(model.classifier.linear.weight)
    model.save_pretrained(tmp_path)
    for classes in (CLASSES, CLASSES[:4]):  # of as many classes, and of others
        again = load_classifier(tmp_path, classes)
        assert again.classifier.linear.weight.abs().max() < 1e-3 and len(again.classifier.linear.weight) == len(classes)


def test_stop_jepa_is_fine_tuned_from_its_target_encoder(tmp_path):
    pretrained = StopJepaForPreTraining(StopJepaConfig(**TINY, predictor_num_hidden_layers=1))
    with torch.no_grad():
        pretrained.target_encoder.norm.bias.fill_(3.0)
    pretrained.save_pretrained(tmp_path)
    assert load_classifier(tmp_path, CLASSES).base_model.norm.bias.eq(3).all()


def test_learning_rate_follows_the_batch_and_warm_up_is_five_epochs_of_a_long_run(tmp_path):
    args = FinetuningArguments(output_dir=str(tmp_path), per_device_train_batch_size=64, gradient_accumulation_steps=8)
    assert args.learning_rate == pytest.approx(5e-4 * 512 / 256)
    assert args.get_warmup_steps(1000) == 50 and args.n_gpu <= 1
    args = FinetuningArguments(output_dir=str(tmp_path), num_train_epochs=20, learning_rate=1.0)
    assert args.learning_rate == 1 and args.get_warmup_steps(1000) == 100


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
    augment.attach(model)
    groups = parameter_groups(model, args.learning_rate, args.weight_decay, args.layer_decay)
    # AdamW would not notice a loss that is too large.
    optimizer = torch.optim.AdamW if augmented else torch.optim.SGD, {"params": groups, "lr": args.learning_rate}
    Trainer(
        model,
        args,
        train_dataset=data,
        compute_loss_func=augment.loss,
        optimizer_cls_and_kwargs=optimizer,
        callbacks=[DatasetEpoch(data), RankSeeds()],
    ).train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
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
    sealed = Sealed(test.images, tmp_path)
    result = Finetune(**QUICK | dict(output_dir=str(tmp_path), epochs=3)).run(extractor(checkpoint), train, sealed)
    classifier = pipeline("image-classification", model=str(tmp_path), device="cpu")
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
    result = Finetune(**QUICK | dict(output_dir=str(tmp_path), epochs=2)).run(extract, few, few)
    model = load_saved(tmp_path)
    pixels = [load_crop(x, CenterCrop(0.75), (32, 32), 3, crop_rng(0, 0, 0)) for x in few.images["image"]]
    with torch.no_grad():
        logits = model((torch.stack(pixels).float() / 255 - 0.3) / 0.3).logits
    assert (logits.argmax(1) == few.read_labels()).double().mean().item() == pytest.approx(result.value)


def load_saved(folder):
    return AutoModelForImageClassification.from_pretrained(folder).eval()


def test_bad_options_are_named_in_one_line():
    for bad in (
        dict(layer_decay=0), dict(layer_decay=1.5), dict(base_lr=0), dict(epochs=0), dict(warmup_epochs=200),
        dict(batch_size=0), dict(blocks=-1), dict(mixup=-1), dict(label_smoothing=1), dict(random_erase=2),
        dict(randaugment_magnitude=11), dict(randaugment_std=-1), dict(crop_scale=(0.5, 0.2)), dict(flip=2),
        dict(weight_decay=-1), dict(drop_path=1),
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
        (dict(batch_size=99), train.select(range(98)), "batch_size must be at most the 98 training images, not 99"),
        (dict(), train.select(of_one), "at least two classes"),
        (dict(), unlabelled, "have no label"),
    ):
        with pytest.raises(ValueError) as error:
            Finetune(**QUICK | options).run(extractor(checkpoint), images, test)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_without_an_encoder_is_refused_in_one_line(tmp_path):
    ViTMAEModel(ViTMAEConfig(**TINY)).save_pretrained(tmp_path / "vit_mae")  # transformers has no classifier of it
    ResNetConfig().save_pretrained(tmp_path / "no_weights")
    half = ViTModel(ViTConfig(**TINY, intermediate_size=64))
    kept = {name: tensor for name, tensor in half.state_dict().items() if "layers.1" not in name}
    half.save_pretrained(tmp_path / "half", state_dict=kept)
    for name, message in (
        ("vit_mae", "holds no encoder"),
        ("no_weights", "holds no encoder"),
        ("nothing", "holds no encoder"),
        ("half", "lacks 16 weights of its encoder, such as vit.layers.1."),
    ):
        with pytest.raises(ValueError) as error:
            load_classifier(tmp_path / name, CLASSES)
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_the_script_trains_and_keeps_in_one_process_and_in_two(checkpoint, tmp_path):
    """Its own example, and under torchrun with two processes."""
    root = Path(__file__).parents[2]
    save_classifier(MAEForPreTraining.from_pretrained(checkpoint), tmp_path, (32, 32), [0.3] * 3, [0.3] * 3)
    run = [str(root / "training/finetune.py"), str(tmp_path), "--dataset", "digits", "--epochs", "2", "--flip", "0"]
    run += ["--use_cpu", "true", "--output_dir", str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": str(Path(sys.executable).parent)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
    for launch, extra in (([sys.executable], []), (torchrun, ["--ddp_backend", "gloo", "--blocks", "1"])):
        done = subprocess.run([*launch, *run, *extra], env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert "eval_top1_accuracy" in done.stdout and "The classifier is in" in done.stdout
        assert load_saved(tmp_path / "out").config.id2label[7] == "7"
