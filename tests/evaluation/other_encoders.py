"""Small encoders of other libraries' kinds, and one of ours."""

import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    IJepaConfig,
    IJepaModel,
    ViTConfig,
    ViTModel,
)

from hf_mim.models.configuration_mae import MAEConfig
from hf_mim.models.modeling_mae import MAEModel

TINY = dict(hidden_size=32, num_hidden_layers=5, num_attention_heads=2, intermediate_size=64, image_size=32)
TINY |= dict(patch_size=8)
OTHERS = {
    "vit": (ViTModel, ViTConfig, 1),
    "dinov2": (Dinov2Model, Dinov2Config, 1),
    "dinov2 with registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, 5),
    "ijepa": (IJepaModel, IJepaConfig, 0),
    "mae": (MAEModel, MAEConfig, 1),
}


def build(name):
    torch.manual_seed(0)
    model_class, config_class, prefix = OTHERS[name]
    return model_class(config_class(**TINY)).eval(), prefix
