"""Small models, and what a pass of one draws and gives."""

import torch
from tiny import head_layers, make_model, only

from hf_mim.models.positions import PositionEmbeddings

# A grid of 8×8 patches.
SIZES = dict(image_size=32, hidden_size=48, num_attention_heads=3)


def make(method, kind="pretraining", **changes):
    return make_model(method, kind, **SIZES | head_layers(method, 2) | only(method, patch_gap=2) | changes)


def head(model):
    """The one network beside the encoders that has layers: a decoder or predictor."""
    (network,) = (m for name, m in model.named_children() if "encoder" not in name and hasattr(m, "layers"))
    return network


def drawn(model, images, seed=1):
    torch.manual_seed(seed)
    return model(images)


def given_back(output):
    """What a pass has drawn, to be given to another."""
    given = {"loss", "predictions", "targets", "metrics", "hidden_states", "attentions"}
    return {name: value for name, value in output.items() if name not in given}


def tables(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PositionEmbeddings)}


def gradients(model, images):
    model.zero_grad()
    loss = drawn(model.train(), images).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
