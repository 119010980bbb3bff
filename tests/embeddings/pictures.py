"""A tiny checkpoint, and pictures with structure."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_mim.data.processor import image_processor
from hf_mim.models.configuration_mae import MAEConfig
from hf_mim.models.modeling_mae import MAEForPreTraining


def tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """An untrained MAE: 32 px, patches of 8 (a grid of 4×4), width 64, 2 layers, CLS."""
    torch.manual_seed(seed)
    size = dict(image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    MAEForPreTraining(MAEConfig(**size, decoder_hidden_size=32, decoder_num_hidden_layers=1)).save_pretrained(folder)
    image_processor((32, 32), [0.5] * 3, [0.5] * 3).save_pretrained(folder)
    return folder


def scene(seed: int) -> Image.Image:
    """A smooth random picture of 80×80 pixels, so that a small shift changes it little, as a photo."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((80, 80), Image.Resampling.BICUBIC)


def scenes(folder: Path, count: int, classes: int = 2) -> Path:
    """`count` pictures in class folders, `a/000.png` and so on."""
    for number in range(count):
        path = folder / "abcdef"[number % classes] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(number).save(path)
    return folder
