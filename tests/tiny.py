"""Tiny models of every method. A method that joins the package's table joins each test that loops over `METHODS`."""

import dataclasses

import torch

from hf_mim import methods

METHODS = [method.name for method in methods.rows()]
# 36 patches, and whatever trains on them is done in milliseconds.
SIZES = dict(image_size=24, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)


def fields(method: str) -> set[str]:
    return {field.name for field in dataclasses.fields(methods.get(method).config_class)}


def only(method: str, **changes) -> dict:
    """Those changes that the method's config has a field for."""
    return {name: value for name, value in changes.items() if name in fields(method)}


def head_layers(method: str, count: int) -> dict:
    """The depth of what stands on the encoder, whatever its name: decoder, predictor."""
    return {name: count for name in fields(method) if name.endswith("_num_hidden_layers")}


def make_config(method: str, **changes):
    some = only(method, mask_ratio=0.75, patch_gap=1)
    return methods.get(method).config_class(**SIZES | head_layers(method, 1) | some | changes)


def make_model(method: str, kind: str = "pretraining", seed: int = 0, **changes):
    """A model with weights drawn from `seed`. kind: "pretraining", "encoder", "classifier" or "backbone"."""
    torch.manual_seed(seed)
    return getattr(methods.get(method), f"{kind}_class")(make_config(method, **changes))


def has_target(method: str) -> bool:
    """Whether a moving average of its encoder is the target."""
    return hasattr(methods.get(method).pretraining_class, "target_pairs")


def make_mean_model(method: str, **changes):
    """A model whose loss is the mean of its images' losses, so that batches may be cut into pieces."""
    return make_model(method, **only(method, similarity_weight=0.0, contrast_weight=0.0), **changes)
