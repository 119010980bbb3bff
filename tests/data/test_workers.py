"""A scheduler signals data workers too. They go on for as long as the main process needs them."""

import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from transformers import Trainer, TrainingArguments

from hf_mim.data.workers import leave_signals_to_the_main_process, leaving_signals
from hf_mim.trainer_utils import ProcessTrainer


class Signalled(Dataset):
    """Its worker gets all signals while it reads."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        assert get_worker_info() is not None
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
        time.sleep(0.02)
        return {"index": torch.tensor(index)}


class Tried(ProcessTrainer, Trainer):
    pass


def trainer_loader(name, folder):
    model = torch.nn.Linear(1, 1)
    args = TrainingArguments(str(folder), dataloader_num_workers=1, remove_unused_columns=False, use_cpu=True)
    trainer = Tried(model, args, train_dataset=Signalled(), eval_dataset=Signalled())
    arguments = [Signalled()] if name == "get_test_dataloader" else []
    return getattr(trainer, name)(*arguments)


LOADERS = {
    "own": lambda folder: DataLoader(Signalled(), 8, num_workers=1, worker_init_fn=leave_signals_to_the_main_process),
    "train": lambda folder: trainer_loader("get_train_dataloader", folder),
    "eval": lambda folder: trainer_loader("get_eval_dataloader", folder),
    "test": lambda folder: trainer_loader("get_test_dataloader", folder),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_worker_that_is_signalled_gives_its_images(name, tmp_path):
    (batch,) = LOADERS[name](tmp_path)
    assert sorted(batch["index"].tolist()) == [0, 1, 2, 3]


def test_what_a_loader_asks_of_its_workers_is_done_once(capfd):
    loader = DataLoader(Signalled(), 8, num_workers=1, worker_init_fn=lambda worker: print(f"worker {worker} starts"))
    assert leaving_signals(leaving_signals(loader)) is loader
    list(loader)
    assert capfd.readouterr().out.count("worker 0 starts") == 1


def test_the_main_process_ends_its_workers_by_a_signal():
    class Endless(Signalled):
        def __getitem__(self, index):
            time.sleep(60)

    loader = iter(DataLoader(Endless(), 8, num_workers=1, worker_init_fn=leave_signals_to_the_main_process))
    (worker,) = loader._workers
    time.sleep(0.5)  # until it has begun
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0
