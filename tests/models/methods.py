"""A small model of each method, for the tests of all of them."""

import torch

import hf_mim
from hf_mim.models.positions import PositionEmbeddings

SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3)


METHODS = {
    "mae": (hf_mim.MAEConfig, hf_mim.MAEForPreTraining, dict(decoder_num_hidden_layers=2)),
    "latent_mim": (hf_mim.LatentMIMConfig, hf_mim.LatentMIMForPreTraining, dict(patch_gap=2, mask_ratio=0.8)),
    "stop_jepa": (
        hf_mim.StopJepaConfig,
        hf_mim.StopJepaForPreTraining,
        dict(predictor_hidden_size=24, predictor_num_hidden_layers=2),
    ),
}


def make_config(method, image_size=32, channels=3, cls_token=None, **changes):
    config_class, _, sizes = METHODS[method]
    cls_token = method != "stop_jepa" if cls_token is None else cls_token
    return config_class(
        **dict(image_size=image_size, patch_size=4, num_channels=channels, use_cls_token=cls_token)
        | SIZES
        | sizes
        | changes
    )


def drawn(model, images, seed=1):
    torch.manual_seed(seed)
    return model(images)


def tables(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PositionEmbeddings)}


def gradients(model, images):
    model.zero_grad()
    loss = drawn(model.train(), images).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
