"""Files as the authors, transformers and timm write them become our checkpoints, with the authors' own numbers."""

import json

import pytest
import torch
from authors import classifier_state, read, save_jepa, save_latent_mim, save_mae, with_module
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    IJepaConfig,
    IJepaForImageClassification,
    IJepaModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

import hf_mim
from hf_mim.hub import key_tables
from hf_mim.hub.convert import Conversion, convert
from hf_mim.models.masking import gather

# What no file tells: the tiny fixtures have widths of no paper.
MAE_HEADS = {"num_attention_heads": 3, "decoder_num_attention_heads": 4}
JEPA_HEADS = {"num_attention_heads": 3}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def dest(tmp_path):
    return tmp_path / "converted"


def converted(source, dest, auto_class, method=None, **settings):
    Conversion.read(source, method, **settings).save(dest)
    return auto_class.from_pretrained(dest).eval()


def mae_heads():
    config = read("mae")[0]
    return {"num_attention_heads": config["heads"], "decoder_num_attention_heads": config["decoder_heads"]}


def test_mae_from_the_authors_file_gives_their_numbers(tmp_path, dest):
    _, t, weights = read("mae")
    file = save_mae(tmp_path / "checkpoint-399.pth", weights, norm_pix_loss=False, mask_ratio=0.75)
    model = converted(file, dest, AutoModelForPreTraining, **mae_heads())
    assert type(model) is hf_mim.MAEForPreTraining and model.config.norm_pix_loss is False  # as its args say
    output = model(t["pixel_values"], noise=t["noise"])
    theirs = t["pred"].gather(1, output.target_ids[..., None].expand(-1, -1, t["pred"].shape[-1]))
    close(output.predictions, theirs)
    close(output.loss, t["loss_norm_pix_false"].squeeze())
    close(AutoModel.from_pretrained(dest)(t["pixel_values"]).last_hidden_state, t["features_unmasked"])


def test_mae_without_decoder_becomes_the_encoder_alone(tmp_path, dest):
    config, t, weights = read("mae")
    encoder = {key: x for key, x in weights.items() if not key.startswith("decoder_") and key != "mask_token"}
    torch.save({"model": encoder}, tmp_path / "mae.pth")
    model = converted(tmp_path / "mae.pth", dest, AutoModel, num_attention_heads=config["heads"])
    assert type(model) is hf_mim.MAEModel
    close(model(t["pixel_values"]).last_hidden_state, t["features_unmasked"])


@pytest.mark.parametrize(
    ("kind", "logits"), [("mean", "logits_global_pool"), ("cls", "logits_cls"), ("linear_probe", "logits_linear_probe")]
)
def test_mae_classifiers_give_the_authors_logits(tmp_path, dest, kind, logits):
    config, t, _ = read("mae_classifiers")
    file = save_mae(tmp_path / "finetuned.pth", classifier_state(kind), global_pool=kind == "mean")
    model = converted(file, dest, AutoModelForImageClassification, num_attention_heads=config["heads"])
    assert type(model) is hf_mim.MAEForImageClassification and model.config.num_labels == 5
    close(model(t["pixel_values"]).logits, t[logits])


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("method", ["ijepa", "stop"])
def test_ijepa_and_stop_from_the_authors_files_give_their_numbers(tmp_path, dest, method, prefix):
    config, t, weights = read(method)
    file = save_jepa(tmp_path / "jepa-ep300.pth.tar", weights, prefix)
    model = converted(file, dest, AutoModelForPreTraining, method, num_attention_heads=config["heads"])
    assert type(model) is hf_mim.StopJepaForPreTraining
    output = model(t["pixel_values"], **{k: t[k] for k in ("context_ids", "target_ids", "position_noise") if k in t})
    close(output.predictions.transpose(0, 1).flatten(0, 1), t["predictions"])  # theirs is block-major
    close(output.loss, t["loss"].squeeze())
    close(AutoModel.from_pretrained(dest)(t["pixel_values"]).last_hidden_state, t["features_target"])
    assert model.config.position_noise_std == (0.25 if method == "stop" else 0)


