"""A tiny encoder and the embedded digits, for every protocol."""

import pytest
import torch

from hf_mim.data import digits
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.images import LabelledImages
from hf_mim.models.configuration_mae import MAEConfig
from hf_mim.models.modeling_mae import MAEModel


@pytest.fixture
def tiny_encoder() -> FrozenEncoder:
    """Untrained: 32 px, patches of 8 (a grid of 4×4), 3 channels, width 32, 2 layers, CLS."""
    torch.manual_seed(0)
    config = MAEConfig(
        image_size=32, patch_size=8, num_channels=3, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    return FrozenEncoder(MAEModel(config), mean=[0.5] * 3, std=[0.5] * 3, name="tiny")


@pytest.fixture(scope="session")
def digits_splits() -> tuple[LabelledImages, LabelledImages]:
    """(train, test) of the embedded digits."""
    train, test = digits()
    return LabelledImages(train, "digits, split train"), LabelledImages(test, "digits, split test")
