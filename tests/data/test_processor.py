"""The image processor of a checkpoint beside those of transformers, and what it refuses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hf_mim.data.processor import image_processor, transformers_processor


@pytest.mark.parametrize(("crop_fraction", "most"), [(1.0, 4), (0.8, 4), (None, 1)])
def test_the_processor_of_transformers_gives_the_pixels_of_ours(crop_fraction, most):
    """Theirs resizes and rounds before it crops, so a few grey levels apart; where its crop falls on whole pixels."""
    ours = image_processor((32, 32), [0.0] * 3, [1.0] * 3, crop_fraction=crop_fraction)
    noise = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise * 255, (80, 120), mode="bicubic").clamp(0, 255)[0].permute(1, 2, 0)
    image = Image.fromarray(smooth.to(torch.uint8).numpy())
    found, expected = (
        p(image, return_tensors="pt")["pixel_values"] * 255 for p in (transformers_processor(ours), ours)
    )
    assert (found - expected).abs().mean() < 1 and (found - expected).abs().max() <= most


def test_input_data_format_decides_how_an_array_is_read():
    processor = image_processor((2, 3), [0.0] * 3, [1.0] * 3)
    array = np.arange(18, dtype=np.uint8).reshape(3, 2, 3)  # its shape can be read in both ways
    with pytest.raises(ValueError, match=r"can be \[h, w, C\] or \[C, h, w\]"):
        processor(array)
    found = processor(array, input_data_format="channels_first", return_tensors="pt")["pixel_values"][0] * 255
    torch.testing.assert_close(found, torch.tensor(array).float(), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="input_data_format must be channels_first or channels_last, not 'chw'"):
        processor(array, input_data_format="chw")


def test_the_processor_of_transformers_for_native_windows_says_that_it_shrinks(caplog):
    theirs = transformers_processor(image_processor((32, 32), [0.0] * 3, [1.0] * 3, None, None, (64, 64)))
    assert "the checkpoint takes windows of 64 x 64 pixels, and images are shrunk there" in caplog.text
    assert theirs.size == {"shortest_edge": 32} and theirs.crop_size == {"height": 32, "width": 32}
