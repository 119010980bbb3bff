"""A checkpoint that is small enough to be measured in no time."""

import shutil

import pytest
import torch

from hf_mim.data.processor import image_processor
from hf_mim.models.configuration_mae import MAEConfig
from hf_mim.models.modeling_mae import MAEForPreTraining


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("original")
    sizes = dict(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    MAEForPreTraining(MAEConfig(**sizes)).save_pretrained(folder)
    image_processor((16, 16), [0.5] * 3, [0.5] * 3).save_pretrained(folder)
    return folder


@pytest.fixture
def run(original, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(original, tmp_path / "run")
