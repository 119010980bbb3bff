"""The share of the time that a run waits for its images, and the line that says what would help."""

import json
import logging
import shlex
import time
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny import make_model
from tiny_runs import Images, arguments

from hf_mim.data.local import image_files
from hf_mim.pretraining.recipe import RunArguments
from hf_mim.pretraining.trainer import MIMTrainer
from hf_mim.pretraining.waiting import WaitingAdvice, advice

STATE = SimpleNamespace(is_world_process_zero=True)


class Slow(Images):
    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


def test_the_share_in_each_log_is_the_time_that_the_loader_took(tmp_path):
    """4 images of 20 ms for each step, loaded in the process itself: at least 80 ms of every step are waiting."""
    model = make_model("mae")
    MIMTrainer(model, arguments(tmp_path, max_steps=6, logging_steps=2), Slow(model)).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert len(rows) == 4  # after 1, 2, 4 and 6 steps
    for row, steps in zip(rows, (1, 1, 2, 2), strict=True):
        assert row["data_wait_share"] == pytest.approx(row["data_wait_seconds"] / row["seconds"])
        assert row["data_wait_seconds"] >= 0.08 * steps and row["data_wait_share"] <= 1


def said(caplog, rows, ended=True):
    callback = WaitingAdvice(lambda: "ADVICE")
    with caplog.at_level(logging.WARNING):
        for seconds, waiting in rows:
            callback.on_log(None, STATE, None, logs={"seconds": seconds, "data_wait_seconds": waiting})
        if ended:
            callback.on_train_end(None, STATE, None)
    return [record.getMessage() for record in caplog.records]


LINE = "30 % of the time is waiting for images; ADVICE"


@pytest.mark.parametrize(
    ("rows", "ended", "lines"),
    [
        ([(9, 9), (40, 12), (40, 12), (40, 12)], False, [LINE]),  # early, once; the first log is left out
        ([(9, 9), (10, 3)], True, [LINE]),  # at the end
        ([(9, 9), (10, 3)], False, []),  # too early to tell
        ([(9, 9), (3, 2)], True, []),  # too short to tell
        ([(9, 9), (100, 20)], True, []),  # a fifth is not much
    ],
)
def test_the_line_is_said_once_and_only_if_a_fifth_of_the_time_is_lost(caplog, rows, ended, lines):
    assert said(caplog, rows, ended) == lines


def pictures(folder, width, height):
    Image.new("RGB", (width, height)).save(folder / "a.png")
    return image_files([str(folder / "a.png")] * 3)


@pytest.mark.parametrize(
    ("side", "workers", "options", "words"),
    [
        (2000, 64, {}, "smaller files: hf-mim prepare 'my photos' 'my photos_512' --short_side 512, then --dataset"),
        (2000, 64, {"crop_pixels": 224}, "smaller files: hf-mim prepare 'my photos' 'my photos_448' --tile 448, then"),
        (300, 0, {}, "more workers: hf-mim pretrain --resume --output_dir {folder} --dataloader_num_workers "),
        (300, 64, {}, "all cores decode already, and the images are small: more cores or a faster disk help"),
    ],
)
def test_what_would_help_follows_from_workers_and_image_sizes(tmp_path, side, workers, options, words):
    args = arguments(tmp_path, dataloader_num_workers=workers)
    run = RunArguments(dataset="my photos", **options)
    line = advice(pictures(tmp_path, side, side + 100), run, args, (224, 224), 3)
    assert line.startswith(words.format(folder=tmp_path)) and "\n" not in line
    assert shlex.split(line)
