"""Checkpoints of every kind, each written in every form of export that can hold it."""

import importlib.util
from functools import partial

import torch
from tiny import head_layers, make_model

from hf_mim.data.processor import image_processor
from hf_mim.hub.export import export

SIZES = dict(image_size=32, patch_size=8, hidden_size=48, num_attention_heads=3)
OBLONG = dict(image_size=(24, 40), num_channels=4, intermediate_size=100, hidden_act="gelu_pytorch_tanh")


def make(method, kind="pretraining", **options):
    return make_model(method, kind, **SIZES | head_layers(method, 2) | options)


mae, latent_mim, stop_jepa, sym_mim, interactive_mim = (
    partial(make, method) for method in ("mae", "latent_mim", "stop_jepa", "sym_mim", "interactive_mim")
)


# name: (the model, what transformers has for it)
CASES = {
    "mae": (lambda: mae(), "ViTMAEForPreTraining"),
    "mae-oblong": (lambda: mae(**OBLONG), "ViTModel"),
    "mae-oblong-patches": (lambda: mae(patch_size=(8, 4), pooling="cls"), "ViTModel"),
    "mae-without-cls": (lambda: mae(use_cls_token=False), "IJepaModel"),
    "mae-encoder": (lambda: mae("encoder"), "ViTModel"),
    "mae-cross-decoder": (lambda: mae(decoder_attention="cross"), "ViTModel"),
    "mae-registers": (lambda: mae(num_register_tokens=3), None),
    "latent_mim": (lambda: latent_mim(), "ViTModel"),
    "latent_mim-oblong": (lambda: latent_mim(**OBLONG), "ViTModel"),
    "stop_jepa": (lambda: stop_jepa(), "IJepaModel"),
    "stop_jepa-oblong": (lambda: stop_jepa(**OBLONG, position_embedding="learned"), "IJepaModel"),
    "sym_mim": (lambda: sym_mim(), "ViTModel"),
    "interactive_mim": (
        lambda: interactive_mim(num_channels=4, modalities={"rgb": 3, "ir": 1}, modalities_seen=["rgb"]),
        "ViTModel",
    ),
    "cls-classifier": (
        lambda: mae("classifier", pooling="cls", num_labels=5),
        "ViTForImageClassification",
    ),
    "linear-probe": (
        lambda: mae("classifier", pooling="cls", head_batch_norm=True, num_labels=5),
        "ViTForImageClassification",
    ),
    "mean-classifier": (lambda: stop_jepa("classifier", num_labels=5), "IJepaForImageClassification"),
    "fine-tuned": (lambda: latent_mim("classifier", pool_before_norm=True, num_labels=5), None),
}
# Forms that take long to load, or to write, have one case or two of each method.
ONLY = {
    "onnx": ("linear-probe", "stop_jepa-oblong"),  # with and without CLS
    "remote-code": ("mae", "mae-oblong", "latent_mim", "stop_jepa-oblong", "sym_mim", "interactive_mim", "fine-tuned"),
}
INSTALLED = {
    "onnx": all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    "real timm": all(importlib.util.find_spec(name) for name in ("timm", "torchvision")),
}


def filled(model, seed=0):
    """Every tensor random, so that none can be left out or taken for another unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.ndim:
            tensor.data = tensor + 0.1 * torch.rand(tensor.shape, generator=generator)
    return model.eval()


def forms(name):
    all_forms = ("transformers", "timm", "real timm", "remote-code", "onnx")
    possible = [form for form in all_forms if form != "transformers" or CASES[name][1]]
    return [form for form in possible if name in ONLY.get(form, CASES)]


def write_exports(models, root):
    for name, model in models.items():
        model.save_pretrained(root / name / "ours")
        channels = model.config.num_channels
        processor = image_processor(model.config.image_height_width, [0.4] * channels, [0.3] * channels)
        processor.save_pretrained(root / name / "ours")
        for form in forms(name):
            if INSTALLED.get(form, True) and form != "real timm":
                export(root / name / "ours", root / name / form, form)
