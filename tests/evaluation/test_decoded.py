"""Images are decoded once for several encoders and measurements, and the features stay the same."""

import io
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_mim.data import RandomCrop
from hf_mim.data.crop import CenterCrop, crop_rng, load_crop
from hf_mim.data.images import Images
from hf_mim.evaluation.decoded import KeptCrops, SharedExtractor
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.raw_pixels import RawPixels

from tiny import make_model  # isort: skip


@pytest.fixture
def opened(monkeypatch):
    """How often each encoded image was opened."""
    from hf_mim.data import decode

    counts, open_bytes = Counter(), decode._open_bytes
    monkeypatch.setattr(decode, "_open_bytes", lambda data, *more: counts.update([data]) or open_bytes(data, *more))
    return counts


def photo(seed, side=24, kind="png"):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def photos(count=12) -> Images:
    rows = [photo(seed) for seed in range(count)]
    return Images(datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image(decode=False)))


def test_encoders_that_share_a_pass_have_the_features_that_each_has_alone(opened):
    encoders = [FrozenEncoder(make_model("mae", seed=seed).base_model, [0.5] * 3, [0.3] * 3) for seed in (0, 1)]
    encoders.append(RawPixels.of(encoders[0]))
    images, spec = photos(), ["last/mean/norm"]
    alone = [FeatureExtractor(encoder, 5, progress=False)(images, spec)[0] for encoder in encoders]
    opened.clear()
    shared = SharedExtractor.of(encoders, batch_size=5, progress=False)
    together = [extract(images, spec)[0] for extract in shared]
    assert set(opened.values()) == {1} and len(opened) == len(images)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize(("kind", "side", "most"), [("png", 96, 1), ("jpeg", 40, 1), ("jpeg", 200, 5)])
def test_kept_crops_are_those_that_are_decoded_anew(opened, kind, side, most):
    """A large JPEG is decoded for each of its crops, because each has a scale of its own."""
    value, kept = photo(0, side, kind), KeptCrops(whole=1)
    views = [(CenterCrop(), 7), *((RandomCrop((0.2, 1.0)), row) for row in range(4))]
    new = [load_crop(value, crop, (16, 16), 3, crop_rng(0, 0, row)) for crop, row in views]
    opened.clear()
    for _ in range(2):
        found = [kept.load(value, crop, (16, 16), 3, row, None) for crop, row in views]
        assert all(torch.equal(one, other) for one, other in zip(new, found, strict=True))
    assert list(opened.values()) == [most]


def test_no_more_is_kept_than_there_is_room_for(opened):
    kept = KeptCrops(whole=9, room=2 * 3 * 16 * 16)
    for _ in range(2):
        for seed in range(3):
            kept.load(photo(seed), CenterCrop(), (16, 16), 3, seed, None)
    assert list(opened.values()) == [1, 1, 2] and kept.room == 0
    kept = KeptCrops(whole=9)
    kept.keep_no_more()
    assert kept.load(photo(0), CenterCrop(), (16, 16), 3, 0, None).shape == (3, 16, 16) and not kept.crops
