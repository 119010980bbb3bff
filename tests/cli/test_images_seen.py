"""How many images a run has seen: counted one by one in the batches, against what its record says."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import run

import hf_mim
from hf_mim.evaluation.result import git_state
from hf_mim.pretraining.trainer import MIMTrainer

TINY = "--image_size 16 --patch_size 8 --hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --use_cpu true "
TINY += "--decoder_hidden_size 16 --decoder_num_hidden_layers 1 --dataloader_num_workers 0 --knn false "
TINY += "--image_mean .5,.5,.5 --image_std .2,.2,.2 --logging_steps 4 --per_device_train_batch_size 8 "


@pytest.fixture
def counted(monkeypatch):
    """The images that go through the model in training."""
    seen, compute = [], MIMTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append(len(inputs["pixel_values"]))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MIMTrainer, "compute_loss", compute_loss)
    return seen


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(29):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("options", [(), ("--dataloader_drop_last", "false")], ids=["whole batches", "the rest too"])
def test_the_smaller_last_step_of_an_epoch_counts_as_what_it_is(counted, photos, tmp_path, options):
    options = *TINY.split(), "--gradient_accumulation_steps", 2, *options
    run(*options, "--dataset", photos, "--max_steps", 7, "--output_dir", tmp_path / "run")
    scores = json.loads((tmp_path / "run" / "results" / "training.json").read_text())["scores"]
    assert scores["images_seen"] == sum(counted) < 7 * 16


def test_a_resumed_run_counts_all_its_images_and_its_rate_is_one_of_images_that_were_timed(counted, photos, tmp_path):
    """The checkpoint of step 3 has no log after step 1, so what the first part did in steps 2 and 3 was not timed."""
    options = *TINY.split(), "--gradient_accumulation_steps", 2, "--dataset", photos, "--output_dir", tmp_path / "run"
    run(*options, "--max_steps", 6, "--save_steps", 3)
    whole = sum(counted)
    for path in (tmp_path / "run").glob("checkpoint-6"):
        path.rename(tmp_path / "elsewhere")
    counted.clear()
    run("--output_dir", tmp_path / "run", "--resume")
    text = (tmp_path / "run" / "results" / "training.json").read_text()
    assert json.loads(text)["git"] == git_state() and str(Path(hf_mim.__file__).parents[1]) not in text
    scores = json.loads(text)["scores"]
    assert scores["images_seen"] == whole > sum(counted)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if "loss" in line]
    assert min(rates) <= scores["images_per_second"] <= max(rates) * 1.5
