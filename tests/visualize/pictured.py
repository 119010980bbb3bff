"""Tiny models to look at, and images to show them."""

import numpy as np
import torch
from tiny import make_model as tiny_model

from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.visualize import Viewer


def viewer(method="mae", image_size=(16, 24), value_range=None, bands=None, **changes) -> Viewer:
    """Its model has patches of 4 x 4 pixels, 4 rows and 6 columns of them."""
    model = tiny_model(method, image_size=list(image_size), **changes).eval()
    channels = model.config.num_channels
    encoder = FrozenEncoder(model.base_model, [0.5] * channels, [0.25] * channels, name="tiny", value_range=value_range)
    return Viewer(encoder, model, bands)


def images(count=2, channels=3, size=(16, 24), dtype=np.uint8, top=256, seed=0) -> list[np.ndarray]:
    """Smooth images, which a stretch of their values does not hide."""
    random = np.random.default_rng(seed)
    grid = torch.from_numpy(random.random((count, channels, 4, 6)))
    smooth = torch.nn.functional.interpolate(grid, size, mode="bicubic").clamp(0, 1)
    found = (smooth.permute(0, 2, 3, 1).numpy() * (top - 1)).astype(dtype)
    return [image[..., 0] if channels == 1 else image for image in found]


def drawn(monkeypatch, module) -> list:
    """The rows of each picture that the module draws from now on, by label."""
    found, draw = [], module.draw_rows

    def spy(title, rows, *args, **kwargs):
        found.append({row.label: np.stack(row.pictures) for row in rows})
        return draw(title, rows, *args, **kwargs)

    monkeypatch.setattr(module, "draw_rows", spy)
    return found
