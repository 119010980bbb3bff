"""The small weights that are kept beside their cards: they load, and give the numbers that were measured."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoImageProcessor, AutoModel

import hf_mim
from hf_mim.evaluation.result import Result

CARDS = Path(__file__).parents[1] / "model_cards"
KEPT = sorted(path.parent for path in CARDS.glob("*/model.safetensors"))
DATA = os.environ.get("HF_MIM_TEST_DATA")


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_kept_weights_are_small_whole_and_in_half_precision(folder):
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    with safe_open(folder / "model.safetensors", "pt") as file:
        kinds = {key: file.get_tensor(key).dtype for key in file.keys()}
    assert {kind for key, kind in kinds.items() if "position_embeddings" not in key} == {torch.float16}
    (kind,) = AutoConfig.from_pretrained(folder).architectures  # with two encoders only one of them is kept
    _, info = getattr(hf_mim, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert f"{folder.name}" in (CARDS / "README.md").read_text()


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_kept_weights_encode_an_image(folder):
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    sides = model.config.image_height_width
    images = torch.randint(0, 256, (2, model.config.num_channels, *sides), dtype=torch.uint8)
    features = model.float().eval()(**processor(list(images), return_tensors="pt")).pooler_output
    assert features.shape == (2, model.config.hidden_size) and features.isfinite().all()
    assert (features[0] - features[1]).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="needs real images: HF_MIM_TEST_DATA=FOLDER with cifar10")
@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_kept_weights_give_the_measured_numbers_again(folder, tmp_path):
    recorded = Result.load(folder / "results" / "knn_of_kept_weights.json")
    options = dict(dataset=f"{DATA}/cifar10", train_images=10_000, test_images=2_000, beside=False)
    again = hf_mim.evaluate("knn", folder, **options, output=str(tmp_path / "knn.json"), cache="none")
    assert again.value == pytest.approx(recorded.value, abs=0.002)
