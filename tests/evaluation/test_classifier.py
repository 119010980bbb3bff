"""Rates by depth worked out by hand, what is frozen stays, and what a checkpoint has to hold."""

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from hf_mim import MAEConfig, MAEForPreTraining, StopJepaConfig, StopJepaForPreTraining
from hf_mim.data.mix import MixAugment
from hf_mim.evaluation.checkpoint import blocks_of
from hf_mim.evaluation.classifier import (
    load_classifier,
    parameter_groups,
)

TINY = dict(image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
CLASSES = [f"class {number}" for number in range(10)]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    torch.manual_seed(0)
    config = MAEConfig(**TINY | {"num_hidden_layers": 4}, decoder_hidden_size=32, decoder_num_hidden_layers=1)
    folder = tmp_path_factory.mktemp("deep")
    MAEForPreTraining(config).save_pretrained(folder)
    return folder


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
        blocks_of(torch.nn.Linear(2, 2))
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


@pytest.mark.parametrize("untrained", [False, True])
def test_a_checkpoint_in_half_precision_is_fine_tuned_in_float32(checkpoint, tmp_path, untrained):
    MAEForPreTraining.from_pretrained(checkpoint).bfloat16().save_pretrained(tmp_path)
    model = load_classifier(tmp_path, CLASSES, untrained=untrained)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} == {model.config.dtype}


def test_stop_jepa_is_fine_tuned_from_its_target_encoder(tmp_path):
    pretrained = StopJepaForPreTraining(StopJepaConfig(**TINY, predictor_num_hidden_layers=1))
    with torch.no_grad():
        pretrained.target_encoder.norm.bias.fill_(3.0)
    pretrained.save_pretrained(tmp_path)
    assert load_classifier(tmp_path, CLASSES).base_model.norm.bias.eq(3).all()


def test_a_checkpoint_without_an_encoder_is_refused_in_one_line(tmp_path):
    ViTMAEModel(ViTMAEConfig(**TINY)).save_pretrained(tmp_path / "vit_mae")  # transformers has no classifier of it
    ResNetConfig().save_pretrained(tmp_path / "no_weights")
    half = ViTModel(ViTConfig(**TINY, intermediate_size=64))
    kept = {name: tensor for name, tensor in half.state_dict().items() if "layers.1" not in name}
    half.save_pretrained(tmp_path / "half", state_dict=kept)
    for name, message in (
        ("vit_mae", "holds no encoder"),
        ("no_weights", "holds no encoder"),
        ("nothing", "checkpoint: there is no folder "),
        ("half", "lacks 16 weights of its encoder, such as vit.layers.1."),
    ):
        with pytest.raises(ValueError) as error:
            load_classifier(tmp_path / name, CLASSES)
        assert message in str(error.value) and "\n" not in str(error.value)
