"""A given encoder is the target, and never moves (SALT, arXiv 2509.24317)."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_config, make_model
from tiny_runs import AtEachStep, Images, arguments
from transformers import AutoModel, AutoModelForPreTraining, IJepaModel

from hf_mim import methods
from hf_mim.hub.export import export
from hf_mim.hub.start import Source, fill_encoder
from hf_mim.models.target_encoder import ENCODER_FIELDS, online_encoder
from hf_mim.pretraining.recipe import Recipe
from hf_mim.pretraining.run import Pretraining
from hf_mim.pretraining.trainer import MIMTrainer

WITH_TARGET = ["latent_mim", "stop_jepa"]
# The target has another width and depth, and a CLS token.
OTHER = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}


def make_frozen(method, **changes):
    """(a model with a frozen target, the MAE whose encoder that is)."""
    teacher = make_model("mae", seed=5, **OTHER)
    sizes = {name: getattr(teacher.config, name) for name in ENCODER_FIELDS}
    torch.manual_seed(0)
    model = methods.get(method).pretraining_class(make_config(method, target_config=sizes, **changes))
    fill_encoder(model.target_encoder, teacher.base_model)
    return model, teacher


def loss(model):
    images = torch.randn(3, 3, *model.config.training_size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.parametrize("method", WITH_TARGET)
def test_the_targets_are_the_standardised_tokens_of_the_given_encoder(method):
    model, teacher = make_frozen(
        method, **({"patch_gap": 0} if method == "latent_mim" else {"position_noise_std": 0.0})
    )
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        output = model(images)
        ids = output.target_ids if method == "latent_mim" else None
        tokens = teacher.encoder(images, patch_ids=ids).last_hidden_state[:, 1:]
        if ids is None:
            ids = output.target_ids.flatten(1)
            tokens = tokens.gather(1, ids[..., None].expand(-1, -1, 48))
    expected = torch.nn.functional.layer_norm(tokens, (48,))
    torch.testing.assert_close(output.targets.reshape(expected.shape), expected, atol=1e-4, rtol=1e-4)
    assert output.predictions.shape == output.targets.shape


@pytest.mark.slow
@pytest.mark.parametrize("method", WITH_TARGET)
def test_a_frozen_target_never_moves_and_the_loss_falls(method, tmp_path):
    model, teacher = make_frozen(method)
    before = {name: x.clone() for name, x in teacher.encoder.state_dict().items()}
    student = {name: x.clone() for name, x in model.encoder.state_dict().items()}
    first, modes = loss(model).loss, []
    args = arguments(tmp_path, max_steps=30, warmup_steps=2)
    watch = AtEachStep(lambda state, optimizer: modes.append((model.training, model.target_encoder.training)))
    MIMTrainer(model, args, Images(model, length=4), callbacks=[watch]).train()
    assert set(modes) == {(True, False)}
    assert all(torch.equal(x, before[name]) for name, x in model.target_encoder.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.target_encoder.parameters())
    assert any(not torch.equal(x, student[name]) for name, x in model.encoder.state_dict().items())
    assert loss(model).loss < 0.97 * first


@pytest.mark.parametrize("method", WITH_TARGET)
def test_a_checkpoint_holds_the_target_and_auto_model_loads_the_encoder_that_was_trained(method, tmp_path):
    model, _ = make_frozen(method)
    model.save_pretrained(tmp_path)
    again, encoder = AutoModelForPreTraining.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loss(again).loss, loss(model).loss)
    assert not any(parameter.requires_grad for parameter in again.target_encoder.parameters())
    trained = model.encoder.state_dict()
    for one in (encoder, again.base_model, online_encoder(again)):
        assert all(torch.equal(x, trained[name]) for name, x in one.state_dict().items())
    encoder.save_pretrained(tmp_path / "encoder")
    alone = AutoModel.from_pretrained(tmp_path / "encoder").state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in alone.items())
    classifier = methods.get(method).classifier_class.from_pretrained(tmp_path)
    assert all(torch.equal(x, trained[name]) for name, x in classifier.base_model.state_dict().items())


def test_the_encoder_that_was_trained_is_exported_and_the_frozen_one_is_not(tmp_path):
    model, _ = make_frozen("stop_jepa")
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "theirs", "transformers")
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        theirs = IJepaModel.from_pretrained(tmp_path / "theirs").eval()(images).last_hidden_state
        torch.testing.assert_close(theirs, model.eval().encoder(images).last_hidden_state, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="^encoder must be online: the target is frozen"):
        export(tmp_path / "ours", tmp_path / "target", "transformers", encoder="target")


def test_a_run_with_a_frozen_target_is_continued_with_it(tmp_path):
    model, _ = make_frozen("stop_jepa")
    model.save_pretrained(tmp_path)
    source = Source.read(str(tmp_path))
    other = methods.get("stop_jepa").pretraining_class(
        make_config("stop_jepa", **source.settings("stop_jepa") | {"image_size": 32})
    )
    assert source.fill(other).endswith("all weights are taken over; grid 6×6 → 8×8")
    assert online_encoder(source.model).config.target_config == other.config.target_config


# ---- from the command line to the run folder

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "use_cpu": True, "knn": False}
TINY |= {"max_steps": 3, "per_device_train_batch_size": 8, "disable_tqdm": True, "save_steps": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    make_model("mae", seed=5, num_channels=1, **OTHER).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", [pytest.param("latent_mim", marks=pytest.mark.slow), "stop_jepa"])
def test_a_run_takes_target_from_a_checkpoint_and_resumes_to_the_bit(method, teacher, tmp_path, capsys):
    given = TINY | {"method": method, "target_from": teacher, "output_dir": str(tmp_path / "run")}
    Pretraining(Recipe.read(None, given))()
    assert "its encoder is the target, and never moves" in capsys.readouterr().out
    weights, target = load_file(tmp_path / "run" / "model.safetensors"), load_file(f"{teacher}/model.safetensors")
    kept = {name: x for name, x in weights.items() if name.startswith("target_encoder.")}
    assert kept and all(torch.equal(x, target[name.removeprefix("target_")]) for name, x in kept.items())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["target_config"]["hidden_size"] == 48 and config["hidden_size"] == 32
    if method == "latent_mim":
        assert config["similarity_weight"] == 0
    assert "| Frozen target | " in (tmp_path / "run" / "README.md").read_text()
    (tmp_path / "run" / "checkpoint-3").rename(tmp_path / "last")
    Pretraining(Recipe.read(None, {"resume": True, "output_dir": str(tmp_path / "run")}))()
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(x, again[name]) for name, x in weights.items())


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"method": "mae"},
            "target_from is for methods that predict a target network .latent_mim, stop_jepa, ijepa., not for mae",
        ),
        (
            {"method": "stop_jepa", "image_size": 32, "patch_size": 8},
            "target_from .* sees 6×6 patches of 4×4 pixels, 1 channel, ",
        ),
        ({"method": "stop_jepa", "momentum_start": 0.9}, "momentum_start does nothing with target_from"),
        ({"method": "stop_jepa", "resume": True}, "target_from cannot be given with resume"),
    ],
)
def test_a_target_that_does_not_fit_is_refused_before_the_run(settings, line, teacher, tmp_path):
    with pytest.raises(ValueError, match=f"^{line}"):
        Pretraining(Recipe.read(None, TINY | {"target_from": teacher, "output_dir": str(tmp_path / "run")} | settings))
    assert not (tmp_path / "run").exists()
