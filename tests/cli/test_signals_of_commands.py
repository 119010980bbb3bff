"""SIGTERM at any moment of a command: within seconds, one line, a status that tells, and no half file."""

import os
import signal
import threading
import time

import pytest
from small_runs import SMALL, evaluate, photos
from torch.utils.data import get_worker_info

from hf_mim import cli
from hf_mim.cli import main
from hf_mim.data import dataset, prepare
from hf_mim.evaluation import features, finetune, linear
from hf_mim.pretraining.run import Pretraining
from hf_mim.pretraining.trainer import MIMTrainer
from hf_mim.run_folder import RECIPE

MOMENTS = {
    "knn": (features.FeatureStore, "commit"),
    "linear": (linear, "train_heads"),
    "finetune": (finetune.FinetuningTrainer, "training_step"),
    "saving": (finetune, "save_classifier"),
}


def interrupted(monkeypatch, owner, name):
    """SIGTERM comes when this function is called."""

    def shot(*arguments, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

    monkeypatch.setattr(owner, name, shot)


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_evaluation_that_is_ended_leaves_nothing_half_and_can_be_started_again(
    run, tmp_path, monkeypatch, capsys, moment
):
    photos(tmp_path / "photos")
    protocol = "finetune" if moment == "saving" else moment
    words = ["--dataset", "photos"]
    if protocol == "finetune":
        words += ["--epochs", 1, "--batch_size", 4, "--output_dir", tmp_path / "classifier", "--num_workers", 1]
    before = sorted(path.name for path in tmp_path.iterdir())
    with monkeypatch.context() as patched:
        interrupted(patched, *MOMENTS[moment])
        begun = time.monotonic()
        assert evaluate(protocol, run, *words) == 75
        assert time.monotonic() - begun < 10
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "SIGTERM has ended the command; the same command starts it again"
    assert not (run / "results").exists()
    assert set(before) | {"cache"} >= {path.name for path in tmp_path.iterdir()}
    assert evaluate(protocol, run, *words) == 0 and len(list((run / "results").glob("*.json"))) == 1


WORKERS = {
    "knn": (features, "load_crop"),
    "finetune": (dataset, "load_crop"),
    "prepare": (prepare, "open_image"),
}


@pytest.mark.parametrize("command", WORKERS)
def test_data_workers_leave_signals_to_the_main_process(run, tmp_path, monkeypatch, command):
    """A scheduler signals them too. If they died of it, the main process would take that for an error."""
    photos(tmp_path / "photos")
    owner, name = WORKERS[command]
    usual = getattr(owner, name)

    def shot(*arguments, **more):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(*arguments, **more)

    monkeypatch.setattr(owner, name, shot)
    if command == "prepare":
        assert main(["prepare", "photos", "prepared", "--tile", "8", "--num_workers", "1"]) == 0
    else:
        words = ["--epochs", 1, "--batch_size", 4] if command == "finetune" else []
        assert evaluate(command, run, "--dataset", "photos", "--num_workers", 1, *words) == 0


@pytest.mark.parametrize("when", ["train", pytest.param("finish", marks=pytest.mark.slow), "push_to_hub"])
def test_a_run_that_is_ended_outside_of_its_steps_says_how_to_resume_it(tmp_path, monkeypatch, capsys, when):
    folder = tmp_path / "run"
    words = [*SMALL, "--max_steps", "1", "--knn", "false", "--output_dir", str(folder)]
    monkeypatch.setattr(MIMTrainer, "init_hf_repo", lambda trainer, *words: None)
    if when == "push_to_hub":
        words += ["--push_to_hub", "true", "--hub_strategy", "end"]
        monkeypatch.setattr(Pretraining, "finish", lambda run: None)
    interrupted(monkeypatch, Pretraining if when == "finish" else MIMTrainer, when)
    assert main(["pretrain", *words]) == 75
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"SIGTERM has ended the run; resume with: hf-mim pretrain --resume --output_dir {folder}"
    assert (folder / RECIPE).exists() and not list(folder.glob("_lock*"))


def test_a_command_that_was_ended_does_not_wait_for_an_upload_in_a_thread(monkeypatch):
    statuses, over = [], threading.Event()
    monkeypatch.setattr(os, "_exit", statuses.append)

    def command(argv):
        threading.Thread(target=over.wait).start()
        return int(argv[0])

    monkeypatch.setattr(cli, "status_of", command)
    try:
        assert [main([status]) for status in ("0", "2", "75", "130")] == [0, 2, 75, 130]
    finally:
        over.set()
    assert statuses == [75, 130]
