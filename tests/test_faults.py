"""What happens to runs, with the real thing: full disks, killed workers, schedulers' signals, a clock set back."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image
from tiny import make_model
from tiny_runs import AtEachStep, Images, arguments, image_column

from hf_mim.cli import main
from hf_mim.data import DeviceAugment, ImageDataset, ImageFormatError, WholeImage, load_images
from hf_mim.pretraining.callbacks import MetricsFile
from hf_mim.pretraining.checkpoints import checkpoints, is_whole, newest_whole
from hf_mim.pretraining.trainer import MIMTrainer

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "PYTHONUNBUFFERED": "1"}
TINY = "--size tiny --hidden_size 16 --num_hidden_layers 1 --num_attention_heads 1 --decoder_hidden_size 16 "
TINY += "--decoder_num_hidden_layers 1 --decoder_num_attention_heads 1 --image_size 32 --patch_size 8 --num_channels 1 "
TINY += "--per_device_train_batch_size 16 --knn false --use_cpu true --logging_steps 1"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """The file that takes all the room that is left."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            return path


def resume(run) -> str:
    """The end of what a run says that has ended early."""
    return f"resume with: hf-mim pretrain --resume --output_dir {run}"


def pretrain(*options):
    command = [sys.executable, "-m", "hf_mim.cli", "pretrain", *TINY.split(), *map(str, options)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=ENVIRONMENT, **pipes)


def go_on(run):
    """To the end, in this process."""
    assert main(["pretrain", *TINY.split(), "--output_dir", str(run), "--resume"]) == 0


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end, "nothing has happened"
        time.sleep(0.02)


def told(process) -> list[str]:
    """The lines on stderr, without progress bars and what other libraries say."""
    return [line for line in re.split(r"[\r\n]+", process.communicate(timeout=100)[1]) if line.strip()]


# ---- the disk


def test_a_full_disk_costs_a_warning_and_never_a_checkpoint(small_disk, caplog):
    filler = []

    def fill_and_free(state, optimizer):
        if state.global_step == 2:
            filler.append(fill(small_disk))
        if state.global_step == 4:
            filler[0].unlink()

    model = make_model("stop_jepa")
    args = arguments(small_disk, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1, logging_steps=1)
    trainer = MIMTrainer(model, args, Images(model), callbacks=[AtEachStep(fill_and_free)])
    seen = []
    trainer.add_callback(AtEachStep(lambda state, optimizer: seen.append([p.name for p in checkpoints(small_disk)])))
    trainer.train()
    assert seen[4] == ["checkpoint-2"] and [path.name for path in checkpoints(small_disk)] == ["checkpoint-6"]
    assert is_whole(small_disk / "checkpoint-6") and not (small_disk / "_saving").exists()
    (warning,) = [line for line in caplog.messages if line.startswith("checkpoint-4 could not be saved")]
    assert warning.endswith("the run goes on, and checkpoint-2 is the newest to resume from") and "\n" not in warning


def test_a_log_that_finds_no_room_costs_a_warning(small_disk, caplog):
    fill(small_disk)
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    MetricsFile().on_log(SimpleNamespace(output_dir=str(small_disk)), state, None, logs={"loss": 1.0})
    assert [line.endswith("No space left on device") for line in caplog.messages] == [True]


@pytest.mark.slow
def test_weights_that_find_no_room_at_the_end_leave_the_old_ones_and_say_so_in_one_line(small_disk):
    run = small_disk / "run"
    process = pretrain("--output_dir", run, "--max_steps", 40, "--save_steps", 40)
    wait_for((run / "metrics.jsonl").exists, process)
    filler = fill(small_disk)
    lines = told(process)
    assert process.returncode == 2
    assert lines[-1].startswith("error: ") and lines[-1].endswith(resume(run)), lines[-3:]
    assert not (run / "model.safetensors").exists() and "Traceback" not in "".join(lines)
    filler.unlink()
    go_on(run)
    assert (run / "model.safetensors").exists() and is_whole(run / "checkpoint-40")


