"""A tiny encoder, a checkpoint and the embedded digits, for every protocol."""

from pathlib import Path

import pytest
import torch

from hf_mim.data import digits
from hf_mim.data.labelled import LabelledImages
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.models.configuration_mae import MAEConfig
from hf_mim.models.modeling_mae import MAEForPreTraining, MAEModel


@pytest.fixture
def tiny_encoder() -> FrozenEncoder:
    """Untrained: 32 px, patches of 8 (a grid of 4×4), 3 channels, width 32, 2 layers, CLS."""
    torch.manual_seed(0)
    config = MAEConfig(
        image_size=32, patch_size=8, num_channels=3, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    return FrozenEncoder(MAEModel(config), mean=[0.5] * 3, std=[0.5] * 3, name="tiny")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The folder of an untrained MAE: 32 px, patches of 8, 3 channels, width 64, 2 layers."""
    torch.manual_seed(0)
    size = dict(image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    folder = tmp_path_factory.mktemp("mae")
    MAEForPreTraining(MAEConfig(**size, decoder_hidden_size=32, decoder_num_hidden_layers=1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def digits_splits() -> tuple[LabelledImages, LabelledImages]:
    """(train, test) of the embedded digits."""
    train, test = digits()
    return LabelledImages(train, "digits, split train"), LabelledImages(test, "digits, split test")
