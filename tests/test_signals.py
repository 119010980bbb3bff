"""A signal or a time-out ends a run that waits for images, at the last whole step."""

import os
import signal
import threading
import time

import pytest
import torch
from tiny import make_model
from tiny_runs import Images, arguments, snapshot

from hf_mim.pretraining import signals
from hf_mim.pretraining.checkpoints import newest_whole
from hf_mim.pretraining.signals import Ended, Listener, NoImagesError, ended_at_once
from hf_mim.pretraining.trainer import MIMTrainer, check_shared_memory

TWO_STEPS = dict(max_steps=6, logging_steps=1, train_sampling_strategy="sequential", save_strategy="no")


class Stalling(Images):
    """The source does not answer when it is asked for image `at`. One batch is read ahead of its step."""

    def __init__(self, model, at, then=None):
        super().__init__(model, 32)
        self.at, self.then = at, then

    def __getitem__(self, index):
        if index == self.at:
            if self.then:
                self.then()
            time.sleep(60)
        return super().__getitem__(index)


def ask(number):
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_run_that_waits_for_images_at_its_last_whole_step(tmp_path, monkeypatch, number):
    monkeypatch.setattr(signals, "GRACE", 0.2)
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    model = make_model("latent_mim")
    trainer = MIMTrainer(model, arguments(tmp_path, **TWO_STEPS), Stalling(model, 12, lambda: ask(number)))
    trainer.train()
    assert trainer.guard.signal == number and trainer.state.global_step == 2
    assert newest_whole(tmp_path).name == "checkpoint-2"

    through, resumed = make_model("latent_mim"), make_model("latent_mim")
    MIMTrainer(through, arguments(tmp_path / "through", **TWO_STEPS), Images(through, 32)).train()
    MIMTrainer(resumed, arguments(tmp_path, **TWO_STEPS), Images(resumed, 32)).train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(through), snapshot(resumed), strict=True))


def test_images_that_do_not_come_end_the_run_with_a_checkpoint(tmp_path):
    model = make_model("mae")
    trainer = MIMTrainer(model, arguments(tmp_path, data_timeout=0.5, **TWO_STEPS), Stalling(model, 12))
    with pytest.raises(NoImagesError, match="no images came for 0.5 s .*shared memory"):
        trainer.train()
    assert newest_whole(tmp_path).name == "checkpoint-2"


def test_the_first_images_may_take_longer_than_the_timeout():
    listener = Listener(timeout=0.1)
    with listener.listening(), listener.waiting():
        time.sleep(1.5)


def test_a_wait_that_is_too_long_is_told(monkeypatch, caplog):
    monkeypatch.setattr(signals, "PATIENCE", 0.1)
    listener = Listener(timeout=60)
    with listener.listening(), listener.waiting():
        time.sleep(1.5)
    assert len(caplog.messages) == 1 and "No images have come" in caplog.text and "/dev/shm" in caplog.text


def test_a_signal_while_nothing_waits_is_only_noted():
    listener = Listener(timeout=60)
    with listener.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    assert listener.asked == signal.SIGTERM


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ended_at_once():
            os.kill(os.getpid(), signal.SIGHUP)
        listener = Listener(timeout=60)
        with listener.listening():
            os.kill(os.getpid(), signal.SIGHUP)
        assert listener.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_training_a_signal_ends_the_process_at_once():
    with pytest.raises(Ended) as error, ended_at_once():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert error.value.signal == signal.SIGTERM
    assert not isinstance(error.value, Exception)  # no library catches it as an error of its own
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_batches_that_do_not_fit_into_shared_memory_are_refused_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mim.pretraining.trainer.free_shared_memory", lambda: 8 * 2**20)
    args = arguments(tmp_path, per_device_train_batch_size=4, dataloader_num_workers=2)
    check_shared_memory(args, 2**19)  # 2 workers × 2 batches × 4 images × half a MiB
    with pytest.raises(ValueError, match="dataloader_num_workers must be smaller than 2, or 0: 4 batches .* 10 MiB"):
        check_shared_memory(args, 2**19 * 5 // 4)
    check_shared_memory(arguments(tmp_path, dataloader_num_workers=0), 2**40)
