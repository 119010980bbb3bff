"""Pictures of a probe appear where `report_to` sends the curves."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers.integrations import TensorBoardCallback, TrackioCallback

from hf_mim.pretraining.pictures import RunPictures
from hf_mim.pretraining.recipe import RunArguments


def report(callback, folder):
    """Report a picture of noise, and return it with its file."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    picture.save(path := folder / "pca.png")
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=folder), callback_handler=SimpleNamespace(callbacks=[object(), callback])
    )
    RunPictures(trainer, None, RunArguments()).report("pca", path, 6)
    return picture, path


def test_tensorboard_gets_the_picture_with_its_step(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "board") as writer:
        picture, _ = report(TensorBoardCallback(writer), tmp_path)
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    (event,) = events.Images("pictures/pca")
    assert event.step == 6
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), np.asarray(picture))


def test_trackio_gets_the_picture_with_its_step(tmp_path, monkeypatch):
    """By a stand-in: `Image` takes a path, and `log` one dictionary, as in trackio 0.43."""
    logged = []
    fake = SimpleNamespace(Image=lambda path: ("image", path), log=logged.append)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    _, path = report(TrackioCallback.__new__(TrackioCallback), tmp_path)
    assert logged == [{"pictures/pca": ("image", path), "train/global_step": 6}]


def test_no_report_is_no_error(tmp_path):
    report(object(), tmp_path)