# ---- signals


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "stream"])
def test_a_schedulers_signal_to_all_processes_ends_the_run_by_75_and_it_goes_on(tmp_path, streaming):
    run, options = tmp_path / "run", ["--max_steps", 30, "--save_steps", 1000, "--dataloader_num_workers", 2]
    if streaming:
        image_column(64).to_parquet(tmp_path / "images.parquet")
        options += ["--dataset", tmp_path / "images.parquet", "--streaming", "true"]
    process = pretrain("--output_dir", run, *options)
    wait_for((run / "metrics.jsonl").exists, process)
    for each in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
        each.send_signal(signal.SIGTERM)
    lines = told(process)
    assert process.returncode == 75, lines[-5:]
    assert lines[-1] == f"SIGTERM has ended the run; {resume(run)}"
    step = int(newest_whole(run).name.rpartition("-")[2])
    assert 0 < step < 30
    go_on(run)
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 31))  # each step once


# ---- data


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_by_75_and_a_line(tmp_path):
    run = tmp_path / "run"
    options = ["--output_dir", run, "--max_steps", 2000, "--save_steps", 5, "--dataloader_num_workers", 2]
    process = pretrain(*options)
    wait_for(lambda: newest_whole(run) is not None, process)
    workers = psutil.Process(process.pid).children()
    workers[0].kill()
    lines = told(process)
    assert process.returncode == 75, lines[-5:]
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert line.startswith("error: DataLoader worker") and "lower dataloader_num_workers" in line
    assert newest_whole(run) is not None


def test_files_that_cannot_be_read_are_left_out_by_the_workers(tmp_path, caplog):
    for index in range(200):
        Image.fromarray(np.full((24, 24), index, np.uint8)).save(tmp_path / f"{index:03}.png")
    for name in ("a.npy", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    images = ImageDataset(load_images(str(tmp_path)), size=24)
    args = arguments(tmp_path / "run", max_steps=51, dataloader_num_workers=2, logging_steps=51)
    trainer = MIMTrainer(make_model("mae"), args, images, augment=DeviceAugment())
    trainer.train()
    assert sorted(Path(name).name for name in images.broken()) == ["a.npy", "b.png"]
    assert trainer.state.log_history[-2]["broken_images"] == 2 and trainer.guard.skipped == 0


@pytest.mark.slow
def test_a_nan_that_only_a_worker_finds_ends_the_run_with_its_name_and_the_option(tmp_path):
    """It is no damage: a mask of clouds, for example. Only the user knows."""
    for index in range(16):
        values = np.full((24, 24, 3), index / 16, np.float32)
        values[3, 4] = np.nan if index == 9 else 0.5
        np.save(tmp_path / f"{index}.npy", values)
    images = ImageDataset(load_images(str(tmp_path)), size=24, crop=WholeImage())
    args = arguments(tmp_path / "run", max_steps=8, dataloader_num_workers=2)
    trainer = MIMTrainer(make_model("mae"), args, images, augment=DeviceAugment())
    with pytest.raises(ImageFormatError, match=r"9.npy: has values that are not finite; pretrain with --nodata nan"):
        trainer.train()
    assert images.num_broken() == 0


# ---- the clock


@pytest.mark.slow
def test_a_clock_set_back_changes_nothing_but_the_times_in_the_log(tmp_path, monkeypatch):
    now = time.time
    clock = {"shift": 0.0}
    monkeypatch.setattr(time, "time", lambda: now() + clock["shift"])

    def set_back(state, optimizer):
        clock["shift"] -= 86400.0
        for path in checkpoints(tmp_path):
            os.utime(path, (now() + clock["shift"],) * 2)

    model = make_model("mae")
    args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=1, save_total_limit=2, logging_steps=1)
    trainer = MIMTrainer(model, args, Images(model), callbacks=[AtEachStep(set_back)])
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-5"]
    assert all(entry["images_per_second"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    times = [json.loads(line)["time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert times[1] < times[0]
    assert trainer.checkpoint_to_resume(True).endswith("checkpoint-6")