def test_a_jepa_file_is_taken_for_ijepa_unless_method_says_stop(tmp_path):
    file = save_jepa(tmp_path / "jepa.pth.tar", read("stop")[2])
    assert convert(file, **JEPA_HEADS).config.use_mask_token
    assert not convert(file, "stop", **JEPA_HEADS).config.use_mask_token
    assert Conversion.read(file, "stop", **JEPA_HEADS).record["left_out"] == ["predictor.mask_token"]


def test_a_target_encoder_alone_becomes_the_encoder(tmp_path, dest):
    _, t, weights = read("ijepa")
    target = {key: x for key, x in weights.items() if key.startswith("target_encoder.")}
    model = converted(save_jepa(tmp_path / "target.pth", target), dest, AutoModel, **JEPA_HEADS)
    assert type(model) is hf_mim.StopJepaModel
    close(model(t["pixel_values"]).last_hidden_state, t["features_target"])


def test_latent_mim_from_the_authors_file_gives_their_numbers(tmp_path, dest):
    config, t, weights = read("latent_mim")
    file = save_latent_mim(tmp_path / "checkpoint_0800.pth", weights)
    settings = {"num_attention_heads": config["heads"], "decoder_num_attention_heads": config["decoder_heads"]}
    settings |= {"patch_gap": config["patch_gap"], "similarity_start": 0.6, "similarity_end": 0.6}
    model = converted(file, dest, AutoModelForPreTraining, **settings)
    assert type(model) is hf_mim.LatentMIMForPreTraining
    offsets = torch.stack([t["offset_rows"], t["offset_cols"]], dim=-1)
    output = model(t["pixel_values"], t["visible_ids"], t["masked_ids"], patch_offsets=offsets)
    close(output.predictions, t["predictions"][:, 1:])
    close(output.targets, t["target_out"][:, 1:])
    close(output.loss, t["loss"].squeeze())
    close(AutoModel.from_pretrained(dest)(t["image_nogap"]).last_hidden_state, t["features_after_norm"])


@pytest.mark.parametrize("depth", [1, 2])
def test_latent_mim_files_with_a_shorter_projector_convert_with_losses_computed_by_hand(tmp_path, depth):
    config, t, weights = read("latent_mim")
    for network in ("encoder", "target_encoder"):
        head = {key: weights.pop(key) for key in [*weights] if key.startswith(f"{network}.head.")}
        if depth == 2:  # the first and the last Linear of three
            kept = {"linear0": "linear0", "norm0": "norm0", "linear2": "linear1", "norm2": "norm1"}
        else:
            kept = {"norm2": "norm0"}
            weights[f"{network}.head.linear0.weight"] = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))
        for name, value in head.items():
            layer, _, parameter = name.removeprefix(f"{network}.head.").partition(".")
            if layer in kept:
                weights[f"{network}.head.{kept[layer]}.{parameter}"] = value
    settings = {"num_attention_heads": config["heads"], "decoder_num_attention_heads": config["decoder_heads"]}
    settings |= {"patch_gap": config["patch_gap"], "similarity_weight": 0}
    model = convert(save_latent_mim(tmp_path / "short.pth", weights), **settings)
    assert model.config.projector_num_layers == depth

    def project(network, tokens):
        for number in range(depth):
            linear, norm = f"{network}.head.linear{number}", f"{network}.head.norm{number}"
            tokens = tokens @ weights[f"{linear}.weight"].T
            centred = tokens - tokens.mean(-1, keepdim=True)
            variance = centred.square().mean(-1, keepdim=True)
            tokens = centred / (variance + 1e-5).sqrt() * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
            if number < depth - 1:
                tokens = tokens * (1 + torch.erf(tokens / 2**0.5)) / 2
        return tokens

    offsets = torch.stack([t["offset_rows"], t["offset_cols"]], dim=-1)
    with torch.no_grad():
        output = model(t["pixel_values"], t["visible_ids"], t["masked_ids"], patch_offsets=offsets)
        ids = {"context_ids": t["visible_ids"], "target_ids": t["masked_ids"]}
        patches, grid, _ = model.draw(t["pixel_values"], offsets, **ids)
        tokens = {
            network: getattr(model, network).encode(gather(patches, t[ids]), grid, t[ids])
            for network, ids in (("encoder", "visible_ids"), ("target_encoder", "masked_ids"))
        }
        predictions = model.decoder(project("encoder", tokens["encoder"]), grid, t["visible_ids"], t["masked_ids"])
    targets = project("target_encoder", tokens["target_encoder"])[:, 1:]
    close(output.targets, targets)
    losses = []
    for own, seen in zip(predictions.double(), targets.double(), strict=True):
        own = torch.nn.functional.normalize((own - own.mean(0)) / (own.std(0) + 1e-4), dim=-1)
        logits = own @ torch.nn.functional.normalize(seen, dim=-1).T / config["temperature"]
        losses += [2 * config["temperature"] * (row.logsumexp(0) - row[place]) for place, row in enumerate(logits)]
    close(output.loss, torch.stack(losses).mean().float())


