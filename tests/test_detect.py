"""Our backbones inside transformers' UperNet and Conditional DETR, and `training/detect.py`."""

import importlib
import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import METHODS, make_model
from tiny_comparison import TRAINING
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from hf_mim import MAEBackbone
from hf_mim.data.processor import image_processor
from hf_mim.data.scenes import SHAPES, scenes


@pytest.fixture(scope="module")
def detect():
    sys.path.insert(0, str(TRAINING))
    yield importlib.import_module("detect")
    sys.path.remove(str(TRAINING))
    sys.modules.pop("detect")


def saved(method, folder, **changes):
    model = make_model(method, image_size=48, patch_size=8, num_hidden_layers=4, **changes)
    model.save_pretrained(folder)
    image_processor((48, 48), [0.5] * 3, [0.5] * 3).save_pretrained(folder)
    return model


def arguments(detect):
    return detect.Arguments(num_queries=10, width=32, depth=1)


def test_boxes_of_scenes_hold_their_objects_tightly():
    """Against the pixels of each object, drawn alone."""
    from hf_mim.data.scenes import SceneObject

    for shape in SHAPES:
        item = SceneObject(shape, (0.4, 0.55), 0.2, 0.3, (1, 0, 0))
        (rows, columns), distance = item.signed_distance(500)
        inside = torch.tensor(distance < 0).nonzero().float()
        top, left = (inside.min(dim=0).values + torch.tensor([rows.start, columns.start])) / 500
        bottom, right = (inside.max(dim=0).values + 1 + torch.tensor([rows.start, columns.start])) / 500
        x, y, width, height = item.box
        assert [x, y, x + width, y + height] == pytest.approx(
            torch.stack([left, top, right, bottom]).tolist(), abs=0.008
        ), shape
    row = scenes(1, 32)[0]
    assert len(row["boxes"]) == len(row["shapes"]) == row["num_objects"]


def test_the_map_of_the_true_boxes_is_one_and_of_others_is_less(detect):
    true = [
        {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2]])},
        {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])},
    ]

    def found(shift=0.0, classes=0):
        return [
            {
                "scores": torch.full((len(one["boxes"]),), 0.9),
                "labels": (one["class_labels"] + classes) % 3,
                "boxes": detect.center_to_corners_format(one["boxes"]) + shift,
            }
            for one in true
        ]

    def score(**changes):
        return detect.mean_average_precision(found(**changes), true, 3, 100)

    assert score() == {"mAP": pytest.approx(1), "AP50": pytest.approx(1)}
    assert score(classes=1)["mAP"] == 0
    # Moved by a tenth of the image: overlaps of 1/7, 1/5 and 9/23 of the union.
    assert score(shift=0.1)["AP50"] == 0 and 0 < score(shift=0.02)["mAP"] < 1


def test_boxes_are_shares_of_the_upright_image_and_of_an_array(detect):
    turned, file = Image.new("RGB", (30, 20)), io.BytesIO()
    exif = turned.getexif()
    exif[0x112] = 6  # it stands on its side
    turned.save(file, "jpeg", exif=exif)
    for image in ({"bytes": file.getvalue(), "path": None}, np.zeros((30, 20, 3), np.uint8)):
        rows = [{"image": image, "objects": {"bbox": [[0, 0, 10, 30]], "category": [1]}}]
        sample = detect.Detections(rows, 16, [0.5] * 3, [0.5] * 3)[0]
        torch.testing.assert_close(sample["labels"]["boxes"], torch.tensor([[0.25, 0.5, 0.5, 1.0]]))


@pytest.mark.parametrize("method", METHODS)
def test_the_detector_has_the_backbone_of_the_checkpoint_and_trains_all_of_it(detect, tmp_path, method):
    model = saved(method, tmp_path)
    torch.manual_seed(0)
    detector = detect.make_detector(str(tmp_path), list(SHAPES), arguments(detect))
    encoder, prefix = model.base_model.state_dict(), f"{model.base_model_prefix}."
    held = {key.removeprefix(prefix): value for key, value in detector.model.backbone.model.state_dict().items()}
    assert held.keys() == encoder.keys() and all(torch.equal(held[name], encoder[name]) for name in encoder)
    batch = detect.collate(
        [detect.Detections(detect.drawn(2, 64, "train"), 64, [0.5] * 3, [0.5] * 3)[i] for i in (0, 1)]
    )
    detector(**batch).loss.backward()  # 64 pixels: another grid than the checkpoint's
    trained = {name for name, p in detector.model.backbone.model.named_parameters() if p.grad is not None}
    assert len(trained) == len(list(detector.model.backbone.model.parameters()))


def test_a_few_steps_lower_the_loss_of_the_detector(detect, tmp_path):
    saved("mae", tmp_path)
    torch.manual_seed(0)
    detector = detect.make_detector(str(tmp_path), list(SHAPES), arguments(detect)).train()
    images = detect.Detections(detect.drawn(4, 48, "train"), 48, [0.5] * 3, [0.5] * 3)
    batch, optimizer = detect.collate([images[i] for i in range(4)]), torch.optim.AdamW(detector.parameters(), 1e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = detector(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


def test_a_few_steps_lower_the_loss_of_upernet(tmp_path):
    """Each pixel's class is the shape there, or the ground."""
    saved("mae", tmp_path)
    backbone = MAEBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = UperNetConfig(
        backbone_config=backbone.config, hidden_size=32, pool_scales=[1, 2], auxiliary_channels=16, num_labels=2
    )
    torch.manual_seed(0)
    model = UperNetForSemanticSegmentation(config)
    model.backbone.load_state_dict(backbone.state_dict())
    pixels = torch.randn(4, 3, 48, 48)
    labels = torch.zeros(4, 48, 48, dtype=torch.int64)
    labels[:, 8:32, 16:40] = 1
    pixels[:, :, 8:32, 16:40] += 1
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(15):
        optimizer.zero_grad()
        output = model(pixels, labels=labels)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert output.logits.shape == (4, 2, 48, 48)
    assert losses[-1] < 0.8 * losses[0] and all(math.isfinite(loss) for loss in losses)


@pytest.mark.slow
def test_the_script_trains_measures_and_saves(detect, tmp_path, monkeypatch, capsys):
    saved("mae", tmp_path / "mae")
    options = ["--scenes", "20", "--max_steps", "4", "--per_device_train_batch_size", "4", "--report_to", "none"]
    options += ["--use_cpu", "true", "--num_queries", "10", "--width", "32", "--depth", "1"]
    options += ["--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["detect.py", str(tmp_path / "mae"), *options])
    detect.main()
    result = json.loads((tmp_path / "out/detection.json").read_text())
    assert 0 <= result["mAP"] <= result["AP50"] <= 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
