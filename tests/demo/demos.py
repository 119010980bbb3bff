"""Demos of tiny models, and images to upload."""

import numpy as np
import torch
from PIL import Image
from tiny import make_model

from hf_mim.demo.actions import Demo
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.visualize import Viewer


def tiny_demo(method="mae", value_range=None, bands=None, search=None, task=True, **changes) -> Demo:
    """Its model has patches of 4 × 4 pixels, 4 rows and 6 columns of them."""
    model = make_model(method, image_size=[16, 24], **changes).eval()
    channels = model.config.num_channels
    encoder = FrozenEncoder(model.base_model, [0.5] * channels, [0.25] * channels, name="tiny", value_range=value_range)
    return Demo(Viewer(encoder, model if task else None, bands), search=search)


def smooth(channels=3, size=(32, 48), seed=0) -> np.ndarray:
    """An image with values in 0..1, [h, w, channels]."""
    grid = torch.from_numpy(np.random.default_rng(seed).random((1, channels, 4, 6)))
    return torch.nn.functional.interpolate(grid, size, mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0).numpy()


def photo(folder, name="photo.png", seed=0) -> str:
    Image.fromarray((255 * smooth(seed=seed)).astype(np.uint8)).save(folder / name)
    return str(folder / name)


def save_png(path, size=(20, 20), mode="RGB"):
    Image.new(mode, size).save(path)


def bad_uploads(folder) -> dict[str, str]:
    """File name → a part of the message about it."""
    (folder / "text.png").write_text("no image")
    (folder / "empty.jpg").write_bytes(b"")
    save_png(folder / "huge.png", (10_000, 10_000), "1")
    np.save(folder / "bands.npy", np.zeros((20, 20, 5), np.uint8))
    Image.effect_noise((60, 60), 90).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:700])
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return {
        "text.png": "text.png: not an image",
        "empty.jpg": "empty.jpg: not an image",
        "huge.png": "huge.png: 10000 x 10000 pixels are more than",
        "bands.npy": "bands.npy: num_channels=3, but the image has 5",
        "cut.jpg": "cut.jpg: ",
        "moving.gif": "The file holds 3 pictures. The first is taken.",
    }