FILES = {
    "mae": (save_mae, key_tables.MAE, MAE_HEADS),
    "ijepa": (save_jepa, key_tables.I_JEPA, JEPA_HEADS),
    "stop": (save_jepa, key_tables.STOP, JEPA_HEADS),
    "latent_mim": (save_latent_mim, key_tables.LATENT_MIM, MAE_HEADS),
}


@pytest.mark.parametrize("method", FILES)
def test_in_out_in_is_bit_exact(tmp_path, dest, method):
    save, table, heads = FILES[method]
    config, _, weights = read(method)
    save(tmp_path / "first.pth", weights)
    first = converted(tmp_path / "first.pth", dest, AutoModelForPreTraining, method, **heads)
    out = key_tables.to_theirs(first.state_dict(), table, (config["patch_size"],) * 2)
    same(out, {key: x for key, x in weights.items() if method != "stop" or key not in key_tables.STOP_UNREAD})
    save(tmp_path / "second.pth", out)
    same(convert(tmp_path / "second.pth", method, **heads).state_dict(), first.state_dict())


def fill(model):
    """Weights of size 1 everywhere: position tables made from a config are zero or small in places."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if "position" in name or "pos_embed" in name else 0.05
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


TINY = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
)
TINY_DECODER = dict(
    decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=64
)
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NOISE = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_vit_mae_of_transformers_gives_the_same_loss_and_features(tmp_path, dest, norm_pix_loss):
    theirs = fill(ViTMAEForPreTraining(ViTMAEConfig(**TINY, **TINY_DECODER, norm_pix_loss=norm_pix_loss)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = converted(tmp_path / "theirs", dest, AutoModelForPreTraining)
    assert type(ours) is hf_mim.MAEForPreTraining and ours.config.layer_norm_eps == 1e-12
    expected = theirs(PIXELS, noise=NOISE)
    torch.testing.assert_close(ours(PIXELS, noise=NOISE).loss, expected.loss, atol=0, rtol=1e-5)
    torch.testing.assert_close(
        ours.encoder(PIXELS, patch_ids=NOISE.argsort(dim=1)[:, :4]).last_hidden_state,
        theirs.vit(PIXELS, noise=NOISE).last_hidden_state,
        atol=1e-5,
        rtol=0,
    )


def test_vit_mae_without_decoder_becomes_the_encoder(tmp_path, dest):
    theirs = fill(ViTMAEModel(ViTMAEConfig(**TINY, mask_ratio=0.5)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = converted(tmp_path / "theirs", dest, AutoModel)
    features = ours(PIXELS, patch_ids=NOISE.argsort(dim=1)[:, :8]).last_hidden_state
    torch.testing.assert_close(features, theirs(PIXELS, noise=NOISE).last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sharded", [False, True])
def test_ijepa_of_transformers_gives_the_same_features(tmp_path, dest, sharded):
    theirs = fill(IJepaModel(IJepaConfig(**TINY)))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if sharded else "5GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == sharded
    ours = converted(tmp_path / "theirs", dest, AutoModel)
    assert type(ours) is hf_mim.StopJepaModel and ours.config.position_noise_std == 0
    features = ours(PIXELS).last_hidden_state
    torch.testing.assert_close(features, theirs(PIXELS).last_hidden_state, atol=1e-5, rtol=0)


def test_a_classifier_of_transformers_keeps_its_logits_and_class_names(tmp_path, dest):
    names = {0: "cat", 1: "dog", 2: "eel"}
    config = IJepaConfig(**TINY, id2label=names, label2id={name: i for i, name in names.items()})
    theirs = fill(IJepaForImageClassification(config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = converted(tmp_path / "theirs", dest, AutoModelForImageClassification)
    assert ours.config.id2label == names
    torch.testing.assert_close(ours(PIXELS).logits, theirs(PIXELS).logits, atol=1e-5, rtol=0)


def test_the_image_processor_of_a_folder_is_kept(tmp_path, dest):
    theirs = IJepaModel(IJepaConfig(**TINY))
    theirs.save_pretrained(tmp_path / "theirs")
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(processor))
    Conversion.read(tmp_path / "theirs").save(dest)
    processor = AutoImageProcessor.from_pretrained(dest)
    assert list(processor.image_mean) == [0.5] * 3 and list(processor.image_std) == [0.25] * 3


def timm_state(cls_token):
    """The names of timm's `vit_base_patch16_224.mae`, or of its I-JEPA models, which have no CLS token."""
    name = "mae" if cls_token else "ijepa"
    config, t, weights = read(name)
    if cls_token:
        weights = {key: x for key, x in weights.items() if "decoder" not in key and key != "mask_token"}
        return config, t["pixel_values"], t["features_unmasked"], weights
    prefix = "target_encoder."
    weights = {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)}
    return config, t["pixel_values"], t["features_target"], weights


@pytest.mark.parametrize("extension", ["pth", "bin", "safetensors"])
@pytest.mark.parametrize("cls_token", [True, False])
def test_a_state_dict_with_timms_names_becomes_the_encoder(tmp_path, dest, cls_token, extension):
    config, pixels, features, weights = timm_state(cls_token)
    save = save_file if extension == "safetensors" else torch.save
    save(weights, tmp_path / f"model.{extension}")
    model = converted(tmp_path, dest, AutoModel, num_attention_heads=config["heads"])  # the folder of that one file
    assert type(model) is (hf_mim.MAEModel if cls_token else hf_mim.StopJepaModel)
    close(model(pixels).last_hidden_state, features)


def test_a_vit_with_cls_can_be_taken_for_latent_mim(tmp_path):
    torch.save(with_module(timm_state(True)[3]), tmp_path / "vit.pth")
    assert type(convert(tmp_path / "vit.pth", "latent_mim", num_attention_heads=3)) is hf_mim.LatentMIMModel


def test_dest_has_processor_and_provenance_and_no_path(tmp_path, dest):
    file = save_mae(tmp_path / "mae.pth", read("mae")[2])
    Conversion.read(file, **mae_heads(), image_mean=[0.1, 0.2, 0.3], image_std=[1, 1, 1]).save(dest)
    assert sorted(path.name for path in dest.iterdir()) == [
        "config.json",
        "conversion.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    processor = AutoImageProcessor.from_pretrained(dest)
    side = read("mae")[0]["image_size"]
    assert dict(processor.size) == {"height": side, "width": side}
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    record = json.loads((dest / "conversion.json").read_text())
    assert record["source"] == "mae.pth" and len(record["sha256"]["mae.pth"]) == 64
    assert record["method"] == "mae" and record["model"] == "MAEForPreTraining"
    assert record["told"]["hidden_size"] == read("mae")[0]["hidden_size"]
    assert record["assumed"] == {"layer_norm_eps": 1e-6, "mask_ratio": 0.75, "norm_pix_loss": True}
    assert record["given"]["num_attention_heads"] == mae_heads()["num_attention_heads"]
    assert str(tmp_path) not in json.dumps(record) + (dest / "config.json").read_text()
